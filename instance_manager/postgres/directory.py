"""The data directory as a thing on the disk: what it is, whether it may be started, and how it is put in and out of place.

A new directory (initdb, clone) is made beside its place, under a name that nothing starts, and renamed when it is
whole. So what lies in place was complete once; what a rewind has left half done is told by a marker outside of it (P6).

Nothing here deletes a directory that may hold somebody's data: it is set aside, and only directories that were set
aside before are deleted, the oldest first. All functions block on the disk: call them through `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from instance_manager.postgres.configuration import AUTO_CONF, REPLICATION_CONF, strip_auto_conf, without_settings
from instance_manager.postgres.files import (
    fsync_directory,
    make_directory,
    read_if_present,
    remove_if_present,
    write_atomically,
)
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.tablespaces import kept_places, remove_aside, remove_places, take_along
from instance_manager.postgres.wal_dump import VIEW_MARK
from instance_manager.threads import monotonic_s

STANDBY_SIGNAL = "standby.signal"
PROMOTE_SIGNAL = "promote"
REWIND_MARKER = "rewind-in-progress"
CLONE_MARK = ".clone-"
INITDB_MARK = ".initdb-"
SET_ASIDE_MARK = ".set-aside-"
LEFT_DEADLINE_S = 30.0
"""Until those who work in a directory have ended, after the agent that began it."""
_LEFT_POLL_S = 0.05

_LEFTOVER = re.compile(rf"({re.escape(CLONE_MARK)}|{re.escape(INITDB_MARK)}|{re.escape(VIEW_MARK)})[0-9a-f]{{8}}")
_SET_ASIDE = re.compile(rf"{re.escape(SET_ASIDE_MARK)}(\d{{1,9}})")
_ONLY_OF_SOURCE = (
    STANDBY_SIGNAL,
    "recovery.signal",
    PROMOTE_SIGNAL,
    "postmaster.pid",
    "postmaster.opts",
    REPLICATION_CONF,
)


class DirectoryRefused(LocalPostgresError):
    """The data directory is not in a state in which this may be done to it; says which and why."""


class DirectoryState(enum.Enum):
    """What is at the data directory's place."""

    MISSING = "missing"
    EMPTY = "empty"
    FOREIGN = "foreign"
    """Something else than a Postgres directory: never started, never touched."""
    HALF_REWOUND = "half rewound"
    """A rewind began and did not end: never started."""
    INITIALISED = "initialised"


@dataclass(frozen=True, slots=True)
class RewindMarker:
    """A rewind began on the directory that is in place, and has not been finished."""

    attempts: int
    """How many were begun, this one included."""
    source: str
    """Host and port, for people."""


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    """Facts of the data directory's place."""

    state: DirectoryState
    major: int | None
    """From PG_VERSION."""
    reason: str
    """For people: why it is in this state."""
    has_standby_signal: bool
    marker: RewindMarker | None
    leftovers: tuple[Path, ...]
    """What interrupted work left beside it; `remove_leftovers` deletes it."""
    set_aside: tuple[Path, ...]
    """Earlier data directories, oldest first."""


def inspect_directory(server: LocalServer) -> DirectoryReport:
    """Look, and change nothing. OSError: it cannot be read."""
    data = server.data_directory
    marker = rewind_marker(server)
    state, major, reason = _state_of(data)
    if state is DirectoryState.INITIALISED and marker is not None:
        state = DirectoryState.HALF_REWOUND
        reason = f"rewind {marker.attempts} from {marker.source} was not finished"
    return DirectoryReport(
        state=state,
        major=major,
        reason=reason,
        has_standby_signal=(data / STANDBY_SIGNAL).exists(),
        marker=marker,
        leftovers=_beside(data, _LEFTOVER),
        set_aside=_set_aside_directories(data),
    )


def require_startable(server: LocalServer) -> None:
    """DirectoryRefused unless a server may be started on the directory; the last check before every start."""
    report = inspect_directory(server)
    if report.state is not DirectoryState.INITIALISED:
        raise DirectoryRefused(f"{server.data_directory} is {report.state.value}: {report.reason}")
    if not (server.data_directory / REPLICATION_CONF).exists():
        raise DirectoryRefused(f"{server.data_directory} has no {REPLICATION_CONF}: its configuration is not ours yet")


def rewind_marker(server: LocalServer) -> RewindMarker | None:
    """The marker of a rewind that was begun; None: there is none. One that cannot be read counts as a marker."""
    try:
        content = read_if_present(server.state_directory / REWIND_MARKER)
        if content is None:
            return None
        fields = json.loads(content)
        return RewindMarker(int(fields["attempts"]), str(fields["source"]))
    except (ValueError, KeyError, TypeError):
        return RewindMarker(1, "unknown")


