"""Taking a base backup of a real server: whole or nothing, with the hashes of all of it; and who takes it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from archive_harness import QUICK, Desk, until
from archiving_server import REPOSITORY, ArchivingServer, all_archived, archiving, insert, prepared
from backup_harness import LAYOUT, SETTINGS, objects, store_of, take
from fault_proxy import FaultProxy
from harness import Cluster, major_version, wait_until
from test_retention import info_at, put
from wal_builders import SYSTEM

from instance_manager.archive.backup.catalogue import list_backups
from instance_manager.archive.backup.control_file import FILE_BYTES, is_whole
from instance_manager.archive.backup.copying import BackupFailed
from instance_manager.archive.backup.floor import raise_floor, take_floor_back
from instance_manager.archive.backup.info import BackupInfo, render_info
from instance_manager.archive.backup.manifest import Manifest, read_members
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.removal import delete_backup
from instance_manager.archive.backup.requests import Attempt, Begun, Claim, Ended, Request, Requests, WalWanted
from instance_manager.archive.backup.retention import Policy
from instance_manager.archive.backup.take import OnBackup
from instance_manager.archive.backup.tender import BackupTender, TenderSettings
from instance_manager.archive.backup.verify import verify_backup
from instance_manager.archive.content import MemoryContent
from instance_manager.archive.lineage import Lineage
from instance_manager.codec import to_json
from instance_manager.ports import Content, ObjectExists, ObjectStore, StoreRefused
from instance_manager.postgres.server import LocalServer

pytestmark = pytest.mark.timeout(240)


async def test_a_backup_is_verified_to_the_last_file_and_a_changed_byte_is_found(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        await insert(server, 0, 1000)
        await server.execute("CREATE UNLOGGED TABLE u AS SELECT n FROM generate_series(1, 1000) n")
        unlogged = await server.fetchval("SELECT pg_relation_filepath('u')")
        taken = await take(made, store, name="first", split_bytes=4 << 20)
        server.kill()
    assert taken.manifest.checked_pages > 1000
    (listed,) = await list_backups(store, LAYOUT, deadline_s=5)
    assert (listed.state, listed.info, listed.manifest) == ("done", taken.info, taken.manifest)
    names = BackupNames(LAYOUT, taken.info.backup_id)
    verdict = await verify_backup(store, LAYOUT, listed)
    assert verdict.is_good, verdict
    assert verdict.files > 500
    assert verdict.segments >= 1
    assert len(taken.manifest.tars) > 3
    held: set[str] = set()
    for entry in taken.manifest.tars:
        held |= set(await read_members(store, names, entry.name, deadline_s=5) or {})
    assert f"{unlogged}_init" in held
    assert unlogged not in held
    path = Path(directory_section["directory"]) / names.tar("data", ".lz4")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))
    verdict = await verify_backup(store, LAYOUT, listed)
    assert not verdict.is_good
    assert "data.tar.lz4" in " ".join(verdict.problems) or "lz4" in " ".join(verdict.problems)


async def test_a_damaged_page_is_reported_with_its_file_and_block_and_lets_nothing_expire(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        await insert(server, 0, 1000)
        await server.execute("CHECKPOINT")
        name = await server.fetchval("SELECT pg_relation_filepath('t')")
        with (server.data / name).open("r+b") as file:
            file.seek(3 * 8192 + 4000)
            file.write(b"rotten")
        taken = await take(made, store)
        server.kill()
    assert [(each.file, each.block) for each in taken.manifest.damaged] == [(name, 3)]
    (listed,) = await list_backups(store, LAYOUT, deadline_s=5)
    assert (listed.state, listed.problem) == ("damaged", "1 pages had a wrong checksum when it was taken")


async def test_a_backup_that_fails_leaves_nothing_and_one_that_is_cancelled_neither(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy
) -> None:
    server, store = cluster.add("p"), store_of(s3_section)
    with archiving(server, s3_section) as made:
        await prepared(cluster, made)
        proxy.fail("500 InternalError", path="data_0001")
        with pytest.raises(BackupFailed, match="data_0001"):
            await take(made, store, split_bytes=4 << 20, patience=QUICK)
        proxy.heal()
        assert await objects(store, "orders/base/") == []
        assert await objects(store, "orders/instance-manager/backups/") == []
        proxy.requests.clear()
        running = asyncio.create_task(take(made, store, rate_limit_bytes_per_s=1 << 20))
        # An upload begins: one that is cancelled before it was told that its mark is there leaves it.
        await until(lambda: "POST" in proxy.requests, deadline_s=60)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [name for name in await objects(store) if "/base/" in name or "/backups/" in name] == []
        running = asyncio.create_task(take(made, store, rate_limit_bytes_per_s=4 << 20))
        begun = (await wait_until(lambda: objects(store, "orders/instance-manager/backups/"), deadline_s=60))[0]
        await delete_backup(store, BackupNames(LAYOUT, begun.split("/")[-2]), deadline_s=5)
        with pytest.raises(BackupFailed, match="deleted while it was taken"):
            await running
        assert [name for name in await objects(store) if "/base/" in name or "/backups/" in name] == []
        server.kill()


async def test_an_incremental_backup_is_refused_where_the_server_cannot_tell_what_has_changed(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    """Where it can: tests/archive/incremental_backups.py."""
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        await take(made, store)
        kept = await objects(store, "orders/instance-manager/backups/")
        reason = "incremental backups need Postgres 17" if major_version() < 17 else "the server writes no summaries"
        with pytest.raises(BackupFailed, match=f"no incremental backup: {reason}"):
            await take(made, store, on=OnBackup())
        assert await objects(store, "orders/instance-manager/backups/") == kept
        server.kill()


class LandsLate:
    """A store that has one tar on its way when another fails: what is sent comes there, whoever waits for it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._failed = asyncio.Event()
        self.landed = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def create(self, name: str, content: Content, **options: Any) -> None:
        if "/data_0001" in name:
            asyncio.get_running_loop().call_later(0.3, self._failed.set)
            raise StoreRefused("no room")
        if "/data.tar" in name:
            await asyncio.shield(asyncio.create_task(self._land(name)))
        else:
            await self._store.create(name, content, **options)

    async def _land(self, name: str) -> None:
        await self._failed.wait()
        await self._store.create(name, MemoryContent.of(b"late"), deadline_s=10)
        self.landed.set()


