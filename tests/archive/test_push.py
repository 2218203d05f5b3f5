"""WAL push: what is acknowledged is in the archive, once, right, and of this cluster's accepted history."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import zstandard
from archive_harness import Desk, desk_at, until
from fault_proxy import FaultProxy
from s3_server import admin, make_bucket, settings_for
from wal_builders import SIZE, SYSTEM, first_page, make_ready, segment_content

from instance_manager.archive import push, upload
from instance_manager.archive.content import MemoryContent, sha256_of
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.archive.upload import NotArchived, Prepared
from instance_manager.ports import ObjectInfo

A, B, C, D = (f"00000001000000000000000{number}" for number in (5, 6, 7, 8))
SEGMENT = SIZE.size_bytes


async def info_of(desk: Desk, name: str) -> ObjectInfo:
    found = await desk.store.info(desk.layout.wal(name), deadline_s=10)
    assert found is not None
    return found


async def settled(desk: Desk) -> None:
    """Until nothing is under way."""
    tasks = [begun.task for begun in desk.archiver.pusher._begun.values() if begun.task is not None]
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_acknowledged_segment_is_in_the_archive_with_its_digest_and_epoch(desk: Desk) -> None:
    desk.command(desk.primary(epoch=7))
    desk.ready(A)
    await desk.push(A)
    assert await desk.wal_in_store(A) == segment_content(A)
    found = await info_of(desk, A)
    stored = await desk.store.receive(found.name, lambda info, chunks: b"".join(chunks), deadline_s=10)
    assert found.metadata["stored-sha256"] == hashlib.sha256(stored or b"").hexdigest()
    assert (found.metadata["epoch"], found.metadata["instance"]) == ("7", "orders-1")
    assert found.size_bytes < SEGMENT / 3
    assert found.name == f"orders/wals/{A[:16]}/{A}.zst"


@pytest.mark.parametrize("codec", ["none", "lz4", "gzip"])
async def test_every_codec_may_be_chosen(tmp_path: Path, directory_store: DirectoryStore, codec: str) -> None:
    async with desk_at(tmp_path / "i", directory_store, codec=codec) as desk:
        desk.ready(A)
        await desk.push(A)
        assert await desk.wal_in_store(A) == segment_content(A)


async def test_files_behind_the_asked_one_go_out_with_it_and_are_acknowledged_one_by_one(desk: Desk) -> None:
    desk.ready(A, B, C)
    await desk.push(A)
    await settled(desk)
    assert len(await desk.object_names()) == 3
    assert desk.push_counters.archived == 3
    await desk.push(B)
    await desk.push(C)
    assert desk.push_counters.archived == 3
    assert desk.push_counters.look_ahead_hits == 2


async def test_the_next_file_is_compressed_while_the_store_is_waited_for(
    tmp_path: Path, directory_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk_at(tmp_path / "i", directory_store, parallel=1) as desk:
        desk.ready(A, B)
        compressed, asked = watched(desk, monkeypatch)
        task = asyncio.create_task(desk.push(A))
        await until(lambda: compressed == [A, B] and asked == [A], deadline_s=10)
        task.cancel()


async def test_what_takes_much_memory_is_not_put_aside_for_the_next_file(
    tmp_path: Path, directory_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "WAITING_MAX_BYTES", 1)
    async with desk_at(tmp_path / "i", directory_store, parallel=1) as desk:
        desk.ready(A, B)
        compressed, asked = watched(desk, monkeypatch)
        task = asyncio.create_task(desk.push(A))
        await until(lambda: asked == [A], deadline_s=10)
        assert desk.archiver.pusher._preparing.locked()
        assert compressed == [A]
        task.cancel()


def watched(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """What is compressed, and what the store is asked to create, for ever without an answer."""
    compressed: list[str] = []
    asked: list[str] = []
    prepare = upload.prepare

    def noted(path: Path, name: str, *rest: Any) -> Prepared:
        compressed.append(name)
        return prepare(path, name, *rest)

    async def never(object_name: str, *rest: object) -> bool:
        asked.append(object_name.rpartition("/")[2].removesuffix(".zst"))
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(push, "prepare", noted)
    monkeypatch.setattr(desk.archiver.pusher._uploader, "create", never)
    return compressed, asked


async def test_a_bad_file_behind_the_asked_one_is_not_the_asked_ones_failure(desk: Desk) -> None:
    desk.ready(A, C)
    make_ready(desk.wal, B, segment_content(D))
    await desk.push(A)
    await settled(desk)
    with pytest.raises(NotArchived, match="begins at 0/800000, not at 0/600000"):
        await desk.push(B)
    await desk.push(C)
    assert await desk.wal_in_store(B) is None
    assert (desk.wal / "archive_status" / f"{B}.ready").exists()


async def test_a_file_behind_that_is_gone_is_not_the_asked_ones_failure(local_desk: Desk) -> None:
    local_desk.ready(A, B)
    (local_desk.wal / B).unlink()
    await local_desk.push(A)
    with pytest.raises(NotArchived, match="No such file"):
        await local_desk.push(B)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (first_page(A, system=SYSTEM + 1) + bytes(SEGMENT - 40), "of the system"),
        (segment_content(B), "begins at"),
        (segment_content(A)[:-1], "has 1048575 bytes"),
        (segment_content(A) + b"x", "has 1048577 bytes"),
        (bytes(SEGMENT), "magic number"),
    ],
)
async def test_what_is_not_the_segment_of_its_name_is_never_archived(
    local_desk: Desk, content: bytes, reason: str
) -> None:
    make_ready(local_desk.wal, A, content)
    with pytest.raises(NotArchived, match=reason):
        await local_desk.push(A)
    assert await local_desk.object_names() == []


async def test_without_a_valid_permit_nothing_is_written(desk: Desk) -> None:
    desk.ready(A)
    desk.now_s = 1060.0
    with pytest.raises(NotArchived, match="no valid write permit"):
        await desk.push(A)
    desk.now_s = 1000.0
    desk.command(desk.standby(epoch=2))
    with pytest.raises(NotArchived, match="no valid write permit"):
        await desk.push(A)
    assert await desk.object_names("") == []


async def test_a_permit_that_ends_while_the_store_fails_ends_the_retries(s3_desk: Desk, proxy: FaultProxy) -> None:
    desk = s3_desk
    desk.ready(A, B)
    await desk.push(A)
    await settled(desk)
    desk.ready(C)
    fault = proxy.fail("503 SlowDown", method="PUT")
    pushing = asyncio.create_task(desk.push(C))
    await until(lambda: fault.met > 0)
    desk.now_s = 1060.0
    with pytest.raises(NotArchived):
        await pushing
    proxy.heal()
    assert await desk.wal_in_store(C) is None


async def test_an_epoch_that_ended_writes_nothing_more(desk: Desk) -> None:
    desk.ready(A)
    orders = desk.primary(epoch=1)
    desk.command(desk.primary(epoch=2))
    with pytest.raises(NotArchived, match="epoch 1 is over, 2 has begun"):
        await desk.archiver.pusher._upload(A, orders)
    assert await desk.object_names() == []


async def test_the_same_content_is_a_success_however_often_it_is_asked(desk: Desk) -> None:
    desk.ready(A)
    await desk.push(A)
    desk.ready(A)
    await desk.push(A)
    assert desk.push_counters.already_there == 1


async def test_the_same_content_by_another_compressor_is_the_same(desk: Desk) -> None:
    """As barman-cloud or another version of the codec leaves it: no digest of ours, other bytes."""
    stored = b"".join(desk.layout.codec.compressed([segment_content(A)[:100], segment_content(A)[100:]], SEGMENT))
    await desk.store.create(desk.layout.wal(A), MemoryContent.of(stored), deadline_s=10)
    desk.ready(A)
    await desk.push(A)
    assert desk.push_counters.already_there == 1


@pytest.mark.parametrize("seed", [0, 1])
async def test_what_another_version_of_the_codec_has_stored_is_compared_by_its_content(
    s3_desk: Desk, seed: int
) -> None:
    """Its digest is of other bytes than ours, which tells nothing of what is in them."""
    stored = zstandard.ZstdCompressor(level=9).compress(segment_content(A, seed=seed))
    metadata = {"stored-sha256": hashlib.sha256(stored).hexdigest(), "epoch": "1"}
    await s3_desk.store.create(s3_desk.layout.wal(A), MemoryContent.of(stored), metadata=metadata, deadline_s=10)
    s3_desk.ready(A)
    if seed:
        with pytest.raises(NotArchived, match=f"other content .*{sha256_of([segment_content(A)])[:16]}"):
            await s3_desk.push(A)
    else:
        await s3_desk.push(A)
        assert s3_desk.push_counters.already_there == 1


async def test_a_segment_that_is_there_as_it_would_be_sent_is_not_read_back(s3_desk: Desk, proxy: FaultProxy) -> None:
    s3_desk.ready(A)
    await s3_desk.push(A)
    proxy.requests.clear()
    s3_desk.ready(A)
    await s3_desk.push(A)
    assert s3_desk.push_counters.already_there == 1
    assert "GET" not in proxy.requests


async def test_other_content_under_the_name_is_a_conflict_for_ever_and_is_never_overwritten(desk: Desk) -> None:
    desk.ready(A, seed=1)
    await desk.push(A)
    desk.ready(A, seed=2)
    for attempt in (1, 2, 3):
        with pytest.raises(NotArchived, match="other content"):
            await desk.push(A)
        assert desk.push_counters.conflicts == attempt
    assert await desk.wal_in_store(A) == segment_content(A, seed=1)


async def test_a_digest_in_the_metadata_is_not_believed_when_the_store_holds_other_content(
    s3_desk: Desk, bucket: str, s3_url: str
) -> None:
    """An upload damaged on its way, whose sender died before it could remove it."""
    right, damaged = (
        b"".join(s3_desk.layout.codec.compressed([segment_content(A, seed=seed)], SEGMENT)) for seed in (0, 9)
    )
    metadata = {
        "sha256": sha256_of([segment_content(A)]),
        "stored-md5": hashlib.md5(right, usedforsecurity=False).hexdigest(),
    }
    key = f"pre/fix/{s3_desk.layout.wal(A)}"
    admin(s3_url).put_object(Bucket=bucket, Key=key, Body=damaged, Metadata=metadata)
    s3_desk.ready(A)
    with pytest.raises(NotArchived, match="other content"):
        await s3_desk.push(A)


async def test_stored_without_an_answer_is_found_by_the_next_try(s3_desk: Desk, proxy: FaultProxy) -> None:
    s3_desk.ready(A)
    await s3_desk.archiver.pusher._ensure_archive(s3_desk.primary())
    proxy.fail("stored_but_500", method="PUT", path="/wals/", times=1)
    await s3_desk.push(A)
    assert s3_desk.push_counters.already_there == 1
    assert await s3_desk.wal_in_store(A) == segment_content(A)


async def test_damage_on_the_way_is_sent_again_and_not_acknowledged_before(s3_desk: Desk, proxy: FaultProxy) -> None:
    s3_desk.ready(A)
    await s3_desk.archiver.pusher._ensure_archive(s3_desk.primary())
    fault = proxy.fail("damaged_on_the_way", method="PUT", path="/wals/", times=2)
    await s3_desk.push(A)
    assert fault.met == 2
    assert await s3_desk.wal_in_store(A) == segment_content(A)


@pytest.mark.parametrize("kind", ["403 AccessDenied", "404 NoSuchBucket", "500 InternalError", "reset"])
async def test_while_the_store_fails_nothing_is_acknowledged_and_then_all_is(
    s3_desk: Desk, proxy: FaultProxy, kind: str
) -> None:
    s3_desk.ready(A, B)
    proxy.fail(kind)
    with pytest.raises(NotArchived):
        await s3_desk.push(A)
    proxy.heal()
    await s3_desk.push(A)
    await s3_desk.push(B)
    assert await s3_desk.wal_in_store(B) == segment_content(B)


@pytest.mark.parametrize("kind", ["403 AccessDenied", "500 InternalError"])
async def test_of_uploads_that_failed_nothing_stays_in_memory(s3_desk: Desk, proxy: FaultProxy, kind: str) -> None:
    """In an outage the files behind fail too: kept with their errors each would hold a segment for hours."""
    names = list(itertools.islice(_names_from(A), 10))
    s3_desk.ready(*names)
    await s3_desk.archiver.pusher._ensure_archive(s3_desk.primary())
    proxy.fail(kind)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with pytest.raises(NotArchived):
                await s3_desk.push(A)
            await settled(s3_desk)
            await until(lambda: contents_in_memory() == 0, deadline_s=5)
    finally:
        gc.enable()
    proxy.heal()
    for name in names:
        await s3_desk.push(name)
    assert s3_desk.push_counters.archived == len(names)


def contents_in_memory() -> int:
    return sum(isinstance(each, MemoryContent) for each in gc.get_objects())


async def test_nothing_is_remembered_a_new_archive_gets_everything(
    tmp_path: Path, proxy: FaultProxy, s3_url: str
) -> None:
    """A peer's spool acknowledged 100 of 100 segments that a new repository never got."""
    for attempt in range(2):
        store = S3Store(settings_for(proxy.url, make_bucket(s3_url)))
        async with desk_at(tmp_path / "i", store) as desk:
            desk.ready(A, B)
            await desk.push(A)
            await desk.push(B)
            assert len(await desk.object_names()) == 2, attempt
            assert not [path for path in desk.wal.rglob("*") if path.is_file() and path.name[:24] not in (A, B)]


