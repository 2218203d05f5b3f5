"""Which segments of a timeline are in the archive: is a range of the log there without a gap?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from instance_manager.archive.layout import Layout
from instance_manager.archive.wal_names import Segment, SegmentSize, wal_kind
from instance_manager.core.types import Timeline
from instance_manager.ports import ObjectStore

MISSING_NAMED = 20


async def segments_of(
    store: ObjectStore, layout: Layout, size: SegmentSize, timeline: Timeline, *, first: int = 0, deadline_s: float
) -> list[int]:
    """Numbers of the whole segments of a timeline that are there, from `first` on, ascending."""
    found: list[int] = []
    after = layout.wal_stem(size.name(Segment(timeline, first - 1))) + "~" if first > 0 else ""
    async for entry in store.entries(f"{layout.wals}{timeline:08X}", after=after, deadline_s=deadline_s):
        name = layout.wal_of(entry.name)
        if name is not None and wal_kind(name) == "segment":
            number = size.parse(name).number
            if number >= first and (not found or found[-1] != number):
                found.append(number)
    return found


def missing_in(found: list[int], first: int, last: int) -> list[int]:
    """What is not in `found` of the numbers from `first` to `last`."""
    there = set(found)
    return [number for number in range(first, last + 1) if number not in there]


def gaps_in(found: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each row of numbers that is missing between two that are there."""
    for before, after in itertools.pairwise(found):
        if after > before + 1:
            yield before + 1, after - 1


def named(size: SegmentSize, timeline: Timeline, numbers: list[int]) -> str:
    """For people: the first of them by name, and how many more."""
    names = [size.name(Segment(timeline, number)) for number in numbers[:MISSING_NAMED]]
    more = len(numbers) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
