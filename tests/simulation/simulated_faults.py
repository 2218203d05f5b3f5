"""What goes wrong in a seed: a table of faults, each with how long it lasts, drawn by the seed's own mix (swarm testing).

A seed first chooses which faults it has at all, and how often; so some seeds are a storm of everything, and others repeat
one thing, which finds what a storm hides. Everything is undone before the cluster must show that it heals.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rare_situations import (
    directory_vanishes,
    interrupted_failover_with_loss,
    unwritable_candidate,
    volume_of_another_cluster,
    winner_cannot_open,
)

if TYPE_CHECKING:
    from simulated_cluster import SimulatedCluster
    from simulated_instance import SimulatedInstance

CHANNELS = ("http", "replication", "store", "clients")

Undo = Callable[[], None]
Apply = Callable[["SimulatedCluster", random.Random], Undo | None]


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    apply: Apply
    lasts_s: tuple[float, float] = (0.0, 0.0)
    weight: float = 1.0
    modes: tuple[str, ...] = ("synchronous", "asynchronous")
    """Of the cluster in which it may happen: what a mode openly does not cover is not asked of it."""


def any_of(cluster: SimulatedCluster, chance: random.Random) -> SimulatedInstance:
    """The primary half of the time: most that can be lost is lost there."""
    instances = list(cluster.instances.values())
    holder = cluster.holder_instance()
    if holder is not None and chance.random() < 0.5:
        return holder
    return chance.choice(instances)


def primary_of(cluster: SimulatedCluster, chance: random.Random) -> SimulatedInstance:
    return cluster.holder_instance() or any_of(cluster, chance)


# The network.


def _cut(cluster: SimulatedCluster, links: list[tuple[str, str, str]]) -> Undo:
    for link in links:
        cluster.network.block(*link)

    def undo() -> None:
        for link in links:
            cluster.network.unblock(*link)

    return undo


def isolate(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """One instance loses everybody, the store included; its clients may stay."""
    name = any_of(cluster, chance).name
    channels = [c for c in CHANNELS if c != "clients" or chance.random() < 0.3]
    return _cut(cluster, cluster.links_of(name, channels))


def isolate_from_some(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Some kinds of traffic of one instance, perhaps in one direction only."""
    name = any_of(cluster, chance).name
    channels = [c for c in CHANNELS if chance.random() < 0.5] or ["replication"]
    links = cluster.links_of(name, channels)
    if chance.random() < 0.5:
        outward = chance.random() < 0.5
        links = [link for link in links if (link[0] == name) is outward]
    return _cut(cluster, links)


