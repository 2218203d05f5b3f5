"""The quorum fence: which standbys a commit waits for, which promises elect, and the only safe order of every change.

The theory in plain words. Postgres runs `ANY k (S)`: a commit is acknowledged once k members of S have flushed it. The
record says `(N, q)`: a member is elected with promises of |N| - q + 1 members of N, and who promised has stopped
receiving. An acknowledged commit is on at least q members of N, so every set of |N| - q + 1 of them has a member that
holds it; and fewer than q others are left, so the old primary, frozen or not, can acknowledge nothing more. All of it
rests on one invariant, at every instant and for every view that any walsender may still have:

    k - |S \\ N| >= q        (whatever k members of S hold a commit, at least q of them are in N)

So a change that makes elections harder is recorded first and then told to Postgres, and a change that makes elections
easier is told to Postgres first, then everything the log holds is waited for (the barrier), and only then recorded:

    add a voter     record, then Postgres              drop a voter    Postgres, barrier, record
    lower q         record, then Postgres              raise q         Postgres, barrier, record

`next_step` walks from any state to any wanted one by these four, one step at a time, and may be stopped, repeated or
given a new goal between any two steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from instance_manager.core.types import MemberId


@dataclass(frozen=True, slots=True)
class SynchronousSet:
    """What Postgres runs: `ANY k (S)`. k = 0 is the empty list: commits wait for nobody.

    With more wanted than named (`NOBODY`) no commit is ever acknowledged: every standby runs so (P1).
    """

    k: int
    members: frozenset[MemberId]

    @property
    def acknowledges_alone(self) -> bool:
        return self.k == 0

    @property
    def never_acknowledges(self) -> bool:
        return self.k > len(self.members)

    def __str__(self) -> str:
        return (
            f"ANY {self.k} ({', '.join(sorted(self.members))})" if self.k else "(nobody: commits wait for no standby)"
        )


NOBODY = SynchronousSet(1, frozenset())
ALONE = SynchronousSet(0, frozenset())


def invariant_holds(voters: frozenset[MemberId], quorum: int, synchronous: SynchronousSet) -> bool:
    """Is every commit that this set acknowledges on at least `quorum` of `voters`?"""
    if quorum == 0 or synchronous.never_acknowledges:
        return True
    return synchronous.k - len(synchronous.members - voters) >= quorum


@dataclass(frozen=True, slots=True)
class RecordVoters:
    """Write (N, q): safe before Postgres is told."""

    voters: frozenset[MemberId]
    quorum: int
    reason: str


@dataclass(frozen=True, slots=True)
class SetSynchronous:
    """Tell Postgres, and see that no process of it still runs on an older view (P1, P5)."""

    synchronous: SynchronousSet
    reason: str


@dataclass(frozen=True, slots=True)
class RecordBehindBarrier:
    """See that k members of S have flushed all that the log holds now, then write (N, q)."""

    synchronous: SynchronousSet
    voters: frozenset[MemberId]
    quorum: int
    reason: str


@dataclass(frozen=True, slots=True)
class Settled:
    """Record and Postgres are as wanted, or must stay as they are; the reason says which."""

    reason: str


QuorumStep = RecordVoters | SetSynchronous | RecordBehindBarrier | Settled


def next_step(
    *,
    voters: frozenset[MemberId],
    quorum: int,
    synchronous: SynchronousSet,
    confirmed: bool,
    wanted: SynchronousSet,
) -> QuorumStep:
    """The one safe step from where we are towards N = S = wanted.members, q = k = wanted.k.

    `synchronous` is what Postgres was last told, `confirmed` whether every process of it is known to run by it.
    """
    if wanted.never_acknowledges:
        if synchronous.acknowledges_alone:
            return SetSynchronous(wanted, "commits must wait for a standby, and there is none")
        return Settled("no standby to go on with yet: what is set stays")
    if quorum == 0 and wanted.k == 0:
        if synchronous != wanted or not confirmed:
            return SetSynchronous(wanted, "q is 0: nobody can be elected, so commits need not wait")
        if voters:
            return RecordVoters(frozenset(), 0, "nobody holds everything: the record names no voter")
        return Settled("alone: nobody can be elected")
    lower = min(quorum, wanted.k)
    wider = wanted.members if lower == 0 else voters | wanted.members
    if (wider, lower) != (voters, quorum):
        if lower == 0 and quorum > 0:
            return RecordVoters(wider, 0, "lower q to 0 before commits stop waiting for standbys")
        if lower < quorum:
            return RecordVoters(wider, lower, f"lower q to {lower} before Postgres waits for fewer")
        return RecordVoters(wider, lower, _reason_to_record(voters, wider))
    if synchronous != wanted or not confirmed:
        return SetSynchronous(wanted, "the voters are recorded: Postgres may wait for exactly them")
    if (voters, quorum) != (wanted.members, wanted.k):
        dropped = voters - wanted.members
        what = f"drop {_names(dropped)} from the voters" if dropped else f"raise q to {wanted.k}"
        return RecordBehindBarrier(wanted, wanted.members, wanted.k, f"{what} once the rest holds the whole log")
    return Settled(f"{wanted}, {len(voters)} voters, q {quorum}")


def synchronous_for(voters: frozenset[MemberId], quorum: int, everybody: frozenset[MemberId]) -> SynchronousSet:
    """What a primary may open with under this record: never weaker than it.

    q = 0 right after a takeover: any one member counts (R13), so that commits are on two disks before the first voter
    is recorded; going on alone is a step of its own.
    """
    if quorum > 0:
        return SynchronousSet(quorum, voters)
    return SynchronousSet(1, everybody) if everybody else ALONE


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyHealth:
    """One standby as the primary sees it."""

    streaming: bool
    lost_for_s: float
    """Since it last streamed and answered; 0 while it does."""
    streaming_for_s: float
    """Without interruption; 0 while it does not stream."""
    stable_needed_s: float
    """How long it must stream before it becomes a voter: doubles for one that flaps (R12)."""
    eligible: bool = True
    """False: fenced, retired, excluded, terminating, or another's namesake."""


