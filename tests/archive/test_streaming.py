"""The unfinished segment in pieces: only what was flushed, few pieces, and none removed before its content is durable."""

from __future__ import annotations

from pathlib import Path

import pytest
from archive_harness import SERVER, Desk, chain_of, desk_at
from fault_proxy import FaultProxy
from hypothesis import given
from hypothesis import strategies as st
from wal_builders import SIZE, history_content, make_ready, segment_content

from instance_manager.archive.fetch import Fetched
from instance_manager.archive.layout import Piece, joined_pieces
from instance_manager.archive.streaming import LARGEST_PIECE_BYTES, Flushed, Ranked, next_piece, sweep_pieces
from instance_manager.core.types import Lsn, Timeline
from instance_manager.postgres.sql import SqlUnavailable
from instance_manager.threads import TooManyCalls

A, B = "000000010000000000000005", "000000010000000000000006"
START = 5 * SIZE.size_bytes


async def pieces(desk: Desk, name: str = A) -> list[Piece]:
    names = await desk.object_names(desk.layout.pieces(name))
    return [piece for each in names if (piece := desk.layout.piece_of(each)) is not None]


def flush(desk: Desk, offset: int, *, timeline: int = 1, name: str = A, seed: int = 0) -> None:
    """Postgres has flushed up to here; behind it the file holds what is not flushed yet."""
    (desk.wal / name).write_bytes(segment_content(name, seed=seed)[:offset] + b"\xee" * (SIZE.size_bytes - offset))
    desk.flushed = Flushed(Timeline(timeline), Lsn(SIZE.start_lsn(SIZE.parse(name)) + offset))


async def joined(desk: Desk, name: str = A) -> bytes:
    """What recovery would make of the pieces."""
    whole = b""
    for piece in joined_pieces(await pieces(desk, name)):
        content = await desk.stored(desk.layout.piece(name, piece))
        assert content is not None
        assert len(content) == piece.end - piece.start
        whole = whole[: piece.start] + content
    return whole


async def test_what_was_flushed_is_in_the_archive_after_a_step_and_nothing_else(desk: Desk) -> None:
    flush(desk, 1000)
    assert await desk.archiver.streamer.step()
    assert await joined(desk) == segment_content(A)[:1000]
    flush(desk, 70_000)
    assert await desk.archiver.streamer.step()
    assert await joined(desk) == segment_content(A)[:70_000]
    assert not await desk.archiver.streamer.step()
    assert desk.archiver.status.stream.durable_lsn == START + 70_000


async def test_what_is_told_never_passes_a_finished_segment_that_still_waits(local_desk: Desk) -> None:
    """By what is told the next primary decides what it archives again: the end of the one that waits was never streamed."""
    flush(local_desk, 5000)
    assert await local_desk.archiver.streamer.step()
    told = local_desk.archiver.status.stream
    make_ready(local_desk.wal, A, segment_content(A))
    (local_desk.wal / B).write_bytes(segment_content(B))
    local_desk.flushed = Flushed(Timeline(1), Lsn(START + SIZE.size_bytes + 1000))
    assert await local_desk.archiver.streamer.step()
    assert not await local_desk.archiver.streamer.step()
    assert told.durable_lsn == START + 5000
    await local_desk.push(A)
    assert not await local_desk.archiver.streamer.step()
    assert told.durable_lsn == START + SIZE.size_bytes + 1000


async def test_a_disk_that_answers_no_call_any_more_is_counted_and_waited_for(local_desk: Desk) -> None:
    async def stuck() -> Flushed | None:
        raise TooManyCalls("16 calls of streaming do not come back")

    local_desk.archiver.streamer._flushed = stuck
    assert not await local_desk.archiver.streamer.step()
    assert "do not come back" in local_desk.archiver.status.stream.last_error


