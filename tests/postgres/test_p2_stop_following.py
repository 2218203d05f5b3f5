"""P2, R5: a voter that has promised acknowledges nothing more, whatever its startup process does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from agent_database import installed_postgres_of
from harness import Cluster, PostgresProcess, conninfo, freeze, frozen, thaw, wait_until

from instance_manager.agent.postgres_port import Upstream
from instance_manager.core.quorum import NOBODY
from instance_manager.core.types import Epoch, MemberId, Timeline, parse_lsn
from instance_manager.postgres import directory, running
from instance_manager.postgres.deadlines import Deadline
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.server import DeadlinePassed
from instance_manager.postgres.voting import NotFollowing, NotStopped, follow, stop_following
from instance_manager.postgres.wal_dump import segment_file_name

A = MemberId("a_0000000a")


def settings_of(server: PostgresProcess) -> DynamicSettings:
    return DynamicSettings(server.running.settings_file)


@contextlib.asynccontextmanager
async def replay_in_conflict(primary: PostgresProcess, standby: PostgresProcess) -> AsyncIterator[None]:
    """Replay on the standby waits for a query of the block's, without limit; WAL goes on to be received."""
    standby.configure(max_standby_streaming_delay="-1", max_standby_archive_delay="-1")
    await standby.reload()
    await primary.execute("CREATE TABLE conflict AS SELECT generate_series(1, 1000) AS id")
    await cluster_caught_up(primary, standby)
    async with standby.session() as reader:
        await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await reader.fetch("SELECT count(*) FROM conflict")
        await primary.execute("DELETE FROM conflict")
        await primary.execute("VACUUM conflict")
        await wait_until(
            lambda: standby.fetchval(
                "SELECT count(*) > 0 FROM pg_stat_activity "
                "WHERE backend_type = 'startup' AND wait_event LIKE 'RecoveryConflict%'"
            ),
            what="a recovery conflict",
        )
        yield


async def cluster_caught_up(primary: PostgresProcess, standby: PostgresProcess) -> None:
    end = await primary.lsn("pg_current_wal_flush_lsn")
    assert end is not None

    async def replayed() -> bool:
        return (await standby.lsn("pg_last_wal_replay_lsn") or 0) >= end

    await wait_until(replayed, what="replay")


async def require(primary: PostgresProcess) -> None:
    primary.set_dynamic(synchronous_standby_names=f"ANY 1 ({A})")
    await primary.reload()
    await primary.execute("CHECKPOINT")
    await primary.execute("CHECKPOINT")
    assert await primary.commit_is_acknowledged(within_s=5)


async def test_p2_emptying_primary_conninfo_does_not_stop_the_acknowledgements_of_a_busy_standby(
    cluster: Cluster,
) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    await require(primary)
    async with replay_in_conflict(primary, standby):
        standby.set_dynamic(primary_conninfo="")
        await standby.reload()
        await asyncio.sleep(1)
        assert await standby.fetchval("SHOW primary_conninfo") == ""
        assert await primary.commit_is_acknowledged(within_s=2), "the fact behind P2 is gone"


