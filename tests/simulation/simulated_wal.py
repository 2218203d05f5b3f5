"""The write-ahead log and the histories of timelines, as far as replication sees them.

A log is a list of entries of one fixed size and three positions: where it ends, how far it has been handed to the
kernel, how far it is on the disk. Any of them may lie amid an entry. A record is one and the same only where the entry
is the same *object*; Postgres itself compares positions, and so does everything here that stands for Postgres (P4).

Left out: pages and their headers, full segments and their recycling (nobody ever lacks old WAL), archived WAL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from instance_manager.core.types import Lsn, Timeline, TimelineChain, WalEnd

ENTRY_BYTES = 100
SEGMENT_ENTRIES = 128
SEGMENT_BYTES = SEGMENT_ENTRIES * ENTRY_BYTES
LOG_BEGINS = 0x1000000

Kind = Literal["commit", "message", "checkpoint", "shutdown", "end of recovery"]

History = tuple[tuple[Timeline, Lsn], ...]
"""(parent, where it was left), oldest first; () is an empty file, which fills a gap in the numbers and says nothing."""


Line = tuple[tuple[Timeline, int], ...]
"""Timelines from the oldest on, each with the position where it begins."""


class Entry:
    """One record. Never changed; compared by identity."""

    __slots__ = ("kind", "payload", "timeline")

    def __init__(self, timeline: Timeline, kind: Kind, payload: object = None) -> None:
        self.timeline = timeline
        self.kind = kind
        self.payload = payload

    def __repr__(self) -> str:
        return f"Entry({self.timeline}, {self.kind}, {self.payload!r})"


def start_of(index: int) -> int:
    return LOG_BEGINS + index * ENTRY_BYTES


def entries_before(lsn: int) -> int:
    """How many entries are complete at `lsn`: the index of the one that begins there or is cut there."""
    return (lsn - LOG_BEGINS) // ENTRY_BYTES


def complete(lsn: int) -> int:
    """The end of the last complete entry before `lsn`."""
    return lsn - (lsn - LOG_BEGINS) % ENTRY_BYTES


def segment_start(lsn: int) -> int:
    return lsn - (lsn - LOG_BEGINS) % SEGMENT_BYTES


class Log:
    """One pg_wal. `entries` holds the one that the end cuts, too."""

    __slots__ = ("end", "entries", "flushed", "written")

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.end = self.written = self.flushed = start_of(len(entries))

    def append(self, entry: Entry) -> int:
        """Into shared memory of a primary, behind the last complete entry; its end."""
        self.entries.append(entry)
        self.end = start_of(len(self.entries))
        return self.end

    def drop_torn_tail(self) -> None:
        """What recovery does with a record that is only partly there: the next one is written over it."""
        self.cut(complete(self.end))

    def cut(self, lsn: int) -> None:
        """Nothing is left behind `lsn`, which may be amid an entry."""
        if lsn < self.end:
            del self.entries[-((LOG_BEGINS - lsn) // ENTRY_BYTES) :]
            self.end = lsn
            self.written = min(self.written, lsn)
            self.flushed = min(self.flushed, lsn)

    def receive(self, first_index: int, entries: tuple[Entry, ...], end: int) -> None:
        """XLogWalRcvWrite: what comes is written by its position.

        The walreceiver begins at a segment's start, so most of the first piece may be there already. Postgres writes over
        it, but what was replayed stays replayed; so here an entry that is there stays, whatever comes in its place.
        """
        own = entries_before(self.end)
        if end <= self.end:
            return
        skipped = own - first_index
        if skipped < 0:
            raise AssertionError("a gap in what was received")
        del self.entries[own:]
        self.entries.extend(entries[skipped:])
        self.end = self.written = end

    def copy(self, upto: int) -> Log:
        return Log(self.entries[: entries_before(upto)])


def newest_timeline(histories: Mapping[Timeline, History], start: Timeline) -> Timeline:
    """findNewestTimeLine: counts up to the first number without a history file."""
    newest = start
    while Timeline(newest + 1) in histories:
        newest = Timeline(newest + 1)
    return newest


def line_of(histories: Mapping[Timeline, History], timeline: Timeline) -> Line:
    """readTimeLineHistory: each timeline from the oldest to `timeline`, with the position where it begins."""
    begins = 0
    found = []
    for parent, left_at in histories.get(timeline, ()):
        found.append((parent, begins))
        begins = left_at
    return (*found, (timeline, begins))


def timeline_at(line: Line, lsn: int) -> Timeline:
    """tliOfPointInHistory: the timeline that the byte at `lsn` is on."""
    for timeline, begins in reversed(line):
        if begins <= lsn:
            return timeline
    return line[0][0]


def left_at(line: Line, timeline: Timeline) -> int | None:
    """tliSwitchPoint: where `line` left `timeline`; None: it is its last. KeyError: it is not in it."""
    for index, (each, _) in enumerate(line):
        if each == timeline:
            return line[index + 1][1] if index + 1 < len(line) else None
    raise KeyError(timeline)


def end_along(log: Log, start: WalEnd, chain: TimelineChain) -> WalEnd:
    """The end of the last complete record that lies in the files, from `start` on: `wal_dump.end_of_wal`.

    Timelines outside the accepted history are not looked at, and one that left it before `start` is not left again.
    """
    begins: dict[Timeline, int] = {start.timeline: 0}
    line: list[tuple[Timeline, int]] = [(chain.first, 0)]
    line += [(switch.timeline, switch.switch_lsn) for switch in chain.switches]
    numbers = [timeline for timeline, _ in line]
    if start.timeline in numbers:
        for timeline, begin in line[numbers.index(start.timeline) + 1 :]:
            if begin < start.lsn:
                break
            begins[timeline] = begin
    index, last = entries_before(start.lsn), entries_before(log.written)
    timeline = start.timeline
    while index < last:
        entry = log.entries[index]
        if entry.timeline < timeline or begins.get(entry.timeline, log.end) > start_of(index):
            break
        timeline = entry.timeline
        index += 1
    return WalEnd(timeline, Lsn(max(start.lsn, start_of(index))))
