"""The random case: a seeded schedule of faults of all kinds that this environment can make, now and then two at once."""

from __future__ import annotations

import random
from collections.abc import Callable

from instance_manager.demo.cluster import NotInTime
from instance_manager.demo.processes import now_s
from instance_manager.drill.faults import (
    CannotInject,
    ClockStep,
    CutFromPeersAndStore,
    CutPair,
    DestroyDirectory,
    DiskFull,
    DiskStall,
    Fault,
    KillInstance,
    KillProcesses,
    StopProcesses,
    StoreAway,
    agent_of,
    one_client_backend_of,
    postmaster_of,
    supervisor_and_agent_of,
    walsenders_of,
)
from instance_manager.drill.stage import Stage

_SECOND_FAULT = 0.25
_HIT_PRIMARY = 0.6
_SWITCHOVER = 0.1
_RECOVERY_S = 120.0


def random_faults(stage: Stage) -> None:
    """For `stage.random_seconds` seconds by `stage.seed`. NotInTime: the cluster did not come back after a fault."""
    chance = random.Random(stage.seed)  # noqa: S311 - to be repeated, not to be secret
    ends_s = now_s() + stage.random_seconds
    while now_s() < ends_s:
        primary = stage.cluster.primary()
        if chance.random() < _SWITCHOVER:
            stage.try_switchover()
        else:
            _one_round(stage, chance, primary)
        _recover(stage, chance)


def _one_round(stage: Stage, chance: random.Random, primary: str | None) -> None:
    active: list[Fault] = []
    hit: set[str] = set()
    for _ in range(2 if chance.random() < _SECOND_FAULT else 1):
        name = primary if primary is not None and chance.random() < _HIT_PRIMARY else chance.choice(stage.cluster.names)
        kinds = _kinds(stage, chance, name)
        fault = chance.choice(kinds)()
        # A second disaster on the volume of another instance may take every copy there is: that is no failover.
        if name in hit or (hit and isinstance(fault, DestroyDirectory)):
            continue
        hit.add(name)
        try:
            active.append(stage.inject(fault))
        except CannotInject as error:
            stage.say(str(error))
        stage.hold(chance.uniform(0, 2))
    stage.hold(chance.choice((0.3, 2.0, 5.0, 10.0, 15.0)))
    for fault in reversed(active):
        stage.heal(fault)


def _kinds(stage: Stage, chance: random.Random, name: str) -> list[Callable[[], Fault]]:
    cluster, environment = stage.cluster, stage.environment
    other = chance.choice([each for each in cluster.names if each != name])
    seconds = chance.choice((-86400, -3600, -10, 10, 3600, 86400))
    kinds: list[Callable[[], Fault]] = [
        lambda: KillInstance(cluster, name),
        lambda: KillProcesses(cluster, name, postmaster_of, "postmaster"),
        lambda: KillProcesses(cluster, name, agent_of, "agent"),
        lambda: StopProcesses(cluster, name, agent_of, "agent"),
        lambda: StopProcesses(cluster, name, supervisor_and_agent_of, "supervisor and the agent"),
        lambda: StopProcesses(cluster, name, postmaster_of, "postmaster"),
        lambda: StopProcesses(cluster, name, one_client_backend_of, "one client's backend"),
        lambda: StopProcesses(cluster, name, walsenders_of, "walsenders"),
        lambda: StoreAway(cluster, [name]),
        lambda: StoreAway(cluster, cluster.names),
    ]
    if name != cluster.primary():
        kinds.append(lambda: DestroyDirectory(cluster, name))
    if (network := environment.network) is not None:
        kinds += [lambda: CutFromPeersAndStore(cluster, network, name), lambda: CutPair(network, name, other)]
    if (volumes := environment.volumes) is not None:
        kinds += [lambda: DiskStall(volumes, name), lambda: DiskFull(volumes, name)]
    if (clocks := environment.clocks) is not None:
        kinds.append(lambda: ClockStep(clocks, name, seconds))
    return kinds


def _recover(stage: Stage, chance: random.Random) -> None:
    """Mostly wait for full redundancy; at times go on at once, into a cluster that is still coming back."""
    if chance.random() < 0.2:
        stage.hold(chance.uniform(0, 5))
        return
    try:
        stage.cluster.wait_redundant(_RECOVERY_S)
    except NotInTime as error:
        stage.say(str(error))
        raise
    stage.hold(chance.uniform(0, 3))
