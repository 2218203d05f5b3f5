"""Synchronous replication of the model misbehaves as Postgres' does (P1, P5, P7, P8, P10, P13), and the real rules see it."""

from __future__ import annotations

import pytest
from postgres_stage import NOBODY, Stage, StagedInstance, all_of, staged
from simulated_streaming import CHANNEL
from simulated_walsender import WalSender

from instance_manager.core.quorum import ALONE
from instance_manager.core.types import Timeline
from instance_manager.postgres.synchronous import BarrierNotPassed, NotConfirmed

ONE = Timeline(1)


def cut(stage: Stage, one: StagedInstance, other: StagedInstance) -> None:
    stage.network.block(one.name, other.name, CHANNEL)
    stage.network.block(other.name, one.name, CHANNEL)


def test_p1_a_list_that_everybody_shows_holds_no_commit_until_the_checkpointer_has_looked() -> None:
    with staged("a", "b", checkpointer_late=1.0, checkpointer_late_s=(5.0, 5.0)) as stage:
        a, b = stage.instances
        stage.primary(a)
        stage.standby(b, a)
        a.write(synchronous_standby_names=f'ANY 1 ("{b.member_id}")')
        stage.run(1)
        assert a.running.senders[0].priority == 1
        cut(stage, a, b)
        stage.commit(a, "lost")
        stage.run(0.1)
        assert stage.outcome("lost") == "acknowledged"
        stage.run(5)
        stage.commit(a, "waits")
        stage.run(0.1)
        assert stage.outcome("waits") is None


def test_p1_the_rule_returns_only_once_commits_wait() -> None:
    with staged("a", "b", checkpointer_late=1.0, checkpointer_late_s=(2.0, 2.0)) as stage:
        a, b = stage.instances
        stage.primary(a)
        stage.standby(b, a)
        began_s = stage.world.now_s
        stage.do(a, a.synchronous.apply(all_of(b), deadline_s=10))
        assert stage.world.now_s - began_s > 2
        cut(stage, a, b)
        stage.commit(a, "waits")
        stage.run(3)
        assert stage.outcome("waits") is None


def test_p1_the_rule_gives_up_while_the_checkpointer_stands_still() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a)
        stage.standby(b, a)
        a.running.pause("checkpointer")
        with pytest.raises(NotConfirmed):
            stage.do(a, a.synchronous.apply(all_of(b), deadline_s=2))


def test_going_to_the_empty_list_releases_everybody_at_once() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a, all_of(b))
        stage.commit(a, "row")
        stage.run(1)
        assert stage.outcome("row") is None
        stage.do(a, a.synchronous.apply(ALONE, deadline_s=2))
        stage.run(0.1)
        assert stage.outcome("row") == "acknowledged"


def _raise_k(stage: Stage) -> tuple[StagedInstance, StagedInstance, StagedInstance]:
    """A commit is on its way to b alone when k goes from 1 to 2."""
    a, b, c = stage.instances
    stage.primary(a, all_of(b, c))
    stage.standby(b, a)
    stage.standby(c, a)
    cut(stage, a, c)
    stage.network.slow(b.name, a.name, CHANNEL, 0.05)
    stage.commit(a, "row")
    stage.run(0.02)
    return a, b, c


def test_p5_a_walsender_that_was_amid_its_loop_releases_by_its_older_k() -> None:
    with staged("a", "b", "c", walsender_late=1.0, walsender_late_s=(1.0, 1.0)) as stage:
        a, b, c = _raise_k(stage)
        a.write(synchronous_standby_names=f'ANY 2 ("{b.member_id}", "{c.member_id}")')
        stage.run(0.5)
        assert a.running.loaded["synchronous_standby_names"].startswith("ANY 2")
        assert stage.outcome("row") is None
        stage.run(1)
        assert stage.outcome("row") == "acknowledged"
        assert stage.count("commit released by a walsender with an older list") == 1


def test_p5_a_stopped_walsender_may_go_on_with_its_older_k() -> None:
    with staged("a", "b", "c") as stage:
        a, b, c = _raise_k(stage)
        sender = next(each for each in a.running.senders if each.name == b.member_id)
        sender.stand_still(amid_loop=True)
        sender.child.pause()
        a.write(synchronous_standby_names=f'ANY 2 ("{b.member_id}", "{c.member_id}")')
        stage.run(1)
        assert stage.outcome("row") is None
        sender.child.resume()
        stage.run(0.01)
        assert stage.outcome("row") == "acknowledged"
        assert sender.config.k == 2


def test_p5_the_barrier_does_not_pass_by_walsenders_that_may_have_an_older_k() -> None:
    with staged("a", "b", "c", walsender_late=1.0, walsender_late_s=(1.0, 1.0)) as stage:
        a, b, c = _raise_k(stage)
        stage.do(a, a.synchronous.apply(all_of(b, c), deadline_s=2))
        stage.do(a, a.synchronous.apply(all_of(b, c, k=2), deadline_s=2))
        with pytest.raises(BarrierNotPassed):
            stage.do(a, a.synchronous.barrier(ONE, deadline_s=2))
        stage.network.heal()
        stage.until(lambda: c.running.streams_from == "a")
        passed = stage.do(a, a.synchronous.barrier(ONE, deadline_s=5))
        assert set(passed.state.passed) == {b.member_id, c.member_id}


def test_p5_a_dropped_name_still_releases_until_its_walsender_has_looked() -> None:
    with staged("a", "b", "c", walsender_late=1.0, walsender_late_s=(1.0, 1.0)) as stage:
        a, _b, c = _raise_k(stage)
        a.write(synchronous_standby_names=f'ANY 1 ("{c.member_id}")')
        stage.run(1.2)
        assert stage.outcome("row") == "acknowledged"
        assert c.entries()[-1].kind == "checkpoint"


