"""Faults that aim: each makes one kind of trouble likely that a particular rule is for, and scripts nothing.

The table `simulated_faults.FAULTS` strikes anywhere; what needs the primary's managers frozen while its Postgres lives, or
a takeover's write under way for seconds, would come once in thousands of seeds. The variants of `broken_rules` name these.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from simulated_faults import CHANNELS, Fault, Undo, primary_of
from simulated_store import StoreFaults

if TYPE_CHECKING:
    from simulated_cluster import SimulatedCluster
    from simulated_instance import SimulatedInstance

Link = tuple[str, str, str]
AGENT_KILLS_MAX = 4
AGENT_KILLS_APART_S = 5.0
LOSS_ALLOWED_S = 40.0
"""After a user has asked for the verb that may lose."""


def _standby_of(cluster: SimulatedCluster, chance: random.Random) -> SimulatedInstance:
    primary = primary_of(cluster, chance)
    others = [each for each in cluster.instances.values() if each is not primary]
    return chance.choice(others)


def _between(a: str, b: str, *channels: str) -> list[Link]:
    return [link for channel in channels for link in ((a, b, channel), (b, a, channel))]


def _cut(cluster: SimulatedCluster, links: list[Link]) -> Undo:
    for link in links:
        cluster.network.block(*link)

    def undo() -> None:
        for link in links:
            cluster.network.unblock(*link)

    return undo


# The primary.


def freeze_managers(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """Agent and supervisor of the primary stand still, and its Postgres goes on: nothing but the quorum fences it."""
    instance = primary_of(cluster, chance)
    processes = instance.processes()
    cluster.excuse(instance)
    for process in processes:
        process.pause()

    def undo() -> None:
        for process in processes:
            process.resume()

    return undo


def control_plane_in_trouble(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """Frozen managers, and a store whose writes land late: seconds between the promises and the takeover."""
    undo_freeze = freeze_managers(cluster, chance)
    undo_late = late_writes(cluster, chance)

    def undo() -> None:
        undo_late()
        if undo_freeze is not None:
            undo_freeze()

    return undo


def crashing_agent(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """The primary's agent ends a moment after each of its starts."""
    instance = primary_of(cluster, chance)
    going_on = [True]

    def kill() -> None:
        if going_on:
            supervisor = instance.supervisor
            if supervisor is not None and supervisor.agent is not None:
                supervisor.agent.kill()
            cluster.world.call_later(0.05, kill)

    kill()
    return going_on.clear


def kill_primary_agent(cluster: SimulatedCluster, chance: random.Random) -> None:
    """Only one that has run for a while: else it is started ever later, and its permit runs out."""
    supervisor = primary_of(cluster, chance).supervisor
    agent = supervisor.agent if supervisor is not None else None
    killed = cluster.world.counters["directed: primary's agent killed"]
    if agent is None or killed >= AGENT_KILLS_MAX or cluster.world.now_s < AGENT_KILLS_APART_S * (killed + 1):
        return
    cluster.world.counters["directed: primary's agent killed"] += 1
    agent.kill()


