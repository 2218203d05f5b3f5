"""Standbys of the model misbehave as Postgres' do (P2, P3, P4, P6, P9, P11, P12), and the real rules see it."""

from __future__ import annotations

import pytest
from postgres_stage import Stage, StagedInstance, all_of, chain_of, staged
from simulated_streaming import CHANNEL
from simulated_time import Process
from simulated_wal import ENTRY_BYTES, LOG_BEGINS, Entry, complete

from instance_manager.core.types import Lsn, Timeline, WalEnd
from instance_manager.postgres import voting
from instance_manager.postgres.control_data import ClusterState
from instance_manager.postgres.directory import DirectoryRefused
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.promotion import PromotedWrong
from instance_manager.postgres.wal_dump import PositionUnknown, WalMissing

ONE = Timeline(1)


def pair(stage: Stage) -> tuple[StagedInstance, StagedInstance]:
    a, b = stage.instances[:2]
    stage.primary(a, all_of(b))
    stage.standby(b, a)
    stage.commit(a, "first")
    stage.run(1)
    return a, b


def test_p2_a_busy_startup_process_lets_the_walreceiver_acknowledge_on() -> None:
    with staged("a", "b") as stage:
        a, b = pair(stage)
        b.running.startup.become_busy(6.0)
        b.write(primary_conninfo="")
        stage.run(4)
        assert b.running.loaded["primary_conninfo"] == ""
        stage.commit(a, "after the vote")
        stage.run(0.1)
        assert stage.outcome("after the vote") == "acknowledged"


@pytest.mark.parametrize("asks_first", [0.0, 1.0])
def test_p2_after_the_rule_nothing_is_acknowledged_whatever_the_startup_process_does(asks_first: float) -> None:
    with staged("a", "b", startup_asks_first=asks_first) as stage:
        a, b = pair(stage)
        b.running.startup.become_busy(3.0)
        stopped = stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
        assert len(stopped.ended) == 1
        stage.commit(a, "after the vote")
        stage.run(10)
        assert stage.outcome("after the vote") is None
        assert stage.count("walreceiver could not be loaded") == asks_first


def test_p2_an_older_conninfo_is_asked_for_once_more_after_a_conflict() -> None:
    """Without the block in dynamic_library_path: the walreceiver is ended, and another one comes."""
    with staged("a", "b", startup_asks_first=1.0) as stage:
        _a, b = pair(stage)
        b.running.startup.become_busy(1.0)
        b.write(primary_conninfo="")
        stage.run(0.1)
        assert b.running.walreceiver is not None
        b.running.walreceiver.terminate()
        stage.run(0.5)
        assert b.running.walreceiver is None
        stage.until(lambda: b.running.walreceiver is not None, 1.0)
        assert stage.count("walreceiver asked for with an older conninfo") == 1


def test_p2_the_rule_does_not_prove_what_it_cannot_see() -> None:
    with staged("a", "b") as stage:
        _a, b = pair(stage)
        b.running.pause("walreceiver")
        with pytest.raises(voting.NotStopped) as failed:
            stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=1))
        assert len(failed.value.walreceivers) == 1


def test_following_again_waits_for_the_startup_process() -> None:
    with staged("a", "b") as stage:
        a, b = pair(stage)
        stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
        b.running.startup.become_busy(4.0)

        async def follow() -> None:
            await voting.follow(b.port.running, b.settings, b.conninfo(a), b.member_id, deadline_s=2)

        with pytest.raises(voting.NotFollowing):
            stage.do(b, follow())
        stage.run(3)
        stage.do(b, follow())
        stage.until(lambda: b.running.streams_from == "a", 2.0)
        stage.commit(a, "again")
        stage.run(0.2)
        assert stage.outcome("again") == "acknowledged"


def test_p3_after_a_restart_nothing_is_received_then_a_segments_start_and_replay_is_behind() -> None:
    with staged("a", "b", replay_s=(5.0, 5.0)) as stage:
        a, b = pair(stage)
        for number in range(20):
            stage.commit(a, number)
        stage.run(1)
        b.running.crash_backend()
        b.write_quietly(primary_conninfo="")
        b.start()
        stage.until(lambda: b.running.ready)
        seen = stage.do(b, b.port.observe(deadline_s=1))
        assert seen.receive_lsn is None
        assert seen.replay_lsn is not None
        assert seen.replay_lsn < b.end
        assert stage.do(b, b.port.position(chain_of(), deadline_s=1)) == WalEnd(ONE, Lsn(b.end))
        b.write(primary_conninfo=b.conninfo(a))
        while b.running.receive_lsn is None:
            stage.run(0.0001)
        assert b.running.receive_lsn == LOG_BEGINS


