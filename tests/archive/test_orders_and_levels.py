"""What the agent may tell the archiver, what the accepted history makes of a name, and the levels of the backlog."""

from __future__ import annotations

from pathlib import Path

import pytest
from archive_harness import Desk, chain_of
from hypothesis import given
from hypothesis import strategies as st
from wal_builders import SIZE

from instance_manager.archive.accepted import Served, Verdict, served_part, verdict_on
from instance_manager.archive.backlog import BacklogWatch, Thresholds, level_of
from instance_manager.archive.orders import OrderBook, OrdersRefused, parse_orders
from instance_manager.archive.tail import chain_from_history
from instance_manager.archive.wal_names import Segment
from instance_manager.codec import to_json
from instance_manager.core.types import Lsn, Timeline

CHAIN = chain_of((2, 1, 0x700100), (5, 2, 0x900000))


def test_orders_come_through_as_they_were_given() -> None:
    orders = Desk.primary(epoch=3, chain=CHAIN)
    assert parse_orders(to_json(orders)) == orders


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        to_json(Desk.primary()).replace(b'"primary"', b'"owner"'),
        to_json(Desk.primary()).replace(b"1048576", b"1048577"),
        to_json(Desk.primary()).replace(b'"epoch":1', b'"epoch":-1'),
        to_json(Desk.primary()).replace(b"1060.0", b"1e999"),
        to_json(Desk.primary(system=5)).replace(b'"5"', b'"five"'),
    ],
)
def test_what_is_no_order_is_refused(content: bytes) -> None:
    with pytest.raises(OrdersRefused):
        parse_orders(content)


def test_a_permit_ends_by_itself_and_epochs_only_rise() -> None:
    now_s = 1000.0
    book = OrderBook(lambda: now_s)
    assert book.permitted() is None
    book.take(Desk.primary(epoch=2, until_s=1010.0))
    assert book.permitted() is not None
    now_s = 1010.0
    assert book.permitted() is None
    now_s = 1000.0
    with pytest.raises(OrdersRefused, match="epoch 1 is over"):
        book.take(Desk.primary(epoch=1, until_s=2000.0))
    book.take(Desk.standby(epoch=2))
    assert book.permitted() is None


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("000000010000000000000006", Verdict.ARCHIVE),
        ("000000010000000000000007", Verdict.PAST_THE_FORK),
        ("000000010000000000000007.partial", Verdict.ARCHIVE),
        ("000000010000000000000008", Verdict.PAST_THE_FORK),
        ("000000020000000000000008", Verdict.ARCHIVE),
        ("000000020000000000000009", Verdict.PAST_THE_FORK),
        ("000000030000000000000008", Verdict.PAST_THE_FORK),
        ("000000050000000000000099", Verdict.ARCHIVE),
        ("000000060000000000000099", Verdict.NOT_YET),
        ("00000002.history", Verdict.ARCHIVE),
        ("00000003.history", Verdict.PAST_THE_FORK),
        ("00000005.history", Verdict.ARCHIVE),
        ("00000006.history", Verdict.NOT_YET),
    ],
)
def test_what_the_accepted_history_says_of_a_name(name: str, verdict: Verdict) -> None:
    assert verdict_on(name, SIZE, CHAIN) is verdict
    assert verdict_on(name, SIZE, None) is Verdict.ARCHIVE


@given(st.integers(1, 7).map(Timeline), st.integers(0, 20))
def test_not_one_byte_behind_a_fork_is_served(timeline: Timeline, number: int) -> None:
    left_at = {1: 0x700100, 2: 0x900000}
    segment = Segment(timeline, number)
    part = served_part(segment, SIZE, CHAIN)
    start = SIZE.start_lsn(segment)
    if timeline not in (1, 2, 5):
        assert part is None
    elif timeline == 5:
        assert part == Served(SIZE.size_bytes)
    elif part is None:
        assert start >= left_at[timeline]
    else:
        assert start + part.bytes == min(left_at[timeline], SIZE.end_lsn(segment))


def test_a_history_file_tells_the_same_chain() -> None:
    chain = chain_from_history(Timeline(5), ((Timeline(1), Lsn(0x700100)), (Timeline(2), Lsn(0x900000))))
    assert [(each.timeline, each.parent, each.switch_lsn) for each in chain.switches] == [
        (each.timeline, each.parent, each.switch_lsn) for each in CHAIN.switches
    ]
    assert (chain.first, chain.current) == (1, 5)


@pytest.mark.parametrize(
    ("ready", "age_s", "free_share", "level"),
    [
        (0, 0, 0.001, "calm"),
        (31, 59, 0.5, "calm"),
        (32, 0, 0.5, "behind"),
        (1, 60, 0.5, "behind"),
        (32, 0, 0.19, "pressed"),
        (32, 0, 0.001, "critical"),
    ],
)
def test_levels_are_as_stated(ready: int, age_s: float, free_share: float, level: str) -> None:
    volume = 100 << 30
    assert level_of(ready, age_s, int(volume * free_share), volume, Thresholds()) == level


def test_the_oldest_waiting_file_ages_until_it_is_archived(tmp_path: Path) -> None:
    status = tmp_path / "archive_status"
    status.mkdir()
    now_s = 0.0
    watch = BacklogWatch(tmp_path, lambda: now_s, Thresholds())
    assert watch.look(archives=True).ready == 0
    for name in ("000000010000000000000006", "000000010000000000000005", "00000002.history"):
        (status / f"{name}.ready").touch()
    (status / "000000010000000000000004.done").touch()
    assert (watch.look(archives=True).ready, watch.look(archives=True).oldest) == (3, "000000010000000000000005")
    now_s = 70.0
    found = watch.look(archives=True)
    assert (found.oldest_age_s, found.level) == (
        70.0,
        "behind" if found.free_bytes >= found.volume_bytes * 0.2 else found.level,
    )
    (status / "000000010000000000000005.ready").unlink()
    assert watch.look(archives=True).oldest_age_s == 0.0


def test_what_a_former_primary_left_waits_for_nobody_until_it_is_primary_again(tmp_path: Path) -> None:
    status = tmp_path / "archive_status"
    status.mkdir()
    (status / "000000010000000000000005.ready").touch()
    now_s = 0.0
    watch = BacklogWatch(tmp_path, lambda: now_s, Thresholds())
    assert watch.look(archives=True).oldest == "000000010000000000000005"
    now_s = 400.0
    left = watch.look(archives=False)
    assert (left.ready, left.oldest, left.oldest_age_s, left.level) == (0, "", 0.0, "calm")
    assert left.free_bytes > 0
    now_s = 500.0
    again = watch.look(archives=True)
    assert (again.ready, again.oldest_age_s) == (1, 0.0)
