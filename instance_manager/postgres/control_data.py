"""What pg_control says, read with pg_controldata: the facts of a data directory that is not running.

On a running server it is a checkpoint old, and its timeline lags behind what has been received (P11).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from instance_manager.core.types import Lsn, Timeline, parse_lsn
from instance_manager.postgres.server import LocalPostgresError, LocalServer, run_program


class ControlDataUnreadable(LocalPostgresError):
    """pg_controldata answered something that this version does not understand, or a checksum that does not match."""


class ClusterState(enum.Enum):
    """`Database cluster state` of pg_control, in Postgres's own words."""

    STARTING_UP = "starting up"
    SHUT_DOWN = "shut down"
    SHUT_DOWN_IN_RECOVERY = "shut down in recovery"
    SHUTTING_DOWN = "shutting down"
    IN_CRASH_RECOVERY = "in crash recovery"
    IN_ARCHIVE_RECOVERY = "in archive recovery"
    IN_PRODUCTION = "in production"


@dataclass(frozen=True, slots=True)
class HotStandbySettings:
    """Settings of the primary when it last wrote them; a standby refuses to start, or pauses, with less."""

    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int


@dataclass(frozen=True, slots=True)
class ControlData:
    """Source: pg_controldata with LC_ALL=C, Postgres 14 to 18."""

    control_version: int
    """Format of pg_control: 1300 for 13 to 16, 1700 for 17, 1800 for 18. Not the major version: that is in PG_VERSION."""
    system_identifier: int
    state: ClusterState
    checkpoint_lsn: Lsn
    """Start of the latest checkpoint record."""
    redo_lsn: Lsn
    """Where recovery from that checkpoint begins: the start of a record."""
    timeline: Timeline
    """Timeline of the latest checkpoint."""
    previous_timeline: Timeline
    minimum_recovery_end_lsn: Lsn
    """Recovery must reach this for a consistent directory; 0: a primary's directory."""
    minimum_recovery_end_timeline: Timeline
    """0 where there is no minimum recovery end."""
    backup_start_lsn: Lsn
    """Not 0: the directory is a base backup whose end has not been reached."""
    end_of_backup_required: bool
    wal_segment_bytes: int
    wal_block_bytes: int
    data_checksums: bool
    wal_level: str
    wal_log_hints: bool
    hot_standby: HotStandbySettings

    @property
    def shut_down_cleanly(self) -> bool:
        """A primary's clean end: its last record is the shutdown checkpoint at `checkpoint_lsn`."""
        return self.state is ClusterState.SHUT_DOWN

    @property
    def can_be_rewound(self) -> bool:
        """pg_rewind needs checksums or hint bits in WAL."""
        return self.data_checksums or self.wal_log_hints


async def read_control_data(server: LocalServer, *, deadline_s: float = 10.0) -> ControlData:
    """Run pg_controldata on the data directory.

    ProgramFailed: no pg_control there. ControlDataUnreadable. DeadlinePassed: a stalled disk.
    """
    output = await run_program(
        server, [server.program("pg_controldata"), "-D", str(server.data_directory)], deadline_s=deadline_s
    )
    return parse_control_data(output)


def parse_control_data(text: str) -> ControlData:
    """From the output of pg_controldata; ControlDataUnreadable names the line that is missing or wrong."""
    if "WARNING" in text:
        # "Calculated CRC checksum does not match" and an invalid segment size are only warnings with exit code 0.
        raise ControlDataUnreadable(f"pg_controldata warns: {_first_warning(text)}")
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())

    def number(name: str) -> int:
        try:
            return int(_field(fields, name))
        except ValueError:
            raise ControlDataUnreadable(f"{name}: {fields[name]!r} is no number") from None

    def lsn(name: str) -> Lsn:
        try:
            return parse_lsn(_field(fields, name))
        except ValueError:
            raise ControlDataUnreadable(f"{name}: {fields[name]!r} is no WAL position") from None

    state_text = _field(fields, "Database cluster state")
    try:
        state = ClusterState(state_text)
    except ValueError:
        raise ControlDataUnreadable(f"unknown database cluster state {state_text!r}") from None
    return ControlData(
        control_version=number("pg_control version number"),
        system_identifier=number("Database system identifier"),
        state=state,
        checkpoint_lsn=lsn("Latest checkpoint location"),
        redo_lsn=lsn("Latest checkpoint's REDO location"),
        timeline=Timeline(number("Latest checkpoint's TimeLineID")),
        previous_timeline=Timeline(number("Latest checkpoint's PrevTimeLineID")),
        minimum_recovery_end_lsn=lsn("Minimum recovery ending location"),
        minimum_recovery_end_timeline=Timeline(number("Min recovery ending loc's timeline")),
        backup_start_lsn=lsn("Backup start location"),
        end_of_backup_required=_field(fields, "End-of-backup record required") == "yes",
        wal_segment_bytes=number("Bytes per WAL segment"),
        wal_block_bytes=number("WAL block size"),
        data_checksums=number("Data page checksum version") != 0,
        wal_level=_field(fields, "wal_level setting"),
        wal_log_hints=_field(fields, "wal_log_hints setting") == "on",
        hot_standby=HotStandbySettings(
            max_connections=number("max_connections setting"),
            max_worker_processes=number("max_worker_processes setting"),
            max_wal_senders=number("max_wal_senders setting"),
            max_prepared_transactions=number("max_prepared_xacts setting"),
            max_locks_per_transaction=number("max_locks_per_xact setting"),
        ),
    )


def _field(fields: dict[str, str], name: str) -> str:
    try:
        return fields[name]
    except KeyError:
        raise ControlDataUnreadable(f"pg_controldata printed no {name!r}") from None


def _first_warning(text: str) -> str:
    found = re.search(r"WARNING:?\s*(.+)", text)
    return found[1].strip() if found is not None else "?"