def _same_number_twice(stage: Stage) -> tuple[StagedInstance, StagedInstance]:
    """a and b both promote to timeline 2 from different points; b then follows a."""
    a, b = pair(stage)
    shared = b.end
    b.write(primary_conninfo="")
    stage.run(0.5)
    for number in range(3):
        stage.commit(a, f"only on a {number}", synchronous=False)
    stage.run(0.5)
    for each in (a, b):
        each.running.kill_all()
        data = each.running.data
        data.standby_signal = True
        data.settings = {**(data.settings or {}), "restore_command": "", "primary_conninfo": ""}
        server = each.start()
        stage.until(lambda server=server: server.ready)  # type: ignore[misc]
        data.promote_file = True
        server.signal("USR1")
        stage.until(lambda server=server: server.read_write)  # type: ignore[misc]
        assert server.timeline == 2
    b.write(synchronous_standby_names="")
    stage.run(0.2)
    for number in range(8):
        stage.commit(b, f"only on b {number}")
    stage.run(0.2)
    assert b.end > a.end > shared
    b.running.kill_all()
    b.running.data.standby_signal = True
    a.running.data.slots.add(b.member_id)
    b.write_quietly(primary_conninfo=b.conninfo(a), primary_slot_name=b.member_id)
    a.write(synchronous_standby_names=f'ANY 1 ("{b.member_id}")')
    b.start()
    stage.until(lambda: b.running.streams_from == "a")
    return a, b


def test_p4_a_standby_follows_across_a_collision_of_timelines_and_claims_what_it_never_had() -> None:
    with staged("a", "b") as stage:
        a, b = _same_number_twice(stage)
        commit = stage.commit(a, "lost")
        stage.run(2)
        assert stage.outcome("lost") == "acknowledged"
        assert commit.entry not in b.entries()
        for number in range(10):
            stage.commit(a, f"later {number}")
        stage.run(1)
        assert b.entries()[-1].payload == "later 9"


def test_p4_a_log_with_another_history_has_no_rank() -> None:
    with staged("a", "b") as stage:
        a, b = _same_number_twice(stage)
        (_, fork) = a.running.data.histories[Timeline(2)][0]
        with pytest.raises(PositionUnknown, match="another history"):
            stage.do(b, b.port.position(chain_of((2, 1, fork)), deadline_s=1))


def test_p4_without_the_claim_a_promotion_takes_the_next_number() -> None:
    with staged("a", "b") as stage:
        _a, b = pair(stage)
        stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
        b.write(restore_command="")
        stage.run(0.2)
        with pytest.raises(PromotedWrong):
            stage.do(b, b.port.promote(chain_of((9, 1, b.end)), b.relay, deadline_s=5))
        assert b.running.timeline == 2


def test_a_gap_in_the_histories_keeps_a_standby_away() -> None:
    with staged("a", "b", "c") as stage:
        a, b = pair(stage)
        c = stage.instances[2]
        stage.standby(c, a)
        a.running.kill_all()
        stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
        stage.do(b, b.port.promote(chain_of((5, 1, b.end)), b.relay, deadline_s=5))
        b.running.data.slots.add(c.member_id)
        del b.running.data.histories[Timeline(3)]
        c.write(primary_conninfo=c.conninfo(b))
        stage.run(2)
        assert c.running.streams_from is None
        assert stage.count("replication refused: a history file is missing") > 3
        b.running.data.histories[Timeline(3)] = ()
        stage.until(lambda: c.running.streams_from == "b" and c.running.timeline == 5)


