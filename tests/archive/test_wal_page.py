"""The header of a segment against its name; the bytes are first pages that Postgres 14 to 18 wrote."""

from __future__ import annotations

import pytest
from wal_builders import SIZE, SYSTEM, first_page

from instance_manager.archive.wal_names import SegmentSize
from instance_manager.archive.wal_page import WrongSegment, check_first_page, parse_first_page

NAME = "000000020000000000000007"
WRITTEN_BY = {
    14: "0dd10700010000000000700000000000e8030000000000008fbded9b509d016b0000100000200000",
    15: "10d10700010000000000600000000000d9000000000000004ece3220549d016b0000100000200000",
    16: "13d10700010000000000500000000000e500000000000000fc2e50a1579d016b0000100000200000",
    17: "16d10700010000000000500000000000110000000000000013401dd05c9d016b0000100000200000",
    18: "18d10700010000000000700000000000e4010000000000002641696a629d016b0000100000200000",
}


@pytest.mark.parametrize("major", WRITTEN_BY)
def test_headers_of_every_major_are_understood(major: int) -> None:
    page = parse_first_page(bytes.fromhex(WRITTEN_BY[major]))
    assert page.major == major
    assert (page.timeline, page.segment_bytes, page.block_bytes) == (1, 1 << 20, 8192)
    assert page.address % (1 << 20) == 0
    assert page.system_identifier >> 32 > 0x6B019D00


def check(start: bytes, name: str = NAME, size: SegmentSize = SIZE) -> None:
    check_first_page(start, size.parse(name), size, SYSTEM)


def test_the_right_segment_passes() -> None:
    check(first_page(NAME))


def test_a_segment_that_begins_as_a_copy_of_the_parent_timelines_passes() -> None:
    check(first_page(NAME, timeline=1))


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (first_page(NAME, system=SYSTEM + 1), "of the system"),
        (first_page("000000020000000000000008"), "begins at 0/800000, not at 0/700000"),
        (first_page(NAME, timeline=3), "timeline 3, later than 2"),
        (first_page(NAME, timeline=0), "timeline 0"),
        (first_page(NAME, size=SegmentSize(16 << 20)), "16777216 bytes"),
        (first_page(NAME, magic=0xD109), "magic number D109"),
        (first_page(NAME, info=0x0001), "no long header"),
        (first_page(NAME)[:39], "only 39 bytes"),
        (bytes(8192), "magic number 0000"),
    ],
)
def test_every_other_one_is_refused_with_what_it_is(start: bytes, reason: str) -> None:
    with pytest.raises(WrongSegment, match=reason):
        check(start)
