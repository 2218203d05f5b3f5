#!/usr/bin/env bash
# Print a base image as a tar archive: Debian's minimal system by debootstrap, for machines that reach no registry.
# usage: base.sh SUITE >FILE; as root
set -euo pipefail

suite=$1
directory=$(mktemp -d)
trap 'rm -rf --one-file-system "$directory"' EXIT

# debootstrap mounts /proc in the new system. In a mount namespace of its own nothing is left behind, however this ends.
unshare --mount --pid --fork --kill-child \
    debootstrap --variant=minbase "$suite" "$directory/base" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >&2
# debootstrap writes only the suite itself; fixes of security come from elsewhere.
cat >"$directory/base/etc/apt/sources.list" <<EOF
deb ${DEBIAN_MIRROR:-http://deb.debian.org/debian} $suite main
deb ${DEBIAN_MIRROR:-http://deb.debian.org/debian} $suite-updates main
deb http://deb.debian.org/debian-security $suite-security main
EOF
rm -rf "$directory"/base/var/cache/apt/archives/*.deb "$directory"/base/var/lib/apt/lists/*
tar -C "$directory/base" --numeric-owner --one-file-system -cf - .
