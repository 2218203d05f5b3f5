"""Faults that lie in wait: each brings about a situation that chance alone would in no thousand seeds, and strikes in it.

They script what happens to the cluster, never what it does. Each is for branches of the rules that nothing else reaches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from instance_manager.codec import from_json
from instance_manager.core.record import ClusterRecord
from instance_manager.core.voting import VolumeState

if TYPE_CHECKING:
    from simulated_cluster import SimulatedCluster
    from simulated_instance import SimulatedInstance

Link = tuple[str, str, str]
LOOK_S = 0.05
ANSWER_LATE_S = 0.9
PAUSED_SHARE = 0.2
PRIMARY_SHARE = 0.6
STORE_LOST_S = 3.0
LOSS_ALLOWED_S = 40.0
"""After a user has asked for the verb that may lose."""


class _Ambush:
    """What one such fault has done so far, and how it is undone."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.cluster = cluster
        self.over = False
        self._undos: list[Callable[[], object]] = []
        cluster.lies_in_wait = True

    def cut(self, *links: Link) -> None:
        for link in links:
            self.cluster.network.block(*link)
            self._undos.append(partial(self.cluster.network.unblock, *link))

    def slow(self, link: Link, added_s: float) -> None:
        self.cluster.network.slow(*link, added_s)
        self._undos.append(lambda: self.cluster.network.slow(*link, 0.0))

    def cut_from_store(self, name: str) -> None:
        self.cut((name, "store", "store"), ("store", name, "store"))

    def watch_memory(self, instance: SimulatedInstance, look: Callable[[VolumeState], object]) -> None:
        """`look` at every state of its volume that reaches the disk, at that very moment."""
        storage = instance.storage
        storage.on_written = lambda content: self.over or look(from_json(content, VolumeState))

        def forget() -> None:
            storage.on_written = None

        self._undos.append(forget)

    def keep_looking(self, look: Callable[[], object]) -> None:
        def again() -> None:
            if not self.over:
                look()
                self.cluster.world.call_later(LOOK_S, again)

        again()

    def then(self, undo: Callable[[], object]) -> None:
        self._undos.append(undo)

    def mend(self) -> None:
        """What was cut and watched so far."""
        undos, self._undos = self._undos, []
        for undo in reversed(undos):
            undo()

    def end(self) -> None:
        self.over = True
        self.cluster.lies_in_wait = False
        self.mend()


def _holder(cluster: SimulatedCluster) -> SimulatedInstance | None:
    """Of whom the next one may lie in wait; one at a time, for two would only be in each other's way."""
    holder = cluster.holder_instance()
    return holder if holder is not None and len(cluster.instances) > 1 and not cluster.lies_in_wait else None


def winner_cannot_open(cluster: SimulatedCluster, chance: random.Random) -> Callable[[], None] | None:
    """R13: the primary crashes; whoever is elected has a Postgres that never lives for long, and the others do not reach
    the store until it gives the Lease back. Perhaps a user pauses the cluster meanwhile."""
    primary = _holder(cluster)
    before = cluster.record
    if primary is None or before is None or not before.opened:
        return None
    ambush = _Ambush(cluster)
    winner: list[SimulatedInstance] = []

    def look() -> None:
        record = cluster.record
        if record is None:
            return
        if winner and record.holder is None and record.release is None:
            cluster.world.counters["rare: a winner gave the Lease back"] += 1
            ambush.over = True
            ambush.mend()
            return
        if not winner and _just_elected(before, record):
            elected = cluster.holder_instance()
            assert elected is not None
            winner.append(elected)
            if chance.random() < PAUSED_SHARE:
                cluster.verb("pause", {}, on=elected)
            for name in cluster.names:
                if name != elected.name:
                    ambush.cut_from_store(name)
        if winner and winner[0].server is not None:
            winner[0].server.crash("it cannot open")

    primary.crash()
    ambush.keep_looking(look)

    def undo() -> None:
        ambush.end()
        primary.start()

    return undo


def _just_elected(before: ClusterRecord, now: ClusterRecord) -> bool:
    return (
        now.holder is not None
        and now.epoch > before.epoch
        and not now.opened
        and (before.holder is None or now.holder.member_id != before.holder.member_id)
    )


