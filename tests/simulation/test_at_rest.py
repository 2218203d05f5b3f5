"""Whole clusters at rest: how little their agents do, that none of them oversleeps, and how soon they notice what happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from simulated_cluster import SimulatedCluster
from simulated_instance import SimulatedInstance
from simulated_listening import HTTP
from test_mended_defects import another_serves, primary_of, record_of, until, whole_cluster

from instance_manager.agent.database import Database
from instance_manager.agent.observing import Observing
from instance_manager.core.observation import Observation
from instance_manager.core.record import Release, StoredRecord

SETTLES_WITHIN_S = 20.0
REST_S = 30.0


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    with whole_cluster() as cluster:
        until(cluster, lambda: all(rests(each) for each in cluster.instances.values()), SETTLES_WITHIN_S)
        yield cluster


def rests(instance: SimulatedInstance) -> bool:
    return instance.agent is not None and instance.agent.context.database.at_rest


def standbys_of(cluster: SimulatedCluster) -> list[SimulatedInstance]:
    return [each for each in cluster.instances.values() if each is not primary_of(cluster)]


def test_at_rest_an_agent_looks_once_a_second_while_clients_write(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[str] = []
    observe = Observing.observe

    def counted(observing: Observing) -> Observation:
        observed.append(observing.context.configuration.name)
        return observe(observing)

    monkeypatch.setattr(Observing, "observe", counted)
    cluster.world.run(cluster.world.now_s + REST_S)
    for name, instance in cluster.instances.items():
        # One a second, and one for each read, renewal and change of the Lease that this store tells of.
        assert REST_S * 0.9 <= observed.count(name) <= REST_S * 2.3, "often it looks five times a second"
        assert rests(instance)


@pytest.fixture
def looks(cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Database, float]]:
    """Each look at Postgres: whose, and when it was begun."""
    begun: list[tuple[Database, float]] = []
    look = Database._look

    async def told(database: Database) -> None:
        begun.append((database, cluster.world.now_s))
        await look(database)

    monkeypatch.setattr(Database, "_look", told)
    return begun


def test_at_rest_each_look_at_postgres_is_judged_at_once(
    cluster: SimulatedCluster, looks: list[tuple[Database, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[tuple[Database, float]] = []
    observe = Observing.observe

    def told(observing: Observing) -> Observation:
        observed.append((observing.context.database, cluster.world.now_s))
        return observe(observing)

    monkeypatch.setattr(Observing, "observe", told)
    cluster.world.run(cluster.world.now_s + REST_S)
    assert len(looks) >= 3 * REST_S * 0.9
    for database, begun_s in looks[:-3]:
        assert any(by is database and begun_s < at_s < begun_s + 0.1 for by, at_s in observed)


def test_whoever_sees_a_release_looks_at_postgres_at_once(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take the Lease only if its log ends where the release says, and the end is as old as the last look."""
    standby, record = standbys_of(cluster)[0], record_of(cluster)
    assert standby.agent is not None
    assert record.holder is not None
    assert record.position is not None
    context = standby.agent.context
    stamp = Release(
        releaser=record.holder.member_id, epoch=record.epoch, end=record.position, target=cluster.member_at(standby)
    )
    released = StoredRecord(replace(record, holder=None, release=stamp), "released")
    asked: list[bool] = []
    monkeypatch.setattr(context.database, "look_soon", lambda: asked.append(True))
    standby.agent.observing.observe()
    assert not asked
    monkeypatch.setattr(context.keeper, "_stored", released)
    standby.agent.observing.observe()
    standby.agent.observing.observe()
    assert asked == [True]


def test_at_rest_peers_are_heard_each_second_and_ask_for_nothing(cluster: SimulatedCluster) -> None:
    listener = cluster.network.listeners[primary_of(cluster).name]
    asked: list[str] = []
    answer = listener.answer

    async def counted(call: str, body: bytes) -> bytes:
        asked.append(call)
        return await answer(call, body)

    listener.answer = counted
    for _ in range(int(REST_S / 0.5)):
        cluster.world.run(cluster.world.now_s + 0.5)
        for instance in cluster.instances.values():
            assert instance.agent is not None
            assert max(view.silent_for_s for view in instance.agent.context.peers.views().values()) < 1.6
    assert asked == []


def test_the_first_sign_of_a_peers_end_ends_the_rest_of_all_others_at_once(cluster: SimulatedCluster) -> None:
    dead, *others = standbys_of(cluster)
    dead.crash()
    until(cluster, lambda: not any(rests(each) for each in (primary_of(cluster), *others)), 0.1, look_s=0.01)


def test_a_primary_whose_container_dies_is_replaced_from_rest_within_a_second_and_a_half(
    cluster: SimulatedCluster,
) -> None:
    primary = primary_of(cluster)
    cluster.world.run(cluster.world.now_s + 0.3)
    primary.crash()
    until(cluster, lambda: another_serves(cluster, primary), 1.5, look_s=0.01)


def test_a_primary_that_is_cut_off_is_replaced_from_rest_as_soon_as_silence_may_be_suspected(
    cluster: SimulatedCluster,
) -> None:
    primary = primary_of(cluster)
    suspect_after_s = primary.configuration.timings.suspect_after_s
    for other in (*cluster.names, "store"):
        for link in ((primary.name, other), (other, primary.name)):
            for channel in (HTTP, "store", "replication"):
                cluster.network.block(*link, channel)
    took_s = until(cluster, lambda: another_serves(cluster, primary), 6.0, look_s=0.01)
    assert took_s >= suspect_after_s - 1


def test_a_lost_standby_is_relaxed_from_rest_soon_after_relax_after(cluster: SimulatedCluster) -> None:
    """Both are gone: commits wait for them until the primary goes on alone."""
    primary = primary_of(cluster)
    for standby in standbys_of(cluster):
        standby.crash()
    until(cluster, lambda: record_of(cluster).quorum == 0, primary.configuration.timings.relax_after_s + 1.0)


def test_a_switchover_from_rest_takes_what_it_takes_and_no_look_is_waited_for(cluster: SimulatedCluster) -> None:
    primary = primary_of(cluster)
    cluster.verb("switchover", {})
    until(cluster, lambda: another_serves(cluster, primary), 0.7, look_s=0.01)
