"""What must be on the machine before a cluster can be started on it."""

from __future__ import annotations

import os
from pathlib import Path

from instance_manager.demo.plan import has_user
from instance_manager.postgres.binaries import BinariesNotFound, find_bin_directory


def missing_prerequisite(bin_directory: Path | None = None) -> str | None:
    """What is missing and how to get it, in one line; None when all is there."""
    try:
        find_bin_directory(explicit=bin_directory)
    except BinariesNotFound as error:
        return str(error)
    if os.geteuid() == 0 and not has_user("postgres"):
        return "there is no user postgres, and Postgres refuses to run as root; install the package postgresql"
    return None