def directory_vanishes(cluster: SimulatedCluster, chance: random.Random) -> Callable[[], None] | None:
    """Of the primary, or of another, under a living container: its Postgres ends, and its agent lives on over nothing."""
    primary = _holder(cluster)
    if primary is None or not cluster.may_lose_volume():
        return None
    others = list(cluster.instances.values())
    cluster.lose_directory_alone(primary if chance.random() < PRIMARY_SHARE else chance.choice(others))
    return None


def volume_of_another_cluster(cluster: SimulatedCluster, chance: random.Random) -> Callable[[], None] | None:
    """It is mounted in place of a standby's, and then the right one again. Nothing of it may count here, nor may it be wiped."""
    primary = _holder(cluster)
    if primary is None or not cluster.has_data:
        return None
    ambush = _Ambush(cluster)
    instance = chance.choice([each for each in cluster.instances.values() if each is not primary])
    volume, storage = instance.volume_of_another_cluster()
    data = volume.data
    mount_right_one = cluster.mount(instance, volume, storage)
    instance.start()

    def undo() -> None:
        ambush.end()
        assert volume.data is data or data in volume.set_aside
        mount_right_one()
        instance.start()

    return undo


def unwritable_candidate(cluster: SimulatedCluster, chance: random.Random) -> Callable[[], None] | None:
    """R11: the primary has lost the store and its standbys. The one that stands cannot write its promise, and the others
    answer it late; meanwhile it hears the primary again, which asks it not to stand."""
    primary, record = _holder(cluster), cluster.record
    if primary is None or record is None or record.quorum == 0:
        return None
    voters = [each for each in cluster.instances.values() if cluster.member_at(each) in record.voters]
    if len(voters) < 2:
        return None
    ambush = _Ambush(cluster)
    # The others have no better log, and by its name it is the first of equals.
    candidate = voters[0]
    ambush.cut_from_store(primary.name)
    for other in voters:
        ambush.cut((other.name, primary.name, "http"), (primary.name, other.name, "http"))
        ambush.cut((other.name, primary.name, "replication"), (primary.name, other.name, "replication"))
        if other is not candidate:
            ambush.slow((other.name, candidate.name, "http"), ANSWER_LATE_S)
    candidate.storage.broken = True
    ambush.then(lambda: setattr(candidate.storage, "broken", False))
    heard: list[bool] = []

    def look() -> None:
        if not heard and candidate.agent is not None and candidate.agent.context.takeover_open:
            heard.append(True)
            cluster.network.unblock(primary.name, candidate.name, "http")

    ambush.keep_looking(look)
    return ambush.end


def interrupted_failover_with_loss(cluster: SimulatedCluster, chance: random.Random) -> Callable[[], None] | None:
    """R3: the record is damaged while its holder reaches no voter, so that a user asks that holder for the verb with loss;
    and when it has promised the next epoch to itself, it loses the store for a moment."""
    primary, record = _holder(cluster), cluster.record
    if primary is None or record is None or record.quorum == 0 or cluster.has_lost_volume or not cluster.has_data:
        return None
    ambush = _Ambush(cluster)
    ambush.cut(*cluster.links_of(primary.name, ["http"]))
    cluster.store.damage()

    def promised(state: VolumeState) -> None:
        last = state.last_record
        if last is not None and state.was_primary and state.promised_epoch > last.epoch:
            ambush.over = True
            ambush.mend()
            cut = _Ambush(cluster)
            cut.cut_from_store(primary.name)
            cluster.world.call_later(STORE_LOST_S, cut.end)

    def ask() -> None:
        agent = primary.supervisor.agent if primary.supervisor is not None else None
        if not ambush.over and agent is not None and agent.alive:
            cluster.checker.loss_allowed_until_s = cluster.world.now_s + LOSS_ALLOWED_S
            cluster.verb("failover", {"allow_data_loss": True}, on=primary)

    ambush.watch_memory(primary, promised)
    cluster.world.call_later(cluster.timings.hard_s + 1.0, ask)
    return ambush.end
