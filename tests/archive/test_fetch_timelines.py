"""Forks, gaps and the unfinished tail: recovery gets the accepted history, all that there is of it, and nothing else."""

from __future__ import annotations

import pytest
from archive_harness import Desk, chain_of
from fetch_steps import ABSENT, FORK, ON_2, PRESENT, SEGMENT, A, B, C, D, fetch, fill, put, restored
from wal_builders import history_content, make_ready, segment_content

from instance_manager.archive.content import MemoryContent, sha256_of
from instance_manager.archive.fetch import NotFetched
from instance_manager.archive.layout import Piece


async def test_a_gap_stops_recovery_instead_of_ending_it(desk: Desk) -> None:
    """A peer opened with everything behind the gap lost."""
    await fill(desk, A, C)
    assert await fetch(desk, A) is PRESENT
    with pytest.raises(NotFetched, match=f"{B} is not in the archive, but {C} is"):
        await fetch(desk, B)
    assert await fetch(desk, D) is ABSENT


async def test_a_gap_before_a_later_timeline_stops_recovery_too(local_desk: Desk) -> None:
    desk = local_desk
    chain = chain_of((2, 1, FORK))
    await fill(desk, A)
    desk.command(desk.primary(epoch=2, chain=chain))
    make_ready(desk.wal, "00000002.history", history_content((1, FORK)))
    desk.ready(ON_2)
    await desk.push(ON_2)
    with pytest.raises(NotFetched, match="the archive has a gap"):
        await fetch(desk, B)


async def test_a_standby_is_told_of_a_gap_as_not_now(local_desk: Desk) -> None:
    await fill(local_desk, A, C)
    assert await fetch(local_desk, B, "standby") is ABSENT


async def test_only_the_accepted_history_is_served(local_desk: Desk) -> None:
    """An old primary went on alone behind the fork, and archived it."""
    desk = local_desk
    await fill(desk, B, C, D)
    desk.command(desk.standby(chain=chain_of((2, 1, FORK))))
    assert await fetch(desk, B) is PRESENT
    assert await fetch(desk, D) is ABSENT
    assert await fetch(desk, C) is PRESENT
    cut = FORK & (SEGMENT - 1)
    assert restored(desk) == segment_content(C)[:cut] + bytes(SEGMENT - cut)
    assert desk.archiver.status.fetch.cut_at_fork == 1


async def test_a_rewind_gets_its_own_old_log_whole(local_desk: Desk) -> None:
    desk = local_desk
    await fill(desk, C, chain=chain_of((2, 1, FORK)))
    assert await fetch(desk, C, "rewind", to=C) is PRESENT
    assert restored(desk, C) == segment_content(C)
    assert desk.archiver.fetcher._prefetch._under_way == {}


async def test_histories_of_dead_ends_are_not_served_and_skipped_numbers_are_empty(local_desk: Desk) -> None:
    desk = local_desk
    await fill(desk, A)
    await put(desk, "00000003.history", history_content((1, 0x600000)))
    await put(desk, "00000009.history", history_content((1, FORK)))
    await put(desk, "0000000B.history", history_content((9, 0x900000)))
    desk.command(desk.standby(chain=chain_of((9, 1, FORK))))
    answers = {}
    for number in range(2, 13):
        name = f"{number:08X}.history"
        (desk.wal / "RECOVERYHISTORY").unlink(missing_ok=True)
        if await fetch(desk, name, to="RECOVERYHISTORY") is PRESENT:
            answers[number] = restored(desk, "RECOVERYHISTORY")
    assert answers == dict.fromkeys(range(2, 9), b"") | {9: history_content((1, FORK))}


async def test_without_the_agents_word_the_newest_timeline_of_the_archive_counts(desk: Desk) -> None:
    await fill(desk, A, C)
    await put(desk, "00000004.history", history_content((1, FORK)))
    assert await fetch(desk, "00000002.history") is PRESENT
    assert restored(desk) == b""
    assert await fetch(desk, "00000004.history") is PRESENT
    assert restored(desk) == history_content((1, FORK))
    assert await fetch(desk, "00000005.history") is ABSENT
    assert await fetch(desk, C) is PRESENT
    cut = FORK & (SEGMENT - 1)
    assert restored(desk)[cut:] == bytes(SEGMENT - cut)


async def test_an_accepted_timeline_without_its_history_stops_recovery(local_desk: Desk) -> None:
    await fill(local_desk, A, chain=chain_of((2, 1, FORK)))
    with pytest.raises(NotFetched, match="part of the accepted history"):
        await fetch(local_desk, "00000002.history")


async def put_piece(desk: Desk, name: str, piece: Piece, content: bytes | None = None) -> None:
    part = segment_content(name)[piece.start : piece.end] if content is None else content
    packed = b"".join(desk.layout.codec.compressed([part], len(part)))
    metadata = {"sha256": sha256_of([segment_content(name)[piece.start : piece.end]])}
    await desk.store.create(desk.layout.piece(name, piece), MemoryContent.of(packed), metadata=metadata, deadline_s=10)


async def test_the_unfinished_segment_is_joined_from_its_pieces(desk: Desk) -> None:
    await fill(desk, A)
    for piece in (Piece(0, 20_000), Piece(20_000, 50_000), Piece(0, 30_000), Piece(60_000, 70_000)):
        await put_piece(desk, B, piece)
    assert await fetch(desk, B) is PRESENT
    assert restored(desk) == segment_content(B)[:50_000] + bytes(SEGMENT - 50_000)
    assert desk.archiver.status.fetch.joined_tails == 1
    assert await fetch(desk, B, "standby") is ABSENT
    assert await fetch(desk, B, "rewind") is ABSENT


async def test_a_whole_segment_goes_before_its_pieces(local_desk: Desk) -> None:
    await fill(local_desk, A)
    await put_piece(local_desk, A, Piece(0, 20_000))
    assert await fetch(local_desk, A) is PRESENT
    assert restored(local_desk) == segment_content(A)


async def test_pieces_before_a_gap_do_not_end_a_recovery(local_desk: Desk) -> None:
    await fill(local_desk, A, C)
    await put_piece(local_desk, B, Piece(0, 20_000))
    with pytest.raises(NotFetched, match="gap"):
        await fetch(local_desk, B)


async def test_a_damaged_piece_stops_recovery(local_desk: Desk) -> None:
    await fill(local_desk, A)
    await put_piece(local_desk, B, Piece(0, 20_000), segment_content(B, seed=3)[:20_000])
    with pytest.raises(NotFetched, match="other content than was streamed"):
        await fetch(local_desk, B)


@pytest.mark.parametrize("piece_end", [None, 0x50, 0x200])
async def test_of_the_segment_with_the_fork_the_partial_one_serves_up_to_the_fork(
    local_desk: Desk, piece_end: int | None
) -> None:
    """Everything was lost right after a promotion: only what the new primary left of the old timeline is there."""
    desk = local_desk
    await fill(desk, A, B)
    desk.ready(f"{C}.partial")
    desk.command(desk.primary(epoch=2))
    await desk.push(f"{C}.partial")
    if piece_end is not None:
        await put_piece(desk, C, Piece(0, piece_end))
    await put(desk, "00000002.history", history_content((1, FORK)))
    desk.command(desk.standby(epoch=2, chain=chain_of((2, 1, FORK))))
    assert await fetch(desk, ON_2) is ABSENT
    assert await fetch(desk, C) is PRESENT
    cut = FORK & (SEGMENT - 1)
    assert restored(desk) == segment_content(C)[:cut] + bytes(SEGMENT - cut)