async def test_many_steps_leave_few_pieces_and_lose_nothing(local_desk: Desk) -> None:
    for number in range(1, 101):
        flush(local_desk, number * 1000)
        assert await local_desk.archiver.streamer.step()
        assert len(await pieces(local_desk)) <= 7
    assert await joined(local_desk) == segment_content(A)[:100_000]
    sent = local_desk.archiver.status.stream.piece_bytes
    assert sent < 100_000 * 5


@given(st.lists(st.integers(1, 3 << 20), min_size=1, max_size=60))
def test_merging_keeps_everything_covered_and_the_pieces_few(steps: list[int]) -> None:
    made: list[Ranked] = []
    end = 0
    for step in steps:
        end += step
        while not made or made[-1].piece.end < end:
            added, replaced = next_piece(made, end)
            assert added.piece.end - added.piece.start <= LARGEST_PIECE_BYTES
            assert [each.piece for each in replaced] == [each.piece for each in made[len(made) - len(replaced) :]][::-1]
            if replaced:
                assert (added.piece.start, added.piece.end > replaced[0].piece.end) == (replaced[-1].piece.start, True)
            made = [*made[: len(made) - len(replaced)], added]
    assert [each.piece.start for each in made] == [0, *(each.piece.end for each in made[:-1])]
    assert len(made) <= 7 + end // LARGEST_PIECE_BYTES * 7


async def test_pieces_go_only_when_the_whole_segment_is_durable(desk: Desk) -> None:
    flush(desk, 5000)
    await desk.archiver.streamer.step()
    make_ready(desk.wal, A, segment_content(A))
    flush(desk, 3000, name=B)
    await desk.archiver.streamer.step()
    assert await pieces(desk, A) == [Piece(0, 5000)]
    await desk.push(A)
    await desk.archiver.streamer.step()
    assert await pieces(desk, A) == []
    assert await pieces(desk, B) == [Piece(0, 3000)]


async def test_a_merged_piece_is_there_before_those_that_it_replaces_go(s3_desk: Desk, proxy: FaultProxy) -> None:
    flush(s3_desk, 1000)
    await s3_desk.archiver.streamer.step()
    proxy.fail("500 InternalError", method="DELETE")
    flush(s3_desk, 2000)
    assert not await s3_desk.archiver.streamer.step()
    assert set(await pieces(s3_desk)) == {Piece(0, 1000), Piece(0, 2000)}
    proxy.heal()
    flush(s3_desk, 2500)
    assert await s3_desk.archiver.streamer.step()
    assert await joined(s3_desk) == segment_content(A)[:2500]
    assert Piece(0, 1000) not in await pieces(s3_desk)


async def test_while_the_store_fails_nothing_is_claimed_and_then_it_goes_on(s3_desk: Desk, proxy: FaultProxy) -> None:
    flush(s3_desk, 1000)
    await s3_desk.archiver.streamer.step()
    durable = s3_desk.archiver.status.stream.durable_lsn
    proxy.fail("503 SlowDown")
    flush(s3_desk, 9000)
    assert not await s3_desk.archiver.streamer.step()
    assert s3_desk.archiver.status.stream.durable_lsn == durable
    assert "SlowDown" in s3_desk.archiver.status.stream.last_error
    proxy.heal()
    assert await s3_desk.archiver.streamer.step()
    assert await joined(s3_desk) == segment_content(A)[:9000]


async def test_a_restarted_archiver_goes_on_where_the_last_one_ended(desk: Desk, tmp_path: Path) -> None:
    for number in range(1, 4):
        flush(desk, number * 1000)
        await desk.archiver.streamer.step()
    async with desk_at(desk.wal.parent, desk.store) as restarted:
        flush(restarted, 3000)
        assert not await restarted.archiver.streamer.step()
        flush(restarted, 4000)
        assert await restarted.archiver.streamer.step()
        assert await joined(restarted) == segment_content(A)[:4000]
        assert len(await pieces(restarted)) <= 3