def write_rewind_marker(server: LocalServer, source: str) -> RewindMarker:
    """Durably say that a rewind begins; counts on from a marker that is there."""
    before = rewind_marker(server)
    marker = RewindMarker((before.attempts if before is not None else 0) + 1, source)
    write_atomically(server.state_directory / REWIND_MARKER, json.dumps(asdict(marker)).encode())
    return marker


def remove_rewind_marker(server: LocalServer) -> None:
    """Durably say that the directory in place is whole."""
    remove_if_present(server.state_directory / REWIND_MARKER)


def create_staging(server: LocalServer, mark: str) -> Path:
    """A new empty directory beside the data directory, in which a new one is built; `mark` is what for."""
    staging = server.data_directory.with_name(f"{server.data_directory.name}{mark}{secrets.token_hex(4)}")
    make_directory(staging, run_as=server.run_as)
    return staging


def install_staging(server: LocalServer, staging: Path) -> None:
    """Rename a finished directory into place, and forget a rewind of the one that was there before.

    DirectoryRefused: the place is taken; set aside what is there first.
    """
    state, _, reason = _state_of(server.data_directory)
    if state is DirectoryState.EMPTY:
        server.data_directory.rmdir()
    elif state is not DirectoryState.MISSING:
        raise DirectoryRefused(f"{server.data_directory} is taken: {reason}")
    fsync_directory(staging)
    staging.rename(server.data_directory)
    fsync_directory(server.data_directory.parent)
    # Last: a crash before this costs one more clone, never the start of a half-rewound directory.
    remove_rewind_marker(server)


@contextlib.contextmanager
def working_in(staging: Path, *, deadline_s: float = 0.0) -> Iterator[int]:
    """Until this has ended, and every process that has inherited the descriptor, nobody else works in the directory, or removes it and
    what it has in tablespaces. DirectoryRefused: somebody does. OSError."""
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        end_s = monotonic_s() + deadline_s
        while not _is_locked(descriptor) and monotonic_s() < end_s:
            time.sleep(_LEFT_POLL_S)
        _require_alone(descriptor, staging)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _require_alone(descriptor: int, directory: Path) -> None:
    if not _is_locked(descriptor):
        raise DirectoryRefused(f"somebody still works in {directory}")
    # It may have been removed before it was locked, and made again.
    if not directory.exists() or not os.path.samestat(os.fstat(descriptor), directory.stat()):
        raise DirectoryRefused(f"{directory} was removed meanwhile")


def remove_leftovers(server: LocalServer) -> tuple[Path, ...]:
    """Delete half clones, half initdbs and views of WAL, with what they have in tablespaces. Only while this process is about no
    such work. DirectoryRefused: what an earlier one began has not ended."""
    leftovers = _beside(server.data_directory, _LEFTOVER)
    for path in leftovers:
        remove_copy(server, path)
    return leftovers


def remove_copy(server: LocalServer, staging: Path) -> None:
    """Delete a directory that never came into place, with what it has in tablespaces. DirectoryRefused: somebody works in it."""
    with working_in(staging, deadline_s=LEFT_DEADLINE_S):
        remove_places(staging, (server.data_directory, *_set_aside_directories(server.data_directory)))
        shutil.rmtree(staging)


def discard_copy(server: LocalServer, staging: Path) -> None:
    """As `remove_copy`, if it is still there; what cannot be removed now `remove_leftovers` removes."""
    with contextlib.suppress(OSError, DirectoryRefused):
        remove_copy(server, staging)


def set_aside(server: LocalServer, *, kept: int = 1) -> Path:
    """Rename the data directory to `<data>.set-aside-<n>`, and its tablespaces alike, so that new ones can take their place.

    `kept`: how many of these stay, this one included; the oldest beyond are deleted, for the volume's space. The
    directory must not be a voter's (R6), and no server may run on it. DirectoryRefused: it is missing or foreign.
    """
    if kept < 1:
        raise ValueError("at least the directory that is set aside now is kept")
    state, _, reason = _state_of(server.data_directory)
    if state in (DirectoryState.MISSING, DirectoryState.FOREIGN):
        raise DirectoryRefused(f"{server.data_directory} is not set aside: {reason}")
    earlier = _set_aside_directories(server.data_directory)
    number = 1 + max((_set_aside_number(path) for path in earlier), default=0)
    target = server.data_directory.with_name(f"{server.data_directory.name}{SET_ASIDE_MARK}{number}")
    server.data_directory.rename(target)
    fsync_directory(target.parent)
    take_along(target, _suffix_of(target))
    for path in (*earlier, target)[:-kept]:
        remove_aside(path, _suffix_of(path))
    return target