def pause_primary_agent(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """For less than its supervisor's patience."""
    supervisor = primary_of(cluster, chance).supervisor
    if supervisor is None or supervisor.agent is None:
        return None
    supervisor.agent.pause()
    return supervisor.agent.resume


def suspend_primary(cluster: SimulatedCluster, chance: random.Random) -> None:
    """For less than its permit still lasts, so that nobody needs to be excused."""
    instance = primary_of(cluster, chance)
    permit = instance.supervisor.permit.current if instance.supervisor is not None else None
    if permit is None or instance.host.suspended:
        return
    left_s = permit.hard_s - instance.host.boottime_s() - 1.0
    if left_s > 0:
        instance.host.suspend(chance.uniform(0.6, 1.0) * left_s)


def crash_primary(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    instance = primary_of(cluster, chance)
    instance.crash()
    return instance.start


def dying_primary(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Its link to one standby goes first, the whole machine a little later: that standby is a voter still, and behind."""
    instance, other = primary_of(cluster, chance), _standby_of(cluster, chance)
    undo_cut = _cut(cluster, _between(instance.name, other.name, "replication"))
    going_on = [True]

    def crash() -> None:
        if going_on:
            instance.crash()

    cluster.world.call_later(chance.uniform(0.3, 1.8), crash)

    def undo() -> None:
        going_on.clear()
        undo_cut()
        instance.start()

    return undo


def lose_rack(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """The primary and a standby at once."""
    instances = [primary_of(cluster, chance), _standby_of(cluster, chance)]
    for instance in instances:
        instance.crash()

    def undo() -> None:
        for instance in instances:
            instance.start()

    return undo


def primary_loses_store(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    name = primary_of(cluster, chance).name
    return _cut(cluster, [(name, "store", "store"), ("store", name, "store")])


def isolate_primary(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """It keeps its clients, and nothing else."""
    name = primary_of(cluster, chance).name
    return _cut(cluster, cluster.links_of(name, [c for c in CHANNELS if c != "clients"]))


def creeping_isolation(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """It loses the store first, and its peers some seconds later."""
    name = primary_of(cluster, chance).name
    going_on = [True]
    undos = [_cut(cluster, [(name, "store", "store"), ("store", name, "store")])]

    def rest() -> None:
        if going_on:
            undos.append(_cut(cluster, cluster.links_of(name, ["http", "replication"])))

    cluster.world.call_later(chance.uniform(6.0, 14.0), rest)

    def undo() -> None:
        going_on.clear()
        for each in undos:
            each()

    return undo


def store_and_a_peer_lost(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """The primary loses the store and one standby, and keeps the others."""
    name, other = primary_of(cluster, chance).name, _standby_of(cluster, chance).name
    links = [(name, "store", "store"), ("store", name, "store")]
    return _cut(cluster, links + _between(name, other, "http", "replication"))


def stall_primary_disk(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    volume = primary_of(cluster, chance).volume
    volume.stalled = True

    def undo() -> None:
        volume.stalled = False

    return undo


# The standbys.


def crash_standby(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    instance = _standby_of(cluster, chance)
    instance.crash()
    return instance.start


def crash_two_standbys(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Of three: k goes down, and up again when they are back."""
    primary = primary_of(cluster, chance)
    standbys = [each for each in cluster.instances.values() if each is not primary]
    instances = chance.sample(standbys, min(2, len(standbys)))
    for instance in instances:
        instance.crash()

    def undo() -> None:
        for instance in instances:
            instance.start()

    return undo


def reinitialise_standby(cluster: SimulatedCluster, chance: random.Random) -> None:
    """It is dropped while it streams as well as ever."""
    cluster.verb("reinit", {"name": _standby_of(cluster, chance).name})


def kill_standby_agents(cluster: SimulatedCluster, chance: random.Random) -> None:
    """One or two, at any moment of the next seconds."""
    for _ in range(chance.randint(1, 2)):
        instance = _standby_of(cluster, chance)
        cluster.world.call_later(chance.expovariate(0.5), partial(_kill_agent_of, instance))


def pause_standby_agents(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Of one or more, for less than their supervisors' patience."""
    primary = primary_of(cluster, chance)
    agents = [
        each.supervisor.agent
        for each in cluster.instances.values()
        if each is not primary and each.supervisor is not None and each.supervisor.agent is not None
    ]
    paused = chance.sample(agents, chance.randint(1, len(agents))) if agents else []
    for agent in paused:
        agent.pause()

    def undo() -> None:
        for agent in paused:
            agent.resume()

    return undo


def flapping_standby(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Its replication comes and goes every few seconds."""
    links = _between(primary_of(cluster, chance).name, _standby_of(cluster, chance).name, "replication")
    going_on = [True]
    undos: list[Undo] = []

    def turn() -> None:
        if not going_on:
            return
        if undos:
            undos.pop()()
        else:
            undos.append(_cut(cluster, links))
        cluster.world.call_later(chance.uniform(0.5, 4.0), turn)

    turn()

    def undo() -> None:
        going_on.clear()
        if undos:
            undos.pop()()

    return undo


def standby_loses_store(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    name = _standby_of(cluster, chance).name
    return _cut(cluster, [(name, "store", "store"), ("store", name, "store")])


def _kill_agent_of(instance: SimulatedInstance) -> None:
    if instance.supervisor is not None and instance.supervisor.agent is not None:
        instance.supervisor.agent.kill()


def cut_standby(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """From the primary only."""
    names = primary_of(cluster, chance).name, _standby_of(cluster, chance).name
    return _cut(cluster, _between(*names, "http", "replication"))


def _first_standby(cluster: SimulatedCluster, chance: random.Random) -> tuple[str, str]:
    """The primary, and always the same standby: where no more than one may be in trouble."""
    primary = primary_of(cluster, chance)
    return primary.name, next(name for name in cluster.names if name != primary.name)


def cut_first_standby(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    return _cut(cluster, _between(*_first_standby(cluster, chance), "http", "replication"))


def cut_first_replication(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    return _cut(cluster, _between(*_first_standby(cluster, chance), "replication"))


def cut_replication(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    names = primary_of(cluster, chance).name, _standby_of(cluster, chance).name
    return _cut(cluster, _between(*names, "replication"))


def slow_replication(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """One standby lags by up to a second: it streams, and is behind."""
    primary, standby = primary_of(cluster, chance).name, _standby_of(cluster, chance).name
    cluster.network.slow(primary, standby, "replication", chance.uniform(0.3, 1.2))

    def undo() -> None:
        cluster.network.slow(primary, standby, "replication", 0.0)

    return undo


def isolate_standby(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    name = _standby_of(cluster, chance).name
    return _cut(cluster, cluster.links_of(name, [c for c in CHANNELS if c != "clients"]))


def lose_standby_volume(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    if not cluster.may_lose_volume():
        return None
    instance = _standby_of(cluster, chance)
    cluster.lose_volume(instance)
    return instance.start


# The store, and its users.


def _store_faults(cluster: SimulatedCluster, faults: StoreFaults) -> Undo:
    store = cluster.store
    before = store.faults
    store.faults = faults

    def undo() -> None:
        store.faults = before

    return undo


def late_writes(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Writes take effect seconds later, when nobody waits for them any more."""
    share = chance.choice([0.5, 0.8])
    return _store_faults(cluster, replace(cluster.store.faults, lands_late=share, late_max_s=8.0))


def slow_store(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    return _store_faults(cluster, replace(cluster.store.faults, slow=0.8, slow_max_s=1.4))


def lost_answers(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    return _store_faults(cluster, replace(cluster.store.faults, answer_lost=0.1, hint_lost=1.0))


def slow_way_to_store(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Of the primary: a write is under way for long, and its answer too."""
    name = primary_of(cluster, chance).name
    links: list[Link] = [(name, "store", "store"), ("store", name, "store")]
    for link in links:
        cluster.network.slow(*link, 0.65)

    def undo() -> None:
        for link in links:
            cluster.network.slow(*link, 0.0)

    return undo


def dying_network(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """The primary's: first slow, and some seconds later it reaches nobody but its clients."""
    undos = [slow_way_to_store(cluster, chance)]
    name = primary_of(cluster, chance).name
    going_on = [True]

    def cut() -> None:
        if going_on:
            undos.append(_cut(cluster, cluster.links_of(name, [c for c in CHANNELS if c != "clients"])))

    cluster.world.call_later(chance.uniform(2.0, 6.0), cut)

    def undo() -> None:
        going_on.clear()
        for each in undos:
            each()

    return undo


def very_slow_way_to_store(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """What the primary writes arrives, in its order, when the primary has long given up waiting."""
    name = primary_of(cluster, chance).name
    cluster.network.slow(name, "store", "store", chance.uniform(2.5, 5.0))

    def undo() -> None:
        cluster.network.slow(name, "store", "store", 0.0)

    return undo


def clear_holder(cluster: SimulatedCluster, chance: random.Random) -> None:
    cluster.store.edit(holder=None)


def fail_over_with_loss(cluster: SimulatedCluster, chance: random.Random) -> None:
    """A user who does not wait."""
    cluster.checker.loss_allowed_until_s = cluster.world.now_s + LOSS_ALLOWED_S
    cluster.verb("failover", {"allow_data_loss": True})


DIRECTED = (
    Fault("primary's managers frozen", freeze_managers, (14.0, 25.0)),
    Fault("managers frozen and writes late", control_plane_in_trouble, (16.0, 25.0)),
    Fault("primary's agent keeps crashing", crashing_agent, (11.0, 20.0)),
    Fault("primary's agent killed", kill_primary_agent),
    Fault("primary's agent paused briefly", pause_primary_agent, (1.0, 2.9)),
    Fault("primary's machine suspended", suspend_primary),
    Fault("primary crashed", crash_primary, (0.2, 15.0)),
    Fault("primary dies bit by bit", dying_primary, (3.0, 15.0)),
    Fault("primary and a standby crashed", lose_rack, (3.0, 15.0)),
    Fault("store unreachable for the primary", primary_loses_store, (5.0, 25.0)),
    Fault("primary isolated", isolate_primary, (5.0, 25.0)),
    Fault("primary isolated for long", isolate_primary, (18.0, 28.0)),
    Fault("primary isolated bit by bit", creeping_isolation, (18.0, 30.0)),
    Fault("primary without the store and a standby", store_and_a_peer_lost, (12.0, 25.0)),
    Fault("primary's disk stalled", stall_primary_disk, (25.0, 30.0)),
    Fault("standby crashed", crash_standby, (0.2, 8.0)),
    Fault("standby restarted", crash_standby, (0.1, 0.5), 2.0),
    Fault("two standbys crashed", crash_two_standbys, (2.5, 5.0)),
    Fault("standby reinitialised", reinitialise_standby),
    Fault("standbys' agents killed", kill_standby_agents, weight=0.5),
    Fault("standbys' agents paused briefly", pause_standby_agents, (0.5, 2.9)),
    Fault("standby cut from the primary", cut_standby, (1.0, 15.0)),
    Fault("one standby cut from the primary", cut_first_standby, (1.0, 15.0)),
    Fault("one standby without replication", cut_first_replication, (0.3, 8.0)),
    Fault("standby cut off for long", cut_standby, (20.0, 30.0)),
    Fault("store unreachable for a standby", standby_loses_store, (10.0, 14.0)),
    Fault("replication flaps", flapping_standby, (10.0, 25.0)),
    Fault("standby without replication", cut_replication, (0.3, 8.0)),
    Fault("standby lags", slow_replication, (3.0, 20.0)),
    Fault("standby isolated", isolate_standby, (5.0, 20.0)),
    Fault("standby's volume destroyed", lose_standby_volume, (0.2, 3.0)),
    Fault("writes land late", late_writes, (10.0, 25.0)),
    Fault("slow store", slow_store, (3.0, 20.0)),
    Fault("store's answers lost", lost_answers, (5.0, 20.0)),
    Fault("slow way to the store", slow_way_to_store, (10.0, 25.0)),
    Fault("primary's network dies", dying_network, (24.0, 30.0)),
    Fault("way to the store takes seconds", very_slow_way_to_store, (4.0, 9.0), 2.0),
    Fault("holder cleared by hand", clear_holder),
    Fault("failover with loss asked", fail_over_with_loss),
)
