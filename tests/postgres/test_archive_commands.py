"""What a promoted standby archives of the log before it, and what restore_command may still bring to a voter (P9)."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from agent_database import installed_postgres_of
from harness import Cluster, wait_until

from instance_manager.core.types import Lsn
from instance_manager.postgres import archive_commands
from instance_manager.postgres.archive_commands import ALLOWS, StillRestoring, allow, ask_again, nothing_is_restored
from instance_manager.postgres.deadlines import Deadline
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.promotion import install_restore_command

MIB = 1 << 20


def segments(directory: Path, *numbers: int) -> Path:
    """Of a MiB each, marked as archived; their status."""
    status = directory / "pg_wal" / "archive_status"
    status.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        name = f"0000000100000000{number:08X}"
        (directory / "pg_wal" / name).write_bytes(bytes(MIB))
        (status / f"{name}.done").touch()
    return status


def ready(status: Path) -> list[int]:
    return sorted(int(path.stem[16:], 16) for path in status.glob("*.ready"))


@pytest.mark.parametrize(
    ("since", "asked"), [(None, [5, 6, 7]), (6 * MIB, [6, 7]), (6 * MIB + 1, [6, 7]), (8 * MIB - 1, [7]), (8 * MIB, [])]
)
def test_segments_behind_what_the_last_primary_archived_are_asked_for_again(
    cluster: Cluster, since: int | None, asked: list[int]
) -> None:
    server = cluster.add("x").server
    status = segments(server.data_directory, 5, 6, 7)
    (status / "00000002.history.done").touch()
    (status / "000000010000000000000007.partial.done").touch()
    (status / "000000010000000000000004.done").touch()
    assert ask_again(server, None if since is None else Lsn(since)) == len(asked)
    assert ready(status) == asked
    assert len(list(status.glob("*.done"))) == 6 - len(asked)


async def test_p9_a_restore_that_hangs_is_seen_until_it_has_ended(cluster: Cluster) -> None:
    """The startup process of a standby waits in restore_command: a promise made now could be followed by more WAL."""
    standby = cluster.add("x")
    client = standby.state / "client.sh"
    client.write_text("touch '" + str(standby.state / "begun") + '\'\nwhile [ -e "$5" ]; do sleep 0.05; done\nexit 1\n')
    standby.set_dynamic(restore_command=install_restore_command(standby.server, f"/bin/sh {client}"))
    standby.write("standby.signal", "")
    allow(standby.server, "fetch")
    await standby.start(wait=False)
    process = standby.process
    assert process is not None

    async def begun() -> bool:
        return (standby.state / "begun").exists()

    await wait_until(begun, deadline_s=30, what="restore_command runs")
    with pytest.raises(StillRestoring):
        await nothing_is_restored(standby.server, process.pid, Deadline(0.3))
    allow(standby.server, None)
    await nothing_is_restored(standby.server, process.pid, Deadline(10))


async def test_p9_a_disk_that_does_not_answer_is_no_proof_that_nothing_is_restored(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promise would wait for it, and hold up every other."""
    goes_on = threading.Event()
    monkeypatch.setattr(archive_commands, "_is_restoring", lambda *_: goes_on.wait(60) is None)
    try:
        with pytest.raises(StillRestoring):
            await nothing_is_restored(cluster.add("x").server, 1, Deadline(0.1))
    finally:
        goes_on.set()


async def test_p9_a_word_that_hung_on_the_disk_does_not_come_after_the_one_that_took_it_back(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its flush takes long, is waited for no longer, and ends when a promise has been made."""
    one = cluster.add("x")
    postgres, word = await installed_postgres_of(one), one.server.state_directory / ALLOWS
    hangs, goes_on = threading.Event(), threading.Event()

    def slow(path: Path, content: bytes, **options: Any) -> None:
        hangs.set()
        assert goes_on.wait(60)
        write_atomically(path, content, **options)

    monkeypatch.setattr(archive_commands, "write_atomically", slow)
    with pytest.raises(TimeoutError):
        await postgres.allow_archive("fetch", deadline_s=0.1)
    assert hangs.is_set()
    late = asyncio.create_task(postgres.allow_archive("fetch", deadline_s=0.1))
    taken_back = asyncio.create_task(postgres.allow_archive(None, deadline_s=30))
    with pytest.raises(TimeoutError):
        await late
    goes_on.set()
    await taken_back

    async def nobody_writes() -> bool:
        return not any("archive's commands" in thread.name for thread in threading.enumerate())

    await wait_until(nobody_writes, deadline_s=30, what="every thread has ended")
    assert not word.exists()