async def test_what_was_on_its_way_when_a_backup_failed_is_cleaned_up_too(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        late = LandsLate(store)
        with pytest.raises(BackupFailed, match="no room"):
            await take(made, cast(ObjectStore, late), split_bytes=4 << 20, patience=QUICK)
        async with asyncio.timeout(10):
            await late.landed.wait()
        assert await objects(store, "orders/base/") == []
        server.kill()


def command(made: ArchivingServer, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "instance_manager", *words, "--config", str(made.server.root / "instance.yaml")]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=120)


async def test_a_standby_takes_what_was_asked_for_and_the_primary_finishes_its_segment(
    cluster: Cluster, directory_section: dict[str, Any], tmp_path: Path
) -> None:
    primary, standby = cluster.add("p"), cluster.add("s")
    store = store_of(directory_section)
    section = {**directory_section, "stream_interval_s": 0}
    with archiving(primary, section) as first, archiving(standby, section) as second:
        system = await prepared(cluster, first)
        await insert(primary, 0, 1000)
        await all_archived(primary)
        cluster.follow(standby, primary)
        await second.start_archiver()
        second.order("standby", system, is_streaming=True)
        await standby.start()
        await cluster.wait_streaming(primary, "s")
        await primary.execute("CHECKPOINT")
        done = await asyncio.to_thread(command, first, "backup", "--wait", "--name", "asked", "--timeout", "90")
        assert done.returncode == 0, done.stderr
        (listed,) = await list_backups(store, LAYOUT, deadline_s=5)
        assert listed.manifest is not None
        assert listed.manifest.was_standby
        assert listed.info is not None
        assert listed.info.name == "asked"
        verdict = await verify_backup(store, LAYOUT, listed)
        assert verdict.is_good, verdict
        shown = await asyncio.to_thread(command, first, "backups", "--json")
        (backup,) = json.loads(shown.stdout)["backups"]
        assert (backup["state"], backup["from_standby"], backup["gap_at_segment"]) == ("done", True, None)
        checked = await asyncio.to_thread(command, first, "archive", "check")
        assert "came back the same" in checked.stdout, checked
        verified = await asyncio.to_thread(command, first, "archive", "verify")
        assert verified.returncode == 0, verified
        kept = await asyncio.to_thread(command, first, "backup", "keep", "asked")
        assert kept.returncode == 0, kept
        deleted = await asyncio.to_thread(command, first, "backup", "delete", "asked", "--yes")
        assert deleted.returncode == 1
        assert "is kept" in deleted.stderr


