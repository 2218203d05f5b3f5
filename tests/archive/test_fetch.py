"""WAL fetch: "absent" is only what is proven, and what is handed over is whole, right, and of the accepted history."""

from __future__ import annotations

import asyncio
import bz2
from pathlib import Path

import pytest
from archive_harness import SERVER, Desk, chain_of, desk_at, until
from fault_proxy import FaultProxy
from s3_server import admin
from wal_builders import SIZE, SYSTEM, history_content, make_ready, segment_content

from instance_manager.archive.codecs import Codec
from instance_manager.archive.content import MemoryContent, sha256_of
from instance_manager.archive.fetch import Fetched, FetchSettings, Mode, NotFetched
from instance_manager.archive.layout import Layout, Piece
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.core.types import TimelineChain
from instance_manager.threads import monotonic_s

A, B, C, D = (f"00000001000000000000000{number}" for number in (5, 6, 7, 8))
ON_2 = "000000020000000000000007"
SEGMENT = SIZE.size_bytes
FORK = 0x700100
PRESENT, ABSENT = Fetched.PRESENT, Fetched.ABSENT


async def fill(desk: Desk, *names: str, chain: TimelineChain | None = None) -> None:
    """Archive these, then be a standby that has lost its stream."""
    desk.command(desk.primary(epoch=1))
    desk.ready(*names)
    for name in names:
        await desk.push(name)
        (desk.wal / name).unlink()
    desk.command(desk.standby(epoch=1, chain=chain))


async def fetch(desk: Desk, name: str, mode: Mode = "recovery", to: str = "RECOVERYXLOG") -> Fetched:
    return await desk.archiver.fetcher.fetch(mode, name, desk.wal / to)


def restored(desk: Desk, to: str = "RECOVERYXLOG") -> bytes:
    return (desk.wal / to).read_bytes()


@pytest.mark.parametrize("mode", ["standby", "recovery", "rewind"])
async def test_what_was_archived_comes_back(desk: Desk, mode: Mode) -> None:
    await fill(desk, A, B)
    for name in (A, B):
        assert await fetch(desk, name, mode) is PRESENT
        assert restored(desk) == segment_content(name)
    assert (desk.wal / "RECOVERYXLOG").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", ["standby", "recovery", "rewind"])
async def test_the_end_of_the_archive_is_absent(desk: Desk, mode: Mode) -> None:
    await fill(desk, A)
    for name in (B, "00000002.history"):
        assert await fetch(desk, name, mode) is ABSENT
    assert not (desk.wal / "RECOVERYXLOG").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "403 AccessDenied",
        "404",
        "404 NoSuchBucket",
        "500 InternalError",
        "503 SlowDown",
        "reset",
        "silent",
        "byte_a_second",
    ],
)
async def test_a_store_that_fails_is_never_an_absence_and_recovery_resumes(
    tmp_path: Path, s3: S3Store, proxy: FaultProxy, kind: str
) -> None:
    impatient = Patience(total_s=1.5, attempt_s=1.0, attempts_max=2, first_pause_s=0.01)
    async with desk_at(tmp_path / "i", s3, fetch=FetchSettings(recovery=impatient, prefetch_bytes=0)) as desk:
        await fill(desk, A, B)
        assert await fetch(desk, A) is PRESENT
        proxy.fail(kind)
        for name in (B, C, "00000002.history"):
            with pytest.raises(NotFetched):
                await fetch(desk, name)
    proxy.heal()
    async with desk_at(tmp_path / "i", s3) as resumed:
        assert await fetch(resumed, B) is PRESENT
        assert restored(resumed) == segment_content(B)
        assert await fetch(resumed, C) is ABSENT


async def test_a_listing_that_fails_is_no_absence_either(s3_desk: Desk, proxy: FaultProxy) -> None:
    await fill(s3_desk, A)
    proxy.fail("500 InternalError", path="list-type=2")
    with pytest.raises(NotFetched):
        await fetch(s3_desk, B)


async def test_an_answer_cut_short_is_fetched_again(s3_desk: Desk, proxy: FaultProxy) -> None:
    for kind in ("reset_in_the_body", "short_body"):
        (s3_desk.wal / A).unlink(missing_ok=True)
        await fill(s3_desk, A)
        await s3_desk.archiver.fetcher.close()
        fault = proxy.fail(kind, method="GET", path="/wals/00000001", times=2)
        assert await fetch(s3_desk, A) is PRESENT
        assert fault.met == 2
        assert restored(s3_desk) == segment_content(A)