def wanted_set(
    *,
    standbys: Mapping[MemberId, StandbyHealth],
    voters: frozenset[MemberId],
    synchronous: SynchronousSet,
    wanted_k: int,
    required: bool,
    relax_after_s: float,
    alone_for_s: float,
) -> SynchronousSet:
    """The set to aim for: voters that stream or have not been gone for long, and standbys that stream stably.

    `alone_for_s`: since this primary opened. It waits for its first standby as long as for a lost one. With
    `required` it never goes on alone: what is set stays.
    """
    members = set()
    for member_id, health in standbys.items():
        if not health.eligible:
            continue
        if member_id in voters or (member_id in synchronous.members and synchronous.k > 0 and voters):
            keep = health.lost_for_s < relax_after_s
        else:
            keep = health.streaming and health.streaming_for_s >= health.stable_needed_s
        if keep:
            members.add(member_id)
    if (
        not members
        and wanted_k > 0
        and not synchronous.acknowledges_alone
        and (required or alone_for_s < relax_after_s)
    ):
        # What is set stays, and nobody is made a voter of it: one whose log has diverged could be neither rewound nor
        # asked while it is one (R6, R16).
        return NOBODY
    if not members and required and wanted_k > 0:
        return NOBODY
    return SynchronousSet(min(wanted_k, len(members)), frozenset(members) if wanted_k else frozenset())


def _reason_to_record(voters: frozenset[MemberId], wider: frozenset[MemberId]) -> str:
    if added := wider - voters:
        return f"add {_names(added)} to the voters before Postgres counts them"
    return f"q is 0: forget {_names(voters - wider)}, which is no voter any more"


def _names(members: frozenset[MemberId]) -> str:
    return ", ".join(sorted(members))
