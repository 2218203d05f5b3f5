"""pg_rewind of a diverged directory, so that an interrupted or failed one can never be started.

A marker in the state directory, outside of what pg_rewind overwrites (P6), is durable before pg_rewind begins, and goes
only after its success. Until then every start is refused; the way on is another rewind, or set aside and clone.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable

from instance_manager.core.types import Timeline
from instance_manager.postgres.clone import SourceServer
from instance_manager.postgres.control_data import read_control_data
from instance_manager.postgres.directory import (
    DirectoryRefused,
    DirectoryState,
    RewindMarker,
    create_standby_signal,
    inspect_directory,
    remove_files_of_source,
    remove_rewind_marker,
    rewind_marker,
    write_rewind_marker,
)
from instance_manager.postgres.server import LocalPostgresError, LocalServer, ProgramFailed, run_program
from instance_manager.postgres.source_questions import SourceNotReady, ask

__all__ = ["RewindFailed", "RewindMarker", "RewindOutcome", "SourceNotReady", "rewind", "rewind_marker"]

_NOT_NEEDED = "no rewind required"


class RewindOutcome(enum.Enum):
    """What pg_rewind did."""

    NOT_NEEDED = "not needed"
    """The directory's log is a prefix of the source's. Nothing was changed."""
    REWOUND = "rewound"
    """The directory is a copy of the source as of the fork, and must replay to come up: as a standby."""


class RewindFailed(LocalPostgresError):
    """pg_rewind failed; the marker stays. `attempts` counts those begun on this directory, `output` is what it said."""

    def __init__(self, output: str, attempts: int) -> None:
        super().__init__(f"pg_rewind failed (attempt {attempts}): {output.strip()[-2000:]}")
        self.output = output
        self.attempts = attempts


async def rewind(
    server: LocalServer,
    source: SourceServer,
    *,
    timeline: Timeline,
    use_restore_command: bool = False,
    deadline_s: float = 1800.0,
    on_line: Callable[[str], None] | None = None,
) -> RewindOutcome:
    """Make the stopped directory follow `source`, a primary on `timeline`.

    Afterwards, when REWOUND: `standby.signal` is there, and the source's configuration came along; the replication
    settings have been removed, so the directory does not start until the caller has written all of ours. It is a new
    member (P7), and must have been dropped as a voter before (R6).

    `use_restore_command`: WAL that pg_wal no longer has comes from `restore_command` of the directory's postgresql.conf.

    SourceNotReady and DirectoryRefused (nothing touched). RewindFailed; DeadlinePassed or a cancellation: the marker
    stays.
    """
    report = await asyncio.to_thread(inspect_directory, server)
    if report.state not in (DirectoryState.INITIALISED, DirectoryState.HALF_REWOUND):
        raise DirectoryRefused(f"{server.data_directory} cannot be rewound: {report.reason}")
    control = await read_control_data(server)
    if not control.can_be_rewound:
        raise DirectoryRefused(f"{server.data_directory} has neither checksums nor wal_log_hints: clone it")
    await require_ready(source, control.system_identifier, timeline)
    marker = await asyncio.to_thread(write_rewind_marker, server, f"{source.host}:{source.port}")
    # pg_rewind runs the server in single-user mode where it was not shut down; that refuses a standby's directory.
    await asyncio.to_thread(_remove_signals, server)
    argv = [
        server.program("pg_rewind"),
        f"--target-pgdata={server.data_directory}",
        f"--source-server={source.conninfo(application_name='instance-manager rewind', database='postgres')}",
        "--progress",
    ]
    if use_restore_command:
        argv.append("--restore-target-wal")
    said: list[str] = []

    def see(line: str) -> None:
        if len(said) < 1000:
            said.append(line)
        if on_line is not None:
            on_line(line)

    try:
        output = await run_program(server, argv, deadline_s=deadline_s, on_line=see)
    except ProgramFailed as error:
        raise RewindFailed(error.stderr, marker.attempts) from error
    not_needed = any(_NOT_NEEDED in line for line in (*said, *output.splitlines()))
    await asyncio.to_thread(_finish, server, not_needed)
    return RewindOutcome.NOT_NEEDED if not_needed else RewindOutcome.REWOUND


def _remove_signals(server: LocalServer) -> None:
    for name in ("standby.signal", "recovery.signal"):
        (server.data_directory / name).unlink(missing_ok=True)


def _finish(server: LocalServer, not_needed: bool) -> None:
    if not not_needed:
        remove_files_of_source(server.data_directory)
    create_standby_signal(server)
    remove_rewind_marker(server)


async def require_ready(source: SourceServer, system_identifier: int, timeline: Timeline) -> None:
    """It is a primary of this system, and has checkpointed on `timeline`: before its first checkpoint there a source's
    pg_control makes pg_rewind say "not needed", wrongly.

    SourceNotReady; DirectoryRefused: it is of another system.
    """
    row = await ask(
        source,
        "select timeline_id, system_identifier, pg_is_in_recovery() as in_recovery "
        "from pg_control_checkpoint(), pg_control_system()",
        application_name="instance-manager rewind",
    )
    if row["system_identifier"] != system_identifier:
        raise DirectoryRefused(f"{source.host}:{source.port} is of another system")
    if row["in_recovery"] or row["timeline_id"] != timeline:
        raise SourceNotReady(
            f"{source.host}:{source.port} last checkpointed on timeline {row['timeline_id']}, "
            f"{'in recovery' if row['in_recovery'] else 'as primary'}: a primary's checkpoint on {timeline} is needed"
        )