def test_p4_a_diverged_standby_is_not_taken_over_a_fork_behind_its_replay() -> None:
    with staged("a", "b") as stage:
        a, b = pair(stage)
        fork = b.end
        stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
        for number in range(3):
            stage.commit(a, number, synchronous=False)
        stage.run(0.5)
        stage.do(b, b.port.promote(chain_of((2, 1, fork)), b.relay, deadline_s=5))
        a.running.kill_all()
        b.running.data.slots.add(a.member_id)
        a.running.data.standby_signal = True
        a.write_quietly(primary_conninfo=a.conninfo(b), primary_slot_name=a.member_id)
        own = list(a.entries())
        a.start()
        stage.run(3)
        assert stage.count("newer timeline forked off before this recovery point") > 3
        assert a.entries() == own
        chain = chain_of((2, 1, fork))
        assert not chain.contains(stage.do(a, a.port.position(chain, deadline_s=1)))


def test_p6_an_interrupted_rewind_leaves_a_directory_that_starts_without_its_rows() -> None:
    with staged("a", "b", copy_s=(2.0, 2.0)) as stage:
        a, b = _diverged(stage)
        a.agent.spawn(_ignore(a, b))
        stage.run(1)
        a.agent.kill()
        stage.run(1)
        assert a.volume.rewind_attempts == 1
        a.agent = Process(a.host, "a/agent again")
        with pytest.raises(DirectoryRefused):
            stage.do(a, a.port.prepare_start())
        a.start()
        stage.until(lambda: a.running.ready)
        assert stage.rows(a) == ()


async def _ignore(a: StagedInstance, b: StagedInstance) -> None:
    await a.port.rewind(b.name, 5432, Timeline(2))


def _diverged(stage: Stage) -> tuple[StagedInstance, StagedInstance]:
    """b was promoted to timeline 2, and a holds records that b never had."""
    a, b = pair(stage)
    stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
    stage.commit(a, "diverged", synchronous=False)
    stage.run(0.2)
    a.running.kill_all()
    stage.do(b, b.port.promote(chain_of((2, 1, b.end)), b.relay, deadline_s=5))
    stage.do(b, b.port.checkpoint(deadline_s=5))
    b.write(synchronous_standby_names="")
    stage.run(0.2)
    return a, b


def test_after_a_rewind_recovery_needs_what_the_source_wrote_meanwhile() -> None:
    with staged("a", "b") as stage:
        a, b = _diverged(stage)
        for number in range(100):
            stage.world.call_later(number * 0.05, stage.commit, b, number)
        chain = chain_of((2, 1, b.running.data.histories[Timeline(2)][0][1]))
        assert stage.do(a, a.port.rewind(b.name, 5432, Timeline(2))) == "rewound"
        assert a.volume.data is not None
        with pytest.raises(WalMissing) as missing:
            stage.do(a, a.port.end_of_stopped(a.volume.data.control(), chain))
        assert missing.value.needed.timeline == 2
        b.running.data.slots.add(a.member_id)
        a.write_quietly(
            primary_conninfo=a.conninfo(b),
            primary_slot_name=a.member_id,
            synchronous_standby_names='ANY 1 ("instance-manager: nobody")',
        )
        a.volume.data.access = Access.OPEN
        a.start()
        stage.until(lambda: a.running.ready)
        stage.run(6)
        assert "diverged" not in stage.rows(a)
        assert stage.rows(a) == stage.rows(b)


def test_p4_a_rewind_across_a_collision_of_timelines_finds_nothing_to_do() -> None:
    with staged("a", "b") as stage:
        a, b = _same_number_twice(stage)
        b.running.kill_all()
        stage.do(a, a.port.checkpoint(deadline_s=5))
        assert b.volume.data is not None
        b.volume.data.timeline = Timeline(2)
        assert stage.do(b, b.port.rewind(a.name, 5432, Timeline(2))) == "not needed"
        assert any("only on b" in str(entry.payload) for entry in b.entries())


def test_orphans_of_a_killed_postmaster_may_commit_on() -> None:
    with staged("a", "b") as stage:
        a = stage.instances[0]
        stage.primary(a)
        session = a.running.open_session()
        assert session is not None
        a.running.kill_postmaster()
        assert a.running.open_session() is None
        a.running.commit(
            "orphan", synchronous=True, session=session, on_result=lambda o, e: stage.results.append((e.payload, o))
        )
        stage.run(0.02)
        stage.run(4)
        assert stage.results == [("orphan", "acknowledged")]
        assert a.exits == ["crashed"]


