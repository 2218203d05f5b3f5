"""Targets, the choice of a backup, and how far the log reaches: pure."""

from __future__ import annotations

import datetime

import pytest
from archive_harness import chain_of
from test_retention import BEGIN, info_at, listed_at
from wal_builders import SIZE

from instance_manager.archive.backup.info import InfoInvalid, Tablespace, parse_info, render_info
from instance_manager.archive.backup.page_checksums import PAGE_BYTES, checksums, wrong_pages
from instance_manager.archive.backup.reach import reach
from instance_manager.archive.backup.requests import Schedule
from instance_manager.archive.recovery.target import (
    NoBackupForTarget,
    TargetInvalid,
    choose_backup,
    make_target,
    with_header,
)
from instance_manager.archive.wal_names import Segment
from instance_manager.core.types import Lsn, Timeline, format_lsn

MIB = SIZE.size_bytes


def segment(timeline: int, number: int) -> Segment:
    return Segment(Timeline(timeline), number)


@pytest.mark.parametrize("text", ["2025-11-28 21:05:00", "yesterday", "2025-11-28", "", "2025-13-01 00:00:00+00"])
def test_a_time_without_its_zone_or_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(TargetInvalid, match="give it like"):
        make_target(time=text)


def test_a_time_is_told_to_postgres_in_utc() -> None:
    settings = make_target(time="2025-11-28 21:05:00+02", inclusive=False).settings(Timeline(3))
    assert settings == {
        "recovery_target_time": "2025-11-28 19:05:00.000000+00:00",
        "recovery_target_inclusive": "off",
        "recovery_target_timeline": "3",
        "recovery_target_action": "pause",
    }


def test_two_targets_and_what_is_none_are_refused() -> None:
    for wrong in ({"lsn": "0/1", "xid": "5"}, {"lsn": "x"}, {"xid": "-1"}, {"name": ""}, {"timeline": "0"}):
        with pytest.raises(TargetInvalid):
            make_target(**wrong)  # type: ignore[arg-type]


def test_the_newest_backup_that_is_complete_before_the_target_is_chosen() -> None:
    listed = [listed_at(1), listed_at(2), listed_at(3, "damaged"), listed_at(4, "incomplete")]
    chain = chain_of()
    assert choose_backup(listed, make_target(), chain) is listed[1]
    assert choose_backup([listed[2]], make_target(), chain) is listed[2]
    at = (BEGIN + datetime.timedelta(days=2, minutes=4)).isoformat()
    assert choose_backup(listed, make_target(time=at), chain) is listed[0]
    end = info_at(2).end_lsn
    assert end is not None
    assert choose_backup(listed, make_target(lsn=format_lsn(end)), chain) is listed[1]
    assert choose_backup(listed, make_target(lsn=format_lsn(end - 1)), chain) is listed[0]
    with pytest.raises(NoBackupForTarget, match="Nothing earlier"):
        choose_backup(listed, make_target(time="2024-01-01 00:00:00+00"), chain)


def test_a_backup_from_behind_the_fork_is_none_of_the_new_history() -> None:
    chain = chain_of((2, 1, 15 * MIB))
    dead, before = listed_at(2), listed_at(1)
    assert choose_backup([before, dead], make_target(), chain) is before
    with pytest.raises(NoBackupForTarget, match="part of the history"):
        choose_backup([dead], make_target(), chain)


def test_a_position_at_a_boundary_is_the_same_as_the_one_behind_the_header() -> None:
    assert with_header(Lsn(3 * MIB), MIB) == 3 * MIB + 40
    assert with_header(Lsn(3 * MIB + 8192), MIB) == 3 * MIB + 8192 + 24
    assert with_header(Lsn(3 * MIB + 100), MIB) == 3 * MIB + 100


def test_the_log_is_followed_over_a_fork_within_a_segment_and_at_a_boundary() -> None:
    chain = chain_of((2, 1, 12 * MIB + 5000), (4, 2, 15 * MIB))
    there = {Timeline(1): {10, 11}, Timeline(2): {12, 13, 14}, Timeline(4): {15, 16}}
    assert reach(segment(1, 10), chain, SIZE, there).last == segment(4, 16)
    assert reach(segment(1, 10), chain, SIZE, there).missing is None
    there[Timeline(2)] = {12, 14}
    found = reach(segment(1, 10), chain, SIZE, there)
    assert (found.last, found.missing) == (segment(2, 12), segment(2, 13))
    assert reach(segment(4, 15), chain, SIZE, there).last == segment(4, 16)
    nothing = reach(segment(1, 9), chain, SIZE, there)
    assert (nothing.last, nothing.missing) == (None, segment(1, 9))


def test_backup_info_comes_back_as_it_was_written_and_nonsense_is_refused() -> None:
    from dataclasses import replace

    info = replace(info_at(3), tablespaces=(Tablespace("it's", 16400, "/mnt/a b"),), name="n", backup_label="A\nB'\n")
    assert parse_info(info.backup_id, render_info(info)) == info
    with pytest.raises(InfoInvalid, match="says nothing of timeline"):
        parse_info("x", b"status=DONE\n")
    with pytest.raises(ValueError, match="line end"):
        render_info(replace(info, name="a\nb=c"))


def test_one_changed_byte_is_a_wrong_checksum_unless_the_page_is_newer_than_the_backup() -> None:
    page = bytearray(b"\0\0\0\0\0\0\1\0\0\0\0\0\x18\0" + bytes(range(256)) * 31 + bytes(242))
    assert len(page) == PAGE_BYTES
    page[8:10] = checksums(bytes(page), 7)[0].to_bytes(2, "little")
    pages = bytes(page) + bytes(PAGE_BYTES)
    assert list(wrong_pages(pages, 7, None)) == []
    assert list(wrong_pages(pages, 8, None)) == [8], "the number of the block is part of it; a new page has none"
    page[5000] ^= 1
    assert list(wrong_pages(bytes(page), 7, Lsn(0x20000))) == [7]
    assert list(wrong_pages(bytes(page), 7, Lsn(0x10000))) == []


def test_a_schedule_names_the_last_moment_at_which_a_backup_was_due() -> None:
    noon = datetime.datetime(2025, 11, 26, 12, tzinfo=datetime.UTC)  # a Wednesday
    times = (datetime.time(3), datetime.time(15))
    assert Schedule(times).last_due(noon) == noon.replace(hour=3)
    assert Schedule(times[1:]).last_due(noon) == datetime.datetime(2025, 11, 25, 15, tzinfo=datetime.UTC)
    assert Schedule(times, frozenset({6})).last_due(noon) == datetime.datetime(2025, 11, 23, 15, tzinfo=datetime.UTC)
