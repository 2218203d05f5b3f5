"""Variants of the quorum's table, the barrier, and what makes Postgres wait for whom (section 4, P1, P5, P7, P8, P10)."""

from __future__ import annotations

import simulated_clients
from bending import bent, replaced, swapped
from broken_rule import BrokenRule
from simulated_cluster import Scenario
from simulated_running import SimulatedReplication
from simulated_volume import PostgresBehaviour

from instance_manager.agent import primary
from instance_manager.agent.database import Database
from instance_manager.core.quorum import (
    QuorumStep,
    RecordVoters,
    SetSynchronous,
    SynchronousSet,
    next_step,
)
from instance_manager.core.types import Lsn, MemberId
from instance_manager.drill.history import Outcome
from instance_manager.postgres.synchronous import SynchronousReplication

Members = frozenset[MemberId]

UNSTEADY = ("standby crashed", "standby cut from the primary", "standby without replication", "standby lags")
"""Voters come and go, so that the quorum changes all the time."""
LATE_LOOKS = PostgresBehaviour(walsender_late=0.6, checkpointer_late=0.6)


def _add_in_postgres_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    adds = quorum > 0 and wanted.k >= quorum and wanted.members - voters
    if adds and (synchronous != wanted or not confirmed):
        return SetSynchronous(wanted, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def _drop_in_record_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k >= quorum > 0 and wanted.members < voters and synchronous != wanted:
        return RecordVoters(wanted.members, quorum, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def _lower_in_postgres_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k < quorum and (synchronous != wanted or not confirmed):
        return SetSynchronous(wanted, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def _raise_in_record_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k > quorum and synchronous != wanted:
        return RecordVoters(wanted.members, wanted.k, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


async def _no_barrier(self: Database, timeline: object, *, deadline_s: float) -> None:
    return None


async def _mark_of_acknowledged(self: SimulatedReplication, deadline: object) -> tuple[object, Lsn]:
    return self._server.timeline, Lsn(self._server.syncrep._released)


async def _nothing_to_wait_for(*_: object, **__: object) -> None:
    return None


QUORUM = (
    BrokenRule(
        name="add a voter: Postgres, then record",
        rule="section 4",
        what="Commits are counted on a standby whose promise no election asks for: it is elected past, and they are lost.",
        patch=swapped(primary, "next_step", _add_in_postgres_first),
        scenario=Scenario(durability="preferred", instances=3, faults=UNSTEADY),
        seeds=60,
    ),
    BrokenRule(
        name="drop a voter: record, then Postgres",
        rule="section 4",
        what="Postgres still counts a standby that the record has dropped: those left elect without what only it holds.",
        patch=swapped(primary, "next_step", _drop_in_record_first),
        scenario=Scenario(durability="preferred", instances=3, faults=("standby reinitialised",)),
        seeds=100,
    ),
    BrokenRule(
        name="lower q: Postgres, then record",
        rule="section 4",
        what="The primary goes on alone while the record still lets a standby be elected.",
        patch=swapped(primary, "next_step", _lower_in_postgres_first),
        scenario=Scenario(durability="preferred", instances=2, faults=UNSTEADY),
        seeds=20,
    ),
    BrokenRule(
        name="raise q: record, then Postgres",
        rule="section 4",
        what="A standby can be elected before commits wait for it.",
        patch=swapped(primary, "next_step", _raise_in_record_first),
        scenario=Scenario(durability="preferred", instances=2, faults=UNSTEADY),
        seeds=20,
    ),
    BrokenRule(
        name="no barrier",
        rule="section 4",
        what="The record changes although the voters do not hold what the log held before.",
        patch=swapped(Database, "barrier", _no_barrier),
        scenario=Scenario(durability="preferred", instances=3, faults=UNSTEADY),
        seeds=20,
    ),
    BrokenRule(
        name="barrier over acknowledged commits only",
        rule="section 4",
        what="A frozen former primary acknowledges an old commit that was inherited, and that the new voters do not hold.",
        patch=swapped(SimulatedReplication, "write_mark", _mark_of_acknowledged),
        scenario=Scenario(durability="preferred", instances=3, faults=(*UNSTEADY, "primary crashed")),
        seeds=60,
    ),
    BrokenRule(
        name="leaving the empty list without a canary",
        rule="P1",
        what="The checkpointer has not yet looked: commits are acknowledged by nobody, and q is recorded.",
        patch=swapped(SynchronousReplication, "_switch_on", _nothing_to_wait_for),
        scenario=Scenario(durability="preferred", instances=2, faults=UNSTEADY, behaviour=LATE_LOOKS),
        seeds=20,
    ),
    BrokenRule(
        name="the start does not wait by the record",
        rule="P8",
        what="A holder that starts again has the empty list and lets clients in at once, while the record has voters.",
        patch=bent(
            Database,
            "start_primary",
            ("write_files(opening, Access.CLOSED", "write_files(SynchronousSet(0, frozenset()), Access.OPEN"),
        ),
        scenario=Scenario(
            durability="preferred", instances=2, faults=("all crashed", "primary crashed", "backend killed")
        ),
        seeds=60,
    ),
    BrokenRule(
        name="a cancelled wait counts as acknowledged",
        rule="P13",
        what="A client takes the success with a WARNING for the promise.",
        patch=lambda: replaced(
            simulated_clients, "_OUTCOMES", {**simulated_clients._OUTCOMES, "cancelled_wait": Outcome.ACKNOWLEDGED}
        ),
        scenario=Scenario(durability="required", instances=2, faults=("waits cancelled", "primary isolated")),
        seeds=20,
    ),
)