async def test_p2_stop_following_ends_the_acknowledgements_of_a_standby_in_conflict(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    await require(primary)
    async with replay_in_conflict(primary, standby):
        started_s = time.monotonic()
        stopped = await stop_following(standby.running, settings_of(standby), deadline_s=3)
        print(f"stop_following, busy: {(time.monotonic() - started_s) * 1000:.0f} ms")
        assert len(stopped.ended) == 1
        assert not await primary.commit_is_acknowledged(within_s=0.5)
    # The conflict is over: the startup process goes on, and may want a walreceiver.
    await asyncio.sleep(1.5)
    assert not await primary.commit_is_acknowledged(within_s=0.3)
    assert await primary.fetchval("SELECT count(*) = 0 FROM pg_stat_replication")


async def test_p2_stop_following_ends_the_acknowledgements_of_idle_and_paused_standbys(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    await require(primary)
    started_s = time.monotonic()
    await stop_following(standby.running, settings_of(standby), deadline_s=3)
    print(f"stop_following, idle: {(time.monotonic() - started_s) * 1000:.0f} ms")
    assert not await primary.commit_is_acknowledged(within_s=0.3)
    started_s = time.monotonic()
    await follow(standby.running, settings_of(standby), conninfo(primary, A), None, deadline_s=3)
    print(f"follow: {(time.monotonic() - started_s) * 1000:.0f} ms")
    assert await primary.commit_is_acknowledged(within_s=5)
    await standby.execute("SELECT pg_wal_replay_pause()")
    await stop_following(standby.running, settings_of(standby), deadline_s=3)
    assert not await primary.commit_is_acknowledged(within_s=0.3)
    # A paused startup process asks for no walreceiver: to follow ends the pause.
    await follow(standby.running, settings_of(standby), conninfo(primary, A), None, deadline_s=3)
    await cluster.wait_streaming(primary, A)


async def test_p2_a_walreceiver_that_does_not_end_makes_no_vote(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    await require(primary)
    walreceiver = standby.child_pid("walreceiver")
    with frozen(walreceiver):
        with pytest.raises(NotStopped) as failure:
            # Time enough to come to the processes, also on a busy machine: what runs out before names nobody.
            await stop_following(standby.running, settings_of(standby), deadline_s=2)
        assert failure.value.walreceivers == (walreceiver,)
    await stop_following(standby.running, settings_of(standby), deadline_s=3)
    assert not await primary.commit_is_acknowledged(within_s=0.3)


async def test_p2_a_last_look_without_an_answer_names_who_was_seen_before(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, standby = await cluster.primary_with_standbys(A)
    walreceiver = standby.child_pid("walreceiver")
    look, looks = running._SqlProcesses.children, 0

    async def answers_once(processes: running._SqlProcesses, deadline: Deadline) -> Any:
        nonlocal looks
        looks += 1
        if looks > 1:
            raise DeadlinePassed("a query", deadline.whole_s)
        return await look(processes, deadline)

    monkeypatch.setattr(running._SqlProcesses, "children", answers_once)
    with frozen(walreceiver), pytest.raises(NotStopped) as failure:
        await stop_following(standby.running, settings_of(standby), deadline_s=10)
    assert failure.value.walreceivers == (walreceiver,)


async def test_p2_a_stopped_postmaster_makes_no_vote(cluster: Cluster) -> None:
    _, standby = await cluster.primary_with_standbys(A)
    with frozen(standby.pid), pytest.raises(NotStopped):
        await stop_following(standby.running, settings_of(standby), deadline_s=0.5)


async def test_p2_a_setting_that_is_overridden_makes_no_vote(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    await standby.execute(f"ALTER SYSTEM SET primary_conninfo = '{conninfo(primary, A)}'")
    with pytest.raises(NotStopped, match="primary_conninfo"):
        await stop_following(standby.running, settings_of(standby), deadline_s=0.5)


async def test_p2_no_walreceiver_can_start_behind_the_block_even_if_it_is_asked_for(cluster: Cluster) -> None:
    """As a startup process would that has not looked at SIGHUP yet: it asks with the address of the old primary."""
    primary, standby = await cluster.primary_with_standbys(A)
    await require(primary)
    await stop_following(standby.running, settings_of(standby), deadline_s=3)
    before = len(standby.log_text())
    standby.dynamic = await settings_of(standby).file.read()
    standby.set_dynamic(primary_conninfo=conninfo(primary, A))
    await standby.reload()

    async def refused() -> bool:
        return "libpqwalreceiver" in standby.log_text()[before:]

    await wait_until(refused, what="a walreceiver that cannot load its library")
    assert not await primary.commit_is_acknowledged(within_s=1.5)
    # All other libraries are found where they were.
    assert await standby.fetchval("SHOW dynamic_library_path") == f"{standby.state}/no-walreceiver:$libdir"
    async with standby.session() as client:
        await client.execute("LOAD 'auto_explain'; DO $$ BEGIN PERFORM 1; END $$")


@dataclass
class BusyFromPgWal:
    """A standby that has replayed pg_wal up to its very last record, and waits in it for a reader's lock."""

    primary: PostgresProcess
    standby: PostgresProcess
    reader: asyncpg.Connection
    locker: asyncpg.Connection

    def life(self) -> str:
        """Its log since its last start."""
        return self.standby.log_text().rpartition("entering standby mode")[2]


def cut_off_after_lock(standby: PostgresProcess) -> None:
    """Zero the WAL of this stopped standby behind the last record that takes a lock."""
    wal = standby.data / "pg_wal"
    segments = sorted(path.name for path in wal.iterdir() if len(path.name) == 24)
    dump = subprocess.run(
        [standby.bin_directory / "pg_waldump", "--path", wal, segments[0], segments[-1]],
        check=False,
        capture_output=True,
        text=True,
    )
    lines = dump.stdout.splitlines()
    lock = max(number for number, line in enumerate(lines) if "rmgr: Standby" in line and "desc: LOCK" in line)
    match = re.search(r"lsn: ([0-9A-F]+/[0-9A-F]+)", lines[lock + 1])
    assert match is not None
    segment, offset = divmod(parse_lsn(match[1]), 1 << 20)
    with (wal / segment_file_name(Timeline(1), segment, 1 << 20)).open("r+b") as file:
        file.seek(offset)
        file.write(bytes((1 << 20) - offset))


async def busy_from_pg_wal(cluster: Cluster) -> BusyFromPgWal:
    primary, standby = await cluster.primary_with_standbys(A)
    await require(primary)
    await primary.execute("CREATE TABLE conflict AS SELECT generate_series(1, 1000) AS id")
    await primary.execute("CHECKPOINT")
    await cluster_caught_up(primary, standby)
    # A restartpoint: the next start replays nothing of before, where the delay would hold it up.
    await standby.execute("CHECKPOINT")
    standby.configure(max_standby_streaming_delay="-1", max_standby_archive_delay="-1", recovery_min_apply_delay="1h")
    await standby.reload()
    await asyncio.sleep(0.1)
    # While the start does not replay this commit yet, a reader can come in before the lock.
    await primary.execute("SELECT pg_logical_emit_message(true, 'test', 'delayed')")
    locker = await primary.connect()
    await locker.execute("BEGIN; LOCK TABLE conflict IN ACCESS EXCLUSIVE MODE")
    await primary.execute("SELECT pg_logical_emit_message(true, 'test', 'flushes the record of the lock')")
    await cluster.wait_streaming(primary, A)
    await standby.stop(deadline_s=10)
    cut_off_after_lock(standby)
    await standby.start()
    reader = await standby.connect()
    await reader.execute("BEGIN; LOCK TABLE conflict IN ACCESS SHARE MODE")
    standby.configure(recovery_min_apply_delay="0")
    await standby.reload()
    await wait_until(
        lambda: standby.fetchval(
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE backend_type = 'startup' AND wait_event_type = 'Lock'"
        ),
        what="a recovery conflict in the last record in pg_wal",
    )
    assert standby.child_pids("walreceiver") == []
    return BusyFromPgWal(primary, standby, reader, locker)


async def test_p2_that_the_startup_process_is_seen_busy_and_no_walreceiver_runs_is_no_proof(cluster: Cluster) -> None:
    """It goes from pg_wal to streaming without a look at SIGHUP, with the address that it had loaded."""
    busy = await busy_from_pg_wal(cluster)
    busy.standby.set_dynamic(primary_conninfo="")
    await busy.standby.reload()
    assert await busy.standby.fetchval("SHOW primary_conninfo") == ""
    await busy.standby.execute("SELECT pg_wal_replay_pause()")
    busy.reader.terminate()

    async def connected() -> bool:
        return "started streaming WAL from primary" in busy.life()

    await wait_until(connected, deadline_s=5, what="a walreceiver with the old primary_conninfo")
    busy.locker.terminate()


async def test_p2_a_standby_busy_with_pg_wal_votes_and_never_connects_to_the_old_primary(cluster: Cluster) -> None:
    busy = await busy_from_pg_wal(cluster)
    standby, address = busy.standby, conninfo(busy.primary, A)
    await stop_following(standby.running, settings_of(standby), deadline_s=3)
    # While it is busy it does not follow again either: it may still have the old address.
    with pytest.raises(NotFollowing):
        await follow(standby.running, settings_of(standby), address, None, deadline_s=0.5)
    busy.reader.terminate()

    async def tried() -> bool:
        # Started and failed at the block; or asked for, and called back by a late look at SIGHUP.
        return "libpqwalreceiver" in busy.life() or "WAL receiver process shutdown requested" in busy.life()

    await wait_until(tried, deadline_s=5, what="the startup process asks for a walreceiver with the old address")
    assert "started streaming WAL" not in busy.life()
    assert not await busy.primary.commit_is_acknowledged(within_s=0.5)
    busy.locker.terminate()
    await follow(standby.running, settings_of(standby), address, None, deadline_s=5)
    assert await busy.primary.commit_is_acknowledged(within_s=5)


async def test_p2_following_again_waits_until_the_startup_process_has_let_go_of_the_old_address(
    cluster: Cluster,
) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    await stop_following(standby.running, settings_of(standby), deadline_s=3)
    startup = standby.child_pid("startup")
    freeze(startup)
    with pytest.raises(NotFollowing):
        await follow(standby.running, settings_of(standby), conninfo(primary, A), None, deadline_s=0.5)
    assert "no-walreceiver" in (await settings_of(standby).file.read())["dynamic_library_path"]
    thaw(startup)
    await follow(standby.running, settings_of(standby), conninfo(primary, A), None, deadline_s=5)
    await cluster.wait_streaming(primary, A)
    # Asked again, it does nothing: the walreceiver stays.
    walreceiver = standby.child_pid("walreceiver")
    await follow(standby.running, settings_of(standby), conninfo(primary, A), None, deadline_s=5)
    os.kill(walreceiver, 0)
    assert standby.child_pid("walreceiver") == walreceiver


@pytest.mark.parametrize("cut_off", ["follow", "start"])
async def test_p2_what_is_cut_off_and_written_late_does_not_come_after_the_vote(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, cut_off: str
) -> None:
    """Its flush takes long, its operation is ended, and the next reload would start a walreceiver after the promise."""
    one = cluster.add("x")
    postgres = await installed_postgres_of(one)
    file = postgres.running.settings_file
    hangs, goes_on, landed = threading.Event(), threading.Event(), threading.Event()

    def slow(path: Path, content: bytes, **options: Any) -> None:
        late = b"old-primary" in content
        if late:
            hangs.set()
            assert goes_on.wait(60)
        write_atomically(path, content, **options)
        if late:
            landed.set()

    monkeypatch.setattr(running, "write_atomically", slow)
    monkeypatch.setattr(directory, "write_atomically", slow)
    old = Upstream(holder=MemberId("p_00000000"), host="old-primary", port=5432, member_id=A, epoch=Epoch(1))
    following = asyncio.create_task(
        file.write({"primary_conninfo": "host=old-primary"})
        if cut_off == "follow"
        else postgres.write_files(NOBODY, Access.CLOSED, standby=True, upstream=old)
    )
    assert await asyncio.to_thread(hangs.wait, 30)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    voting = asyncio.create_task(file.write({"primary_conninfo": ""}))
    # Whoever does not wait for the late one is done by now.
    await asyncio.wait([voting], timeout=0.5)
    goes_on.set()
    await voting
    assert await asyncio.to_thread(landed.wait, 30)
    assert (await file.read())["primary_conninfo"] == ""
