#!/usr/bin/env bash
# Write image/requirements.txt and image/build-requirements.txt: what the image installs from PyPI, each file by its hash.
# To be run after a change of pyproject.toml's dependencies or of constraints.txt; needs a Python 3.11, as the image has.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "$("$python" --version): the image's Python is 3.11; say PYTHON=python3.11 image/lock.sh" >&2
    exit 1
}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"$python" -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check pip-tools

# lock INPUT OUTPUT OPTIONS...
lock() {
    # Links of this machine's own are nobody else's.
    env -u PIP_FIND_LINKS "$tools/bin/pip-compile" --quiet --generate-hashes --strip-extras --allow-unsafe --no-header --no-annotate \
        --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file "$2.new" "${@:3}" "$1"
    { echo "# Written by image/lock.sh."; cat "$2.new"; } >"$2"
    rm "$2.new"
}
lock pyproject.toml image/requirements.txt --constraint constraints.txt
lock image/build-requirements.in image/build-requirements.txt
