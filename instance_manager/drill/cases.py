"""Every fault that the cluster must survive, with its target for the longest write outage."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from instance_manager.drill.environment import Need
from instance_manager.drill.faults import (
    ClockStep,
    CutFromPeersAndStore,
    CutPair,
    DestroyDirectory,
    DiskFull,
    DiskStall,
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
from instance_manager.drill.random_faults import random_faults
from instance_manager.drill.stage import CaseFailed, Stage

NO_OUTAGE_S = 0.5
"""What "0 s" means to a client: no gap beyond a checkpoint or a busy core."""
_LONG_HOLD_S = 60.0
_QUICK_HOLD_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    title: str
    target_s: float | None
    """For the longest write outage; None: none is stated."""
    run: Callable[[Stage], None]
    needs: frozenset[Need] = frozenset()
    stale_read_limit_s: float | None = None
    """The last stale read at most this long after the fault came."""
    pgbench: bool = False
    is_random: bool = False


def _switchover(stage: Stage) -> None:
    stage.hold(3)
    stage.mark()
    stage.say(stage.switchover(stage.standbys[0]))


def _kill_postmaster(stage: Stage) -> None:
    stage.inject(KillProcesses(stage.cluster, stage.primary, postmaster_of, "postmaster"))
    stage.wait_writes(60)


def _kill_stays_away(stage: Stage) -> None:
    fault = stage.inject(KillInstance(stage.cluster, stage.primary))
    stage.wait_writes(60)
    stage.hold(12)
    stage.heal(fault)


def _kill_restarted(stage: Stage) -> None:
    fault = stage.inject(KillInstance(stage.cluster, stage.primary))
    stage.hold(1)
    stage.heal(fault)
    stage.wait_writes(60)


def _kill_agent(stage: Stage) -> None:
    stage.inject(KillProcesses(stage.cluster, stage.primary, agent_of, "agent"))
    stage.hold(12)
    stage.expect_same_primary()


def _stop_agent(stage: Stage) -> None:
    fault = stage.inject(StopProcesses(stage.cluster, stage.primary, agent_of, "agent"))
    stage.hold(_LONG_HOLD_S, quick_s=_QUICK_HOLD_S)
    stage.heal(fault)
    stage.expect_same_primary()


def _stop_supervisor_and_agent(stage: Stage) -> None:
    fault = stage.inject(
        StopProcesses(stage.cluster, stage.primary, supervisor_and_agent_of, "supervisor and the agent")
    )
    stage.hold(_LONG_HOLD_S, quick_s=30)
    stage.wait_other_primary(30)
    stage.heal(fault)


def _stop_postmaster(stage: Stage) -> None:
    fault = stage.inject(StopProcesses(stage.cluster, stage.primary, postmaster_of, "postmaster"))
    stage.hold(30, quick_s=20)
    stage.heal(fault)
    stage.wait_writes(60)


def _stop_backend_in_switchover(stage: Stage) -> None:
    fault = stage.inject(StopProcesses(stage.cluster, stage.primary, one_client_backend_of, "one client's backend"))
    stage.hold(1)
    stage.say(stage.switchover(stage.standbys[0]))
    stage.heal(fault)


def _cut_primary(stage: Stage) -> None:
    fault = stage.inject(CutFromPeersAndStore(stage.cluster, stage.network, stage.primary))
    stage.hold(25)
    stage.wait_other_primary(30)
    stage.heal(fault)


def _cut_one_standby(stage: Stage) -> None:
    fault = stage.inject(CutPair(stage.network, stage.primary, stage.standbys[0]))
    stage.hold(30, quick_s=_QUICK_HOLD_S)
    stage.expect_same_primary()
    stage.heal(fault)


def _cut_store(stage: Stage) -> None:
    fault = stage.inject(StoreAway(stage.cluster, [stage.primary]))
    stage.hold(30, quick_s=20)
    stage.expect_same_primary()
    stage.heal(fault)


def _store_away(stage: Stage) -> None:
    fault = stage.inject(StoreAway(stage.cluster, stage.cluster.names))
    stage.hold(_LONG_HOLD_S, quick_s=20)
    stage.expect_same_primary()
    stage.heal(fault)


def _both_standbys(stage: Stage) -> None:
    faults = [stage.inject(KillInstance(stage.cluster, name)) for name in stage.standbys]
    stage.hold(1)
    stage.wait_writes(60)
    stage.hold(3)
    for fault in faults:
        stage.heal(fault)
    stage.cluster.wait_redundant()
    stage.expect_same_primary()
    last = stage.inject(KillInstance(stage.cluster, stage.primary))
    stage.wait_writes(60)
    stage.heal(last)


def _disk_stall(stage: Stage) -> None:
    fault = stage.inject(DiskStall(stage.volumes, stage.primary))
    stage.hold(30, quick_s=25)
    stage.wait_other_primary(30)
    stage.heal(fault)


def _disk_full(stage: Stage) -> None:
    fault = stage.inject(DiskFull(stage.volumes, stage.primary))
    stage.hold(30, quick_s=25)
    stage.wait_writes(30)
    stage.heal(fault)


def _clock_step(stage: Stage) -> None:
    for name in (stage.primary, stage.standbys[0]):
        for seconds in (3600, -3600):
            fault = stage.inject(ClockStep(stage.clocks, name, seconds))
            stage.hold(12, quick_s=8)
            stage.heal(fault)
    stage.hold(5)
    stage.expect_same_primary()


def _standby_destroyed(stage: Stage) -> None:
    fault = stage.inject(DestroyDirectory(stage.cluster, stage.standbys[0]))
    stage.hold(3)
    stage.heal(fault)
    stage.cluster.wait_redundant()
    stage.expect_same_primary()


def _extra_rows(stage: Stage) -> None:
    """The walsenders stand still, so that what the primary writes now reaches nobody; then all of it dies."""
    old = stage.primary
    extra_rows(stage, old, "DROP TABLE IF EXISTS drill_extra; CREATE TABLE drill_extra (row int)")
    walsenders = StopProcesses(stage.cluster, old, walsenders_of, "walsenders")
    stage.inject(walsenders)
    extra_rows(stage, old, "INSERT INTO drill_extra SELECT generate_series(1, 10000)")
    kill = stage.inject(KillInstance(stage.cluster, old))
    stage.faults.heal(walsenders)
    stage.wait_writes(60)
    stage.heal(kill)
    stage.cluster.wait_redundant()
    stage.expect(stage.cluster.primary() != old, f"{old} is the primary again, with rows that no standby had")
    for name in stage.cluster.names:
        kept = extra_rows(stage, name, "SELECT count(*) FROM drill_extra")
        stage.expect(kept == "0", f"{name} holds {kept} rows that were on no standby when the primary died")


def extra_rows(stage: Stage, name: str, statement: str) -> str:
    """Run it with `synchronous_commit = local`: rows that no client may rely on. CaseFailed."""
    member = stage.cluster.plan.member(name)
    prefix = [] if stage.environment.network is None else [*stage.environment.network.enter_clients()]
    argv = [
        *prefix,
        "psql",
        "--no-psqlrc",
        "--quiet",
        "--tuples-only",
        "--no-align",
        f"--command={statement}",
        f"host={member.client_host} port={member.postgres_port} dbname=app user=app "
        f"passfile={stage.cluster.layout.password_file} options='-c synchronous_commit=local'",
    ]
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except subprocess.CalledProcessError as error:
        raise CaseFailed(f"psql: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CaseFailed(f"psql: {error}") from error


_NETWORK = frozenset({Need.NETWORK})
_DISK = frozenset({Need.DISK})
_CLOCK = frozenset({Need.CLOCK})

CASES: tuple[Case, ...] = (
    Case(name="switchover", title="planned switchover under pgbench load", target_s=1.0, run=_switchover, pgbench=True),
    Case(name="kill-postmaster", title="SIGKILL postmaster of the primary", target_s=2.0, run=_kill_postmaster),
    Case(
        name="kill-all",
        title="SIGKILL supervisor, agent and all of Postgres at once, stays away",
        target_s=3.0,
        run=_kill_stays_away,
    ),
    Case(name="kill-all-restart", title="the same, restarted after 1 s", target_s=3.0, run=_kill_restarted),
    Case(name="kill-agent", title="SIGKILL of the agent only", target_s=0.0, run=_kill_agent),
    Case(name="stop-agent", title="SIGSTOP of the agent for 60 s", target_s=0.0, run=_stop_agent),
    Case(
        name="stop-supervisor-and-agent",
        title="SIGSTOP of the supervisor and the agent for 60 s, Postgres left running",
        target_s=3.0,
        run=_stop_supervisor_and_agent,
    ),
    Case(name="stop-postmaster", title="SIGSTOP of the postmaster", target_s=15.0, run=_stop_postmaster),
    Case(
        name="stop-backend-switchover",
        title="SIGSTOP of one backend while a switchover runs",
        target_s=3.0,
        run=_stop_backend_in_switchover,
    ),
    Case(
        name="cut-primary",
        title="primary cut off from peers and store, clients still connected to it",
        target_s=5.0,
        run=_cut_primary,
        needs=_NETWORK,
        stale_read_limit_s=9.0,
    ),
    Case(
        name="cut-one-standby",
        title="primary cut off from one standby",
        target_s=0.0,
        run=_cut_one_standby,
        needs=_NETWORK,
    ),
    Case(name="cut-store", title="primary cut off from the store only", target_s=0.0, run=_cut_store),
    Case(name="store-away", title="coordination store away for 60 s", target_s=0.0, run=_store_away),
    Case(
        name="both-standbys",
        title="both standbys killed: writes resume alone, they come back, then the primary is killed",
        target_s=6.0,
        run=_both_standbys,
    ),
    Case(
        name="disk-stall", title="disk of the primary stalls (fsync hangs)", target_s=15.0, run=_disk_stall, needs=_DISK
    ),
    Case(name="disk-full", title="disk of the primary is full", target_s=15.0, run=_disk_full, needs=_DISK),
    Case(
        name="clock-step",
        title="clock stepped by an hour forward and back on one instance",
        target_s=0.0,
        run=_clock_step,
        needs=_CLOCK,
    ),
    Case(
        name="standby-destroyed",
        title="a standby's directory destroyed: it rejoins by itself",
        target_s=0.0,
        run=_standby_destroyed,
    ),
    Case(
        name="extra-rows",
        title="a former primary with extra local rows returns: it rejoins by itself",
        target_s=3.0,
        run=_extra_rows,
    ),
    Case(
        name="random",
        title="random faults of all kinds",
        target_s=None,
        run=random_faults,
        needs=frozenset(Need),
        is_random=True,
    ),
)


def outage_limit_s(case: Case) -> float | None:
    """The target as it is measured."""
    return None if case.target_s is None else max(case.target_s, NO_OUTAGE_S)