async def test_another_file_that_took_the_name_is_not_acknowledged_by_what_was_sent_before(local_desk: Desk) -> None:
    local_desk.ready(A, B, seed=1)
    await local_desk.push(A)
    await settled(local_desk)
    (local_desk.wal / B).unlink()
    local_desk.ready(B, seed=2)
    with pytest.raises(NotArchived, match="other content"):
        await local_desk.push(B)


async def test_many_that_ask_for_one_file_share_one_upload(s3_desk: Desk, proxy: FaultProxy) -> None:
    s3_desk.ready(A)
    await s3_desk.archiver.pusher._ensure_archive(s3_desk.primary())
    proxy.requests.clear()
    await asyncio.gather(*(s3_desk.archiver.pusher.push(A) for _ in range(5)))
    assert proxy.requests.count("PUT") == 1


async def test_a_backup_label_is_archived_as_it_is(desk: Desk) -> None:
    name = f"{A}.00000028.backup"
    make_ready(desk.wal, name, b"START WAL LOCATION: 0/5000028\n")
    await desk.push(name)
    assert await desk.wal_in_store(name) == b"START WAL LOCATION: 0/5000028\n"


@pytest.mark.parametrize("name", ["../../etc/passwd", "x", "00000001000000000000000A.zst"])
async def test_what_is_no_wal_file_is_refused(local_desk: Desk, name: str) -> None:
    with pytest.raises(NotArchived, match="not the name of a WAL file"):
        await local_desk.archiver.pusher.push(name)


