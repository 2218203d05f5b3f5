"""From the archiver's counters to what people are told: `ArchiveState`."""

from __future__ import annotations

from datetime import UTC, datetime

from instance_manager.archive.counters import ArchiverStatus, BackupsSeen
from instance_manager.archive.orders import Orders
from instance_manager.archive.wal_names import wal_kind
from instance_manager.core.archive_state import ArchiveState, BackupsState
from instance_manager.core.types import Lsn

NOT_LOOKED_AT = "not looked at yet"


def state_of(status: ArchiverStatus, orders: Orders | None, now_s: float) -> ArchiveState:
    """`orders`: those under which may be written now; None: this is no primary, and nothing waits for it."""
    if orders is None:
        return ArchiveState(level="calm")
    backlog, stream = status.backlog, status.stream
    is_segment = bool(backlog.oldest) and wal_kind(backlog.oldest) == "segment"
    position: Lsn | None = Lsn(stream.durable_lsn) if stream.durable_lsn else None
    if is_segment:
        # What Postgres still asks for is the first that is missing, whatever was streamed behind it.
        # While one waits the streamer's own position rests.
        position = orders.size.start_lsn(orders.size.parse(backlog.oldest))
    since_covered_s = None if stream.covered_s is None else now_s - stream.covered_s
    lag_s = max(since_covered_s or 0.0, backlog.oldest_age_s if is_segment else 0.0)
    return ArchiveState(
        level=backlog.level,
        position=position,
        lag_s=round(lag_s, 1) if since_covered_s is not None or is_segment else None,
        waiting=backlog.ready,
        oldest=backlog.oldest,
        oldest_age_s=round(backlog.oldest_age_s, 1),
        gaps=len(status.backfill.gaps),
        first_gap=status.backfill.gaps[0] if status.backfill.gaps else "",
        conflicts=status.push.conflicts,
        backups=None if status.backups is None else backups_of(status.backups, now_s),
        trouble=_trouble(status),
    )


def backups_of(seen: BackupsSeen, now_s: float) -> BackupsState:
    """Ages go on with the monotonic clock: one that is told is never younger than the one before."""
    now_unix_s = seen.looked_at_unix_s + (now_s - seen.looked_s)

    def age_s(unix_s: float | None) -> float | None:
        return None if unix_s is None else round(max(0.0, now_unix_s - unix_s), 1)

    begin = seen.recoverable_from_unix_s
    return BackupsState(
        good=seen.good,
        newest=seen.newest,
        newest_age_s=age_s(seen.newest_end_unix_s),
        recoverable_from="" if begin is None else f"{datetime.fromtimestamp(begin, UTC):%Y-%m-%d %H:%M:%S}",
        recoverable_s=age_s(begin),
        first_gap=seen.first_gap,
        problem=seen.problem,
    )


def _trouble(status: ArchiverStatus) -> str | None:
    if status.archive not in ("ok", NOT_LOOKED_AT):
        return status.archive
    return status.push_trouble or status.stream.trouble or status.backfill.last_error or None
