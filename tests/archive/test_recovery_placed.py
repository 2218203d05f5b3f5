"""Real recoveries over segments that lie in pg_wal before they are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from archive_harness import until
from archiving_server import REPOSITORY, SEGMENT_BYTES
from backup_harness import LAYOUT, store_of
from harness import BIN_DIRECTORY, Cluster, run_as, wait_until
from recovery_harness import ROWS, Restoration, archived, segments_in

from instance_manager.archive.content import MemoryContent
from instance_manager.archive.recovery.restore import RestoreFailed
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.wal_names import SegmentSize, wal_kind
from instance_manager.ports import ObjectStore

pytestmark = pytest.mark.timeout(240)
SIZE = SegmentSize(SEGMENT_BYTES)


@pytest.fixture
def shells(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The segments for which Postgres has run a shell since the start of the test."""
    file = cluster.root / "shells"
    file.touch()
    if (user := run_as()) is not None:
        os.chown(file, user.uid, user.gid)
    command = RecoveryArchive.restore_command
    monkeypatch.setattr(RecoveryArchive, "restore_command", lambda archive: f"echo %f >>{file}; {command(archive)}")
    return lambda: [name for name in file.read_text().split() if wal_kind(name) == "segment"]


async def test_most_segments_are_read_without_a_question_and_a_target_inside_leaves_none_of_the_others(
    cluster: Cluster, directory_section: dict[str, Any], shells: Callable[[], list[str]]
) -> None:
    store = store_of(directory_section)
    await archived(cluster, directory_section, store)
    restoration = Restoration(cluster.add("r"), store)
    restored = await restoration.run(name="half")
    first = SIZE.name(restored.info.begin_segment)
    last = SIZE.name(SIZE.containing(restored.info.timeline, restored.reached.lsn))
    replayed = [name for name in await segments_in(store) if first <= name <= last]
    assert len(replayed) > 10
    assert shells()[:2] == replayed[:2]
    assert set(shells()[2:]) <= {last}, "which may be looked at once more as it opens"
    wal = restoration.server.data_directory / "pg_wal"
    left = {path.name for path in wal.iterdir() if len(path.name) == 24 and path.name.startswith("00000001")}
    assert all(name <= last for name in left)
    assert all((wal / "archive_status" / f"{name}.done").exists() for name in left)
    # In its later life it archives what it writes, and nothing that it was recovered from.
    server = restoration.process
    told = server.root / "archived"
    told.touch()
    server.own(told)
    data = server.data
    data.rename(data.with_name("template"))
    restoration.server.data_directory.rename(data)
    server.set_dynamic(synchronous_standby_names="")
    server.configure(archive_mode="on", archive_command=f"echo %f >> {told}")
    await server.start()
    assert await server.fetchval("SELECT count(*) FROM t") == ROWS // 2
    await server.execute("CHECKPOINT")
    name = await server.fetchval("SELECT pg_walfile_name(pg_switch_wal() - 1)")
    await wait_until(lambda: asyncio.to_thread(lambda: name in told.read_text()), deadline_s=30)
    assert all(line.startswith("00000002") for line in told.read_text().split())


async def test_a_record_that_cannot_be_read_is_told_and_nothing_opens(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    """In an object that is right in itself: Postgres asked for it again and again, and the restore never ended."""
    store = store_of(directory_section)
    await archived(cluster, directory_section, store)
    names = await segments_in(store)
    for damaged in (names[-1], names[-9]):
        await damage(Path(directory_section["directory"]), store, damaged)
        restoration = Restoration(cluster.add(f"r{damaged[-2:].lower()}"), store)
        with pytest.raises(RestoreFailed, match=f"replay stopped at .* a record in {damaged}.*cannot be read"):
            await restoration.run()
        assert (restoration.server.data_directory / "standby.signal").exists()


async def damage(root: Path, store: ObjectStore, segment: str) -> None:
    name = LAYOUT.wal(segment)
    packed = iter([(root / name).read_bytes()])
    content = bytearray(b"".join(LAYOUT.codec.decompressed(packed, limit_bytes=SEGMENT_BYTES)))
    at = 100_000
    content[at : at + 200] = bytes(byte ^ 0x55 for byte in content[at : at + 200])
    await store.delete(name, deadline_s=5)
    again = b"".join(LAYOUT.codec.compressed([bytes(content)], len(content)))
    await store.create(name, MemoryContent.of(again), deadline_s=5)


@contextlib.contextmanager
def small_volume(place: Path, mib: int) -> Iterator[None]:
    place.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small volume")
async def test_a_volume_that_fills_up_stops_replay_which_goes_on_when_there_is_room(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    store = store_of(directory_section)
    await archived(cluster, directory_section, store)
    restoration = Restoration(cluster.add("r"), store)
    data = restoration.server.data_directory
    with small_volume(data, 48):
        running = asyncio.create_task(restoration.run())
        await until(lambda: running.done() or "waiting for the archive" in "".join(restoration.said), deadline_s=120)
        assert not any("opening" in text for text in restoration.said)
        assert (data / "standby.signal").exists()
        subprocess.run(["mount", "-o", "remount,size=400m", str(data)], check=True)  # noqa: ASYNC221
        if running.done():
            with pytest.raises(RestoreFailed):
                await running
            await restoration.run()
        else:
            await running
        # It lies on a mount, so it is looked at where it is.
        server = restoration.process
        subprocess.run(["cp", "-a", str(data), f"{data}.copy"], check=True)  # noqa: ASYNC221
    data.rmdir()
    data.with_name(f"{data.name}.copy").rename(data)
    assert await restoration.numbers() == set(range(ROWS))
    server.kill()


async def test_a_recovery_that_is_killed_in_the_middle_goes_on_over_what_it_had_placed(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    store = store_of(directory_section)
    await archived(cluster, directory_section, store)
    restoration = Restoration(cluster.add("r"), store)
    data = restoration.server.data_directory
    command = [sys.executable, "-m", "instance_manager", "restore", str(data), "--server", "orders"]
    command += ["--directory", directory_section["directory"], "--bin-directory", str(BIN_DIRECTORY)]
    # Whatever it leaves goes with the cluster.
    environment = {**os.environ, "TMPDIR": str(cluster.root)}
    first = await asyncio.create_subprocess_exec(
        *command, cwd=REPOSITORY, env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert first.stdout is not None
    async for line in first.stdout:
        if line.startswith(b"replayed to"):
            break
    first.kill()
    await first.wait()
    assert (data / "standby.signal").exists()
    # Its Postgres ends with it, but not at once.
    await until(lambda: not (data / "postmaster.pid").exists(), deadline_s=30)
    await restoration.run()
    assert "going on with the restore" in "".join(restoration.said)
    assert await restoration.numbers() == set(range(ROWS))
