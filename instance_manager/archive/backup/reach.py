"""How far the log in the archive reaches from a position on, along a history of timelines: pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from instance_manager.archive.accepted import switch_position
from instance_manager.archive.wal_names import Segment, SegmentSize
from instance_manager.core.types import Timeline, TimelineChain


@dataclass(frozen=True, slots=True)
class Reach:
    """From a first segment on."""

    last: Segment | None
    """The last one that is there without a gap before it; None: not even the first is."""
    missing: Segment | None
    """The first that is not there although later ones of the history are: a gap; None: the archive just ends."""


def reach(start: Segment, chain: TimelineChain, size: SegmentSize, there: Mapping[Timeline, Set[int]]) -> Reach:
    """Follow the log from `start`. KeyError: its timeline is not part of the chain.

    Where a timeline was left within a segment, the next timeline's copy of that segment holds what counts of it; where it was
    left exactly at a boundary, the old timeline needs no segment behind it.
    """
    timeline, number = start.timeline, start.number
    last: Segment | None = None
    while True:
        left_at = switch_position(chain, timeline)
        if left_at is not None and number == left_at // size.size_bytes:
            timeline = _child(chain, timeline)
            continue
        if number not in there.get(timeline, frozenset()):
            break
        last = Segment(timeline, number)
        number += 1
    later = any(max(there.get(each, frozenset()), default=-1) > number for each in _from(chain, timeline))
    return Reach(last, Segment(timeline, number) if later else None)


def _child(chain: TimelineChain, parent: Timeline) -> Timeline:
    return next(switch.timeline for switch in chain.switches if switch.parent == parent)


def _from(chain: TimelineChain, timeline: Timeline) -> list[Timeline]:
    return [timeline, *(switch.timeline for switch in chain.switches if switch.timeline > timeline)]
