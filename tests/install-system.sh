#!/usr/bin/env bash
# What the project needs from the system: Postgres with its programs, and Python's venv; with `drill` as a second word also
# the tools of its faults, without which it leaves cases out; with `benchmark` what it is compared with; with `majors` what other
# majors of Postgres need; with `monitoring` also
# promtool, Prometheus and postgres_exporter, unpacked below .cache, because their packages would start servers; with `test`
# what else its tests run, with `browser` a chromium. Installs only what is missing.
set -euo pipefail

python=${1:-python3}

fail() {
    echo "$*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "$python is missing: install the package python3, or say make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" --version) is too old: Python 3.11 or later is needed; say make PYTHON=python3.11"

packages=()
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || packages+=(postgresql)
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
PATH=$PATH:/usr/sbin:/sbin
[ "${2:-}" != test ] || command -v haproxy >/dev/null || packages+=(haproxy)
[ "${2:-}" != browser ] || command -v chromium >/dev/null || packages+=(chromium fonts-dejavu-core)
optional=()
[ "${2:-}" != test ] || command -v strace >/dev/null || optional+=(strace)
if [ "${2:-}" = drill ]; then
    command -v ip >/dev/null || optional+=(iproute2)
    command -v mkfs.ext4 >/dev/null || optional+=(e2fsprogs)
    ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 || optional+=(faketime)
fi
if [ "${2:-}" = majors ]; then
    # Of the extension uuid-ossp in the programs that are fetched.
    ldconfig -p | grep -q 'libossp-uuid\.so\.16' || packages+=(libossp-uuid16)
fi
if [ "${2:-}" = benchmark ]; then
    command -v pgbackrest >/dev/null || packages+=(pgbackrest)
fi
monitoring=$PWD/.cache/monitoring
unpacked=()
if [ "${2:-}" = monitoring ]; then
    command -v promtool >/dev/null || [ -x "$monitoring/usr/bin/promtool" ] || unpacked+=(prometheus)
    command -v prometheus-postgres-exporter >/dev/null || [ -x "$monitoring/usr/bin/prometheus-postgres-exporter" ] \
        || unpacked+=(prometheus-postgres-exporter)
fi
[ $((${#packages[@]} + ${#optional[@]} + ${#unpacked[@]})) -eq 0 ] && exit 0

command -v apt-get >/dev/null || fail "install ${packages[*]} ${optional[*]}: this machine has no apt-get to do it with"
sudo=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "install ${packages[*]} ${optional[*]} as root: there is no sudo here"
    sudo=(sudo)
fi
echo "installing ${packages[*]} ${optional[*]} ${unpacked[*]}"
# The package would make a cluster of its own and start it; ours are elsewhere.
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq || echo "apt-get update failed; trying with the lists that are there" >&2
if [[ " ${packages[*]} " == *" postgresql "* && ! -e /etc/postgresql-common/createcluster.conf ]]; then
    "${sudo[@]}" mkdir -p /etc/postgresql-common
    echo "create_main_cluster = false" | "${sudo[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
fi
install() {
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o Dpkg::Options::=--force-confold "$@" >/dev/null
}
if [ ${#packages[@]} -gt 0 ]; then
    install "${packages[@]}" || fail "apt-get could not install ${packages[*]}: install it by hand and try again"
fi
for package in "${optional[@]}"; do
    install "$package" || echo "apt-get could not install $package: the drill leaves out the cases that need it" >&2
done
if [ ${#unpacked[@]} -gt 0 ]; then
    mkdir -p "$monitoring"
    (
        cd "$monitoring"
        apt-get download -qq "${unpacked[@]}" 2>/dev/null || fail "apt-get could not download ${unpacked[*]}"
        for archive in *.deb; do
            dpkg-deb -x "$archive" .
            rm "$archive"
        done
    )
fi
