"""Archiving and recovery by Postgres itself: its own archiver and its own recovery, over a real archiver process."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from archive_harness import until
from archiving_server import (
    INSERT,
    all_archived,
    archiving,
    cold_copy,
    insert,
    prepared,
    run,
)
from fault_proxy import FaultProxy
from harness import Cluster, conninfo, wait_until
from recovering_server import recovery_of

from instance_manager.archive import commands
from instance_manager.archive.codecs import Codec
from instance_manager.archive.layout import Layout

pytestmark = pytest.mark.timeout(240)
LAYOUT = Layout("orders", Codec("zstd"))


async def test_what_postgres_archived_is_what_recovery_gets_back(cluster: Cluster, section: dict[str, Any]) -> None:
    server = cluster.add("p")
    with archiving(server, section) as made:
        copy = await cold_copy(cluster, server)
        clients = server.state / "clients"
        counted = commands.quick(made.client)
        counted.write_text(f"open(my $of, '>>', '{clients}'); print $of 'x'; close $of;\n{counted.read_text()}")
        system = await prepared(cluster, made)
        assert made.process is not None
        made.process.send_signal(signal.SIGSTOP)  # so that more than one file waits
        for number in range(12):
            await insert(server, number * 3000, 3000)
        made.process.send_signal(signal.SIGCONT)
        await all_archived(server)
        status = made.status()
        assert (await server.fetchval("SELECT failed_count FROM pg_stat_archiver"), status["push"]["refused"]) == (0, 0)
        assert status["push"]["archived"] >= 12
        assert status["push"]["look_ahead_hits"] > 0
        assert len(clients.read_text()) < status["push"]["archived"], "of several one receipt at least was used"
        server.kill()
    async with recovery_of(cluster, copy, section, system) as recovery:
        await recovery.start()
        assert await recovery.rows() == set(range(36_000))
        assert recovery.made.status()["fetch"]["from_prefetch"] > 0


async def test_losing_every_volume_costs_the_streaming_interval_and_not_a_segment(
    cluster: Cluster, section: dict[str, Any]
) -> None:
    server = cluster.add("p")
    with archiving(server, {**section, "stream_interval_s": 0.2}) as made:
        copy = await cold_copy(cluster, server)
        system = await prepared(cluster, made)
        async with server.session(synchronous_commit="on") as session:
            for number in range(60):
                await session.execute(INSERT, number, number)
                await asyncio.sleep(0.02)
            flushed = int(await session.fetchval("SELECT pg_current_wal_flush_lsn() - '0/0'"))
            await until(lambda: made.status()["stream"]["durable_lsn"] >= flushed, deadline_s=20)
            for number in range(60, 80):
                await session.execute(INSERT, number, number)
        made.kill_archiver()
        server.kill()
    async with recovery_of(cluster, copy, section, system) as recovery:
        await recovery.start()
        rows = await recovery.rows()
        assert set(range(60)) <= rows <= set(range(80))
        assert recovery.made.status()["fetch"]["joined_tails"] >= 1


async def test_archivers_and_servers_killed_at_random_lose_nothing_acknowledged(
    cluster: Cluster, section: dict[str, Any]
) -> None:
    chance = random.Random(5)
    server = cluster.add("p")
    with archiving(server, section) as made:
        copy = await cold_copy(cluster, server)
        system = await prepared(cluster, made)
        count = 0
        for _ in range(8):
            for _ in range(chance.randrange(1, 4)):
                await insert(server, count, 1500)
                count += 1500
                await server.execute("SELECT pg_switch_wal()")
            await asyncio.sleep(chance.uniform(0, 0.3))
            made.kill_archiver()
            if chance.random() < 0.4:
                server.kill()
                await server.start()
            await made.start_archiver()
            made.order("primary", system)
        await all_archived(server, deadline_s=90)
        assert made.status()["push"]["conflicts"] == 0
        server.kill()
    async with recovery_of(cluster, copy, section, system) as recovery:
        await recovery.start()
        assert await recovery.rows() == set(range(count))


async def test_a_store_that_fails_during_recovery_stops_it_and_it_resumes_without_opening(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy
) -> None:
    server = cluster.add("p")
    with archiving(server, s3_section) as made:
        copy = await cold_copy(cluster, server)
        system = await prepared(cluster, made)
        for number in range(8):
            await insert(server, number * 3000, 3000)
        name = await all_archived(server)
        server.kill()
    async with recovery_of(cluster, copy, s3_section, system) as recovery:
        proxy.fail("403 AccessDenied", path=name)
        await recovery.start(wait=False)
        assert await recovery.server.wait_ended(deadline_s=60) != 0
        log = recovery.server.log_text()
        assert f'FATAL:  could not restore file "{name}" from archive' in log
        assert "archive recovery complete" not in log
        proxy.heal()
        await recovery.start()
        assert await recovery.rows() == set(range(24_000))


async def test_without_its_archiver_recovery_stops_and_does_not_open(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server = cluster.add("p")
    with archiving(server, directory_section) as made:
        copy = await cold_copy(cluster, server)
        system = await prepared(cluster, made)
        await insert(server, 0, 3000)
        await all_archived(server)
        server.kill()
    async with recovery_of(cluster, copy, directory_section, system) as recovery:
        await recovery.made.start_archiver()
        recovery.made.kill_archiver()
        recovery.server.write("recovery.signal", "")
        recovery.server.configure(**recovery.made.restore_settings("recovery"), archive_mode="off")
        recovery.server.set_dynamic(synchronous_standby_names="")
        await recovery.server.start(wait=False)
        assert await recovery.server.wait_ended(deadline_s=30) != 0
        assert "archive recovery complete" not in recovery.server.log_text()
        await recovery.start()
        assert await recovery.rows() == set(range(3000))


async def test_recovery_follows_a_promotion_and_nothing_behind_the_fork(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    primary, standby = cluster.add("p"), cluster.add("s")
    with archiving(primary, directory_section) as first, archiving(standby, directory_section) as second:
        copy = await cold_copy(cluster, primary)
        system = await prepared(cluster, first)
        cluster.follow(standby, primary)
        standby.configure(**second.archive_settings())
        await second.start_archiver()
        second.order("standby", system)
        await standby.start()
        await insert(primary, 0, 3000)
        await cluster.wait_streaming(primary, "s")
        standby.set_dynamic(primary_conninfo="", synchronous_standby_names="")
        await standby.reload()
        # The old primary goes on alone, and archives it: nobody was told of a fork yet.
        await wait_until(
            lambda: standby.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)"), what="the stream ends"
        )
        await insert(primary, 100_000, 3000)
        await all_archived(primary)
        primary.kill()
        await standby.execute("SELECT pg_promote()")
        second.order("primary", system, epoch=2)
        await insert(standby, 3000, 3000)
        await all_archived(standby)
        assert (Path(directory_section["directory"]) / LAYOUT.wal("00000002.history")).exists()
        standby.kill()
    async with recovery_of(cluster, copy, directory_section, system) as recovery:
        await recovery.start()
        assert await recovery.rows() == set(range(6000))


async def test_a_rewind_gets_the_log_that_its_directory_no_longer_has(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    old, new = cluster.add("p"), cluster.add("s")
    with archiving(old, directory_section) as made:
        system = await prepared(cluster, made, wal_keep_size=0)
        cluster.follow(new, old)
        await new.start()
        await insert(old, 0, 3000)
        await cluster.wait_streaming(old, "s")
        new.set_dynamic(primary_conninfo="", synchronous_standby_names="")
        await new.reload()
        await wait_until(lambda: new.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)"))
        await new.execute("SELECT pg_promote()")
        await new.execute("CHECKPOINT")
        for number in range(4):
            await insert(old, 100_000 + number * 3000, 3000)
            await all_archived(old)
            await old.execute("CHECKPOINT")
        await old.stop()
        made.order("standby", system)
        old.configure(**made.restore_settings("rewind"))
        argv = [
            *(old.bin_directory / "pg_rewind", f"--target-pgdata={old.data}"),
            f"--source-server=host=127.0.0.1 port={new.port} user=postgres dbname=postgres",
        ]
        without = await run([*argv, "--dry-run"], as_postgres=True)
        assert without.returncode != 0, "the log is still there: this proves nothing"
        done = await run([*argv, "--restore-target-wal"], as_postgres=True)
        assert done.returncode == 0, done.stderr
        assert made.status()["fetch"]["restored"] > 0
    old.configure(restore_command="", archive_mode="off")
    cluster.follow(old, new)
    await old.start()
    await cluster.wait_streaming(new, "p")
    assert await old.fetchval("SELECT count(*) FROM t WHERE n >= 100000") == 0


async def test_a_standby_without_a_stream_catches_up_from_the_archive(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    primary, standby = cluster.add("p"), cluster.add("s")
    with archiving(primary, directory_section) as first, archiving(standby, directory_section) as second:
        system = await prepared(cluster, first)
        await insert(primary, 0, 6000)
        await all_archived(primary)
        standby.make_standby()
        standby.configure(**second.restore_settings("standby"))
        standby.set_dynamic(primary_conninfo="")
        await second.start_archiver()
        second.order("standby", system)
        await standby.start()

        async def caught_up() -> bool:
            with contextlib.suppress(Exception):
                return bool(await standby.fetchval("SELECT count(*) = 6000 FROM t"))
            return False

        await wait_until(caught_up, deadline_s=30, what="the standby has the archive's rows")
        # Absence does not end it: it goes on asking, and takes what comes later.
        await insert(primary, 6000, 100)
        await all_archived(primary)
        await wait_until(
            lambda: standby.fetchval("SELECT count(*) = 6100 AND pg_is_in_recovery() FROM t"), deadline_s=30
        )
        # Then it streams, and the archive is left alone.
        standby.set_dynamic(primary_conninfo=conninfo(primary, "s"))
        await standby.reload()
        await cluster.wait_streaming(primary, "s")


async def test_a_primary_whose_permit_ended_archives_nothing_and_loses_nothing(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server = cluster.add("p")
    with archiving(server, directory_section) as made:
        system = await prepared(cluster, made)
        await all_archived(server)
        made.order("standby", system)
        await insert(server, 0, 10)
        name = await server.fetchval("SELECT pg_walfile_name(pg_switch_wal())")
        await wait_until(
            lambda: server.fetchval("SELECT failed_count > 0 FROM pg_stat_archiver"), deadline_s=20, what="a refusal"
        )
        assert "no valid write permit" in server.log_text()
        assert not (Path(directory_section["directory"]) / LAYOUT.wal(name)).exists()
        assert (server.data / "pg_wal/archive_status" / f"{name}.ready").exists()
        made.order("primary", system, epoch=2)
        await all_archived(server, deadline_s=90)


async def test_a_fast_shutdown_does_not_wait_for_a_store_that_hangs_longer_than_one_push(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy
) -> None:
    server = cluster.add("p")
    with archiving(server, s3_section) as made:
        await prepared(cluster, made)
        await all_archived(server)
        proxy.fail("silent")
        await server.execute("SELECT pg_switch_wal()")
        await server.stop(signal.SIGINT, deadline_s=90)
        proxy.heal()