async def put(desk: Desk, name: str, content: bytes, **metadata: str) -> None:
    packed = b"".join(desk.layout.codec.compressed([content], len(content)))
    await desk.store.create(desk.layout.wal(name), MemoryContent.of(packed), metadata=metadata, deadline_s=10)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (segment_content(B), "not what its name says"),
        (segment_content(C)[: SEGMENT // 2], "524288 bytes"),
        (segment_content(C) + b"x", "more than"),
        (bytes(SEGMENT), "not what its name says"),
        (b"", "0 bytes"),
    ],
)
async def test_a_wrong_segment_under_the_right_name_stops_recovery(
    local_desk: Desk, content: bytes, reason: str
) -> None:
    """Handed over it would promote silently."""
    await fill(local_desk, A)
    await put(local_desk, C, content)
    with pytest.raises(NotFetched, match=reason):
        await fetch(local_desk, C)
    assert not (local_desk.wal / "RECOVERYXLOG").exists()


async def test_content_that_is_not_what_was_archived_stops_recovery(local_desk: Desk) -> None:
    await fill(local_desk, A)
    await put(local_desk, C, segment_content(C, seed=2), sha256=sha256_of([segment_content(C)]))
    with pytest.raises(NotFetched, match="other content than was archived"):
        await fetch(local_desk, C)


async def test_another_systems_archive_is_not_one_that_ends_here(local_desk: Desk) -> None:
    await fill(local_desk, A)
    local_desk.command(local_desk.primary(epoch=2, system=SYSTEM + 1))
    for name in (A, "00000002.history"):
        with pytest.raises(NotFetched, match="of the system"):
            await fetch(local_desk, name)


async def test_no_archive_at_all_is_not_one_that_ends_here(tmp_path: Path, desk: Desk) -> None:
    with pytest.raises(NotFetched, match=r"there is no archive at orders: mend archive\.server_name"):
        await fetch(desk, A)


async def test_before_the_agent_has_spoken_nothing_is_absent(tmp_path: Path, directory_store: DirectoryStore) -> None:
    async with desk_at(tmp_path / "i", directory_store) as desk:
        desk.archiver.orders._orders = None
        with pytest.raises(NotFetched, match="has not told"):
            await fetch(desk, A)


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


async def test_while_it_streams_or_has_promised_a_standby_gets_its_answer_at_once(
    s3_desk: Desk, proxy: FaultProxy
) -> None:
    await fill(s3_desk, A)
    proxy.requests.clear()
    s3_desk.command(s3_desk.standby(is_streaming=True))
    assert await fetch(s3_desk, A, "standby") is ABSENT
    s3_desk.command(s3_desk.standby(is_withholding=True))
    assert await fetch(s3_desk, A, "standby") is ABSENT
    assert proxy.requests == []
    s3_desk.command(s3_desk.standby())
    assert await fetch(s3_desk, A, "standby") is PRESENT


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


async def test_segments_ahead_are_there_before_they_are_asked_for(desk: Desk) -> None:
    names = [f"0000000100000000000000{number:02X}" for number in range(5, 13)]
    await fill(desk, *names)
    for name in names:
        assert await fetch(desk, name) is PRESENT
        assert restored(desk) == segment_content(name)
        assert len(desk.archiver.fetcher._prefetch._under_way) <= 4
    assert desk.archiver.status.fetch.from_prefetch >= 6


async def test_what_has_come_ahead_is_kept_until_it_is_asked_for(local_desk: Desk) -> None:
    desk = local_desk
    await fill(desk, A, B, C, D)
    for number, name in enumerate((A, B, C, D)):
        assert await fetch(desk, name) is PRESENT
        assert restored(desk) == segment_content(name)
        under_way = desk.archiver.fetcher._prefetch._under_way
        await until(lambda: all(task.done() for task in under_way.values()))  # noqa: B023
        there = {path.name[:24] for path in (desk.wal / ".instance-manager-restore").iterdir()}
        assert there == set((B, C, D)[number:])


async def test_what_was_not_there_ahead_is_asked_for_again(local_desk: Desk) -> None:
    """A peer's flag of an end once seen ended every restore after it."""
    desk = local_desk
    await fill(desk, A)
    assert await fetch(desk, A) is PRESENT
    ahead = desk.archiver.fetcher._prefetch._under_way
    await until(lambda: all(task.done() for task in ahead.values()))
    await put(desk, B, segment_content(B))
    assert await fetch(desk, B) is PRESENT
    assert restored(desk) == segment_content(B)


