"""How a data directory comes back: as it is, rewound, cloned again, or not at all yet."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import MemberId, TimelineChain, WalEnd


class Rejoin(enum.Enum):
    """What to do with the data directory before it may follow the holder."""

    FOLLOW = "follow"
    """Its log is a prefix of the accepted history: start as a standby."""
    FOLLOW_AT_ONCE = "follow at once"
    """It was rewound, or lost the end of its log: it is a prefix, but consistent only once it has received more. It
    follows from its very start, as a new member."""
    REWIND = "rewind"
    """It holds records that the accepted history does not have."""
    CLONE = "clone"
    """There is nothing, or nothing that can be used: a new directory, a new member."""
    SET_ASIDE_AND_CLONE = "set aside and clone"
    """Hopeless, but it may hold data that somebody wants to look at: kept under another name."""
    WAIT = "wait"
    """It must not be touched yet."""


@dataclass(frozen=True, slots=True)
class RejoinPlan:
    rejoin: Rejoin
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryFacts:
    """What is known of a stopped directory, or of a standby whose log cannot be followed on."""

    exists: bool
    half_rewound: bool
    foreign: str | None
    """Why it is not a directory of this cluster: never touched by itself."""
    system_identifier: str | None
    end: WalEnd | None
    """End of its log; None if it cannot be told."""
    needs: WalEnd | None
    """How far recovery must get, when its own log does not reach there; None when it does."""
    member_id: MemberId | None
    failed_rewinds: int
    excluded: bool
    own_initdb: bool = False
    """Made by an initdb of this instance that did not become the cluster."""


MAXIMUM_REWINDS = 3
"""One class of retries, then set aside and clone (patroni#3652: endless failing rewinds)."""


def plan_rejoin(record: ClusterRecord, facts: DirectoryFacts, *, chain: TimelineChain) -> RejoinPlan:
    """Rules R6, R15 and P7: a directory is neither wiped nor rewound while it is a voter."""
    if facts.foreign is not None:
        return RejoinPlan(
            Rejoin.WAIT, f"the data directory is not this cluster's: {facts.foreign}; move it away by hand"
        )
    if not facts.exists:
        return RejoinPlan(Rejoin.CLONE, "there is no data directory")
    another = facts.system_identifier is not None and record.system_identifier != facts.system_identifier
    if another and facts.own_initdb:
        return RejoinPlan(Rejoin.SET_ASIDE_AND_CLONE, "another instance has initialised the cluster meanwhile")
    if another:
        return RejoinPlan(
            Rejoin.WAIT,
            f"the data directory has system identifier {facts.system_identifier}, the cluster {record.system_identifier}; "
            "move it away by hand",
        )
    plan = _plan_for_own_directory(facts, chain)
    if plan.rejoin is Rejoin.REWIND and facts.failed_rewinds >= MAXIMUM_REWINDS:
        plan = RejoinPlan(Rejoin.SET_ASIDE_AND_CLONE, f"{facts.failed_rewinds} rewinds failed")
    votes = record.needs_vote_of(facts.member_id)
    if facts.excluded and votes and not facts.half_rewound and facts.end is not None and chain.contains(facts.end):
        # Else the primary could not come back to drop it: it asks every voter for the end of its log (R16).
        return RejoinPlan(Rejoin.FOLLOW, "it was given up, and serves as a voter until the primary has dropped it")
    if plan.rejoin is not Rejoin.FOLLOW and votes:
        return RejoinPlan(Rejoin.WAIT, f"{plan.reason}; but it is still a voter: the primary drops it first (R6)")
    return plan


def _plan_for_own_directory(facts: DirectoryFacts, chain: TimelineChain) -> RejoinPlan:
    if facts.excluded:
        return RejoinPlan(Rejoin.SET_ASIDE_AND_CLONE, "it was given up by a failover that allowed data loss (R15)")
    if facts.half_rewound:
        return RejoinPlan(Rejoin.REWIND, "a rewind was interrupted: the directory must not be started")
    if facts.needs is not None and chain.contains(facts.needs):
        # Never rewound again: pg_rewind would first finish recovery by itself, on a log of its own.
        return RejoinPlan(Rejoin.FOLLOW_AT_ONCE, f"it must receive up to {facts.needs} before it is consistent")
    if facts.needs is not None:
        return RejoinPlan(Rejoin.SET_ASIDE_AND_CLONE, f"it needs {facts.needs}, which is not in the cluster's history")
    if facts.end is None:
        return RejoinPlan(Rejoin.REWIND, "the end of its log cannot be told")
    if chain.contains(facts.end):
        return RejoinPlan(Rejoin.FOLLOW, f"its log ends at {facts.end}, which the cluster's history contains")
    return RejoinPlan(
        Rejoin.REWIND, f"its log ends at {facts.end}, past the cluster's history (timeline {chain.current})"
    )
