"""After a promotion: what the old primary never archived and the new one has is brought, and every gap is named."""

from __future__ import annotations

import pytest
from archive_harness import Desk, chain_of
from fault_proxy import FaultProxy
from wal_builders import SIZE, history_content, make_ready, segment_content

from instance_manager.archive.backfill import segments_between
from instance_manager.archive.wal_names import Segment
from instance_manager.core.types import Timeline
from instance_manager.ports import ObjectStoreError

FIVE, SIX, SEVEN, EIGHT = (f"00000001000000000000000{number}" for number in (5, 6, 7, 8))
CHAIN = chain_of((2, 1, 0x800100))


def promote(desk: Desk) -> None:
    make_ready(desk.wal, "00000002.history", history_content((1, 0x800100)))
    desk.command(desk.primary(epoch=2, chain=CHAIN))


async def backfill(desk: Desk) -> None:
    orders = desk.archiver.orders.current
    assert orders is not None
    await desk.archiver.backfill_once(orders, CHAIN)


async def archived_by_the_old_primary(desk: Desk, *names: str) -> None:
    desk.ready(*names)
    for name in names:
        await desk.push(name)
        (desk.wal / name).unlink()


async def test_segments_that_were_streamed_but_archived_by_neither_are_brought(desk: Desk) -> None:
    """A peer left a gap in the archive that no recovery passes."""
    await archived_by_the_old_primary(desk, FIVE)
    for name in (FIVE, SIX, SEVEN, EIGHT):
        (desk.wal / name).write_bytes(segment_content(name))
        (desk.wal / "archive_status" / f"{name}.done").touch()
    promote(desk)
    await backfill(desk)
    assert await desk.wal_in_store(SIX) == segment_content(SIX)
    assert await desk.wal_in_store(SEVEN) == segment_content(SEVEN)
    assert await desk.wal_in_store(EIGHT) is None
    state = desk.archiver.status.backfill
    assert (state.epoch, state.uploaded, state.gaps) == (2, 2, ())


async def test_the_history_of_a_timeline_that_had_no_segment_of_its_own_is_brought(desk: Desk) -> None:
    """Two failovers within one segment: the second primary had not archived its history when it was lost."""
    chain = chain_of((2, 1, 0x800100), (3, 2, 0x800200))
    second, third = history_content((1, 0x800100)), history_content((1, 0x800100), (2, 0x800200))
    make_ready(desk.wal, "00000002.history", second)
    (desk.wal / "archive_status/00000002.history.ready").rename(desk.wal / "archive_status/00000002.history.done")
    make_ready(desk.wal, "00000003.history", third)
    desk.command(desk.primary(epoch=3, chain=chain))
    orders = desk.archiver.orders.current
    assert orders is not None
    await desk.archiver.backfill_once(orders, chain)
    assert await desk.wal_in_store("00000002.history") == second
    assert desk.archiver.status.backfill.gaps == ()


async def test_an_accepted_history_that_is_nowhere_is_named_as_a_gap(desk: Desk) -> None:
    chain = chain_of((2, 1, 0x800100), (3, 2, 0x800200))
    make_ready(desk.wal, "00000003.history", history_content((1, 0x800100), (2, 0x800200)))
    desk.command(desk.primary(epoch=3, chain=chain))
    orders = desk.archiver.orders.current
    assert orders is not None
    await desk.archiver.backfill_once(orders, chain)
    assert desk.archiver.status.backfill.gaps == ("00000002.history",)


async def test_what_is_nowhere_is_named_as_a_gap(desk: Desk) -> None:
    await archived_by_the_old_primary(desk, FIVE)
    (desk.wal / SEVEN).write_bytes(segment_content(SEVEN))
    promote(desk)
    await backfill(desk)
    assert desk.archiver.status.backfill.gaps == (SIX,)


async def test_a_recycled_file_under_a_name_of_the_past_is_not_taken_for_it(local_desk: Desk) -> None:
    desk = local_desk
    await archived_by_the_old_primary(desk, FIVE)
    (desk.wal / SIX).write_bytes(segment_content(FIVE))
    promote(desk)
    await backfill(desk)
    assert desk.archiver.status.backfill.gaps == (SIX, SEVEN)
    assert await desk.wal_in_store(SIX) is None


async def test_while_the_store_fails_it_is_not_done(s3_desk: Desk, proxy: FaultProxy) -> None:
    await archived_by_the_old_primary(s3_desk, FIVE)
    (s3_desk.wal / SIX).write_bytes(segment_content(SIX))
    promote(s3_desk)
    proxy.fail("503 SlowDown")
    with pytest.raises(ObjectStoreError):
        await backfill(s3_desk)
    assert s3_desk.archiver.status.backfill.epoch == 0
    proxy.heal()
    await backfill(s3_desk)
    assert s3_desk.archiver.status.backfill.uploaded == 1


def test_the_way_of_the_accepted_history_over_two_forks() -> None:
    chain = chain_of((2, 1, 0x700100), (5, 2, 0x900000))
    names = [SIZE.name(each) for each in segments_between(chain, Segment(Timeline(1), 5), SIZE)]
    assert names == [FIVE, SIX, "000000020000000000000007", "000000020000000000000008"]
    assert segments_between(chain, Segment(Timeline(5), 12), SIZE) == []
    assert segments_between(chain_of(), Segment(Timeline(1), 5), SIZE) == []
