"""A new data directory from a running member, by pg_basebackup.

It is made beside its place and renamed when whole: an interrupted clone never looks like a finished one. What it brings
of the source's role is removed (P6), and it begins as a standby's directory. A clone is a new member (P7).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from instance_manager.postgres.configuration import ClientTls, render_conninfo
from instance_manager.postgres.control_data import read_control_data
from instance_manager.postgres.directory import (
    CLONE_MARK,
    DirectoryRefused,
    DirectoryState,
    create_staging,
    create_standby_signal,
    discard_copy,
    inspect_directory,
    install_staging,
    remove_files_of_source,
    working_in,
)
from instance_manager.postgres.host_based_access import REPLICATION_ROLE
from instance_manager.postgres.server import DeadlinePassed, LocalPostgresError, LocalServer, run_program

_PROGRESS = re.compile(r"\s*(\d+)/(\d+) kB \(")
_NEVER_S = 7 * 24 * 3600.0


class CloneRefused(LocalPostgresError):
    """What the source gave is not what was asked for; it has been deleted."""


@dataclass(frozen=True, slots=True)
class SourceServer:
    """A running member to copy or to rewind from."""

    host: str
    port: int
    passfile: Path
    """Password file of libpq, readable by Postgres's user."""
    user: str = REPLICATION_ROLE
    tls: ClientTls = ClientTls()

    def conninfo(self, *, application_name: str, database: str | None = None) -> str:
        """Connection string; the password stays in the passfile."""
        options: dict[str, str | int] = {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "passfile": str(self.passfile),
            "application_name": application_name,
            **self.tls.options(),
            "gssencmode": "disable",
            "connect_timeout": 10,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10000,
        }
        if database is not None:
            options["dbname"] = database
        return render_conninfo(options)


@dataclass(frozen=True, slots=True)
class CloneProgress:
    """What pg_basebackup has received of what it expects; the total is an estimate that may grow."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class CloneDeadlines:
    """A clone may take hours: limited is the time without progress."""

    start_s: float = 300.0
    """Until the first byte: the source's checkpoint, though asked to be fast, writes its whole cache."""
    no_progress_s: float = 60.0
    finish_s: float = 900.0
    """After the last byte: the rest of WAL, and flushing all files, which says nothing while it works."""


async def clone(
    server: LocalServer,
    source: SourceServer,
    *,
    system_identifier: int | None,
    slot: str | None = None,
    deadlines: CloneDeadlines | None = None,
    on_progress: Callable[[CloneProgress], None] | None = None,
) -> None:
    """Put a copy of `source` in the data directory's place, which must be free.

    `system_identifier`: of the cluster; another is refused. `slot`: an existing physical slot of the source for the
    copy's WAL; None: a temporary one. The copy has `standby.signal` and no replication settings: it does not start until
    ours are written.

    DirectoryRefused: the place is taken. ProgramFailed, DeadlinePassed, CloneRefused. Whatever happens, a cancellation
    included, nothing is left but a leftover if this process is killed.
    """
    limits = deadlines or CloneDeadlines()
    report = await asyncio.to_thread(inspect_directory, server)
    if report.state not in (DirectoryState.MISSING, DirectoryState.EMPTY):
        raise DirectoryRefused(f"{server.data_directory} is taken: {report.reason}")
    staging = await asyncio.to_thread(create_staging, server, CLONE_MARK)
    argv = [
        server.program("pg_basebackup"),
        f"--dbname={source.conninfo(application_name='instance-manager clone')}",
        f"--pgdata={staging}",
        "--format=plain",
        "--wal-method=stream",
        "--checkpoint=fast",
        "--progress",
        "--no-password",
    ]
    if slot is not None:
        argv.append(f"--slot={slot}")
    try:
        # A pg_basebackup that a kill of this process leaves behind writes into tablespaces, and they have no other place.
        with working_in(staging) as lock:
            await _run_watched(replace(server, kept_open=(lock,)), argv, limits, on_progress)
        control = await read_control_data(replace(server, data_directory=staging))
        if system_identifier is not None and control.system_identifier != system_identifier:
            raise CloneRefused(
                f"{source.host}:{source.port} is of system {control.system_identifier}, not {system_identifier}"
            )
        await asyncio.to_thread(install_standby, server, staging)
    finally:
        await asyncio.shield(asyncio.to_thread(discard_copy, server, staging))


def install_standby(server: LocalServer, staging: Path) -> None:
    """A whole copy of another directory becomes the data directory, a standby's. DirectoryRefused: the place is taken."""
    remove_files_of_source(staging)
    create_standby_signal(server, staging)
    install_staging(server, staging)


async def _run_watched(
    server: LocalServer,
    argv: list[str],
    limits: CloneDeadlines,
    on_progress: Callable[[CloneProgress], None] | None,
) -> None:
    loop = asyncio.get_running_loop()
    last = CloneProgress(0, 0)
    phase, limit_s = "its start", limits.start_s
    moved_s = loop.time()

    def see(line: str) -> None:
        nonlocal last, phase, limit_s, moved_s
        progress = parse_progress(line)
        if progress is None:
            return
        if progress.done_bytes > last.done_bytes:
            moved_s = loop.time()
            whole = progress.done_bytes >= progress.total_bytes
            phase, limit_s = ("its end", limits.finish_s) if whole else ("progress", limits.no_progress_s)
        last = progress
        if on_progress is not None:
            on_progress(progress)

    running = asyncio.create_task(run_program(server, argv, deadline_s=_NEVER_S, on_line=see, ends_with_parent=True))
    try:
        while not running.done():
            left_s = moved_s + limit_s - loop.time()
            if left_s <= 0:
                raise DeadlinePassed(f"pg_basebackup, waiting for {phase}", limit_s)
            await asyncio.wait({running}, timeout=min(left_s, 1.0))
        running.result()
    finally:
        if not running.done():
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, LocalPostgresError):
                await running


def parse_progress(line: str) -> CloneProgress | None:
    """A line such as `  1024/23456 kB (4%), 0/1 tablespace`; None: another line."""
    match = _PROGRESS.match(line)
    return None if match is None else CloneProgress(int(match[1]) * 1024, int(match[2]) * 1024)
