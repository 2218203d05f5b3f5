#!/bin/sh
# In the system stage: Postgres's programs of one major, Python, and the user `postgres` with uid and gid 999.
set -eu
major=$1
source=$2
# https://www.postgresql.org/about/news/pgdg-apt-repository-for-debianubuntu-1432/
pgdg_fingerprint=B97B0AFCAA1A47F044F244A07FCC7D46ACCC4CF8
pgdg_key=/usr/share/keyrings/apt.postgresql.org.asc

fail() {
    echo "install-postgres: $*" >&2
    exit 1
}

case $major in
14 | 15 | 16 | 17 | 18) ;;
*) fail "PG_MAJOR is 14 to 18, not '$major'" ;;
esac

add_pgdg() {
    # The key comes with Debian's own package, so apt's signatures vouch for it; that it is the one meant is checked here.
    apt-install postgresql-common gpg
    found=$(gpg --homedir /tmp --show-keys --with-colons /usr/share/postgresql-common/pgdg/apt.postgresql.org.asc |
        awk -F: '$1 == "fpr" { print $10 }')
    [ "$found" = "$pgdg_fingerprint" ] || fail "the key of apt.postgresql.org is $found, not $pgdg_fingerprint"
    cp /usr/share/postgresql-common/pgdg/apt.postgresql.org.asc "$pgdg_key"
    . /etc/os-release
    # Signed, so that http is as good as https, and needs no certificates here.
    echo "deb [signed-by=$pgdg_key] http://apt.postgresql.org/pub/repos/apt $VERSION_CODENAME-pgdg main" \
        >/etc/apt/sources.list.d/pgdg.list
    apt-get purge -y -q --auto-remove gpg
}

# Before the packages make their own: volumes keep numbers, so the number must be the same in every image.
groupadd --system --gid 999 postgres
useradd --system --uid 999 --gid postgres --home-dir /var/lib/postgresql --no-create-home \
    --shell /usr/sbin/nologin postgres
# The package would make a cluster of its own; ours is on the volume.
mkdir -p /etc/postgresql-common
echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf

case $source in
pgdg) add_pgdg ;;
debian)
    apt-get update -q
    apt-cache show "postgresql-$major" >/dev/null 2>&1 ||
        fail "this base's archive has no postgresql-$major: take its own major, or POSTGRES_SOURCE=pgdg"
    ;;
*) fail "POSTGRES_SOURCE is pgdg or debian, not '$source'" ;;
esac
apt-install python3 ca-certificates "postgresql-$major"
"/usr/lib/postgresql/$major/bin/postgres" --version
install -d -o postgres -g postgres -m 0700 /var/lib/postgresql