def places_kept_by_others(server: LocalServer) -> dict[Path, list[Path]]:
    """By the directory that was set aside: where a tablespace of it still is, and no other can be. OSError."""
    asides = _set_aside_directories(server.data_directory)
    return {aside: kept for aside in asides if (kept := kept_places(aside, _suffix_of(aside)))}


def create_standby_signal(server: LocalServer, directory: Path | None = None) -> None:
    """From the next start on the server is a standby. `directory`: instead of the data directory."""
    write_atomically((directory or server.data_directory) / STANDBY_SIGNAL, b"", run_as=server.run_as)


def remove_standby_signal(server: LocalServer) -> bool:
    """From the next start on the server is a primary: only for the holder of the Lease. False: it was not there."""
    return remove_if_present(server.data_directory / STANDBY_SIGNAL)


def remove_files_of_source(directory: Path) -> None:
    """Remove what a clone or a rewind copied and must not bring along: the source's role (P6).

    Without its replication settings the directory does not start until ours are written.
    """
    for name in _ONLY_OF_SOURCE:
        (directory / name).unlink(missing_ok=True)
    fsync_directory(directory)


def write_configuration_file(server: LocalServer, name: str, text: str) -> None:
    """Write one of Postgres's files in the data directory, whole and owned by Postgres's user."""
    if "/" in name or name.startswith("."):
        raise ValueError(f"not the name of a configuration file: {name!r}")
    write_atomically(server.data_directory / name, text.encode(), run_as=server.run_as)


def strip_auto_conf_file(server: LocalServer) -> tuple[str, ...]:
    """Apply `strip_auto_conf` to postgresql.auto.conf; before every start and reload. Returns its warnings."""
    path = server.data_directory / AUTO_CONF
    content = read_if_present(path)
    if content is None:
        return ()
    stripped = strip_auto_conf(content.decode(errors="surrogateescape"))
    if stripped.warnings:
        write_atomically(path, stripped.text.encode(errors="surrogateescape"), run_as=server.run_as)
    return stripped.warnings


def disable_in_auto_conf(server: LocalServer, names: frozenset[str]) -> None:
    """What ALTER SYSTEM has set of `names` holds no more; its lines stay in postgresql.auto.conf, as comments."""
    path = server.data_directory / AUTO_CONF
    content = read_if_present(path)
    if content is None:
        return
    text = content.decode(errors="surrogateescape")
    if (changed := without_settings(text, names)) != text:
        write_atomically(path, changed.encode(errors="surrogateescape"), run_as=server.run_as)


def secure_directory(server: LocalServer) -> None:
    """Mode 0700 and Postgres's user as owner of the directory itself; Postgres refuses to start otherwise."""
    server.data_directory.chmod(0o700)
    if server.run_as is not None:
        os.chown(server.data_directory, server.run_as.uid, server.run_as.gid)


def _state_of(data: Path) -> tuple[DirectoryState, int | None, str]:
    if not data.exists() and not data.is_symlink():
        return DirectoryState.MISSING, None, "there is nothing"
    if not data.is_dir() or data.is_symlink():
        return DirectoryState.FOREIGN, None, "it is no directory"
    if not any(data.iterdir()):
        return DirectoryState.EMPTY, None, "it is empty"
    try:
        version = read_if_present(data / "PG_VERSION", limit_bytes=64)
    except (ValueError, OSError):
        version = None
    if version is None or re.fullmatch(rb"\d{1,3}\n?", version) is None:
        return DirectoryState.FOREIGN, None, "it has files but no PG_VERSION"
    if not (data / "global" / "pg_control").is_file():
        return DirectoryState.FOREIGN, int(version), "it has a PG_VERSION but no global/pg_control"
    return DirectoryState.INITIALISED, int(version), "it is a directory of Postgres"


def _beside(data: Path, pattern: re.Pattern[str]) -> tuple[Path, ...]:
    return tuple(
        sorted(
            path
            for path in data.parent.iterdir()
            if path.name.startswith(data.name) and pattern.fullmatch(path.name[len(data.name) :])
        )
    )


def _set_aside_directories(data: Path) -> tuple[Path, ...]:
    return tuple(sorted(_beside(data, _SET_ASIDE), key=_set_aside_number))


def _suffix_of(aside: Path) -> str:
    return f"{SET_ASIDE_MARK}{_set_aside_number(aside)}"


def _set_aside_number(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])
