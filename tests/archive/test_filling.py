"""What only a standby still holds of the log comes into the archive from there, whole, or not at all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from archive_harness import SERVER, Desk, chain_of, until
from wal_builders import SIZE, history_content, make_ready, paged_segment

from instance_manager.archive.filling import Replayed
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.upload import NotArchived
from instance_manager.core.types import Lsn, Timeline
from instance_manager.threads import monotonic_s

FIVE, SIX, SEVEN, EIGHT = (f"00000001000000000000000{number}" for number in (5, 6, 7, 8))
CHAIN = chain_of((2, 1, 0x800100))
HISTORY = history_content((1, 0x800100))
PAST_THE_FORK = Replayed(Timeline(2), Lsn(0x800200))


class Pair:
    """A new primary whose pg_wal begins at SEVEN, and its standby, which holds SIX too; the archive ends with FIVE."""

    def __init__(self, tmp_path: Path) -> None:
        root = tmp_path / "archive"
        root.mkdir(exist_ok=True)
        self.primary = Desk(tmp_path / "primary", DirectoryStore(root))
        self.standby = Desk(tmp_path / "standby", DirectoryStore(root))

    async def after_a_promotion(self) -> Desk:
        """The standby, which may bring what its primary lacks."""
        make_ready(self.primary.wal, FIVE, paged_segment(FIVE))
        await self.primary.push(FIVE)
        (self.primary.wal / FIVE).unlink()
        make_ready(self.primary.wal, "00000002.history", HISTORY)
        (self.primary.wal / SEVEN).write_bytes(paged_segment(SEVEN))
        self.primary.command(self.primary.primary(epoch=2, chain=CHAIN))
        await self.look()
        (self.standby.wal / "00000002.history").write_bytes(HISTORY)
        for name in (SIX, SEVEN, EIGHT):
            (self.standby.wal / name).write_bytes(paged_segment(name))
        self.asked()
        self.standby.replayed = PAST_THE_FORK
        return self.standby

    async def look(self) -> None:
        orders = self.primary.archiver.orders.current
        assert orders is not None
        await self.primary.archiver.backfill_once(orders, CHAIN)

    def asked(self, **flags: bool) -> None:
        told = {"is_streaming": True, "has_gaps": True, **flags}
        self.standby.command(self.standby.standby(epoch=2, chain=CHAIN, **told))

    @property
    def gaps(self) -> tuple[str, ...]:
        """As the primary tells them."""
        return self.primary.archiver.status.backfill.gaps


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


async def test_a_gap_that_a_standby_can_fill_is_filled_and_told_no_more(pair: Pair) -> None:
    standby = await pair.after_a_promotion()
    assert pair.gaps == (SIX,)
    assert await standby.archiver.filler.fill() == (SIX,)
    assert await standby.wal_in_store(SIX) == paged_segment(SIX)
    assert await standby.wal_in_store(EIGHT) is None, "the fork lies in it"
    await pair.look()
    assert not pair.gaps
    assert await standby.archiver.filler.fill() == ()


async def test_a_history_that_only_a_standby_holds_is_brought_before_its_segments(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    chain = chain_of((2, 1, 0x700100), (3, 2, 0x900100))
    standby = pair.standby
    (standby.wal / "00000002.history").write_bytes(history_content((1, 0x700100)))
    (standby.wal / "00000003.history").write_bytes(history_content((1, 0x700100), (2, 0x900100)))
    second = "000000020000000000000008"
    (standby.wal / second).write_bytes(paged_segment(second))
    standby.replayed = Replayed(Timeline(3), Lsn(0x900200))
    standby.command(standby.standby(epoch=3, chain=chain, is_streaming=True, has_gaps=True))
    assert await standby.archiver.filler.fill() == ("00000002.history", "00000003.history", second)


@pytest.mark.parametrize(
    "replayed",
    [None, Replayed(Timeline(1), Lsn(0x900000)), Replayed(Timeline(2), Lsn(0x800100))],
    ids=["no stream", "the old timeline", "not past the fork"],
)
async def test_a_standby_that_has_not_replayed_past_the_fork_brings_nothing(
    pair: Pair, replayed: Replayed | None
) -> None:
    """Its last segment may be half received, over what a recycled file held."""
    standby = await pair.after_a_promotion()
    standby.replayed = replayed
    assert await standby.archiver.filler.fill() == ()
    assert await standby.wal_in_store(SIX) is None


@pytest.mark.parametrize(
    "flags",
    [{"has_gaps": False}, {"is_streaming": False}, {"is_withholding": True}],
    ids=["no gaps", "no stream", "promised"],
)
async def test_nothing_is_brought_that_nobody_lacks_or_after_a_promise(pair: Pair, flags: dict[str, bool]) -> None:
    standby = await pair.after_a_promotion()
    pair.asked(**flags)
    assert await standby.archiver.filler.fill() == ()


async def test_a_standby_whose_history_is_not_the_accepted_one_brings_nothing(pair: Pair) -> None:
    standby = await pair.after_a_promotion()
    (standby.wal / "00000002.history").write_bytes(history_content((1, 0x700100)))
    assert await standby.archiver.filler.fill() == ()
    assert await standby.wal_in_store(SIX) is None


def recycled_half_way() -> bytes:
    """The file has been taken for a later segment, and that was begun to be written from its second page on."""
    later = paged_segment("000000010000000000000009")
    return paged_segment(SIX)[:8192] + later[8192 : SIZE.size_bytes // 2] + paged_segment(SIX)[SIZE.size_bytes // 2 :]


def with_a_hole() -> bytes:
    whole = paged_segment(SIX)
    return whole[:16384] + bytes(8192) + whole[24576:]


@pytest.mark.parametrize(
    "content",
    [recycled_half_way(), with_a_hole(), paged_segment(FIVE), paged_segment(SIX)[:-8192], b""],
    ids=["recycled", "a hole", "another segment", "short", "empty"],
)
async def test_a_file_that_is_not_what_its_name_says_is_not_brought(pair: Pair, content: bytes) -> None:
    standby = await pair.after_a_promotion()
    (standby.wal / SIX).write_bytes(content)
    assert await standby.archiver.filler.fill() == ()
    assert await standby.wal_in_store(SIX) is None
    await pair.look()
    assert pair.gaps == (SIX,), "and it is told on"


async def test_a_segment_that_was_finished_early_ends_with_zeros(pair: Pair) -> None:
    standby = await pair.after_a_promotion()
    (standby.wal / SIX).write_bytes(paged_segment(SIX, filled_bytes=5 * 8192))
    assert await standby.archiver.filler.fill() == (SIX,)


async def test_what_nobody_can_fill_is_asked_about_more_and_more_rarely_until_something_changes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look lists a part of the archive."""
    standby = await pair.after_a_promotion()
    monkeypatch.setattr("instance_manager.archive.archiver.FILL_PAUSE_S", 0.01)
    looks: list[float] = []

    async def fill() -> tuple[str, ...]:
        looks.append(monotonic_s())
        return ()

    standby.archiver.filler.fill = fill  # type: ignore[method-assign]
    filling = asyncio.create_task(standby.archiver._fill())
    try:
        await until(lambda: len(looks) >= 5)
        assert looks[4] - looks[3] >= 0.07
        # The next doubling is far off; a new epoch does not wait for it.
        await until(lambda: len(looks) >= 8, deadline_s=20)
        standby.command(standby.standby(epoch=3, chain=CHAIN, is_streaming=True, has_gaps=True))
        changed_s = monotonic_s()
        await until(lambda: looks[-1] > changed_s)
        assert looks[-1] - changed_s < 1.0
    finally:
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)