def cut_pair(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    if len(cluster.instances) < 2:
        return None
    a, b = chance.sample(sorted(cluster.instances), 2)
    channels = chance.choice([("http",), ("replication",), ("http", "replication")])
    links = [(a, b, c) for c in channels]
    if chance.random() < 0.7:
        links += [(b, a, c) for c in channels]
    return _cut(cluster, links)


def store_unreachable(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """For one instance, in one direction or both."""
    name = any_of(cluster, chance).name
    links = chance.choice(
        [
            [(name, "store", "store"), ("store", name, "store")],
            [("store", name, "store")],
            [(name, "store", "store")],
        ]
    )
    return _cut(cluster, links)


def bad_network(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Loss, delays, duplicates and reordering for everybody."""
    network = cluster.network
    before = network.faults
    network.faults = replace(
        before,
        loss=chance.choice([0.0, 0.02, 0.1, 0.3]),
        slow=chance.choice([0.01, 0.1, 0.3]),
        slow_max_s=chance.choice([0.3, 1.0, 3.0]),
        duplicated_request=chance.choice([0.0, 0.05, 0.3]),
        cancelled_handler=chance.random(),
        broken_connection=chance.choice([0.0, 0.02, 0.2]),
        frozen_connection=chance.choice([0.0, 0.02, 0.2]),
        ended_connection=chance.choice([0.0, 0.02, 0.2]),
    )

    def undo() -> None:
        network.faults = before

    return undo


def slow_links(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    name = any_of(cluster, chance).name
    links = cluster.links_of(name, [c for c in CHANNELS if chance.random() < 0.5])
    added_s = chance.choice([0.05, 0.5, 2.0])
    for link in links:
        cluster.network.slow(*link, added_s)

    def undo() -> None:
        for link in links:
            cluster.network.slow(*link, 0.0)

    return undo


# Processes.


def pause_agent(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    supervisor = any_of(cluster, chance).supervisor
    if supervisor is None or supervisor.agent is None:
        return None
    agent = supervisor.agent
    agent.pause()
    return agent.resume


def pause_supervisor(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """Perhaps with its agent. Asynchronous clusters state that they rely on the supervisor being scheduled."""
    instance = any_of(cluster, chance)
    if instance.supervisor is None:
        return None
    processes = instance.processes() if chance.random() < 0.5 else instance.processes()[:1]
    cluster.excuse(instance)
    for process in processes:
        process.pause()

    def undo() -> None:
        for process in processes:
            process.resume()
        cluster.end_excuse(instance)

    return undo


def pause_instance(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """Everything in one container, Postgres too, as when a machine is frozen."""
    instance = any_of(cluster, chance)
    if instance.supervisor is None:
        return None
    processes, server = instance.processes(), instance.server
    cluster.excuse(instance)
    for process in processes:
        process.pause()
    if server is not None:
        server.pause()

    def undo() -> None:
        for process in processes:
            process.resume()
        if server is not None:
            server.resume()
        cluster.end_excuse(instance)

    return undo


def suspend_machine(cluster: SimulatedCluster, chance: random.Random) -> None:
    instance = any_of(cluster, chance)
    duration_s = chance.uniform(0.5, 20.0)
    cluster.excuse(instance, duration_s)
    instance.host.suspend(duration_s)


def kill_agent(cluster: SimulatedCluster, chance: random.Random) -> None:
    supervisor = any_of(cluster, chance).supervisor
    if supervisor is not None and supervisor.agent is not None:
        supervisor.agent.kill()


def kill_agent_soon(cluster: SimulatedCluster, chance: random.Random) -> None:
    """At any await of whatever it does in the next moments: the primary's while its quorum changes, a voter's while it votes."""
    instance = any_of(cluster, chance)
    for _ in range(chance.randint(1, 4)):
        cluster.world.call_later(chance.expovariate(2.0), _kill_agent_of, instance)


def _kill_agent_of(instance: SimulatedInstance) -> None:
    if instance.supervisor is not None and instance.supervisor.agent is not None:
        instance.supervisor.agent.kill()


def crash_container(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """The supervisor dies, and so everything; it comes back when the fault ends."""
    instance = any_of(cluster, chance)
    instance.crash()
    return instance.start


def lose_power(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Everything that was not flushed may be gone."""
    instance = any_of(cluster, chance)
    instance.lose_power()
    return instance.start


def crash_all(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    instances = list(cluster.instances.values())
    for instance in instances:
        if chance.random() < 0.5:
            instance.lose_power()
        else:
            instance.crash()

    def undo() -> None:
        chance.shuffle(instances)
        for instance in instances:
            cluster.world.call_later(chance.choice([0.0, 0.0, 1.0, 5.0]) * chance.random(), instance.start)

    return undo


def restart_gracefully(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """SIGTERM, as a drain or a rolling restart sends it."""
    instance = any_of(cluster, chance)
    if instance.supervisor is None:
        return None
    instance.supervisor.terminate()

    def undo() -> None:
        instance.crash()
        instance.start()

    return undo


# Disks.


def stall_disk(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    volume = any_of(cluster, chance).volume
    volume.stalled = True

    def undo() -> None:
        volume.stalled = False

    return undo


def fill_disk(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    volume = any_of(cluster, chance).volume
    volume.full = True

    def undo() -> None:
        volume.full = False

    return undo


def destroy_volume(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """Of one instance at most: what a cluster of three cannot bear, two lost disks, is not asked of it."""
    instance = any_of(cluster, chance)
    if not cluster.may_lose_volume():
        return None
    cluster.lose_volume(instance)
    return instance.start


def remove_data_directory(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """By hand, or a broken file system: what the volume remembers beside it stays."""
    instance = any_of(cluster, chance)
    if not cluster.may_lose_volume():
        return None
    cluster.lose_volume(instance, with_memory=False)
    return instance.start


def lose_tail(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """The primary's disk lied about its flushes: what its standbys acknowledged is with them (R16)."""
    instance = cluster.holder_instance()
    record = cluster.record
    if instance is None or record is None or record.quorum == 0 or record.mode != "synchronous":
        return None
    if not cluster.may_lose_volume():
        return None
    cluster.spend_volume()
    instance.lose_power()
    instance.volume.lose_flushed_tail(chance.randint(1, 5))
    return instance.start


# Clocks.


def change_clock_rate(cluster: SimulatedCluster, chance: random.Random) -> None:
    instance = any_of(cluster, chance)
    error = instance.configuration.timings.clock_rate_error
    instance.host.rate = 1 + chance.uniform(-0.9, 0.9) * error


def step_wall_clock(cluster: SimulatedCluster, chance: random.Random) -> None:
    any_of(cluster, chance).host.step_wall(chance.choice([-3600.0, 3600.0, -0.5, 86400.0 * 365]))


# The store.


def store_outage(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    cluster.store.outage = True

    def undo() -> None:
        cluster.store.outage = False

    return undo


def bad_store(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    """Answers lost, late, doubled, refused, old."""
    store = cluster.store
    before = store.faults
    store.faults = cluster.bad_store_faults(chance)

    def undo() -> None:
        store.faults = before

    return undo


# With a disk lost too, the last holder's perhaps, nobody may write a new one (R3): that is a user's to decide.


def delete_record(cluster: SimulatedCluster, chance: random.Random) -> None:
    if cluster.has_lost_volume or not cluster.has_data:
        return
    cluster.store.delete()


def damage_record(cluster: SimulatedCluster, chance: random.Random) -> None:
    if cluster.has_lost_volume or not cluster.has_data:
        return
    cluster.store.damage()


def restore_record(cluster: SimulatedCluster, chance: random.Random) -> None:
    """From a backup of an epoch that every instance has seen the end of: of an epoch that some have not outlived, nobody
    could tell, and no manager could be safe (README)."""
    state = cluster.state_before_every_memory(chance)
    if state is not None and not cluster.has_lost_volume and cluster.has_data:
        cluster.store.restore(state)


def edit_record(cluster: SimulatedCluster, chance: random.Random) -> None:
    """By hand: the holder cleared, or what nobody should touch."""
    if cluster.has_lost_volume or not cluster.has_data:
        return
    choices: list[dict[str, Any]] = [
        {"holder": None},
        {"voters": frozenset(), "quorum": 0},
        {"cluster_uid": "another"},
        {"quorum": 0},
    ]
    cluster.store.edit(**chance.choice(choices))


# What users do.


def switch_over(cluster: SimulatedCluster, chance: random.Random) -> None:
    target = chance.choice([None, *sorted(cluster.instances)])
    cluster.verb("switchover", {"to": target} if target else {})


def fence(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    name = any_of(cluster, chance).name
    cluster.verb("fence", {"name": name})
    return lambda: cluster.verb("unfence", {"name": name})


def pause_cluster(cluster: SimulatedCluster, chance: random.Random) -> Undo:
    cluster.verb("pause", {})
    return lambda: cluster.verb("resume", {})


def restart_postgres(cluster: SimulatedCluster, chance: random.Random) -> None:
    cluster.verb("restart", {"name": any_of(cluster, chance).name})


def reinitialise(cluster: SimulatedCluster, chance: random.Random) -> None:
    cluster.verb("reinit", {"name": any_of(cluster, chance).name})


def change_mode(cluster: SimulatedCluster, chance: random.Random) -> None:
    """The whole cluster's durability, at slightly different times (R8)."""
    durability = chance.choice(["preferred", "required", "asynchronous"])
    for instance in cluster.instances.values():
        cluster.world.call_later(chance.uniform(0, 2.0), instance.change_durability, durability)


def cancel_waits(cluster: SimulatedCluster, chance: random.Random) -> None:
    """Sessions whose wait for standbys is cut: success with a warning (P13)."""
    for commit in cluster.clients.commits():
        if commit.session is not None and chance.random() < 0.7:
            commit.session.server.cancel_wait(commit)


# Inside Postgres.


def kill_postmaster(cluster: SimulatedCluster, chance: random.Random) -> None:
    server = any_of(cluster, chance).server
    if server is not None:
        server.crash("the postmaster was killed")


def kill_backend(cluster: SimulatedCluster, chance: random.Random) -> None:
    """With restart_after_crash off the whole server ends."""
    server = any_of(cluster, chance).server
    if server is not None:
        server.crash("a backend was killed")


def pause_part_of_postgres(cluster: SimulatedCluster, chance: random.Random) -> Undo | None:
    """One of its processes stands still."""
    server = any_of(cluster, chance).server
    if server is None:
        return None
    parts = {"postmaster": server.postmaster, "checkpointer": server.checkpointer}
    if server.in_recovery and server.ready:
        parts["startup process"] = server.startup.child
    if server.walreceiver is not None:
        parts["walreceiver"] = server.walreceiver.child
    if server.senders:
        parts["walsender"] = chance.choice(server.senders).child
    if server.sessions:
        parts["backend"] = chance.choice(server.sessions).child
    name = chance.choice(sorted(parts))
    cluster.world.counters[f"fault: {name} paused"] += 1
    parts[name].pause()
    return parts[name].resume


RARE = (
    Fault("a winner cannot open", winner_cannot_open, (35.0, 50.0), 0.1),
    Fault("data directory vanishes under a living container", directory_vanishes, weight=0.1),
    Fault("failover with loss interrupted", interrupted_failover_with_loss, (25.0, 30.0), 0.1, modes=("synchronous",)),
    Fault("a candidate cannot write its promise", unwritable_candidate, (7.0, 10.0), 0.1),
    Fault("volume of another cluster mounted", volume_of_another_cluster, (5.0, 20.0), 0.1),
)
"""They lie in wait; some seeds have nothing else, so that nothing comes in between."""
RARE_ALONE = 0.02
"""Share of such seeds."""

FAULTS = (
    Fault("isolate an instance", isolate, (0.5, 25.0), 2.0),
    Fault("cut some traffic of an instance", isolate_from_some, (0.5, 20.0), 2.0),
    Fault("cut two instances from one another", cut_pair, (0.5, 20.0)),
    Fault("store unreachable for one", store_unreachable, (0.5, 25.0)),
    Fault("bad network", bad_network, (1.0, 20.0)),
    Fault("slow links", slow_links, (1.0, 15.0)),
    Fault("agent paused", pause_agent, (0.1, 15.0), 1.5),
    Fault("supervisor paused", pause_supervisor, (0.1, 25.0), 1.5),
    Fault("instance paused", pause_instance, (0.1, 25.0), 1.5),
    Fault("machine suspended", suspend_machine),
    Fault("agent killed", kill_agent, weight=1.0),
    Fault("agent killed again and again", kill_agent_soon, weight=2.0),
    Fault("container crashed", crash_container, (0.2, 20.0), 2.0),
    Fault("power lost", lose_power, (0.5, 20.0)),
    Fault("all crashed", crash_all, (0.2, 5.0), 0.5),
    Fault("terminated", restart_gracefully, (2.0, 30.0)),
    Fault("disk stalled", stall_disk, (0.5, 15.0)),
    Fault("disk full", fill_disk, (1.0, 20.0), 0.5),
    Fault("volume destroyed", destroy_volume, (0.5, 5.0), 0.3),
    Fault("data directory removed", remove_data_directory, (0.5, 5.0), 0.3),
    Fault("primary's disk lost its tail", lose_tail, (0.2, 5.0), 0.5, modes=("synchronous",)),
    Fault("clock rate changed", change_clock_rate, weight=0.5),
    Fault("wall clock stepped", step_wall_clock, weight=0.5),
    Fault("store away", store_outage, (1.0, 40.0)),
    Fault("bad store", bad_store, (2.0, 25.0), 2.0),
    Fault("record deleted", delete_record, weight=0.2, modes=("synchronous",)),
    Fault("record damaged", damage_record, weight=0.2, modes=("synchronous",)),
    Fault("record restored from earlier", restore_record, weight=0.2, modes=("synchronous",)),
    Fault("record edited", edit_record, weight=0.2, modes=("synchronous",)),
    Fault("switchover asked", switch_over, weight=1.5),
    Fault("instance fenced", fence, (2.0, 20.0), 0.5),
    Fault("cluster paused", pause_cluster, (2.0, 20.0), 0.3),
    Fault("Postgres restarted by a user", restart_postgres, weight=0.5),
    Fault("instance reinitialised", reinitialise, weight=0.3),
    Fault("durability changed", change_mode, weight=0.2),
    Fault("waits cancelled", cancel_waits, weight=0.5),
    Fault("postmaster killed", kill_postmaster, weight=1.5),
    Fault("backend killed", kill_backend, weight=0.5),
    Fault("a process of Postgres paused", pause_part_of_postgres, (0.1, 15.0), 2.0),
    *RARE,
)


@dataclass(frozen=True, slots=True)
class Mix:
    """Which faults a seed has, how often, for how long."""

    faults: tuple[Fault, ...]
    mean_pause_s: float
    duration_s: float


def choose_mix(chance: random.Random, mode: str, only: tuple[str, ...] = ()) -> Mix:
    """`only`: names of faults, all of which the seed then has."""
    allowed = [fault for fault in FAULTS if mode in fault.modes]
    if only:
        faults = tuple(fault for fault in allowed if fault.name in only)
        return Mix(faults, chance.choice([0.7, 2.0, 5.0]), chance.choice([15.0, 30.0, 30.0]))
    if chance.random() < RARE_ALONE:
        return Mix((chance.choice([fault for fault in RARE if mode in fault.modes]),), 10.0, 60.0)
    share = chance.choice([0.1, 0.3, 0.6, 1.0])
    faults = tuple(fault for fault in allowed if chance.random() < share) or (chance.choice(allowed),)
    return Mix(faults, chance.choice([0.7, 2.0, 5.0, 10.0]), chance.choice([15.0, 30.0, 30.0, 60.0]))
