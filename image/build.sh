#!/usr/bin/env bash
# Build the image: `make image`, with these variables where the defaults do not fit.
#   PG_MAJOR          14 to 18; default 17, or Debian's 15 where apt.postgresql.org cannot be reached
#   IMAGE             name of the result; default localhost/instance-manager:VERSION-pgMAJOR
#   BASE              base image; default Debian's, or one made by debootstrap where no registry can be reached
#   POSTGRES_SOURCE   pgdg or debian; default by what can be reached
#   WITH_JIT          yes or no
#   CONTAINER_ENGINE  podman or docker
set -euo pipefail

cd "$(dirname "$0")/.."
# shellcheck source=image/engine.sh
. image/engine.sh

readonly suite=bookworm
readonly registry_base=docker.io/library/debian:$suite-slim
readonly own_base=localhost/instance-manager-base:$suite
readonly pgdg=http://apt.postgresql.org/pub/repos/apt/dists/$suite-pgdg/InRelease
# Any file of CA certificates that this machine trusts: the build has to reach PyPI as this machine does.
certificates=/dev/null
for candidate in "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
    if [ -s "$candidate" ]; then
        certificates=$candidate
        break
    fi
done

# Sets base.
choose_base() {
    base=${BASE:-}
    if [ -n "$base" ]; then
        "${engine[@]}" image inspect "$base" >/dev/null 2>&1 || "${engine[@]}" pull "$base" >&2 || fail "there is no base $base"
        return
    fi
    for base in "$registry_base" "$own_base"; do
        ! "${engine[@]}" image inspect "$base" >/dev/null 2>&1 || return 0
    done
    base=$registry_base
    ! works "${engine[@]}" pull "$base" || return 0
    base=$own_base
    say "$registry_base cannot be pulled; making a base by debootstrap (a few minutes)"
    PATH=$PATH:/usr/sbin:/sbin
    command -v debootstrap >/dev/null || install_packages debootstrap
    [ "$(id -u)" = 0 ] || fail "debootstrap needs root: sudo make image, or say BASE=..."
    local archive
    archive=$(mktemp)
    nice -n 5 bash image/base.sh "$suite" >"$archive" || { rm "$archive"; fail "debootstrap failed; or say BASE=..."; }
    "${engine[@]}" import "$archive" "$base" >/dev/null
    rm "$archive"
}

is_reachable() {
    timeout 20 python3 -I -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=15)' "$1" 2>/dev/null
}

# Sets major and source.
choose_postgres() {
    source=${POSTGRES_SOURCE:-pgdg}
    if [ -z "${POSTGRES_SOURCE:-}" ] && ! is_reachable "$pgdg"; then
        source=debian
        [ -n "${PG_MAJOR:-}" ] || say "apt.postgresql.org cannot be reached: taking Debian's own Postgres 15"
        [ "${PG_MAJOR:-15}" = 15 ] ||
            fail "PG_MAJOR=$PG_MAJOR comes from apt.postgresql.org, which cannot be reached; Debian's own is 15"
    fi
    major=${PG_MAJOR:-$([ "$source" = debian ] && echo 15 || echo 17)}
}

if ! find_engine; then
    [ -z "${CONTAINER_ENGINE:-}" ] || fail "$CONTAINER_ENGINE does not answer; see: $CONTAINER_ENGINE info"
    install_packages podman buildah runc
    find_engine || fail "podman is there and does not answer; see: podman info"
fi
choose_postgres
choose_base
find_build_options "$base" || fail "${engine[*]} builds nothing here; see: ${engine[*]} build --network host ."

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' instance_manager/__init__.py)
image=${IMAGE:-localhost/instance-manager:$version-pg$major}
revision=unknown
created=0
if git rev-parse --git-dir >/dev/null 2>&1; then
    revision=$(git rev-parse HEAD)
    [ -z "$(git status --porcelain -- Dockerfile image instance_manager pyproject.toml)" ] || revision+=-changed
    created=$(git log -1 --format=%ct)
fi

# Every file has the commit's time, so that the same sources and packages give the same image.
export SOURCE_DATE_EPOCH=$created
if [ "${engine[0]}" = docker ]; then
    build_options+=(--build-arg "SOURCE_DATE_EPOCH=$created")
else
    # OCI's format has no HEALTHCHECK.
    build_options+=(--format docker --timestamp "$created")
fi
say "building $image with ${engine[*]}: Postgres $major of $source on $base"
# Labels by their values, and not by arguments in the Dockerfile: buildah's cache does not see that an argument has changed there.
nice -n 5 "${engine[@]}" build "${build_options[@]}" \
    --secret "id=certificates,src=$certificates" \
    --build-arg "BASE=$base" \
    --build-arg "PG_MAJOR=$major" \
    --build-arg "POSTGRES_SOURCE=$source" \
    --build-arg "WITH_JIT=${WITH_JIT:-no}" \
    --label "org.opencontainers.image.version=$version" \
    --label "org.opencontainers.image.revision=$revision" \
    --label "org.opencontainers.image.base.name=$base" \
    --label "dev.instance-manager.postgres.major=$major" \
    --label "dev.instance-manager.postgres.source=$source" \
    --tag "$image" .
say "built $image"
