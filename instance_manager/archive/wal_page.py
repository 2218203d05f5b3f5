"""The header of a segment's first page: is this file what its name says, and of this cluster?

A wrong segment under the right name makes recovery promote silently, so both ways are checked: before it is archived, and
before it is handed to Postgres. Source: XLogLongPageHeaderData of Postgres 14 to 18, which all have the same layout.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from instance_manager.archive.wal_names import Segment, SegmentSize
from instance_manager.core.types import Lsn, Timeline, format_lsn

HEADER_BYTES = 40
MAJOR_OF_MAGIC = {0xD10D: 14, 0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18}
# magic, info, timeline, page address, remaining length, padding, system identifier, segment size, block size
_LONG_HEADER = struct.Struct("=HHIQI4xQII")
_IS_LONG = 0x0002
# magic, info, timeline, page address: what the header of every page begins with
_SHORT_HEADER = struct.Struct("=HHIQ")


class WrongSegment(Exception):
    """The file is not the segment that its name says; the text tells what it is instead."""


@dataclass(frozen=True, slots=True)
class FirstPage:
    """What the first page of a segment says of itself."""

    major: int
    timeline: Timeline
    address: Lsn
    system_identifier: int
    segment_bytes: int
    block_bytes: int


def parse_first_page(start: bytes) -> FirstPage:
    """From the first bytes of a segment (`HEADER_BYTES` suffice). WrongSegment: no header of a supported version."""
    if len(start) < HEADER_BYTES:
        raise WrongSegment(f"only {len(start)} bytes long")
    magic, info, timeline, address, _, system, segment_bytes, block_bytes = _LONG_HEADER.unpack_from(start)
    major = MAJOR_OF_MAGIC.get(magic)
    if major is None:
        raise WrongSegment(f"its first page has the magic number {magic:04X}, which no supported Postgres writes")
    if not info & _IS_LONG:
        raise WrongSegment("its first page has no long header")
    return FirstPage(major, Timeline(timeline), Lsn(address), system, segment_bytes, block_bytes)


def check_first_page(start: bytes, segment: Segment, size: SegmentSize, system_identifier: int) -> FirstPage:
    """The header, if it fits. WrongSegment otherwise.

    A page of an earlier timeline than the name's is right: at a promotion the new timeline's first segment begins as a
    copy of the old one's.
    """
    page = parse_first_page(start)
    if page.system_identifier != system_identifier:
        raise WrongSegment(f"it is of the system {page.system_identifier}, not of {system_identifier}")
    if page.segment_bytes != size.size_bytes:
        raise WrongSegment(f"it is of a cluster with segments of {page.segment_bytes} bytes, not {size.size_bytes}")
    expected = size.start_lsn(segment)
    if page.address != expected:
        raise WrongSegment(f"it begins at {format_lsn(page.address)}, not at {format_lsn(expected)}")
    if page.timeline > segment.timeline or page.timeline == 0:
        raise WrongSegment(f"it is of timeline {page.timeline}, later than {segment.timeline}")
    return page


def check_pages(file: BinaryIO, segment: Segment, size: SegmentSize, system_identifier: int) -> None:
    """Every page of the segment says its own position. WrongSegment otherwise. Blocks on the disk.

    What `check_first_page` cannot see: a file that was begun to be used for a later segment. Behind the end of a segment that
    was finished early (pg_switch_wal) all pages are zeros, and none of them is anything else.
    """
    first = check_first_page(file.read(HEADER_BYTES), segment, size, system_identifier)
    is_over = False
    for offset in range(first.block_bytes, size.size_bytes, first.block_bytes):
        file.seek(offset)
        start = file.read(_SHORT_HEADER.size)
        if len(start) < _SHORT_HEADER.size:
            raise WrongSegment(f"only {offset + len(start)} bytes long")
        if not any(start):
            is_over = True
            continue
        magic, _, timeline, address = _SHORT_HEADER.unpack(start)
        if is_over or address != size.start_lsn(segment) + offset or MAJOR_OF_MAGIC.get(magic) != first.major:
            raise WrongSegment(f"its page at {offset} is not of this segment")
        if not 0 < timeline <= segment.timeline:
            raise WrongSegment(f"its page at {offset} is of timeline {timeline}, not of {segment.timeline} or before")
