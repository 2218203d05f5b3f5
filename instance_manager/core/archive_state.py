"""What an archiver tells of itself, for people and peers. No decision over writes rests on any of it."""

from __future__ import annotations

from dataclasses import dataclass

from instance_manager.core.types import Lsn

GAP = "the archive has a gap"
"""How every sentence of a recovery that tells of one says it."""
ARCHIVE_LEVELS = ("calm", "behind", "pressed", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupsState:
    """What can be recovered from the archive, as its primary's archiver last looked."""

    good: int
    """Backups without a damaged page, of the accepted history, with all of the log that makes them consistent."""
    newest: str = ""
    """The id of the newest of them; empty: there is none."""
    newest_age_s: float | None = None
    """Since its end, by the wall clock."""
    recoverable_from: str = ""
    """The end of the oldest of them from which the log goes on without a gap, UTC; empty: there is none."""
    recoverable_s: float | None = None
    """How far back that is, by the wall clock. Every moment from then until `lag_s` ago can be recovered."""
    first_gap: str = ""
    """Segment behind the newest of them that is missing although later ones are there."""
    problem: str | None = None
    """Why this could not be looked at the last time; the rest is from before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveState:
    level: str
    """One of ARCHIVE_LEVELS; `unknown` while the archiver does not answer."""
    position: Lsn | None = None
    """The log before it is in the archive without a gap, as segments or pieces, since this timeline's archiving began."""
    lag_bytes: int | None = None
    """Flushed on the primary's disk, and not in the archive."""
    lag_s: float | None = None
    """Since everything that was flushed was in the archive: what the loss of every volume now would cost."""
    waiting: int = 0
    """Finished files that Postgres wants to archive."""
    oldest: str = ""
    oldest_age_s: float = 0.0
    """How long this archiver has seen it be the oldest."""
    gaps: int = 0
    """Segments of the accepted history that are missing in the archive: no recovery passes them."""
    first_gap: str = ""
    conflicts: int = 0
    """Attempts to archive what differs from what is there under its name."""
    backups: BackupsState | None = None
    """None: not looked at yet."""
    trouble: str | None = None
    """Why nothing can be archived now, in one sentence."""
