"""What the archiver has done and what is wrong, as plain numbers and texts for status and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class PushCounters:
    """Since the start of this process."""

    archived: int = 0
    """Files made durable by this process."""
    already_there: int = 0
    """Files that were found in the archive with the same content."""
    past_the_fork: int = 0
    """Files that were left out because the accepted history does not contain them."""
    other_partials: int = 0
    refused: int = 0
    retries: int = 0
    conflicts: int = 0
    """Attempts that met other content under the same name."""
    wal_bytes: int = 0
    stored_bytes: int = 0
    look_ahead_hits: int = 0
    """Files that were durable when they were asked for, receipts included."""
    prepare_seconds: float = 0.0
    """In which files were read, checked and compressed; of parallel ones each counts."""
    store_seconds: float = 0.0
    """In which the store was asked to keep them, retries included."""
    last_archived: str = ""
    last_error: str = ""


@dataclass(slots=True)
class StreamCounters:
    """The unfinished segment."""

    pieces: int = 0
    piece_bytes: int = 0
    removed: int = 0
    failures: int = 0
    durable_lsn: int = 0
    """Everything before it is in the archive as segments or pieces, as far as this process has put it there."""
    covered_s: float | None = None
    """CLOCK_BOOTTIME at which all that was flushed then is in the archive, but for segments that wait; None: never yet."""
    trouble: str = ""
    """Why the last step failed; empty when it did not."""
    last_error: str = ""


@dataclass(slots=True)
class FetchCounters:
    """restore_command."""

    restored: int = 0
    from_prefetch: int = 0
    joined_tails: int = 0
    cut_at_fork: int = 0
    absent: int = 0
    withheld: int = 0
    failures: int = 0
    damaged: int = 0
    retries: int = 0
    last_restored: str = ""
    last_error: str = ""


@dataclass(slots=True)
class Backlog:
    """What waits in pg_wal/archive_status, and how full the volume is, at the last look."""

    ready: int = 0
    oldest: str = ""
    oldest_age_s: float = 0.0
    """How long this process has seen the same file be the oldest."""
    free_bytes: int = 0
    volume_bytes: int = 0
    level: str = "calm"


@dataclass(slots=True)
class BackfillState:
    """After the last promotion."""

    epoch: int = 0
    """Of the primary for which it was done; 0: not yet."""
    uploaded: int = 0
    gaps: tuple[str, ...] = ()
    """Segments of the accepted history that are not in the archive: no recovery passes them."""
    brought: int = 0
    """Files that this process, on a standby, has brought because the primary lacked them."""
    last_error: str = ""


@dataclass(slots=True)
class BackupProgress:
    """Of the base backup that this process takes right now."""

    backup_id: str = ""
    phase: str = ""
    read_bytes: int = 0
    estimated_bytes: int = 0


@dataclass(slots=True)
class BackupState:
    """Base backups that this process has taken."""

    running: BackupProgress | None = None
    last_backup: str = ""
    """Its id; empty: none since the start of this process."""
    last_error: str = ""
    damaged_pages: int = 0
    """Of the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupsSeen:
    """What can be recovered, at the last look of `backup.watch`; see `BackupsState`."""

    looked_s: float
    """CLOCK_BOOTTIME."""
    looked_at_unix_s: float
    good: int = 0
    newest: str = ""
    newest_end_unix_s: float | None = None
    recoverable_from_unix_s: float | None = None
    first_gap: str = ""
    problem: str | None = None


@dataclass(slots=True)
class ArchiverStatus:
    """All of it."""

    archive: str = "not looked at yet"
    """`ok`, or what is wrong with the archive as a whole."""
    push_trouble: str = ""
    """Why the last file that Postgres asked for was not archived; empty when it was."""
    push: PushCounters = field(default_factory=PushCounters)
    stream: StreamCounters = field(default_factory=StreamCounters)
    fetch: FetchCounters = field(default_factory=FetchCounters)
    backlog: Backlog = field(default_factory=Backlog)
    backfill: BackfillState = field(default_factory=BackfillState)
    backup: BackupState = field(default_factory=BackupState)
    backups: BackupsSeen | None = None
    """Of a primary's archiver only; None: not looked at yet."""
