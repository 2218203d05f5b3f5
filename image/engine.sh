#!/usr/bin/env bash
# Which program builds and runs containers on this machine, and with which options it works: found out by trying, since what
# a nested or an old system allows is written nowhere.
#
# Sourced by build.sh. Run as `engine.sh IMAGE`, it prints two lines for others: the command, and the options of its `run`.
#
# The engine's own network is never used, neither here nor by build.sh: it would make a bridge, firewall rules and
# forwarding on this machine.

say() { echo "image: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

works() { timeout 120 nice -n 5 "$@" >/dev/null 2>&1 </dev/null; }

# Install only what is missing, as tests/install-system.sh does.
install_packages() {
    local -a sudo=()
    command -v apt-get >/dev/null || fail "install $*: this machine has no apt-get to do it with"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "install $* as root: there is no sudo here"
        sudo=(sudo)
    fi
    say "installing $*"
    "${sudo[@]}" apt-get update -qq || say "apt-get update failed; trying with the lists that are there"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold "$@" >/dev/null ||
        fail "apt-get could not install $*: install it by hand and try again"
}

# Sets the array `engine`: $CONTAINER_ENGINE, else podman or docker, whichever answers. An engine that is installed and does
# not answer is no engine: a docker client without its daemon is common.
find_engine() {
    local candidate
    local -a candidates=(podman docker "podman --storage-driver vfs")
    [ -z "${CONTAINER_ENGINE:-}" ] || candidates=("$CONTAINER_ENGINE" "$CONTAINER_ENGINE --storage-driver vfs")
    for candidate in "${candidates[@]}"; do
        read -ra engine <<<"$candidate"
        ! works "${engine[@]}" info || return 0
    done
    return 1
}

# Sets the array `run_options`: what `run` needs before a container starts at all. False if nothing helps.
find_run_options() {
    local image=$1 candidate
    local -a candidates=("")
    # Nested systems forbid to raise limits, and some have an OCI runtime that does not know their cgroups.
    [ "${engine[0]}" = docker ] || candidates+=(
        "--ulimit host"
        "--ulimit nofile=4096:4096 --ulimit nproc=4096:4096"
        "--runtime runc"
        "--runtime runc --ulimit nofile=4096:4096 --ulimit nproc=4096:4096"
    )
    for candidate in "${candidates[@]}"; do
        read -ra run_options <<<"$candidate"
        ! works "${engine[@]}" run --rm --network none "${run_options[@]}" --entrypoint /bin/true "$image" || return 0
    done
    return 1
}

# Sets the array `build_options`. False if nothing helps.
find_build_options() {
    local base=$1 context candidate found=1
    local -a candidates=("--network host")
    [ "${engine[0]}" = docker ] || candidates+=("--network host --isolation chroot")
    context=$(mktemp -d)
    printf 'FROM %s\nRUN /bin/true\n' "$base" >"$context/Dockerfile"
    for candidate in "${candidates[@]}"; do
        read -ra build_options <<<"$candidate"
        if works "${engine[@]}" build --no-cache "${build_options[@]}" --tag localhost/instance-manager-trial "$context"; then
            works "${engine[@]}" rmi localhost/instance-manager-trial
            found=0
            break
        fi
    done
    rm -rf "$context"
    return "$found"
}

main() {
    [ $# = 1 ] || fail "usage: engine.sh IMAGE"
    find_engine || fail "neither podman nor docker answers on this machine"
    "${engine[@]}" image inspect "$1" >/dev/null 2>&1 || fail "there is no image $1: make image"
    find_run_options "$1" ||
        fail "${engine[*]} starts no container here; see: ${engine[*]} run --rm --network none --entrypoint /bin/true $1"
    printf '%s\n' "${engine[*]}" "${run_options[*]}"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    main "$@"
fi
