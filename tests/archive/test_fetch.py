"""WAL fetch: "absent" is only what is proven, and what is handed over is whole, right, and of the accepted history."""

from __future__ import annotations

import asyncio
import bz2
from dataclasses import replace
from pathlib import Path

import pytest
from archive_harness import SERVER, Desk, desk_at, until
from fault_proxy import FaultProxy
from fetch_steps import ABSENT, PRESENT, SEGMENT, A, B, C, D, fetch, fill, put, restored
from s3_server import admin
from wal_builders import SYSTEM, segment_content

from instance_manager.archive.codecs import Codec
from instance_manager.archive.content import MemoryContent, sha256_of
from instance_manager.archive.fetch import FetchSettings, Mode, NotFetched
from instance_manager.archive.layout import Layout
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.threads import monotonic_s


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


async def test_an_object_that_is_not_the_one_that_was_stored_stops_recovery(local_desk: Desk) -> None:
    """Whole, with a right checksum and the right first page, but another."""
    await fill(local_desk, A)
    stored = b"".join(local_desk.layout.codec.compressed([segment_content(C)], SEGMENT))
    told = {"stored-sha256": sha256_of([stored])}
    await put(local_desk, B, segment_content(B), **{"stored-sha256": sha256_of([b""])})
    await put(local_desk, C, segment_content(C, seed=2), **told)
    for name in (B, C):
        with pytest.raises(NotFetched, match="is not the object that was stored"):
            await fetch(local_desk, name)
    await local_desk.store.delete(local_desk.layout.wal(C), deadline_s=10)
    await put(local_desk, C, segment_content(C), **told)
    assert await fetch(local_desk, C) is PRESENT
    assert restored(local_desk) == segment_content(C)


async def test_another_systems_archive_is_not_one_that_ends_here(local_desk: Desk) -> None:
    await fill(local_desk, A)
    local_desk.command(local_desk.primary(epoch=2, system=SYSTEM + 1))
    for name in (A, "00000002.history"):
        with pytest.raises(NotFetched, match="of the system"):
            await fetch(local_desk, name)


async def test_a_restored_copy_gets_nothing_of_the_log_that_its_source_wrote_on(local_desk: Desk) -> None:
    """Both promote to the same timeline number: to a standby of the copy its source's segments would look right."""
    await fill(local_desk, A)
    local_desk.command(replace(local_desk.standby(epoch=2), cluster_uid="uid-2"))
    modes: tuple[Mode, ...] = ("standby", "rewind")
    for mode in modes:
        with pytest.raises(NotFetched, match="another cluster of the same system"):
            await fetch(local_desk, A, mode)
    assert await fetch(local_desk, A, "recovery") is PRESENT, "that is how a copy is made"
    with pytest.raises(NotFetched, match="another cluster of the same system"):
        await fetch(local_desk, A, "standby")


async def test_no_archive_at_all_is_not_one_that_ends_here(tmp_path: Path, desk: Desk) -> None:
    with pytest.raises(NotFetched, match=r"there is no archive at orders: mend archive\.server_name"):
        await fetch(desk, A)


async def test_before_the_agent_has_spoken_nothing_is_absent(tmp_path: Path, directory_store: DirectoryStore) -> None:
    async with desk_at(tmp_path / "i", directory_store) as desk:
        desk.archiver.orders._orders = None
        with pytest.raises(NotFetched, match="has not told"):
            await fetch(desk, A)


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