async def test_orders_that_change_meanwhile_end_it(pair: Pair) -> None:
    """Whatever it has begun under an epoch that is over is looked at anew."""
    standby = await pair.after_a_promotion()
    ensure = standby.archiver.filler._ensure_archive

    async def and_then_another_epoch(orders) -> None:  # type: ignore[no-untyped-def]
        await ensure(orders)
        standby.command(standby.standby(epoch=3, chain=CHAIN, is_streaming=True, has_gaps=True))

    standby.archiver.filler._ensure_archive = and_then_another_epoch
    with pytest.raises(NotArchived, match="orders have changed"):
        await standby.archiver.filler.fill()
    assert await standby.wal_in_store(SIX) is None


async def test_what_another_has_put_there_is_never_replaced(pair: Pair) -> None:
    standby = await pair.after_a_promotion()
    make_ready(pair.primary.wal, SIX, paged_segment(SIX, filled_bytes=8192))
    missing = standby.archiver.filler._missing_segments

    async def looked_before(*words):  # type: ignore[no-untyped-def]
        found = await missing(*words)
        await pair.primary.archiver.pusher.push(SIX)
        return found

    standby.archiver.filler._missing_segments = looked_before  # type: ignore[method-assign]
    assert await standby.archiver.filler.fill() == ()
    assert standby.push_counters.conflicts == 1
    assert await standby.wal_in_store(SIX) == paged_segment(SIX, filled_bytes=8192)


async def test_a_restored_copys_standby_brings_nothing_to_its_sources_archive(pair: Pair) -> None:
    standby = await pair.after_a_promotion()
    orders = standby.standby(epoch=2, chain=CHAIN, is_streaming=True, has_gaps=True)
    copy = type(orders)(**{key: getattr(orders, key) for key in orders.__dataclass_fields__} | {"cluster_uid": "copy"})
    standby.command(copy)
    with pytest.raises(NotArchived, match="another"):
        await standby.archiver.filler.fill()
    assert f"{SERVER}/wals/{SIX[:16]}/{SIX}.zst" not in await standby.object_names()