def test_a_clone_is_a_standby_that_needs_no_more_than_it_has() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a)
        stage.commit(a, "row")
        stage.do(b, b.port.clone(a.name, 5432, 7, lambda text: None))
        assert b.volume.data is not None
        control = b.volume.data.control()
        end = stage.do(b, b.port.end_of_stopped(control, chain_of()))
        assert end.lsn == a.end
        b.write_quietly(primary_conninfo="", synchronous_standby_names="")
        b.start()
        stage.until(lambda: b.running.ready)
        assert b.running.in_recovery


def test_p9_a_voter_pulls_more_wal_by_its_restore_command() -> None:
    with staged("a", "b") as stage:
        a, b = pair(stage)
        stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
        voted = stage.do(b, b.port.position(chain_of(), deadline_s=1))
        stage.commit(a, "archived", synchronous=False)
        stage.run(0.5)
        stage.cluster.archive = a.running.data.log
        stage.run(1)
        assert b.end == voted.lsn
        b.write(restore_command="from the archive")
        stage.run(1)
        assert b.end > voted.lsn


def test_p11_half_a_record_is_no_position_and_is_dropped_at_a_promotion() -> None:
    with staged("a", "b") as stage:
        a, b = pair(stage)
        stage.cluster.behaviour = type(stage.cluster.behaviour)(torn_send=1.0)
        stage.commit(a, "torn", synchronous=False)
        stage.until(lambda: b.end % ENTRY_BYTES != complete(b.end) % ENTRY_BYTES, 1.0)
        stage.network.block("a", "b", CHANNEL)
        end = stage.do(b, b.port.position(chain_of(), deadline_s=1))
        assert end.lsn == complete(b.end)
        stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
        end = stage.do(b, b.port.position(chain_of(), deadline_s=1))
        assert b.end > end.lsn
        stage.do(b, b.port.promote(chain_of((2, 1, end.lsn)), b.relay, deadline_s=5))
        assert stage.rows(b) == ("first",)


def test_p11_pg_control_is_on_the_older_timeline_until_a_checkpoint() -> None:
    with staged("a", "b") as stage:
        _a, b = pair(stage)
        stage.do(b, voting.stop_following(b.port.running, b.settings, deadline_s=2))
        b.running.pause("checkpointer")
        stage.do(b, b.port.promote(chain_of((2, 1, b.end)), b.relay, deadline_s=5))
        assert b.running.data.control().timeline == 1
        assert b.entries()[-1].timeline == 2


def test_p12_a_shutdown_waits_for_a_connected_standby_and_not_for_a_dead_connection() -> None:
    with staged("a", "b") as stage:
        a, b = pair(stage)
        stage.network.block("a", "b", CHANNEL)
        a.running.signal("INT")
        stage.run(2)
        assert a.exits == []
        a.running.senders[0].terminate()
        stage.run(0.5)
        assert a.exits == ["stopped"]
        control = a.running.data.control()
        assert control.state is ClusterState.SHUT_DOWN
        end = stage.do(a, a.port.shutdown_end(control, chain_of()))
        assert isinstance(end, WalEnd)
        assert stage.do(b, b.port.position(chain_of(), deadline_s=1)).lsn < end.lsn


def test_p12_a_handed_over_log_ends_with_the_shutdown_checkpoint_everywhere() -> None:
    with staged("a", "b") as stage:
        a, b = pair(stage)
        a.running.signal("INT")
        stage.until(lambda: a.exits)
        end = stage.do(a, a.port.shutdown_end(a.running.data.control(), chain_of()))
        stage.run(0.1)
        assert stage.do(b, b.port.position(chain_of(), deadline_s=1)) == end


def test_a_machine_that_loses_power_may_lose_what_was_not_flushed() -> None:
    with staged("a", "b", flush_s=(0.05, 0.05)) as stage:
        a, b = pair(stage)
        stage.commit(a, "row")
        stage.until(lambda: b.entries()[-1].payload == "row")
        b.running.kill_all()
        log = b.running.data.log
        assert log.flushed < log.written
        flushed = log.flushed
        b.volume.lose_power()
        assert flushed <= log.end
        assert isinstance(log.entries[-1], Entry)


def test_a_stalled_disk_acknowledges_nothing_until_it_ends() -> None:
    with staged("a", "b") as stage:
        a, b = pair(stage)
        b.volume.stalled = True
        stage.commit(a, "row")
        stage.run(3)
        assert stage.outcome("row") is None
        b.volume.stalled = False
        stage.run(0.5)
        assert stage.outcome("row") == "acknowledged"
