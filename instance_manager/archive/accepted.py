"""What the accepted history of timelines says of a WAL file: is it part of it, in whole, in part, or not at all?"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from instance_manager.archive.wal_names import Segment, SegmentSize, timeline_of, wal_kind
from instance_manager.core.types import Lsn, Timeline, TimelineChain


class Verdict(enum.Enum):
    """What to do with a file that Postgres wants to archive."""

    ARCHIVE = "archive"
    PAST_THE_FORK = "past the fork"
    """Never part of the accepted history: nothing acknowledged is only there. It is left out, and counted."""
    NOT_YET = "not yet"
    """A timeline that the agent has not told of: wait for its next word."""


def switch_position(chain: TimelineChain, timeline: Timeline) -> Lsn | None:
    """Where the accepted history left `timeline`; None: it is the current one. KeyError: it is not part of the chain."""
    if timeline == chain.current:
        return None
    for switch in chain.switches:
        if switch.parent == timeline:
            return switch.switch_lsn
    raise KeyError(timeline)


def history_until(chain: TimelineChain, timeline: Timeline) -> tuple[tuple[Timeline, Lsn], ...]:
    """What the history file of an accepted timeline ends with: (parent, where it was left); empty for the first."""
    return tuple((switch.parent, switch.switch_lsn) for switch in chain.switches if switch.timeline <= timeline)


def verdict_on(name: str, size: SegmentSize, chain: TimelineChain | None) -> Verdict:
    """Of a file in pg_wal that Postgres wants to archive. ValueError: not the name of a WAL file.

    The old timeline's segment in which the fork lies is left out too: the new timeline's first segment begins with what
    counts of it, and its rest is nobody's.
    """
    timeline = timeline_of(name)
    if chain is None:
        return Verdict.ARCHIVE
    if timeline > chain.current:
        return Verdict.NOT_YET
    try:
        left_at = switch_position(chain, timeline)
    except KeyError:
        return Verdict.PAST_THE_FORK
    if wal_kind(name) != "segment" or left_at is None or size.end_lsn(size.parse(name)) <= left_at:
        return Verdict.ARCHIVE
    return Verdict.PAST_THE_FORK


@dataclass(frozen=True, slots=True)
class Served:
    """How much of a segment may be handed to recovery: its first `bytes`; the rest is zeros, where Postgres stops."""

    bytes: int


def served_part(segment: Segment, size: SegmentSize, chain: TimelineChain | None) -> Served | None:
    """Of a segment in the archive; None: none of it.

    Of the segment in which the accepted history left the timeline only what is before the fork: what an old primary wrote
    behind it must never be replayed.
    """
    whole = Served(size.size_bytes)
    if chain is None:
        return whole
    try:
        left_at = switch_position(chain, segment.timeline)
    except KeyError:
        return None
    if left_at is None or size.end_lsn(segment) <= left_at:
        return whole
    part = left_at - size.start_lsn(segment)
    return Served(part) if part > 0 else None