async def test_a_claim_that_fell_silent_is_cleared_up_and_its_request_taken_again(
    local_desk: Desk, tmp_path: Path
) -> None:
    store, layout = local_desk.store, local_desk.layout
    await store.create(
        layout.lineage, MemoryContent.of(to_json(Lineage(str(SYSTEM), "uid-1", 1 << 20, "zstd"))), deadline_s=5
    )
    requests = Requests(store, layout)
    await requests.ask("r1", Request("wanted", "test", "now"))
    assert await requests.claim("r1", 1, Claim("dead", "now"))
    assert not await requests.claim("r1", 1, Claim("orders-1", "now")), "one claims, all others see it"
    names = BackupNames(layout, info_at(1).backup_id)
    await requests.begun("r1", 1, Begun(names.backup_id))
    for name in (names.begun, names.tar("data", ".lz4")):
        await put(store, name)
    now_s = 0.0
    # No server is there: taking it fails at once, which is an attempt too.
    server = LocalServer(tmp_path, tmp_path, tmp_path, "127.0.0.1", 5432, tmp_path, None)
    settings = TenderSettings(instance="orders-1", take=SETTINGS, dead_after_s=90, primary_waits_s=20)

    async def switch_wal() -> None:
        return

    tender = BackupTender(settings, server, store, layout, local_desk.archiver.orders, switch_wal, now_s=lambda: now_s)
    await tender.look()
    now_s = 89.0
    await tender.look()
    assert [each.state for each in await list_backups(store, layout, deadline_s=5)] == ["incomplete"]
    now_s = 91.0
    await tender.look()
    assert await list_backups(store, layout, deadline_s=5) == ()
    assert (await requests.listing())["r1"].attempts[1].is_over
    await tender.look()
    assert 2 not in (await requests.listing())["r1"].attempts, "a primary leaves it to the standbys for a while"
    now_s = 112.0
    await tender.look()
    await tender.idle()
    attempt = (await requests.listing())["r1"].attempts[2]
    assert attempt.is_over
    ended = await requests.ended("r1", 2)
    assert ended is not None
    assert "Postgres" in ended.error
    # Another cluster's archive is left alone, whatever is asked for in it.
    local_desk.command(Desk.primary(2, cluster_uid="uid-2"))
    await requests.ask("r2", Request(None, "test", "now"))
    now_s = 500.0
    await tender.look()
    now_s = 600.0
    await tender.look()
    assert (await requests.listing())["r2"].attempts == {}


def tender_of(desk: Desk, root: Path) -> BackupTender:
    """Of an instance without a server: what it looks at is all in the store."""
    server = LocalServer(root, root, root, "127.0.0.1", 5432, root, None)

    async def switch_wal() -> None:
        return

    settings = TenderSettings(instance="orders-1", take=SETTINGS, policy=Policy(count=1))
    return BackupTender(settings, server, desk.store, desk.layout, desk.archiver.orders, switch_wal)


async def put_taken(desk: Desk, day: int) -> BackupInfo:
    """A whole backup of ours, as its taker leaves it."""
    info = info_at(day)
    info = replace(info, backup_label=f"START TIMELINE: 1\nLABEL: instance-manager {info.backup_id}\n")
    names = BackupNames(desk.layout, info.backup_id)
    for name in (names.begun, names.tar("data", ".lz4")):
        await put(desk.store, name)
    await put(
        desk.store,
        names.manifest,
        to_json(Manifest(backup_id=info.backup_id, instance="orders-2", was_standby=False, tars=())),
    )
    await put(desk.store, names.info, render_info(info))
    return info


async def test_a_backup_that_ends_while_it_is_given_up_for_dead_is_not_removed(
    local_desk: Desk, tmp_path: Path
) -> None:
    requests = Requests(local_desk.store, local_desk.layout)
    await requests.ask("r1", Request(None, "test", "now"))
    await requests.claim("r1", 1, Claim("orders-2", "now"))
    info = info_at(1)
    await requests.begun("r1", 1, Begun(info.backup_id))
    tender = tender_of(local_desk, tmp_path)

    class Finishing(Requests):
        """Its instance comes back between the look for its backup.info and the word that it is dead."""

        async def end(self, request_id: str, number: int, ended: Ended) -> bool:
            await put_taken(local_desk, 1)
            await requests.end(request_id, number, Ended(info.backup_id))
            return await super().end(request_id, number, ended)

    tender._requests = Finishing(local_desk.store, local_desk.layout)
    await tender._bury((await requests.listing())["r1"], Attempt(1))
    (listed,) = await list_backups(local_desk.store, local_desk.layout, deadline_s=5)
    assert listed.state == "done"


