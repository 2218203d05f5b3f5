"""P3, P11: a voter tells the end of the log that its disk holds, whatever the server says."""

from __future__ import annotations

import time

import pytest
from harness import Cluster, PostgresProcess, conninfo

from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, TimelineSwitch, WalEnd
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.observation import observe
from instance_manager.postgres.promotion import install_restore_command, promote
from instance_manager.postgres.sql import LocalSql
from instance_manager.postgres.voting import PositionUnknown, follow, position, stop_following

A = MemberId("a_0000000a")
B = MemberId("b_0000000b")
FIRST = TimelineChain(Timeline(1))


def chain_to(timeline: int, switch_lsn: Lsn) -> TimelineChain:
    return FIRST.forked(TimelineSwitch(Timeline(timeline), Timeline(1), switch_lsn, Epoch(2)))


async def stop(server: PostgresProcess) -> None:
    await stop_following(server.running, DynamicSettings(server.running.settings_file), deadline_s=5)


async def written(primary: PostgresProcess) -> Lsn:
    end = await primary.lsn("pg_current_wal_flush_lsn")
    assert end is not None
    return end


async def test_p3_after_a_restart_the_position_is_the_end_on_disk_not_what_the_server_says(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    standby.configure(recovery_min_apply_delay="1h")
    await standby.reload()
    await primary.execute("CREATE TABLE t AS SELECT generate_series(1, 20000) AS id")
    await primary.execute("INSERT INTO t SELECT generate_series(1, 20000)")
    await cluster.wait_streaming(primary, A)
    end = await written(primary)
    await standby.stop()
    standby.set_dynamic(primary_conninfo="")
    await standby.start()
    receive = await standby.lsn("pg_last_wal_receive_lsn")
    replay = await standby.lsn("pg_last_wal_replay_lsn")
    assert max(receive or 0, replay or 0) < end, "the fact behind P3 is gone"
    await stop(standby)
    started_s = time.monotonic()
    assert await position(standby.server, FIRST, deadline_s=5) == WalEnd(Timeline(1), end)
    print(f"position: {(time.monotonic() - started_s) * 1000:.0f} ms")


async def test_p3_the_position_of_a_streaming_standby_is_all_that_it_acknowledged(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    await standby.execute("SELECT pg_wal_replay_pause()")
    await primary.execute("CREATE TABLE t AS SELECT generate_series(1, 5000) AS id")
    await cluster.wait_streaming(primary, A)
    end = await written(primary)
    await stop(standby)
    assert await position(standby.server, FIRST, deadline_s=5) == WalEnd(Timeline(1), end)


async def test_p11_the_position_names_the_timeline_that_pg_control_does_not_know_yet(cluster: Cluster) -> None:
    primary, a, b = await cluster.primary_with_standbys(A, B)
    for standby in (a, b):
        standby.set_dynamic(restore_command=install_restore_command(standby.server))
        await standby.reload()
    await stop(b)
    await stop(a)
    fork = (await position(a.server, FIRST, deadline_s=5)).lsn
    chain = chain_to(9, fork)
    await promote(a.server, chain, a.relay, deadline_s=10)
    primary.kill()
    await follow(b.running, DynamicSettings(b.running.settings_file), conninfo(a, B), None, deadline_s=5)
    await cluster.wait_streaming(a, B)
    await a.execute("CREATE TABLE t AS SELECT generate_series(1, 100) AS id")
    await cluster.wait_streaming(a, B)
    end = await written(a)
    await stop(b)
    assert await position(b.server, chain, deadline_s=5) == WalEnd(Timeline(9), end)
    assert await b.fetchval("SELECT timeline_id FROM pg_control_checkpoint()") == 1
    # The same log by the old record: a timeline that nobody claimed. By one with another fork: another history.
    with pytest.raises(PositionUnknown, match="never claimed"):
        await position(b.server, FIRST, deadline_s=5)
    with pytest.raises(PositionUnknown, match="another history"):
        await position(b.server, chain_to(9, Lsn(fork + 8)), deadline_s=5)


async def test_p3_a_primary_has_no_voter_position(cluster: Cluster) -> None:
    primary = await cluster.primary()
    with pytest.raises(PositionUnknown, match="not in recovery"):
        await position(primary.server, FIRST, deadline_s=5)


async def test_observation_of_a_primary_and_of_its_standby(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A, slots=True)
    sql = LocalSql(primary.server)
    started_s = time.monotonic()
    seen = await observe(sql)
    first_s = time.monotonic() - started_s
    started_s = time.monotonic()
    seen = await observe(sql)
    print(f"observe: {first_s * 1000:.0f} ms, then {(time.monotonic() - started_s) * 1000:.1f} ms")
    assert not seen.in_recovery
    assert seen.timeline == 1
    assert seen.flush_lsn is not None
    assert seen.replay_lsn is None
    assert seen.walreceiver is None
    (sender,) = seen.walsenders
    assert (sender.application_name, sender.state, sender.slot) == (A, "streaming", A)
    (slot,) = seen.slots
    assert (slot.name, slot.physical, slot.active_pid) == (A, True, sender.pid)
    assert seen.checkpointer_pid == primary.child_pid("checkpointer")
    assert seen.hot_standby.max_connections == 40
    assert seen.configuration_errors == ()
    primary.configure(work_mem="nonsense", max_connections=41)
    await primary.reload()
    seen = await observe(sql)
    assert any("work_mem" in error for error in seen.configuration_errors)
    sql.close()

    sql = LocalSql(standby.server)
    behind = await observe(sql)
    assert behind.in_recovery
    assert behind.timeline == 1
    assert behind.is_receiving
    assert behind.walreceiver is not None
    assert behind.walreceiver.pid == standby.child_pid("walreceiver")
    assert behind.walreceiver.sender_port == primary.port
    assert behind.walreceiver.silent_for_s < 30
    assert behind.walreceiver.last_message is not None
    assert behind.replay_pause == "not paused"
    assert behind.flush_lsn is None
    assert behind.system_identifier == seen.system_identifier
    assert not behind.startup_is_held_up
    sql.close()
