"""What seeds and aimed faults have found, each as the shortest story that shows it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest
from promise_checker import PromiseBroken, PromiseChecker
from simulated_cluster import Scenario, SimulatedCluster
from simulated_instance import SimulatedInstance
from simulated_supervisor import SimulatedSupervisor
from simulated_wal import Entry, Log

from instance_manager.config_sections import Durability
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import MemberName, Timeline

STARTS_WITHIN_S = 60.0
LOOK_S = 0.1


@contextmanager
def whole_cluster(durability: Durability = "preferred", instances: int = 3) -> Iterator[SimulatedCluster]:
    """Everybody streams and votes, and nothing is wrong yet."""
    cluster = SimulatedCluster(1, Scenario(durability=durability, instances=instances))
    try:
        for instance in cluster.instances.values():
            instance.start()
        cluster._until_whole(STARTS_WITHIN_S, "at the start")
        cluster.clients.start()
        cluster.world.run(cluster.world.now_s + 1)
        yield cluster
    finally:
        cluster.world.close()


def until(cluster: SimulatedCluster, what: Callable[[], bool], within_s: float, look_s: float = LOOK_S) -> float:
    """Virtual seconds until then; what was never so fails the test."""
    began_s = cluster.world.now_s
    while not what():
        assert cluster.world.now_s - began_s < within_s, f"not within {within_s:g} s: {cluster.record}"
        cluster.world.run(cluster.world.now_s + look_s)
    return cluster.world.now_s - began_s


def record_of(cluster: SimulatedCluster) -> ClusterRecord:
    assert cluster.record is not None
    return cluster.record


def primary_of(cluster: SimulatedCluster) -> SimulatedInstance:
    primary = cluster.holder_instance()
    assert primary is not None
    return primary


def supervisor_of(instance: SimulatedInstance) -> SimulatedSupervisor:
    assert instance.supervisor is not None
    return instance.supervisor


def another_serves(cluster: SimulatedCluster, former: SimulatedInstance) -> bool:
    holder = cluster.holder_instance()
    return holder is not None and holder is not former and record_of(cluster).opened


@pytest.mark.parametrize("durability", ["preferred", "asynchronous"])
def test_a_holder_whose_directory_vanished_under_a_living_container_is_replaced(durability: Durability) -> None:
    """Of an asynchronous cluster too, where only the end of the renewals lets another take over."""
    with whole_cluster(durability) as cluster:
        primary = primary_of(cluster)
        cluster.lose_directory_alone(primary)
        until(cluster, lambda: another_serves(cluster, primary), 40)


def test_a_lone_holder_whose_directory_vanished_leaves_the_way_to_the_verb_with_loss() -> None:
    """With q = 0 nobody can be elected; while it renewed, the verb was refused: `the primary lives`."""
    with whole_cluster(instances=2) as cluster:
        primary = primary_of(cluster)
        standby = next(each for each in cluster.instances.values() if each is not primary)
        standby.crash()
        until(cluster, lambda: record_of(cluster).quorum == 0, 20)
        cluster.lose_directory_alone(primary)
        standby.start()
        cluster.world.run(cluster.world.now_s + 15)
        assert record_of(cluster).holder is not None
        cluster.checker.loss_allowed_until_s = float("inf")
        cluster.verb("failover", {"allow_data_loss": True})
        until(cluster, lambda: another_serves(cluster, primary), 40)


@pytest.mark.parametrize("agent_restarts", [False, True])
def test_r13_a_winner_that_cannot_open_gives_the_lease_back_promote_timeout_after_it_took_it(
    agent_restarts: bool,
) -> None:
    """Also while nobody else can take it from it, in whatever way its Postgres fails, and when its agent restarted since."""
    with whole_cluster() as cluster:
        former, found = primary_of(cluster), record_of(cluster)
        former.crash()
        until(cluster, lambda: cluster.holder_instance() not in (None, former), 20)
        winner = primary_of(cluster)
        for name in cluster.names:
            if name != winner.name:
                cluster.network.block(name, "store", "store")

        if agent_restarts:
            cluster.world.run(cluster.world.now_s + LOOK_S)
            assert winner.server is not None
            winner.server.crash("it cannot open")
            agent = supervisor_of(winner).agent
            assert agent is not None
            agent.kill()

        def gave_back() -> bool:
            if winner.server is not None:
                winner.server.crash("it cannot open")
            return record_of(cluster).holder is None

        took_s = until(cluster, gave_back, 30)
        assert cluster.timings.promote_timeout_s - 1 < took_s < cluster.timings.promote_timeout_s + 3
        given, last = record_of(cluster), winner.agent
        assert last is not None
        assert given.release is None
        assert given.quorum > 0, "somebody can be elected"
        assert given.voters <= found.voters
        intended = last.context.volume.state.intended_record
        assert intended is not None, "nobody may take it for lost and repair the Lease by it (R3)"
        assert intended.holder is None
        cluster.network.heal()
        until(cluster, lambda: another_serves(cluster, former), 30)


def test_r16_a_holder_that_ended_amid_lowering_q_to_0_is_judged_by_the_q_that_commits_waited_by() -> None:
    """Seed 1010299: the lower q was recorded and Postgres not told of it; its disk lost what the standby held, and nobody asked."""
    with whole_cluster(instances=2) as cluster:
        primary = primary_of(cluster)
        standby = next(each for each in cluster.instances.values() if each is not primary)
        standby.crash()
        until(cluster, lambda: record_of(cluster).quorum == 0, 20, look_s=0.0002)
        agent = primary.agent
        assert agent is not None
        last = agent.context.volume.state.last_record
        assert last is not None
        assert last.quorum == 1, "the answer has not reached it"
        primary.lose_power()
        primary.volume.lose_flushed_tail(3)
        primary.start()
        cluster.world.run(cluster.world.now_s + 10)
        assert (record_of(cluster).quorum, record_of(cluster).epoch) == (1, last.epoch), "it waits for the standby"
        standby.start()
        until(cluster, lambda: another_serves(cluster, primary), 40)


def test_a_start_that_a_held_up_supervisor_has_not_answered_keeps_the_directory_for_itself() -> None:
    """Seed 1001740: it was given up, and happened amid a rewind. Here a second start would be refused."""
    with whole_cluster() as cluster:
        primary = primary_of(cluster)
        standby = next(each for each in cluster.instances.values() if each is not primary)
        supervisor = supervisor_of(standby)
        assert standby.server is not None
        standby.server.crash("it was killed")
        agent = standby.agent
        assert agent is not None
        until(cluster, lambda: agent.context.link.postgres is None, 2, look_s=0.0005)
        supervisor.process.pause()
        until(cluster, lambda: agent.context.link.may_start_yet, 2)
        cluster.world.run(cluster.world.now_s + 8)
        assert agent.context.link.may_start_yet, "given up, and not answered"
        supervisor.process.resume()
        cluster._until_whole(30, "when the supervisor went on")
        assert cluster.world.counters["supervisor: refused start"] == 0


def test_the_judge_of_a_failover_with_loss_counts_no_record_that_was_received_in_part() -> None:
    """Seed 1003347: half of it lay on the disk of one that was not chosen, and nobody has lost it by that."""
    entries = [Entry(Timeline(1), "commit", number) for number in range(3)]
    half, whole = Log(list(entries)), Log(list(entries))
    half.cut(half.end - 1)

    def judge(log: Log) -> None:
        broken: list[str] = []
        instance = SimpleNamespace(
            name="bravo",
            volume=SimpleNamespace(data=SimpleNamespace(log=log), rewind_attempts=0),
            supervisor=object(),
        )
        cluster = SimpleNamespace(
            instances={"bravo": instance},
            is_member=lambda _: True,
            world=SimpleNamespace(stop=lambda error: broken.append(str(error))),
        )
        checker = PromiseChecker(cast(SimulatedCluster, cluster))
        checker.acknowledged = {entries[2]: "alpha"}
        checker._check_loses_no_more_than_it_must(MemberName("charlie"), frozenset(entries[:2]))
        if broken:
            raise PromiseBroken(broken[0])

    judge(half)
    with pytest.raises(PromiseBroken, match="although bravo holds"):
        judge(whole)
