"""P1: leaving the empty list is switched on by the checkpointer alone."""

from __future__ import annotations

import asyncio

import pytest
from harness import Cluster, PostgresProcess, frozen, thaw, wait_until

from instance_manager.core.quorum import ALONE, NOBODY, SynchronousSet
from instance_manager.core.types import MemberId
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.synchronous import NotConfirmed, SynchronousReplication

A = MemberId("a_0000000a")


def replication_of(server: PostgresProcess) -> SynchronousReplication:
    return SynchronousReplication(server.running, DynamicSettings(server.running.settings_file), require_slots=False)


async def test_p1_with_a_stopped_checkpointer_commits_pass_although_the_view_says_quorum(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    with frozen(primary.child_pid("checkpointer")):
        primary.set_dynamic(synchronous_standby_names=f"ANY 1 ({A})")
        await primary.reload()
        await wait_until(
            lambda: primary.fetchval("SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'quorum'")
        )
        with frozen(standby.child_pid("walreceiver")):
            assert await primary.commit_is_acknowledged(within_s=2), "the fact behind P1 is gone"


async def test_p1_the_list_is_confirmed_only_once_the_checkpointer_has_switched_waiting_on(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    replication = replication_of(primary)
    wanted = SynchronousSet(1, frozenset({A}))
    with frozen(primary.child_pid("checkpointer")):
        with pytest.raises(NotConfirmed):
            await replication.apply(wanted, deadline_s=0.7)
        assert replication.confirmed is None
    confirmed = await replication.apply(wanted, deadline_s=5)
    print(f"confirm from the empty list: {confirmed.took_s * 1000:.0f} ms")
    with frozen(standby.child_pid("walreceiver")):
        assert not await primary.commit_is_acknowledged(within_s=0.5)
    assert await primary.commit_is_acknowledged(within_s=5)
    again = await replication.apply(wanted, deadline_s=5)
    print(f"confirm between two lists: {again.took_s * 1000:.0f} ms")


async def test_p1_a_list_that_follows_the_empty_one_is_not_confirmed_by_the_waiting_of_before_it(
    cluster: Cluster,
) -> None:
    """A checkpointer that has stood still since before the list was emptied has waiting switched on yet, and may have
    the empty list in hand: that a commit waits proves nothing until one was seen that does not."""
    primary, standby = await cluster.primary_with_standbys(A)
    replication = replication_of(primary)
    wanted = SynchronousSet(1, frozenset({A}))
    await replication.apply(wanted, deadline_s=5)
    with frozen(primary.child_pid("checkpointer")):
        await replication.apply(ALONE, deadline_s=5)
        # The agent may have restarted meanwhile: nothing of it rests on what one remembers.
        for each in (replication, replication_of(primary)):
            with pytest.raises(NotConfirmed):
                await each.apply(wanted, deadline_s=1)
            assert each.confirmed is None
            # It has not even begun with the next list.
            assert await primary.fetchval("SHOW synchronous_standby_names") == ""
    await replication.apply(wanted, deadline_s=5)
    with frozen(standby.child_pid("walreceiver")):
        assert not await primary.commit_is_acknowledged(within_s=0.5)
    assert await primary.commit_is_acknowledged(within_s=5)


async def test_p1_a_list_that_nobody_can_satisfy_holds_every_commit_and_the_empty_one_none(cluster: Cluster) -> None:
    primary, _ = await cluster.primary_with_standbys(A)
    replication = replication_of(primary)
    await replication.apply(NOBODY, deadline_s=5)
    assert not await primary.commit_is_acknowledged(within_s=0.4)
    await replication.apply(ALONE, deadline_s=5)
    assert await primary.commit_is_acknowledged(within_s=2)


async def test_p1_no_canary_is_left_behind_and_a_client_that_waits_is_neither_cancelled_nor_ended(
    cluster: Cluster,
) -> None:
    primary, standby = await cluster.primary_with_standbys(A)
    replication = replication_of(primary)
    with frozen(standby.child_pid("walreceiver")):
        await replication.apply(SynchronousSet(1, frozenset({A})), deadline_s=5)
        assert await primary.fetchval(
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name LIKE '%canary%'"
        )
        async with primary.session(synchronous_commit="on", application_name="client") as client:
            commit = asyncio.ensure_future(client.execute("SELECT pg_logical_emit_message(true, 'test', 'x')"))
            await wait_until(
                lambda: primary.fetchval(
                    "SELECT count(*) = 1 FROM pg_stat_activity "
                    "WHERE application_name = 'client' AND wait_event = 'SyncRep'"
                )
            )
            await replication.apply(SynchronousSet(1, frozenset({A, MemberId("b_0000000b")})), deadline_s=5)
            assert not commit.done()
            thaw(standby.child_pid("walreceiver"))
            await asyncio.wait_for(commit, 5)


async def test_p1_a_standby_is_refused(cluster: Cluster) -> None:
    _, standby = await cluster.primary_with_standbys(A)
    with pytest.raises(NotConfirmed, match="recovery"):
        await replication_of(standby).apply(ALONE, deadline_s=2)
