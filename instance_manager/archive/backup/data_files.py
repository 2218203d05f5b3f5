"""What of a data directory belongs into a backup: the rules of Postgres's own basebackup.c, and what is ours.

The directory changes while it is read. A file that vanishes is left out, one that grows or shrinks is whatever it was when
it was read: the log from the backup's begin on makes it right.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from instance_manager.archive.backup.increment import Delta

FILES_PER_TAR_MAX = 20_000
"""Bounds the memory for the list of one tar."""

_EMPTIED_DIRECTORIES = frozenset(
    {
        "pg_wal",
        "pg_replslot",
        "pg_dynshmem",
        "pg_notify",
        "pg_serial",
        "pg_snapshots",
        "pg_stat_tmp",
        "pg_subtrans",
        "log",
        "pg_log",
    }
)
_LEFT_OUT = re.compile(
    r"postmaster\.(pid|opts)|(backup_label|tablespace_map)(\.old)?|backup_manifest|pg_internal\.init.*|pgsql_tmp.*"
    r"|current_logfiles(\.tmp)?|postgresql\.auto\.conf\.tmp|standby\.signal|recovery\.signal|promote"
    r"|\.instance-manager.*|\..*\.tmp"
)
_TEMPORARY_RELATION = re.compile(r"t\d+_\d+(_(fsm|vm|init))?(\.\d+)?")
_RELATION = re.compile(r"(\d+)(_(?:fsm|vm|init))?(?:\.(\d+))?")
PG_CONTROL = "global/pg_control"


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file or a directory, with its name in the tar."""

    path: Path
    name: str
    size_bytes: int
    """As it was listed; of one that goes in part, what is expected of it."""
    is_directory: bool = False
    delta: Delta | None = None
    """What of it has changed since the backup before; None: it goes whole."""

    @property
    def first_block(self) -> int | None:
        """Number of its first page in its fork of the relation; None: it has no pages with checksums."""
        match = _RELATION.fullmatch(self.path.name)
        if match is None or not (self.name.startswith(("base/", "global/")) or "/PG_" in f"/{self.name}"):
            return None
        return int(match[3] or 0) * ((1 << 30) // 8192)


@dataclass(slots=True)
class TarPlan:
    """What goes into one tar."""

    name: str
    """`data` or the tablespace's oid, with `_0001` for those behind the first."""
    files: list[DataFile] = field(default_factory=list)
    size_bytes: int = 0


def data_files(root: Path) -> Iterator[DataFile]:
    """The data directory's, without pg_control, which goes last; tablespaces outside of it aside. OSError."""
    yield from _below(root, "")


def tablespace_files(location: Path, major: int) -> Iterator[DataFile]:
    """A tablespace's: only the directories of this major version, as there may be others' beside it."""
    for entry in sorted(os.scandir(location), key=lambda each: each.name):
        if entry.name.startswith(f"PG_{major}_") and entry.is_dir(follow_symlinks=False):
            yield DataFile(Path(entry.path), entry.name, 0, is_directory=True)
            yield from _below(Path(entry.path), f"{entry.name}/")


def planned(name: str, files: Iterator[DataFile], split_bytes: int) -> Iterator[TarPlan]:
    """In tars of about `split_bytes`, never fewer than one; each is finished before the next is looked for."""
    number = 0
    plan = TarPlan(name)
    for file in files:
        if plan.files and (plan.size_bytes + file.size_bytes > split_bytes or len(plan.files) >= FILES_PER_TAR_MAX):
            yield plan
            number += 1
            plan = TarPlan(f"{name}_{number:04d}")
        plan.files.append(file)
        plan.size_bytes += file.size_bytes
    yield plan


def _below(directory: Path, prefix: str) -> Iterator[DataFile]:
    try:
        entries = sorted(os.scandir(directory), key=lambda each: each.name)
    except FileNotFoundError:
        return
    unlogged = _unlogged([entry.name for entry in entries])
    for entry in entries:
        name = prefix + entry.name
        if _is_left_out(entry.name, unlogged) or name == PG_CONTROL:
            continue
        try:
            found = entry.stat(follow_symlinks=name in _EMPTIED_DIRECTORIES)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(found.st_mode):
            yield DataFile(Path(entry.path), name, 0, is_directory=True)
            if name not in _EMPTIED_DIRECTORIES:
                yield from _below(Path(entry.path), f"{name}/")
        elif stat.S_ISREG(found.st_mode):
            yield DataFile(Path(entry.path), name, found.st_size)


def _is_left_out(name: str, unlogged: frozenset[str]) -> bool:
    if _LEFT_OUT.fullmatch(name) or _TEMPORARY_RELATION.fullmatch(name):
        return True
    match = _RELATION.fullmatch(name)
    return match is not None and match[1] in unlogged and match[2] != "_init"


def _unlogged(names: list[str]) -> frozenset[str]:
    """Relations with an init fork: recovery makes them anew from it, empty."""
    return frozenset(name.removesuffix("_init") for name in names if name.endswith("_init") and name[:1].isdigit())