async def test_a_backup_that_was_given_up_for_dead_lets_nothing_expire_when_it_ends_all_the_same(
    local_desk: Desk, tmp_path: Path
) -> None:
    store, requests = local_desk.store, Requests(local_desk.store, local_desk.layout)
    older = await put_taken(local_desk, 1)
    await requests.ask("r1", Request(None, "test", "now"))
    await requests.claim("r1", 1, Claim("orders-1", "now"))
    await requests.end("r1", 1, Ended(None, "its instance fell silent"))
    late = await put_taken(local_desk, 2)
    await tender_of(local_desk, tmp_path)._end("r1", 1, Ended(late.backup_id))
    left = await list_backups(store, local_desk.layout, deadline_s=5)
    assert [(each.backup_id, each.state) for each in left] == [(older.backup_id, "done")]


async def test_while_a_dead_instances_backup_is_removed_it_never_counts_as_whole(
    local_desk: Desk, tmp_path: Path
) -> None:
    """Its instance may live after all, and write backup.info at any moment."""
    store, requests = local_desk.store, Requests(local_desk.store, local_desk.layout)
    await requests.ask("r1", Request(None, "test", "now"))
    await requests.claim("r1", 1, Claim("orders-2", "now"))
    info = info_at(1)
    names = BackupNames(local_desk.layout, info.backup_id)
    await requests.begun("r1", 1, Begun(info.backup_id))
    for name in (names.begun, names.tar("data", ".lz4")):
        await put(store, name)
    seen: list[str] = []

    class Late:
        """At each deletion its instance finishes, and somebody looks."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def delete(self, name: str, *, deadline_s: float) -> None:
            with contextlib.suppress(ObjectExists):
                await put(store, names.info, render_info(info))
            seen.extend(each.state for each in await list_backups(store, local_desk.layout, deadline_s=5))
            await store.delete(name, deadline_s=deadline_s)

    tender = tender_of(local_desk, tmp_path)
    tender._store = Late()
    await tender._bury((await requests.listing())["r1"], Attempt(1))
    assert seen
    assert set(seen) == {"deleting"}


async def test_a_backup_of_ours_without_its_manifest_is_no_whole_one(local_desk: Desk) -> None:
    info = await put_taken(local_desk, 1)
    names = BackupNames(local_desk.layout, info.backup_id)
    await local_desk.store.delete(names.manifest, deadline_s=5)
    (listed,) = await list_backups(local_desk.store, local_desk.layout, deadline_s=5)
    assert (listed.state, listed.is_restorable) == ("unreadable", False)


async def test_an_error_that_nobody_thought_of_does_not_end_the_archiver(
    local_desk: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tender = tender_of(local_desk, tmp_path)
    looked = asyncio.Event()

    async def look() -> None:
        looked.set()
        raise RuntimeError("unthought of")

    tender.look = look  # type: ignore[method-assign]
    running = asyncio.create_task(tender.run())
    await asyncio.wait_for(looked.wait(), 5)
    await asyncio.sleep(0)
    assert not running.done()
    assert "unthought of" in caplog.text
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_a_failed_attempt_could_not_remove_is_removed_later_and_asked_about_once(
    local_desk: Desk, tmp_path: Path
) -> None:
    """The store that failed the backup fails its removal too; while an unfinished one lies there no WAL expires."""
    store, layout = local_desk.store, local_desk.layout
    await store.create(
        layout.lineage, MemoryContent.of(to_json(Lineage(str(SYSTEM), "uid-1", 1 << 20, "zstd"))), deadline_s=5
    )
    requests = Requests(store, layout)
    names = BackupNames(layout, info_at(1).backup_id)
    await requests.ask("r1", Request(None, "test", "now"))
    for number in (1, 2, 3):
        await requests.claim("r1", number, Claim("orders-2", "now"))
        await requests.begun("r1", number, Begun(names.backup_id))
        await requests.end("r1", number, Ended(None, "the store failed"))
    for name in (names.begun, names.tar("data", ".lz4")):
        await put(store, name)
    tender = tender_of(local_desk, tmp_path)
    await tender.look()
    assert await list_backups(store, layout, deadline_s=5) == ()
    asked: list[str] = []

    class Counting(Requests):
        async def ended(self, request_id: str, number: int) -> Ended | None:
            asked.append(request_id)
            return await super().ended(request_id, number)

    tender._requests = Counting(store, layout)
    await tender.look()
    assert asked == [], "what is over stays so"


async def test_while_a_backup_is_taken_here_others_are_attended_to_and_its_own_is_not_given_up(
    local_desk: Desk, tmp_path: Path
) -> None:
    """A primary that took one itself finished no segment for a standby's, which failed after ten minutes."""
    store, layout = local_desk.store, local_desk.layout
    await store.create(
        layout.lineage, MemoryContent.of(to_json(Lineage(str(SYSTEM), "uid-1", 1 << 20, "zstd"))), deadline_s=5
    )
    requests = Requests(store, layout)
    await requests.ask("r1", Request(None, "test", "now"))
    now_s, switched, ended = 0.0, 0, asyncio.Event()

    async def switch_wal() -> None:
        nonlocal switched
        switched += 1

    tender = tender_of(local_desk, tmp_path)
    tender._switch_wal, tender._now_s = switch_wal, lambda: now_s

    async def take_for_long(request_id: str, number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    tender._take = take_for_long  # type: ignore[method-assign]
    await tender.look()
    now_s = 21.0
    await tender.look()
    assert 1 in (await requests.listing())["r1"].attempts, "this one is taken here"
    await requests.ask("r2", Request(None, "test", "now"))
    assert await requests.claim("r2", 1, Claim("orders-2", "now"))
    await requests.want_wal("r2", 1, WalWanted(1))
    await requests.ask("r3", Request(None, "test", "now"))
    await asyncio.wait_for(tender.look(), 5)
    assert switched == 1
    now_s = 200.0
    await tender.look()
    listing = await requests.listing()
    assert not listing["r1"].attempts[1].is_over, "its beats may not have reached the store"
    assert listing["r2"].attempts[1].is_over, "whose instance is silent"
    assert listing["r3"].attempts == {}, "one at a time"
    await tender.close()
    assert ended.is_set()


async def test_a_backup_that_begins_where_the_log_has_expired_fails_and_leaves_nothing(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        floor = await raise_floor(store, LAYOUT, 1 << 20, deadline_s=5)
        with pytest.raises(BackupFailed, match="has expired"):
            await take(made, store)
        assert [name for name in await objects(store) if "/base/" in name or "/backups/" in name] == []
        await take_floor_back(store, floor, deadline_s=5)
        await take(made, store)
        server.kill()


async def test_a_control_file_that_is_caught_half_written_is_read_again(
    cluster: Cluster, directory_section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        whole = (server.data / "global/pg_control").read_bytes()
        assert is_whole(whole)
        torn = whole[:24] + bytes([whole[24] ^ 1]) + whole[25:]
        reads: list[int] = []

        def read_bytes(path: Path) -> bytes:
            if path.name != "pg_control":
                return path.open("rb").read()
            reads.append(1)
            return torn if len(reads) < 3 else path.open("rb").read()

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        taken = await take(made, store)
        assert len(reads) == 3
        names = BackupNames(LAYOUT, taken.info.backup_id)
        last = max(entry.name for entry in taken.manifest.tars)
        members = await read_members(store, names, last, deadline_s=5)
        assert members is not None
        assert members["global/pg_control"].sha256 != hashlib.sha256(torn).hexdigest()
        monkeypatch.setattr(
            Path, "read_bytes", lambda path: torn if path.name == "pg_control" else path.open("rb").read()
        )
        with pytest.raises(BackupFailed, match="checksum was wrong"):
            await take(made, store)
        assert len(await list_backups(store, LAYOUT, deadline_s=5)) == 1
        server.kill()


@pytest.mark.parametrize("place", [0, 24, 200, 287, 288, 291, 300, 8191])
def test_a_control_file_with_one_wrong_byte_is_not_whole(place: int) -> None:
    body = bytes(range(256)) + bytes(32)
    whole = body + crc32c(body).to_bytes(4, "little") + bytes(FILE_BYTES - 292)
    assert is_whole(whole)
    assert not is_whole(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
    assert not is_whole(whole[:-1])


def crc32c(content: bytes) -> int:
    """Bit by bit, as the polynomial says."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
