"""MinIO for tests, an S3 server that others wrote: found, or built once into the user's cache.

    python tests/programs/minio_program.py

builds it if it is missing and shows progress; the first time that takes long. It is published as a Go module only, of
which `minio/go.mod` names the version: the last one before its authors closed the project. No code of it is linked here.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from go_programs import GoProgram, Say, Unavailable, build, cache_directory, locked

MODULE = Path(__file__).resolve().parent / "minio"
MINIO = GoProgram("minio", "github.com/minio/minio", MODULE)


def version() -> str:
    """As go.mod has it."""
    found = re.search(rf"{re.escape(MINIO.package)} (v\S+)", (MODULE / "go.mod").read_text())
    assert found is not None
    return found[1]


def find() -> Path:
    """What is here already, without network and without waiting. Unavailable."""
    path = cache_directory(f"minio-{version()}") / MINIO.name
    if not os.access(path, os.X_OK):
        raise Unavailable(f"MinIO {version()} is missing: run `python tests/programs/minio_program.py`")
    return path


def provide(say: Say = print) -> Path:
    """Build it if it is missing. Unavailable."""
    cache = cache_directory(f"minio-{version()}")
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock", say):
        reason = None if os.access(cache / MINIO.name, os.X_OK) else build([MINIO], cache, say)
        try:
            return find()
        except Unavailable as missing:
            raise Unavailable(f"{missing}; {reason}") from missing


def main() -> int:
    try:
        print(provide(lambda text: print(text, flush=True)))
    except Unavailable as missing:
        print(f"not available: {missing}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
