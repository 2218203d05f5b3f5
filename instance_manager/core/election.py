"""The candidate's side: who stands first, when enough have promised, and the one write that takes the Lease."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import Epoch, MemberId, Timeline, TimelineSwitch, WalEnd
from instance_manager.core.voting import VolumeState


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteAnswer:
    """A voter's answer to a pre-vote or a promise."""

    voter: MemberId | None
    granted: bool
    reason: str
    highest_epoch: Epoch
    end: WalEnd | None
    """Of its log: for a pre-vote what it believes, for a promise what it has proven after it stopped receiving (P2)."""
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    member_id: MemberId
    end: WalEnd
    priority: int

    def rank(self) -> tuple[Timeline, int, int, tuple[int, ...]]:
        """Greater is better: timeline, position, priority, then the name that sorts first (R2, P4, P11)."""
        return (self.end.timeline, self.end.lsn, self.priority, tuple(-ord(letter) for letter in self.member_id))


def place(me: Candidate, others: list[Candidate]) -> int:
    """How many of the others go first: the wait before standing is in proportion to it."""
    return sum(other.rank() > me.rank() for other in others)


@dataclass(frozen=True, slots=True)
class Stand:
    """Go on: to ask for promises of `epoch`."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class StandBack:
    """Do not go on now; `better` should stand instead, if somebody is known to be ahead."""

    reason: str
    better: MemberId | None = None


def judge_pre_votes(
    record: ClusterRecord, volume: VolumeState, me: Candidate, answers: Mapping[MemberId, VoteAnswer]
) -> Stand | StandBack:
    """Would an election succeed? `answers` holds one per member of N that answered, this candidate's own included."""
    needed = record.promises_needed
    if needed is None:
        return StandBack("q is 0: nobody can be elected, only the holder itself can come back (R7)")
    if me.member_id not in record.voters:
        return StandBack("this member is not among the voters")
    granted = {voter for voter, answer in answers.items() if answer.granted and voter in record.voters}
    ahead = [
        (answer.end, voter)
        for voter, answer in answers.items()
        if voter in granted and answer.end is not None and answer.end > me.end
    ]
    if ahead:
        end, voter = max(ahead)
        return StandBack(f"{voter} is ahead: {end} against {me.end}", better=voter)
    if len(granted) < needed:
        refusals = "; ".join(
            f"{voter}: {answers[voter].reason}" if voter in answers else f"{voter}: no answer"
            for voter in sorted(record.voters - granted)
        )
        return StandBack(f"{len(granted)} of {needed} promises needed ({refusals})")
    highest = max([record.epoch, volume.highest_epoch, *(answer.highest_epoch for answer in answers.values())])
    return Stand(Epoch(highest + 1))


@dataclass(frozen=True, slots=True)
class Won:
    record: ClusterRecord
    """To be written on exactly the version that the promises stood on."""


def judge_promises(
    record: ClusterRecord,
    me: Candidate,
    holder: Holder,
    epoch: Epoch,
    promises: Mapping[MemberId, VoteAnswer],
    *,
    wanted_k: int,
) -> Won | StandBack:
    """With |N| - q + 1 promises, this member's included, and nobody of them ahead, the Lease may be taken."""
    needed = record.promises_needed
    if needed is None:
        return StandBack("q is 0: nobody can be elected (R7)")
    # Without a position it is no promise (R5).
    promised = {
        voter: answer.end
        for voter, answer in promises.items()
        if voter in record.voters and answer.granted and answer.end is not None
    }
    if record.chain is None or not record.chain.contains(me.end):
        return StandBack(f"this log ends at {me.end}, which is not in the cluster's history: it has no rank (P4)")
    if me.member_id not in promised:
        return StandBack("this member has not promised itself")
    if len(promised) < needed:
        missing = "; ".join(
            f"{voter}: {promises[voter].reason if voter in promises else 'no answer'}"
            for voter in sorted(record.voters - set(promised))
        )
        return StandBack(f"{len(promised)} of {needed} promises ({missing})")
    for voter, end in sorted(promised.items()):
        if end > me.end:
            return StandBack(f"{voter} is ahead: {end} against {me.end}", better=voter)
    equal = frozenset(voter for voter, end in promised.items() if end == me.end) - {me.member_id}
    return Won(
        taken_over(record, holder=holder, epoch=epoch, end=me.end, voters=equal, quorum=min(wanted_k, len(equal)))
    )


def taken_over(
    record: ClusterRecord, *, holder: Holder, epoch: Epoch, end: WalEnd, voters: frozenset[MemberId], quorum: int
) -> ClusterRecord:
    """The takeover's write: holder, epoch, the claimed timeline with its fork, and the voters that hold the same log.

    The claim is one more than every number ever claimed (R2, P4). Voters of the old record that do not hold the
    winner's whole log are none of the new one's; they join again by the quorum's rules.
    """
    if record.chain is None:
        raise ValueError("nothing to take over: the cluster was never initialised")
    if epoch <= record.epoch:
        raise ValueError(f"epoch {epoch} is not after {record.epoch}")
    if holder.member_id in voters or not voters <= record.voters:
        raise ValueError("the new voters must be old ones other than the winner")
    claim = Timeline(record.highest_timeline + 1)
    switch = TimelineSwitch(claim, end.timeline, end.lsn, epoch)
    return replace(
        record,
        holder=holder,
        epoch=epoch,
        chain=record.chain.forked(switch),
        highest_timeline=claim,
        voters=voters,
        quorum=quorum,
        opened=False,
        release=None,
        switchover=None,
        position=end,
        renewals=0,
        # Whoever is elected holds what counts: it is given up no more.
        excluded=record.excluded - {holder.member_id},
    )


def taken_from_release(
    record: ClusterRecord,
    *,
    member: MemberId,
    holder: Holder,
    end: WalEnd,
    volume: VolumeState,
    released_for_s: float,
    takeover_timeout_s: float,
    wanted_k: int,
    now_s: float,
) -> Won | StandBack:
    """R4: a stamped release needs no promises, but only from a member whose log ends with that very checkpoint.

    The named target takes it at once, another such member (the releaser too) after `takeover_timeout_s`. Its N are
    those that were seen to hold the checkpoint.
    """
    release = record.release
    if now_s < volume.extension_until_s:
        return StandBack("this member promised the primary not to take over while the store is away (R11)")
    if record.holder is not None or release is None:
        return StandBack("the Lease has no release stamp: an empty holder means nothing (R4)")
    if release.epoch != record.epoch:
        return StandBack(f"the stamp is of epoch {release.epoch}, the Lease of {record.epoch}")
    if end != release.end:
        return StandBack(f"this log ends at {end}, the release at {release.end}")
    if release.target != member and released_for_s < takeover_timeout_s:
        return StandBack(f"released to {release.target}; others wait {takeover_timeout_s:g} s")
    epoch = Epoch(max(record.epoch, volume.highest_epoch) + 1)
    voters = record.voters - {member}
    quorum = min(wanted_k, len(voters)) if record.quorum > 0 else 0
    return Won(taken_over(record, holder=holder, epoch=epoch, end=end, voters=voters, quorum=quorum))