async def test_pieces_that_are_not_what_the_disk_holds_are_replaced(local_desk: Desk) -> None:
    flush(local_desk, 1000, seed=1)
    await local_desk.archiver.streamer.step()
    async with desk_at(local_desk.wal.parent, local_desk.store) as restarted:
        flush(restarted, 900, seed=2)
        assert await restarted.archiver.streamer.step()
        assert await joined(restarted) == segment_content(A, seed=2)[:900]


async def test_nothing_is_streamed_without_a_permit_or_by_a_standby_or_off_the_accepted_timeline(desk: Desk) -> None:
    flush(desk, 1000)
    desk.now_s = 1060.0
    assert not await desk.archiver.streamer.step()
    desk.now_s = 1000.0
    desk.flushed = None
    assert not await desk.archiver.streamer.step()
    flush(desk, 1000)
    desk.command(desk.primary(epoch=2, chain=chain_of((2, 1, START + 100))))
    assert not await desk.archiver.streamer.step()
    assert await desk.object_names("") == []


async def test_the_time_in_which_it_was_no_primary_is_no_lag(local_desk: Desk) -> None:
    desk = local_desk
    flush(desk, 1000)
    assert await desk.archiver.streamer.step()
    assert desk.archiver.status.stream.covered_s is not None
    desk.now_s = 1060.0
    assert not await desk.archiver.streamer.step()
    assert desk.archiver.status.stream.covered_s is None


async def test_a_timelines_history_is_there_before_its_first_piece(desk: Desk) -> None:
    name = "000000020000000000000005"
    desk.command(desk.primary(epoch=2, chain=chain_of((2, 1, START + 100))))
    flush(desk, 1000, timeline=2, name=name)
    assert not await desk.archiver.streamer.step()
    assert "00000002.history" in desk.archiver.status.stream.last_error
    make_ready(desk.wal, "00000002.history", history_content((1, START + 100)))
    assert await desk.archiver.streamer.step()
    assert await desk.object_names() == [desk.layout.wal("00000002.history")]
    assert await pieces(desk, name) == [Piece(0, 1000)]


async def test_a_postgres_that_does_not_answer_is_counted_and_waited_for(local_desk: Desk) -> None:
    async def silent() -> Flushed | None:
        raise SqlUnavailable("starting up")

    local_desk.archiver.streamer._flushed = silent
    assert not await local_desk.archiver.streamer.step()
    assert "starting up" in local_desk.archiver.status.stream.last_error


async def test_pieces_left_by_a_crash_go_when_their_segment_is_there(desk: Desk) -> None:
    flush(desk, 5000)
    await desk.archiver.streamer.step()
    assert await sweep_pieces(desk.store, desk.layout, "", deadline_s=10) == 0
    make_ready(desk.wal, A, segment_content(A))
    await desk.push(A)
    assert await sweep_pieces(desk.store, desk.layout, A, deadline_s=10) == 0
    assert await sweep_pieces(desk.store, desk.layout, B, deadline_s=10) == 1
    assert await desk.object_names(f"{SERVER}/instance-manager/pieces/") == []


async def test_what_was_streamed_is_what_recovery_gets(desk: Desk, tmp_path: Path) -> None:
    flush(desk, 8000)
    await desk.archiver.streamer.step()
    flush(desk, 123_456)
    await desk.archiver.streamer.step()
    async with desk_at(tmp_path / "new", desk.store) as fresh:
        fresh.command(fresh.standby())
        assert await fresh.archiver.fetcher.fetch("recovery", A, fresh.wal / "RECOVERYXLOG") is Fetched.PRESENT
        restored = (fresh.wal / "RECOVERYXLOG").read_bytes()
        assert restored == segment_content(A)[:123_456] + bytes(SIZE.size_bytes - 123_456)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 64])
def test_the_nth_piece_replaces_as_many_as_n_has_zeros_at_its_end(number: int) -> None:
    made: list[Ranked] = []
    replaced: list[Ranked] = []
    for step in range(1, number + 1):
        added, replaced = next_piece(made, step)
        made = [*made[: len(made) - len(replaced)], added]
    assert len(replaced) == (number & -number).bit_length() - 1
    assert len(made) == number.bit_count()