async def test_a_restart_of_recovery_drops_what_was_ahead_and_leaves_nothing_behind(local_desk: Desk) -> None:
    desk = local_desk
    await fill(desk, A, B, C, D)
    for name in (A, B, A, C, D):
        assert await fetch(desk, name) is PRESENT
        assert restored(desk) == segment_content(name)
    async with desk_at(desk.wal.parent, desk.store) as restarted:
        assert await fetch(restarted, A) is PRESENT
        spool = restarted.wal / ".instance-manager-restore"
        known = set(restarted.archiver.fetcher._prefetch._under_way)
        await until(lambda: all(task.done() for task in restarted.archiver.fetcher._prefetch._under_way.values()))
        assert {path.name[:24] for path in spool.iterdir()} <= known


async def test_a_request_that_was_left_behind_never_takes_a_later_ones_place(s3_desk: Desk, proxy: FaultProxy) -> None:
    """Postgres was killed while it waited, started again, and asked for another file under the same path."""
    await fill(s3_desk, A, B)
    assert await fetch(s3_desk, B) is PRESENT
    await s3_desk.archiver.fetcher.close()
    fault = proxy.fail("slow", path=A)
    left_behind = asyncio.create_task(fetch(s3_desk, A))
    await until(lambda: fault.met)
    assert await fetch(s3_desk, B) is PRESENT
    with pytest.raises(NotFetched, match="another request"):
        await left_behind
    await until(lambda: s3_desk.store._threads._in_flight == 0)  # type: ignore[attr-defined]
    assert restored(s3_desk) == segment_content(B)


async def test_a_cancelled_request_puts_nothing_in_place(s3_desk: Desk, proxy: FaultProxy) -> None:
    await fill(s3_desk, A)
    fault = proxy.fail("slow", path=A)
    cancelled = asyncio.create_task(fetch(s3_desk, A))
    await until(lambda: fault.met)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await until(lambda: s3_desk.store._threads._in_flight == 0)  # type: ignore[attr-defined]
    assert not (s3_desk.wal / "RECOVERYXLOG").exists()


async def test_an_archive_that_is_emptied_while_it_is_read_has_not_ended(
    s3_desk: Desk, bucket: str, s3_url: str
) -> None:
    await fill(s3_desk, A, B)
    assert await fetch(s3_desk, A) is PRESENT
    await s3_desk.archiver.fetcher.close()
    client = admin(s3_url)
    for each in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=each["Key"])
    with pytest.raises(NotFetched, match="there is no archive"):
        await fetch(s3_desk, B)


async def test_only_a_file_in_pg_wal_is_ever_written(local_desk: Desk, tmp_path: Path) -> None:
    await fill(local_desk, A)
    for path in (tmp_path / "elsewhere", local_desk.wal / ".." / "postgresql.conf", local_desk.wal / "x" / "y"):
        with pytest.raises(NotFetched, match="is not a file in"):
            await local_desk.archiver.fetcher.fetch("recovery", A, path)
        assert not path.exists()


@pytest.mark.parametrize("codec", ["gzip", "lz4", "none", "bzip2"])
async def test_an_archive_of_another_codec_is_read(local_desk: Desk, codec: str) -> None:
    """As CloudNativePG or barman-cloud wrote it."""
    content = segment_content(A)
    packed = bz2.compress(content) if codec == "bzip2" else b"".join(Codec(codec).compressed([content], SEGMENT))
    name = Layout(SERVER, Codec(codec)).wal(A)
    await local_desk.store.create(name, MemoryContent.of(packed), deadline_s=10)
    assert await fetch(local_desk, A) is PRESENT
    assert restored(local_desk) == content
    assert await fetch(local_desk, B) is ABSENT


async def test_an_absence_told_to_a_standby_is_asked_again_after_a_second(
    local_desk: Desk,
) -> None:
    await fill(local_desk, A)
    assert await fetch(local_desk, B, "standby") is ABSENT
    await put(local_desk, B, segment_content(B))
    await until(lambda: local_desk.archiver.fetcher._absent_until_s[B] <= monotonic_s())
    assert await fetch(local_desk, B, "standby") is PRESENT