def test_p5_the_rule_waits_for_the_walsender_of_a_dropped_name() -> None:
    with staged("a", "b", "c", walsender_late=1.0, walsender_late_s=(1.5, 1.5)) as stage:
        a, b, c = stage.instances
        stage.primary(a, all_of(b, c))
        stage.standby(b, a)
        stage.standby(c, a)
        stage.do(a, a.synchronous.apply(all_of(b, c), deadline_s=2))
        cut(stage, a, c)
        stage.do(a, a.synchronous.apply(all_of(c), deadline_s=5))
        stage.commit(a, "row")
        stage.run(2)
        assert stage.outcome("row") is None


def _namesakes(stage: Stage) -> tuple[StagedInstance, StagedInstance, StagedInstance]:
    a, b, c, d = stage.instances
    stage.primary(a, all_of(b, c, k=2))
    stage.standby(b, a, slot=False)
    d.member_id = b.member_id
    stage.standby(d, a, slot=False)
    return a, b, c


def test_p7_two_walsenders_of_one_name_satisfy_two() -> None:
    with staged("a", "b", "c", "d") as stage:
        a, _b, c = _namesakes(stage)
        stage.commit(a, "row")
        stage.run(1)
        assert stage.outcome("row") == "acknowledged"
        assert c.volume.data is None
        assert stage.count("commit released by two walsenders of one name") == 1


def test_p7_the_barrier_refuses_a_name_seen_twice() -> None:
    with staged("a", "b", "c", "d") as stage:
        a, b, c = _namesakes(stage)
        stage.do(a, a.synchronous.apply(all_of(b, c, k=2), deadline_s=2))
        with pytest.raises(BarrierNotPassed) as refused:
            stage.do(a, a.synchronous.barrier(ONE, deadline_s=0.5))
        assert refused.value.state is not None
        assert refused.value.state.duplicates == (b.member_id,)


def test_p7_a_slot_is_held_by_one() -> None:
    with staged("a", "b", "d") as stage:
        a, b, d = stage.instances
        stage.primary(a, all_of(b))
        stage.standby(b, a)
        d.member_id = b.member_id
        assert a.volume.data is not None
        data = d.volume.data = a.volume.data.copy_of(a.end)
        data.settings = {**(b.running.data.settings or {}), "primary_conninfo": d.conninfo(a)}
        d.start()
        stage.run(3)
        assert d.running.streams_from is None
        assert len(a.running.senders) == 1
        assert stage.count("replication refused: the slot is active") > 3


def test_p7_a_half_open_connection_holds_its_slot_until_the_timeout() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a, all_of(b))
        stage.standby(b, a)
        cut(stage, a, b)
        b.running.kill_all()
        b.start()
        stage.network.power_on(b.name)
        stage.run(4)
        assert len(a.running.senders) == 1
        stage.run(2)
        assert a.running.senders == []
        stage.network.heal()
        stage.until(lambda: b.running.streams_from == "a")


def test_p8_after_a_crash_rows_are_visible_that_no_standby_has() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a, all_of(b))
        stage.commit(a, "row")
        stage.run(0.1)
        assert stage.rows(a) == ()
        a.running.crash_backend()
        assert stage.outcome("row") == "unknown"
        a.start()
        stage.until(lambda: a.running.ready)
        assert stage.rows(a) == ("row",)


def test_p8_in_an_older_minor_a_commit_right_after_the_start_waits_for_nobody() -> None:
    with staged("a", "b", startup_race=1.0, startup_race_s=(1.0, 1.0)) as stage:
        a, b = stage.instances
        stage.primary(a, all_of(b))
        stage.commit(a, "row")
        stage.run(0.1)
        assert stage.outcome("row") == "acknowledged"


def test_p10_the_first_that_a_standby_says_it_has_flushed_is_its_replay_position() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a)
        stage.standby(b, a)
        for number in range(50):
            stage.commit(a, number)
        stage.run(1)
        b.running.crash_backend()
        b.start()
        seen: list[WalSender] = []
        while not seen:
            stage.run(0.0002)
            seen = [sender for sender in a.running.senders if sender.flush is not None]
        assert seen[0].flush == b.running.startup.replayed == a.end


def test_p13_a_cancelled_wait_reports_success_and_the_row_is_there() -> None:
    with staged("a", "b") as stage:
        a, _b = stage.instances
        stage.primary(a, NOBODY)
        stage.commit(a, "row")
        stage.run(1)
        a.running.cancel_waits()
        stage.run(0.01)
        assert stage.outcome("row") == "cancelled_wait"
        assert stage.rows(a) == ("row",)
        assert stage.acknowledged == []


def test_a_session_opened_before_goes_on_when_the_gate_is_closed() -> None:
    from instance_manager.postgres.host_based_access import Access

    with staged("a") as stage:
        (a,) = stage.instances
        stage.primary(a)
        session = a.running.open_session()
        assert session is not None
        stage.do(a, a.port.write_access(Access.CLOSED))
        a.running.signal("HUP")
        stage.run(0.1)
        stage.commit(a, "refused")
        a.running.commit(
            "goes on",
            synchronous=True,
            session=session,
            on_result=lambda outcome, entry: stage.results.append((entry.payload, outcome)),
        )
        stage.run(0.1)
        assert stage.results == [("refused", "failed"), ("goes on", "acknowledged")]
