"""P12: what a clean shutdown says, and what it does not; slots."""

from __future__ import annotations

import asyncio
import signal

from harness import Cluster, freeze

from instance_manager.core.types import MemberId, Timeline, TimelineChain, WalEnd
from instance_manager.postgres.control_data import read_control_data
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.promotion import NotHandedOver, shutdown_end
from instance_manager.postgres.slots import plan_slots, reconcile
from instance_manager.postgres.sql import LocalSql
from instance_manager.postgres.voting import position, stop_following

A = MemberId("a_0000000a")
B = MemberId("b_0000000b")
FIRST = TimelineChain(Timeline(1))


async def test_p12_a_shutdown_completes_without_a_standby_whose_connection_died(cluster: Cluster) -> None:
    primary, a = await cluster.primary_with_standbys(A)
    freeze(a.child_pid("walreceiver"))
    primary.send(signal.SIGINT)
    await asyncio.sleep(0.5)
    assert primary.process is not None
    assert primary.process.poll() is None, "it waits for its standby"
    a.kill()
    assert await primary.wait_ended() == 0
    end = await shutdown_end(primary.server, await read_control_data(primary.server), FIRST, deadline_s=5)
    assert isinstance(end, WalEnd), end
    a.set_dynamic(primary_conninfo="")
    await a.start()
    await stop_following(a.running, DynamicSettings(a.running.settings_file), deadline_s=5)
    assert await position(a.server, FIRST, deadline_s=5) < end


async def test_p12_a_standby_that_streamed_to_the_end_holds_the_very_end_that_pg_control_tells(
    cluster: Cluster,
) -> None:
    primary, a = await cluster.primary_with_standbys(A)
    await primary.stop()
    control = await read_control_data(primary.server)
    end = await shutdown_end(primary.server, control, FIRST, deadline_s=5)
    await stop_following(a.running, DynamicSettings(a.running.settings_file), deadline_s=5)
    assert await position(a.server, FIRST, deadline_s=5) == end
    other = TimelineChain(Timeline(3))
    assert isinstance(await shutdown_end(primary.server, control, other, deadline_s=5), NotHandedOver)


async def test_p12_an_immediate_shutdown_is_not_handed_over(cluster: Cluster) -> None:
    primary = await cluster.primary()
    await primary.stop(signal.SIGQUIT)
    end = await shutdown_end(primary.server, await read_control_data(primary.server), FIRST, deadline_s=5)
    assert isinstance(end, NotHandedOver)
    assert "in production" in end.reason


def test_slots_are_planned_from_what_exists() -> None:
    plan = plan_slots(
        [
            (A, True, "reserved"),
            (B, False, "lost"),
            ("c_0000000c", False, "reserved"),
            ("d_0000000d", True, "reserved"),
            ("somebody_elses", False, "lost"),
        ],
        [A, B, MemberId("e_0000000e")],
    )
    assert plan.create == ("e_0000000e",)
    assert plan.recreate == (B,)
    assert plan.drop == ("c_0000000c",)
    assert plan.busy == ("d_0000000d",)


async def test_slots_are_created_dropped_and_recreated_when_lost(cluster: Cluster) -> None:
    primary = await cluster.primary()
    sql = LocalSql(primary.server)
    await primary.execute("SELECT pg_create_physical_replication_slot('users_own', true)")
    assert (await reconcile(sql, [A, B])).created == (A, B)
    assert (await reconcile(sql, [A])).dropped == (B,)
    primary.configure(max_slot_wal_keep_size="1MB", wal_keep_size="0", min_wal_size="2MB", max_wal_size="2MB")
    await primary.reload()
    for _ in range(4):
        await primary.execute("SELECT pg_logical_emit_message(true, 't', repeat('x', 900000))")
        await primary.execute("SELECT pg_switch_wal()")
    await primary.execute("CHECKPOINT")
    assert await primary.fetchval("SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1", A) == "lost"
    assert (await reconcile(sql, [A])).recreated == (A,)
    assert await primary.fetchval("SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1", A) == "reserved"
    changes = await reconcile(sql, [])
    assert changes.dropped == (A,)
    assert await primary.fetchval("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'users_own'") == 1
    sql.close()
