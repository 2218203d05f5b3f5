"""P5, P7, P10: what the list means to each walsender, and the barrier behind which a change is recorded."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from harness import Cluster, PostgresProcess, frozen, thaw, wait_until

from instance_manager.core.quorum import SynchronousSet
from instance_manager.core.types import Lsn, MemberId, Timeline
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.running import Sender
from instance_manager.postgres.synchronous import (
    BarrierNotPassed,
    NotConfirmed,
    SynchronousReplication,
    judge_barrier,
    judge_dropped,
)

A = MemberId("a_0000000a")
B = MemberId("b_0000000b")
C = MemberId("c_0000000c")
ONE = Timeline(1)


def replication_of(server: PostgresProcess, *, require_slots: bool = True) -> SynchronousReplication:
    settings = DynamicSettings(server.running.settings_file)
    return SynchronousReplication(server.running, settings, require_slots=require_slots)


def chosen(k: int, *members: MemberId) -> SynchronousSet:
    return SynchronousSet(k, frozenset(members))


def sender(
    pid: int = 1,
    name: str = A,
    *,
    state: str = "streaming",
    priority: int = 1,
    sent: int = 100,
    flush: int | None = 100,
    slot: str | None = "own",
) -> Sender:
    return Sender(
        pid=pid,
        backend_start="then",
        name=name,
        state=state,
        sync_priority=priority,
        sent_lsn=Lsn(sent),
        flush_lsn=None if flush is None else Lsn(flush),
        slot=name if slot == "own" else slot,
    )


@pytest.mark.parametrize(
    ("senders", "passes"),
    [
        ([sender(1, A), sender(2, B)], True),
        ([sender(1, A)], False),
        ([sender(1, A), sender(2, B, flush=99)], False),
        ([sender(1, A), sender(2, B, flush=None)], False),
        ([sender(1, A), sender(2, B, sent=99)], False),
        ([sender(1, A), sender(2, B, state="catchup")], False),
        ([sender(1, A), sender(2, C)], False),
        ([sender(1, A), sender(2, A)], False),
        ([sender(1, A), sender(2, B), sender(3, A, state="startup", flush=None, slot=None)], False),
        ([sender(1, A), sender(2, B, slot=None)], False),
        ([sender(1, A), sender(2, B, slot=A)], False),
        ([sender(1, A), sender(2, B), sender(3, C, slot=None), sender(4, C, slot=None)], True),
    ],
)
def test_p5_p7_p10_the_barrier_counts_members_that_stream_have_sent_and_flushed_and_are_alone_of_their_name(
    senders: list[Sender], passes: bool
) -> None:
    state = judge_barrier(senders, members=frozenset({A, B}), needed=2, mark=Lsn(100))
    assert state.is_passed == passes


def test_p5_a_listed_walsender_with_an_unknown_k_must_pass_too_or_be_gone() -> None:
    members, suspects = frozenset({A, B, C}), frozenset({(3, "then")})
    two = [sender(1, A), sender(2, B)]

    def passes(*third: Sender) -> bool:
        return judge_barrier([*two, *third], members=members, needed=2, mark=Lsn(100), suspects=suspects).is_passed

    assert not passes(sender(3, C, flush=99))
    assert not passes(sender(3, C, flush=99, state="catchup"))
    assert passes(sender(3, C))
    assert passes(sender(4, C, flush=99))
    assert passes()


def test_p5_priority_0_is_no_evidence_without_a_flush_position() -> None:
    before = frozenset({(1, "then")})

    def lingering(one: Sender) -> bool:
        return bool(judge_dropped([one], members=frozenset({B}), before=before))

    assert lingering(sender(1, A, priority=1))
    assert lingering(sender(1, A, priority=0, flush=None))
    assert not lingering(sender(1, A, priority=0))
    assert not lingering(sender(2, A, priority=0, flush=None))
    assert not lingering(sender(1, "pg_basebackup", priority=0, flush=None))
    assert not lingering(sender(1, B, priority=1))


async def test_p5_a_dropped_name_still_counts_until_its_walsender_has_looked(cluster: Cluster) -> None:
    """A has flushed, and its frozen walsender says so under a name that is dropped: B alone then makes two."""
    primary, _, b, c = await cluster.primary_with_standbys(A, B, C)
    await replication_of(primary, require_slots=False).apply(chosen(2, A, B, C), deadline_s=5)
    with frozen(b.child_pid("walreceiver")), frozen(c.child_pid("walreceiver")):
        client = await primary.connect(synchronous_commit="on")
        commit = asyncio.ensure_future(client.execute("SELECT pg_logical_emit_message(true, 'test', 'x')"))
        await wait_until(
            lambda: primary.fetchval("SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        )
        await wait_until(
            lambda: primary.fetchval(
                "SELECT count(*) = 1 FROM pg_stat_replication WHERE application_name = $1 "
                "AND flush_lsn >= pg_current_wal_flush_lsn()",
                A,
            )
        )
        walsender = await primary.walsender_pid(A)
        assert walsender is not None
        with frozen(walsender):
            primary.set_dynamic(synchronous_standby_names=f"ANY 2 ({B}, {C})")
            await primary.reload()
            await wait_until(
                lambda: primary.fetchval("SELECT current_setting('synchronous_standby_names') NOT LIKE '%a_%'")
            )
            await asyncio.sleep(0.2)
            assert not commit.done()
            thaw(b.child_pid("walreceiver"))
            await asyncio.wait_for(commit, 5)  # The fact behind P5: of B and C only B has it.
        client.terminate()


async def test_p5_a_list_is_confirmed_only_when_the_walsenders_of_dropped_names_have_let_go(cluster: Cluster) -> None:
    primary, _, _, _ = await cluster.primary_with_standbys(A, B, C)
    replication = replication_of(primary, require_slots=False)
    await replication.apply(chosen(2, A, B, C), deadline_s=5)
    walsender = await primary.walsender_pid(A)
    assert walsender is not None
    with frozen(walsender):
        with pytest.raises(NotConfirmed) as failure:
            await replication.apply(chosen(2, B, C), deadline_s=2, terminate_after_s=0.3)
        assert failure.value.lingering == (walsender,)
        with pytest.raises(BarrierNotPassed):
            await replication.barrier(ONE, deadline_s=1)
    await replication.apply(chosen(2, B, C), deadline_s=5)
    passed = await replication.barrier(ONE, deadline_s=5)
    print(f"barrier: {passed.took_s * 1000:.0f} ms")


async def test_p5_after_k_was_raised_every_listed_walsender_must_pass_the_mark_or_be_gone(cluster: Cluster) -> None:
    primary, _, _, _ = await cluster.primary_with_standbys(A, B, C, slots=True)
    replication = replication_of(primary)
    await replication.apply(chosen(1, A, B, C), deadline_s=5)
    await replication.barrier(ONE, deadline_s=5)
    walsender = await primary.walsender_pid(C)
    assert walsender is not None
    with frozen(walsender):
        await replication.apply(chosen(2, A, B, C), deadline_s=5)
        with pytest.raises(BarrierNotPassed) as failure:
            await replication.barrier(ONE, deadline_s=2, terminate_after_s=0.3)
        assert failure.value.state is not None
        assert failure.value.state.suspects == (walsender,)
        assert failure.value.state.passed == (A, B)
    await replication.barrier(ONE, deadline_s=5)
    # With the k unchanged a frozen one more is no hindrance.
    await cluster.wait_streaming(primary, C)
    walsender = await primary.walsender_pid(C)
    assert walsender is not None
    with frozen(walsender):
        await replication.apply(chosen(2, A, B, C), deadline_s=5)
        await replication.barrier(ONE, deadline_s=2)


async def test_p7_a_half_open_walsender_and_its_successor_satisfy_any_2_alone(cluster: Cluster) -> None:
    primary, a, b = await cluster.primary_with_standbys(A, B)
    await replication_of(primary, require_slots=False).apply(chosen(2, A, B), deadline_s=5)
    with frozen(b.child_pid("walreceiver")):
        client = await primary.connect(synchronous_commit="on")
        commit = asyncio.ensure_future(client.execute("SELECT pg_logical_emit_message(true, 'test', 'x')"))
        await wait_until(
            lambda: primary.fetchval("SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        )
        await wait_until(
            lambda: primary.fetchval(
                "SELECT flush_lsn >= pg_current_wal_flush_lsn() FROM pg_stat_replication WHERE application_name = $1", A
            )
        )
        assert not commit.done()
        walsender = await primary.walsender_pid(A)
        assert walsender is not None
        with frozen(walsender):
            os.kill(a.child_pid("walreceiver"), signal.SIGTERM)
            await asyncio.wait_for(commit, 10)  # The fact behind P7: only A has it.
        client.terminate()


async def test_p7_the_barrier_refuses_a_name_seen_twice(cluster: Cluster) -> None:
    primary, a, _ = await cluster.primary_with_standbys(A, B)
    replication = replication_of(primary, require_slots=False)
    await replication.apply(chosen(1, A, B), deadline_s=5)
    await replication.barrier(ONE, deadline_s=5)
    walsender = await primary.walsender_pid(A)
    assert walsender is not None
    with frozen(walsender):
        os.kill(a.child_pid("walreceiver"), signal.SIGTERM)
        await wait_until(
            lambda: primary.fetchval("SELECT count(*) = 2 FROM pg_stat_replication WHERE application_name = $1", A)
        )
        with pytest.raises(BarrierNotPassed) as failure:
            await replication.barrier(ONE, deadline_s=2, terminate_after_s=0.3)
        assert failure.value.state is not None
        assert failure.value.state.duplicates == (A,)
    await replication.barrier(ONE, deadline_s=5)


async def test_p7_a_member_counts_only_through_its_own_slot_which_lets_in_no_second(cluster: Cluster) -> None:
    primary, a = await cluster.primary_with_standbys(A)
    replication = replication_of(primary)
    await replication.apply(chosen(1, A), deadline_s=5)
    with pytest.raises(BarrierNotPassed) as failure:
        await replication.barrier(ONE, deadline_s=1.5)
    assert failure.value.state is not None
    assert failure.value.state.without_slot == (A,)
    await primary.execute(f"SELECT pg_create_physical_replication_slot('{A}', true)")
    a.set_dynamic(primary_slot_name=A)
    await a.reload()
    await replication.barrier(ONE, deadline_s=5)


async def test_p10_the_mark_is_reached_where_the_insert_position_at_a_page_start_is_not(cluster: Cluster) -> None:
    primary, _ = await cluster.primary_with_standbys(A, slots=True)
    async with primary.session(synchronous_commit="local") as client:

        async def insert() -> int:
            text = await client.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'")
            return int(text)

        async def emit(length: int) -> int:
            before = await insert()
            await client.execute(f"SELECT pg_logical_emit_message(false, 't', repeat('x', {length}))")
            return await insert() - before

        await client.execute("CHECKPOINT")
        overhead = await emit(800) - 800
        for _ in range(20):
            left = 8192 - await insert() % 8192
            if left < 400:
                await emit(left)
                continue
            await emit(left - overhead)
            if await insert() % 8192 in (24, 40):
                break
        position = await insert()
        assert position % 8192 in (24, 40), position % 8192
        boundary = position - position % 8192
        # The walwriter flushes whole pages.
        await wait_until(lambda: client.fetchval("SELECT pg_current_wal_flush_lsn() - '0/0' >= $1::numeric", boundary))
        await asyncio.sleep(0.3)
        flush = int(await client.fetchval("SELECT pg_current_wal_flush_lsn() - '0/0'"))
        assert (flush, await insert()) == (boundary, position), "the fact behind P10 is gone"
        standby = int(await client.fetchval("SELECT flush_lsn - '0/0' FROM pg_stat_replication"))
        assert standby <= boundary
    replication = replication_of(primary)
    await replication.apply(chosen(1, A), deadline_s=5)
    started_s = time.monotonic()
    passed = await replication.barrier(ONE, deadline_s=5)
    print(f"barrier: {(time.monotonic() - started_s) * 1000:.0f} ms")
    assert passed.state.mark > position


async def test_p10_the_barrier_is_refused_on_a_timeline_that_is_not_the_claimed_one(cluster: Cluster) -> None:
    primary, _ = await cluster.primary_with_standbys(A, slots=True)
    replication = replication_of(primary)
    await replication.apply(chosen(1, A), deadline_s=5)
    with pytest.raises(BarrierNotPassed, match="timeline 1, not the claimed 2"):
        await replication.barrier(Timeline(2), deadline_s=2)


async def test_p13_a_cancelled_wait_reports_success_with_a_warning(cluster: Cluster) -> None:
    primary, a = await cluster.primary_with_standbys(A)
    await replication_of(primary, require_slots=False).apply(chosen(1, A), deadline_s=5)
    with frozen(a.child_pid("walreceiver")):
        async with primary.session(synchronous_commit="on") as client:
            warnings: list[str] = []
            client.add_log_listener(lambda _, message: warnings.append(message.message))
            commit = asyncio.ensure_future(client.execute("SELECT pg_logical_emit_message(true, 'test', 'x')"))
            await wait_until(
                lambda: primary.fetchval("SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            )
            await primary.execute(f"SELECT pg_cancel_backend({client.get_server_pid()})")
            assert await asyncio.wait_for(commit, 5) == "SELECT 1"
            assert any("canceling wait for synchronous replication" in each for each in warnings)
