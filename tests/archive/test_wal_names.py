"""Names and their arithmetic, for every segment size, and names that must never become a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance_manager.archive.wal_names import Segment, SegmentSize, timeline_of, wal_kind
from instance_manager.core.types import Lsn, Timeline

SIZES = st.integers(20, 30).map(lambda power: SegmentSize(1 << power))
TIMELINES = st.integers(1, 0xFFFFFFFF).map(Timeline)
POSITIONS = st.integers(0, (1 << 64) - 1).map(Lsn)


@given(SIZES, TIMELINES, POSITIONS)
def test_a_segment_has_one_name_and_holds_its_position(size: SegmentSize, timeline: Timeline, lsn: Lsn) -> None:
    segment = size.containing(timeline, lsn)
    assert size.start_lsn(segment) <= lsn < size.end_lsn(segment)
    name = size.name(segment)
    assert wal_kind(name) == "segment"
    assert size.parse(name) == segment
    assert timeline_of(name) == timeline
    assert size.parse(f"{name}.partial") == size.parse(f"{name}.00000028.backup") == segment


@given(SIZES, TIMELINES, st.integers(0, (1 << 64) - (1 << 31)).map(Lsn))
def test_the_next_name_is_the_next_in_order_and_begins_where_this_one_ends(
    size: SegmentSize, timeline: Timeline, lsn: Lsn
) -> None:
    segment = size.containing(timeline, lsn)
    following = size.next_name(size.name(segment))
    assert following > size.name(segment)
    assert size.start_lsn(size.parse(following)) == size.end_lsn(segment)
    assert timeline_of(following) == timeline


def test_names_as_postgres_counts_them() -> None:
    default = SegmentSize(16 << 20)
    assert default.next_name("0000000100000000000000FE") == "0000000100000000000000FF"
    assert default.next_name("0000000100000000000000FF") == "000000010000000100000000"
    assert SegmentSize(1 << 20).next_name("000000010000000000000FFF") == "000000010000000100000000"
    assert SegmentSize(1 << 30).next_name("000000010000000000000003") == "000000010000000100000000"
    assert SegmentSize(1 << 30).next_name("0000000A0000000000000001") == "0000000A0000000000000002"


def test_a_name_of_another_segment_size_is_refused() -> None:
    with pytest.raises(ValueError, match="too high"):
        SegmentSize(1 << 30).parse("0000000100000000000000FE")


def test_the_last_segment_of_all_has_no_next() -> None:
    with pytest.raises(ValueError, match="no segment"):
        SegmentSize(16 << 20).next_name("00000001FFFFFFFF000000FF")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "000000010000000000000001 ",
        "00000001000000000000000g",
        "00000001000000000000000a",
        "../000000010000000000000001",
        "000000010000000000000001.partial.partial",
        "000000010000000000000001.zst",
        "00000002.HISTORY",
        "RECOVERYXLOG",
        "000000010000000000000001\n",
    ],
)
def test_anything_else_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a WAL file"):
        wal_kind(name)


@given(st.text(alphabet="0123456789ABCDEFabcdef./\n history.backupartl", max_size=45))
def test_what_is_taken_for_a_name_has_no_way_out_of_its_directory(text: str) -> None:
    try:
        kind = wal_kind(text)
    except ValueError:
        return
    assert kind in ("segment", "partial", "label", "history")
    assert "/" not in text
    assert "\n" not in text
    assert ".." not in text


def test_there_is_no_timeline_zero() -> None:
    with pytest.raises(ValueError, match="no timeline 0"):
        timeline_of("000000000000000000000001")


@pytest.mark.parametrize("size", [0, 1 << 19, 3 << 20, 1 << 31, -(1 << 20)])
def test_a_size_that_no_cluster_has_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="not a size"):
        SegmentSize(size)


def test_segments_of_a_later_timeline_come_later() -> None:
    assert Segment(Timeline(1), 9) < Segment(Timeline(2), 3)
