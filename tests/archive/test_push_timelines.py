"""Histories, forks and partial segments: only the accepted history is archived, and its history files first."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from archive_harness import SERVER, Desk, chain_of, desk_at
from wal_builders import history_content, make_ready, segment_content

from instance_manager.archive.upload import NotArchived

A, B, C, D = (f"00000001000000000000000{number}" for number in (5, 6, 7, 8))


async def test_a_history_goes_out_before_any_file_of_its_timeline(desk: Desk) -> None:
    name = "000000020000000000000007"
    desk.command(desk.primary(chain=chain_of((2, 1, 0x700100))))
    desk.ready(name)
    with pytest.raises(NotArchived, match=r"waits: 00000002\.history"):
        await desk.push(name)
    assert await desk.object_names() == []
    make_ready(desk.wal, "00000002.history", history_content((1, 0x700100)))
    await desk.push(name)
    assert await desk.object_names() == [f"{SERVER}/wals/00000002.history.zst", f"{SERVER}/wals/{name[:16]}/{name}.zst"]
    assert await desk.wal_in_store("00000002.history") == history_content((1, 0x700100))


async def test_a_history_that_only_the_archive_has_is_enough(desk: Desk) -> None:
    name = "000000020000000000000007"
    make_ready(desk.wal, "00000002.history", history_content((1, 0x700100)))
    await desk.push("00000002.history")
    (desk.wal / "00000002.history").unlink()
    desk.archiver.pusher._histories.clear()
    desk.ready(name)
    await desk.push(name)
    assert await desk.wal_in_store(name) == segment_content(name)


async def test_of_two_promotions_to_one_timeline_the_archive_takes_one(tmp_path: Path, desk: Desk) -> None:
    name, history = "000000020000000000000007", "00000002.history"
    async with desk_at(tmp_path / "other", desk.store) as other:
        for each, position in ((desk, 0x700100), (other, 0x700200)):
            make_ready(each.wal, history, history_content((1, position)))
            each.ready(name, seed=position)
        outcomes = await asyncio.gather(desk.push(history), other.push(history), return_exceptions=True)
        assert sorted(str(type(each).__name__) for each in outcomes) == ["ArchiveConflict", "NoneType"]
        winner, loser = (desk, other) if outcomes[0] is None else (other, desk)
        await winner.push(name)
        with pytest.raises(NotArchived, match="other content"):
            await loser.push(name)
        seed = 0x700100 if winner is desk else 0x700200
        assert await desk.wal_in_store(name) == segment_content(name, seed=seed)
        assert await desk.wal_in_store(history) == history_content((1, seed))


@pytest.mark.parametrize("content", [b"not a history\n", history_content((2, 5)), history_content((1, 9), (1, 10))])
async def test_a_history_that_cannot_be_is_not_archived(local_desk: Desk, content: bytes) -> None:
    make_ready(local_desk.wal, "00000002.history", content)
    with pytest.raises(NotArchived, match="history of timeline 2"):
        await local_desk.push("00000002.history")
    assert await local_desk.object_names() == []


async def test_a_history_other_than_the_accepted_one_is_not_archived(local_desk: Desk) -> None:
    desk = local_desk
    desk.command(desk.primary(epoch=3, chain=chain_of((2, 1, 0x700100), (5, 2, 0x900000))))
    make_ready(desk.wal, "00000005.history", history_content((1, 0x700100), (2, 0x900008)))
    with pytest.raises(NotArchived, match="not the history that was accepted"):
        await desk.push("00000005.history")
    make_ready(desk.wal, "00000005.history", history_content((1, 0x700100), (2, 0x900000)))
    await desk.push("00000005.history")


async def test_nothing_past_the_fork_is_archived_and_it_does_not_stop_what_comes_after(local_desk: Desk) -> None:
    """A former primary that is primary again: what it wrote alone is no part of the accepted history."""
    desk = local_desk
    desk.command(desk.primary(epoch=3, chain=chain_of((2, 1, 0x700100))))
    make_ready(desk.wal, "00000002.history", history_content((1, 0x700100)))
    later = "000000020000000000000007"
    desk.ready(B, C, D, later)
    for name in (B, C, D, later):
        await desk.push(name)
    assert [name.rpartition("/")[2] for name in await desk.object_names()] == [
        f"{B}.zst",
        "00000002.history.zst",
        f"{later}.zst",
    ]
    assert desk.push_counters.past_the_fork == 2


async def test_the_history_of_a_dead_end_is_left_out(local_desk: Desk) -> None:
    desk = local_desk
    desk.command(desk.primary(epoch=4, chain=chain_of((4, 1, 0x700100))))
    make_ready(desk.wal, "00000003.history", history_content((1, 0x600100)))
    make_ready(desk.wal, "00000002.history", b"")
    await desk.push("00000003.history")
    await desk.push("00000002.history")
    assert await desk.object_names() == []
    assert desk.push_counters.past_the_fork == 2


async def test_a_timeline_that_the_agent_has_not_told_of_waits(local_desk: Desk) -> None:
    local_desk.command(local_desk.primary(chain=chain_of()))
    local_desk.ready("000000020000000000000007")
    with pytest.raises(NotArchived, match="not told of yet"):
        await local_desk.push("000000020000000000000007")


async def test_partial_segments_of_two_promotions_are_both_kept(desk: Desk) -> None:
    name = f"{A}.partial"
    for seed in (1, 2):
        desk.ready(name, seed=seed)
        await desk.push(name)
    assert await desk.wal_in_store(name) == segment_content(A, seed=1)
    aside = await desk.object_names(f"{SERVER}/instance-manager/partials/")
    assert len(aside) == 1
    assert await desk.stored(aside[0]) == segment_content(A, seed=2)
    assert desk.push_counters.other_partials == 1
