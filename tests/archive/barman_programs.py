"""barman-cloud from PyPI, installed once under .cache: the other side of the archive's layout."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

REQUIREMENT = "barman[cloud,zstandard,lz4]==3.19.1"
HOME = Path(__file__).parent.parent.parent / ".cache" / "barman"


def barman_programs() -> Path:
    """The folder with `barman-cloud-wal-restore` and its siblings."""
    HOME.parent.mkdir(exist_ok=True)
    with (HOME.parent / "barman.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (HOME / ".made").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
            pip = [str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, REQUIREMENT], check=True)
            (HOME / ".made").touch()
    return HOME / "bin"