async def test_another_clusters_archive_is_never_written_to(tmp_path: Path, desk: Desk) -> None:
    desk.ready(A)
    await desk.push(A)
    async with desk_at(tmp_path / "copy", desk.store) as copy:
        copy.command(copy.primary(cluster_uid="uid-2"))
        copy.ready(B)
        with pytest.raises(NotArchived, match=r"restored copy.*archive\.server_name"):
            await copy.push(B)
        assert "restored copy" in copy.archiver.status.archive
    assert len(await desk.object_names()) == 1


async def test_a_store_that_ignores_conditions_is_refused_before_the_first_write(
    s3_desk: Desk, proxy: FaultProxy
) -> None:
    proxy.fail("condition_ignored", method="PUT")
    s3_desk.ready(A)
    with pytest.raises(NotArchived, match="ignores If-None-Match"):
        await s3_desk.push(A)
    assert await s3_desk.object_names("") == []


class CountingPath:
    """How often the status of a file is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self.listings = 0
        stat, scandir, iterdir = Path.stat, Path.glob, Path.iterdir

        def counted(path: Path, **options: bool):  # type: ignore[no-untyped-def]
            self.looks += 1
            return stat(path, **options)

        def listed(path: Path, *arguments: str):  # type: ignore[no-untyped-def]
            self.listings += 1
            return scandir(path, *arguments)

        def iterated(path: Path):  # type: ignore[no-untyped-def]
            self.listings += 1
            return iterdir(path)

        monkeypatch.setattr(Path, "stat", counted)
        monkeypatch.setattr(Path, "glob", listed)
        monkeypatch.setattr(Path, "iterdir", iterated)


@pytest.mark.timeout(300)
async def test_a_backlog_of_50_000_files_is_worked_off_at_a_constant_cost_for_each(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, count = local_desk, 50_000
    names = list(itertools.islice(_names_from(A), count))
    for name in names:
        (desk.wal / "archive_status" / f"{name}.ready").touch()
        (desk.wal / name).touch()
    sent: list[str] = []

    async def only_note(name: str, *rest: object) -> None:
        sent.append(name)

    monkeypatch.setattr(desk.archiver.pusher, "_upload_in_turn", only_note)
    counting = CountingPath(monkeypatch)
    for name in names:
        await desk.archiver.pusher.push(name)
    assert sent == names
    assert counting.listings == 0
    assert counting.looks < 6 * count
    assert len(desk.archiver.pusher._begun) <= 16


def _names_from(name: str):  # type: ignore[no-untyped-def]
    while True:
        yield name
        name = SIZE.next_name(name)
