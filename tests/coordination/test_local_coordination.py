# ruff: noqa: ASYNC220, ASYNC240
"""The Lease on one machine: conditional writes, outages, outcomes, and proof of death, on real files and processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instance_manager.coordination import local
from instance_manager.coordination.local import LocalCoordination, UnreadableFile
from instance_manager.core.record import ClusterRecord, Holder, initial_record
from instance_manager.core.types import MemberId
from instance_manager.ports import Conflict, OutcomeUnknown, RecordUnreadable, StoreUnavailable

HOLDER = Holder(member_id=MemberId("demo_1_0123abcd"), incarnation="8f1e2d3c4b5a6978")
RACE = Path(__file__).with_name("lease_race.py")
RECORD = initial_record(
    cluster_name="demo", cluster_uid="uid-1", mode="synchronous", lease_duration_s=10.0, holder=HOLDER
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "lease"
    path.mkdir()
    return path


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    path = tmp_path / "locks"
    path.mkdir()
    return path


@pytest.fixture
def store(directory: Path, locks: Path) -> LocalCoordination:
    return LocalCoordination(directory, locks)


def renewal(record: ClusterRecord) -> ClusterRecord:
    return replace(record, renewals=record.renewals + 1)


async def test_an_empty_directory_holds_no_record(store: LocalCoordination) -> None:
    assert await store.read(deadline_s=2) is None


async def test_what_was_written_is_read_with_its_version(store: LocalCoordination) -> None:
    created = await store.create(RECORD, deadline_s=2)
    assert await store.read(deadline_s=2) == created
    replaced = await store.replace(renewal(RECORD), version=created.version, deadline_s=2)
    assert replaced.version != created.version
    assert await store.read(deadline_s=2) == replaced


async def test_a_record_that_exists_is_not_created_again(store: LocalCoordination, directory: Path) -> None:
    created = await store.create(RECORD, deadline_s=2)
    with pytest.raises(Conflict):
        await store.create(renewal(RECORD), deadline_s=2)
    assert await store.read(deadline_s=2) == created
    (directory / "lease.json").write_text("garbage")
    with pytest.raises(Conflict):
        await store.create(RECORD, deadline_s=2)


async def test_a_write_on_another_version_is_a_conflict_and_changes_nothing(store: LocalCoordination) -> None:
    first = await store.create(RECORD, deadline_s=2)
    second = await store.replace(renewal(RECORD), version=first.version, deadline_s=2)
    with pytest.raises(Conflict):
        await store.replace(renewal(RECORD), version=first.version, deadline_s=2)
    assert await store.read(deadline_s=2) == second


async def test_a_write_on_a_record_that_is_gone_is_a_conflict(store: LocalCoordination, directory: Path) -> None:
    created = await store.create(RECORD, deadline_s=2)
    (directory / "lease.json").unlink()
    with pytest.raises(Conflict, match="gone"):
        await store.replace(RECORD, version=created.version, deadline_s=2)


async def test_no_version_comes_again_after_a_deletion_or_an_old_copy(
    store: LocalCoordination, directory: Path
) -> None:
    path = directory / "lease.json"
    first = await store.create(RECORD, deadline_s=2)
    backup = path.read_bytes()
    second = await store.replace(RECORD, version=first.version, deadline_s=2)
    path.write_bytes(backup)
    other_second = await store.replace(RECORD, version=first.version, deadline_s=2)
    path.unlink()
    recreated = await store.create(RECORD, deadline_s=2)
    assert len({first.version, second.version, other_second.version, recreated.version}) == 4


@pytest.mark.parametrize("content", [b"", b"{", b'{"version":"1-0000000000000000"}', b"\xff\x00", b"[]"])
async def test_a_file_that_is_no_record_is_unreadable_and_never_none(
    store: LocalCoordination, directory: Path, content: bytes
) -> None:
    (directory / "lease.json").write_bytes(content)
    with pytest.raises(RecordUnreadable):
        await store.read(deadline_s=2)
    with pytest.raises(RecordUnreadable):
        await store.replace(RECORD, version="1-0000000000000000", deadline_s=2)


async def test_an_unknown_field_or_an_overlong_file_is_unreadable(store: LocalCoordination, directory: Path) -> None:
    await store.create(RECORD, deadline_s=2)
    path = directory / "lease.json"
    good = path.read_text()
    path.write_text(good.replace('"version"', '"extra": 1, "version"', 1))
    with pytest.raises(RecordUnreadable):
        await store.read(deadline_s=2)
    path.write_text(good + " " * local.RECORD_BYTES_MAX + "x")
    with pytest.raises(RecordUnreadable):
        await store.read(deadline_s=2)


async def test_an_unreadable_file_is_repaired_only_as_it_was_seen(store: LocalCoordination, directory: Path) -> None:
    path = directory / "lease.json"
    path.write_text("garbage")
    with pytest.raises(UnreadableFile) as seen:
        await store.read(deadline_s=2)
    path.write_text("other garbage")
    with pytest.raises(RecordUnreadable):
        await store.replace(RECORD, version=seen.value.version, deadline_s=2)
    path.write_text("garbage")
    repaired = await store.replace(RECORD, version=seen.value.version, deadline_s=2)
    assert await store.read(deadline_s=2) == repaired


async def test_a_missing_directory_is_an_unavailable_store_at_once(store: LocalCoordination, directory: Path) -> None:
    created = await store.create(RECORD, deadline_s=2)
    away = directory.rename(directory.with_name("away"))
    before = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.read(deadline_s=5)
    with pytest.raises(StoreUnavailable):
        await store.create(RECORD, deadline_s=5)
    with pytest.raises(StoreUnavailable):
        await store.replace(RECORD, version=created.version, deadline_s=5)
    assert time.monotonic() - before < 1
    away.rename(directory)
    assert await store.read(deadline_s=2) == created


async def test_a_dangling_symlink_is_an_unavailable_store_for_that_instance_only(
    directory: Path, locks: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory)
    cut_off, connected = LocalCoordination(link, locks), LocalCoordination(directory, locks)
    created = await cut_off.create(RECORD, deadline_s=2)
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreUnavailable):
        await cut_off.read(deadline_s=2)
    assert await connected.read(deadline_s=2) == created


async def test_a_directory_that_is_a_file_is_an_unavailable_store(tmp_path: Path, locks: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable):
        await LocalCoordination(tmp_path / "file", locks).read(deadline_s=2)


@pytest.fixture
def foreign_lock(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / "lease.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


async def test_a_write_that_never_got_the_lock_was_certainly_not_applied(
    store: LocalCoordination, directory: Path, foreign_lock: None
) -> None:
    with pytest.raises(StoreUnavailable):
        await store.create(RECORD, deadline_s=0.1)
    await asyncio.sleep(0.05)
    assert sorted(path.name for path in directory.iterdir()) == ["lease.lock"]


async def test_a_frozen_writer_that_holds_the_lock_does_not_hold_up_readers(
    store: LocalCoordination, foreign_lock: None
) -> None:
    assert await store.read(deadline_s=1) is None


async def test_a_stalled_fsync_before_the_rename_is_certainly_not_applied(
    store: LocalCoordination, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await store.create(RECORD, deadline_s=2)
    go_on = threading.Event()
    real_fsync = os.fsync

    def stalled_fsync(descriptor: int) -> None:
        go_on.wait(5)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", stalled_fsync)
    with pytest.raises(StoreUnavailable):
        await store.replace(renewal(RECORD), version=created.version, deadline_s=0.1)
    go_on.set()
    await asyncio.sleep(0.2)
    assert await store.read(deadline_s=2) == created
    assert sorted(path.name for path in directory.iterdir()) == ["lease.json", "lease.lock"]


async def test_a_write_that_began_and_did_not_answer_is_unknown_and_may_land_late(
    store: LocalCoordination, directory: Path, locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await store.create(RECORD, deadline_s=2)
    go_on, renamed = threading.Event(), threading.Event()
    real_rename = os.rename

    def stalled_rename(*arguments: Any, **keywords: Any) -> None:
        go_on.wait(5)
        real_rename(*arguments, **keywords)
        renamed.set()

    monkeypatch.setattr(os, "rename", stalled_rename)
    with pytest.raises(OutcomeUnknown):
        await store.replace(renewal(RECORD), version=created.version, deadline_s=1.0)
    other = LocalCoordination(directory, locks)
    assert await other.read(deadline_s=2) == created
    go_on.set()
    assert await asyncio.to_thread(renamed.wait, 10)
    landed = await other.read(deadline_s=2)
    assert landed is not None
    assert landed.record.renewals == 1
    # R1: a conditional write of our own on what we saw could not have succeeded beside it.
    with pytest.raises(Conflict):
        await other.replace(RECORD, version=created.version, deadline_s=2)


async def test_an_error_after_the_rename_is_unknown(store: LocalCoordination, monkeypatch: pytest.MonkeyPatch) -> None:
    created = await store.create(RECORD, deadline_s=2)
    real_fsync, calls = os.fsync, []

    def failing_fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OutcomeUnknown):
        await store.replace(renewal(RECORD), version=created.version, deadline_s=2)


async def test_a_full_disk_is_certainly_not_applied(store: LocalCoordination, monkeypatch: pytest.MonkeyPatch) -> None:
    created = await store.create(RECORD, deadline_s=2)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            await store.replace(renewal(RECORD), version=created.version, deadline_s=2)
    assert await store.read(deadline_s=2) == created


async def test_a_stalled_disk_never_blocks_the_loop_and_calls_are_bounded(
    store: LocalCoordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(local, "_content", lambda directory_fd: go_on.wait(5) and None)
    before = time.monotonic()
    outcomes = await asyncio.gather(*(store.read(deadline_s=0.2) for _ in range(40)), return_exceptions=True)
    assert time.monotonic() - before < 1
    assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    assert sum("do not come back" in str(outcome) for outcome in outcomes) == 24
    go_on.set()
    await asyncio.sleep(0.1)
    assert await store.read(deadline_s=1) is None


async def test_a_cancelled_write_is_applied_as_a_whole_or_not_at_all(store: LocalCoordination) -> None:
    stored = await store.create(RECORD, deadline_s=2)
    for delay_s in (0.0, 0.0005, 0.001, 0.002, 0.005):
        task = asyncio.create_task(store.replace(renewal(stored.record), version=stored.version, deadline_s=2))
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.05)
        found = await store.read(deadline_s=2)
        assert found is not None
        assert found.version == stored.version or found.record == renewal(stored.record)
        stored = found


async def test_each_version_has_exactly_one_winner_among_processes(store: LocalCoordination, directory: Path) -> None:
    created = await store.create(RECORD, deadline_s=2)
    racers = [subprocess.Popen([sys.executable, RACE, directory, "40"], stdout=subprocess.PIPE) for _ in range(4)]
    lines = [line.split() for racer in racers for line in racer.communicate(timeout=30)[0].decode().splitlines()]
    assert all(racer.returncode == 0 for racer in racers)
    successor = dict(lines)
    assert len(successor) == len(lines) == 160
    version = created.version
    for _ in range(160):
        version = successor[version]
    last = await store.read(deadline_s=2)
    assert last is not None
    assert (last.version, last.record.renewals) == (version, 160)
    assert version.startswith("161-")


async def test_writers_killed_at_any_moment_leave_a_readable_record_and_a_free_lock(
    store: LocalCoordination, directory: Path
) -> None:
    await store.create(RECORD, deadline_s=2)
    for round_number in range(6):
        racers = [subprocess.Popen([sys.executable, RACE, directory, "-1"], stdout=subprocess.PIPE) for _ in range(2)]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline()
        await asyncio.sleep(0.007 * round_number)
        for racer in racers:
            racer.kill()
        for racer in racers:
            racer.communicate()
        found = await store.read(deadline_s=2)
        assert found is not None
        await store.replace(renewal(found.record), version=found.version, deadline_s=2)


async def test_prepared_files_of_writers_long_dead_are_removed(store: LocalCoordination, directory: Path) -> None:
    old, young = directory / f"lease.json.{'0' * 16}.new", directory / f"lease.json.{'1' * 16}.new"
    old.touch()
    young.touch()
    os.utime(old, (1000, 1000))
    await store.create(RECORD, deadline_s=2)
    assert not old.exists()
    assert young.exists()


async def test_changes_hint_at_a_write_an_outage_and_a_return(store: LocalCoordination, directory: Path) -> None:
    changes = store.changes()
    await asyncio.wait_for(anext(changes), 1)
    await asyncio.sleep(0.05)
    await store.create(RECORD, deadline_s=2)
    await asyncio.wait_for(anext(changes), 1)
    away = directory.rename(directory.with_name("away"))
    await asyncio.wait_for(anext(changes), 1)
    away.rename(directory)
    await asyncio.wait_for(anext(changes), 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(changes), 0.3)


async def test_changes_leave_no_thread_behind(store: LocalCoordination) -> None:
    changes = store.changes()
    await anext(changes)
    await changes.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.2)
    assert not any(thread.name == "lease changes" for thread in threading.enumerate())


# Proof of death


@pytest.fixture
def supervisor_lock(locks: Path) -> Iterator[int]:
    """A life of demo-1, as the supervisor's lock.acquire leaves it."""
    descriptor = os.open(locks / "demo-1.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.pwrite(descriptor, b"8f1e2d3c4b5a6978 4242\n", 0)
    yield descriptor
    os.close(descriptor)


async def test_a_life_whose_lock_is_held_is_not_proven_dead(store: LocalCoordination, supervisor_lock: int) -> None:
    assert not await store.is_proven_dead(HOLDER, deadline_s=1)


async def test_a_life_whose_lock_was_dropped_is_proven_dead(store: LocalCoordination, supervisor_lock: int) -> None:
    fcntl.flock(supervisor_lock, fcntl.LOCK_UN)
    assert await store.is_proven_dead(HOLDER, deadline_s=1)
    fcntl.flock(supervisor_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_the_lock_is_held_until_the_last_inheriting_process_is_gone(
    store: LocalCoordination, locks: Path
) -> None:
    path = locks / "demo-1.lock"
    path.write_text('{"incarnation": "8f1e2d3c4b5a6978", "pid": 1}')
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    postgres = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    os.close(descriptor)
    assert not await store.is_proven_dead(HOLDER, deadline_s=1)
    postgres.kill()
    postgres.wait()
    assert await store.is_proven_dead(HOLDER, deadline_s=1)


async def test_a_later_life_under_the_lock_proves_the_earlier_dead(
    store: LocalCoordination, supervisor_lock: int
) -> None:
    os.pwrite(supervisor_lock, b"ffffffffffffffff 4243\n", 0)
    assert await store.is_proven_dead(HOLDER, deadline_s=1)
    assert not await store.is_proven_dead(replace(HOLDER, incarnation="f" * 16), deadline_s=1)


@pytest.mark.parametrize("content", [b"", b"ffff", b"{}\n", b"../ 1\n", b'{"incarnation": 5}', b"{\n"])
async def test_a_lock_file_that_does_not_name_a_life_proves_nothing(
    store: LocalCoordination, locks: Path, content: bytes
) -> None:
    (locks / "demo-1.lock").write_bytes(content)
    assert not await store.is_proven_dead(HOLDER, deadline_s=1)


async def test_without_lock_file_or_directory_nothing_is_proven(store: LocalCoordination, locks: Path) -> None:
    assert not await store.is_proven_dead(HOLDER, deadline_s=1)
    locks.rmdir()
    assert not await store.is_proven_dead(HOLDER, deadline_s=1)
