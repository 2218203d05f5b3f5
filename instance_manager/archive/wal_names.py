"""Names in pg_wal and in an archive, and their arithmetic for every segment size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from instance_manager.core.types import Lsn, Timeline

WalKind = Literal["segment", "partial", "label", "history"]

SMALLEST_SEGMENT_BYTES = 1 << 20
LARGEST_SEGMENT_BYTES = 1 << 30
_LOG_BYTES = 1 << 32
_TIMELINE_MAX = 0xFFFFFFFF
_SEGMENT = re.compile(r"[0-9A-F]{24}")
_PARTIAL = re.compile(r"[0-9A-F]{24}\.partial")
_LABEL = re.compile(r"[0-9A-F]{24}\.[0-9A-F]{8}\.backup")
_HISTORY = re.compile(r"[0-9A-F]{8}\.history")


def wal_kind(name: str) -> WalKind:
    """What a file of this name is. ValueError: none that Postgres archives; no path may be built of it."""
    if _SEGMENT.fullmatch(name):
        return "segment"
    if _HISTORY.fullmatch(name):
        return "history"
    if _PARTIAL.fullmatch(name):
        return "partial"
    if _LABEL.fullmatch(name):
        return "label"
    raise ValueError(f"not the name of a WAL file: {name[:100]!r}")


def timeline_of(name: str) -> Timeline:
    """The timeline that the name of any WAL file begins with. ValueError, as `wal_kind`; also for timeline 0."""
    wal_kind(name)
    timeline = int(name[:8], 16)
    if timeline == 0:
        raise ValueError(f"there is no timeline 0: {name}")
    return Timeline(timeline)


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """A segment of the log: its timeline, and its number counted from position 0."""

    timeline: Timeline
    number: int


@dataclass(frozen=True, slots=True)
class SegmentSize:
    """The segment size of a cluster, a power of two from 1 MiB to 1 GiB; decides what a name means."""

    size_bytes: int

    def __post_init__(self) -> None:
        size = self.size_bytes
        if not SMALLEST_SEGMENT_BYTES <= size <= LARGEST_SEGMENT_BYTES or size & (size - 1):
            raise ValueError(f"not a size of a WAL segment: {size}")

    @property
    def per_log(self) -> int:
        """How many segments 4 GiB of log have: the last 8 digits of a name count up to this."""
        return _LOG_BYTES // self.size_bytes

    def parse(self, name: str) -> Segment:
        """The segment of this name, or the one that a `.partial` or a backup label belongs to. ValueError."""
        if wal_kind(name) == "history":
            raise ValueError(f"a history is no segment: {name}")
        high, low = int(name[8:16], 16), int(name[16:24], 16)
        if low >= self.per_log:
            raise ValueError(
                f"{name} is no segment of {self.size_bytes >> 20} MiB: its number within 4 GiB is too high"
            )
        return Segment(timeline_of(name), high * self.per_log + low)

    def name(self, segment: Segment) -> str:
        """Its file name. ValueError: outside of what the names can tell."""
        high, low = divmod(segment.number, self.per_log)
        if not 0 < segment.timeline <= _TIMELINE_MAX or not 0 <= high <= 0xFFFFFFFF:
            raise ValueError(f"no segment: {segment}")
        return f"{segment.timeline:08X}{high:08X}{low:08X}"

    def start_lsn(self, segment: Segment) -> Lsn:
        """Position of its first byte."""
        return Lsn(segment.number * self.size_bytes)

    def end_lsn(self, segment: Segment) -> Lsn:
        """Position behind its last byte."""
        return Lsn((segment.number + 1) * self.size_bytes)

    def containing(self, timeline: Timeline, lsn: Lsn) -> Segment:
        """The segment that holds the byte at `lsn`."""
        return Segment(timeline, lsn // self.size_bytes)

    def next_name(self, name: str) -> str:
        """The name of the segment behind this one, on its timeline. ValueError: no segment, or the last there can be."""
        if wal_kind(name) != "segment":
            raise ValueError(f"only segments are in a row: {name}")
        segment = self.parse(name)
        return self.name(Segment(segment.timeline, segment.number + 1))
