"""The bent forms of the core's functions, each as somebody might write it who has not read why it is as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from instance_manager.core.election import Candidate, StandBack, VoteAnswer, Won, taken_over
from instance_manager.core.lease import given_back
from instance_manager.core.quorum import (
    QuorumStep,
    RecordVoters,
    SetSynchronous,
    SynchronousSet,
    next_step,
)
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import Epoch, MemberId, Timeline, TimelineChain, WalEnd
from instance_manager.core.voting import (
    ExtensionRequest,
    Verdict,
    VolumeState,
    VoteRequest,
    VoterView,
    judge_extension,
    judge_vote,
)

Members = frozenset[MemberId]
Promises = Mapping[MemberId, VoteAnswer]

# Section 4's table, each row in the other order.


def add_voter_in_postgres_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    adds = quorum > 0 and wanted.k >= quorum and wanted.members - voters
    if adds and (synchronous != wanted or not confirmed):
        return SetSynchronous(wanted, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def drop_voter_in_record_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k >= quorum > 0 and wanted.members < voters and synchronous != wanted:
        return RecordVoters(wanted.members, quorum, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def lower_q_in_postgres_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k < quorum and (synchronous != wanted or not confirmed):
        return SetSynchronous(wanted, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def raise_q_in_record_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k > quorum and wanted.members == voters and synchronous != wanted:
        return RecordVoters(voters, wanted.k, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def unconfirmed_is_good_enough(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=True, wanted=wanted)


def alone_after_a_start(voters: Members, quorum: int, everybody: Members) -> SynchronousSet:
    return SynchronousSet(0, frozenset())


# Promises.


def one_fewer(voters: int, quorum: int) -> int | None:
    return voters - quorum if quorum else None


def needed_also_without_quorum(voters: int, quorum: int) -> int | None:
    return voters - max(quorum, 1) + 1


def follows_whatever_was_promised(state: VolumeState, record: ClusterRecord) -> VolumeState:
    """Following below a promise, which stays as it is."""
    if state.may_follow(record):
        return state.following(record)
    return state.saw_record(record)


def always(*_: object) -> bool:
    return True


def _won(
    record: ClusterRecord,
    me: Candidate,
    holder: Holder,
    epoch: Epoch,
    promises: Mapping[MemberId, VoteAnswer],
    wanted_k: int,
    *,
    fewer: int = 0,
    ahead_counts: bool = True,
    inherit: bool = False,
) -> Won | StandBack:
    """`judge_promises` step by step, so that each can be left out."""
    needed = record.promises_needed
    promised = {voter: answer.end for voter, answer in promises.items() if answer.end is not None}
    if needed is None or record.chain is None or not record.chain.contains(me.end):
        return StandBack("q is 0, or no rank")
    if me.member_id not in promised or len(promised) < needed - fewer:
        return StandBack("too few")
    if ahead_counts and any(end > me.end for end in promised.values()):
        return StandBack("behind")
    equal = frozenset(voter for voter, end in promised.items() if end == me.end and voter in record.voters)
    voters = (record.voters if inherit else equal) - {me.member_id}
    quorum = min(wanted_k, len(voters))
    return Won(taken_over(record, holder=holder, epoch=epoch, end=me.end, voters=voters, quorum=quorum))


def one_promise_fewer(
    record: ClusterRecord, me: Candidate, holder: Holder, epoch: Epoch, promises: Promises, *, wanted_k: int
) -> Won | StandBack:
    return _won(record, me, holder, epoch, promises, wanted_k, fewer=1)


def ahead_is_ignored(
    record: ClusterRecord, me: Candidate, holder: Holder, epoch: Epoch, promises: Promises, *, wanted_k: int
) -> Won | StandBack:
    return _won(record, me, holder, epoch, promises, wanted_k, ahead_counts=False)


def winner_inherits_voters(
    record: ClusterRecord, me: Candidate, holder: Holder, epoch: Epoch, promises: Promises, *, wanted_k: int
) -> Won | StandBack:
    return _won(record, me, holder, epoch, promises, wanted_k, inherit=True)


# Timelines.


def claims_after_its_own_log(record: ClusterRecord, taken: ClusterRecord, end: WalEnd) -> ClusterRecord:
    """One more than the own log's timeline, as Postgres itself would take it."""
    assert record.chain is not None
    assert taken.chain is not None
    timeline = Timeline(end.timeline + 1)
    kept = tuple(switch for switch in record.chain.switches if switch.timeline <= end.timeline)
    switch = replace(taken.chain.switches[-1], timeline=timeline)
    chain = TimelineChain(record.chain.first, (*kept, switch))
    return replace(taken, chain=chain, highest_timeline=timeline)


def claims_after_the_chain(record: ClusterRecord, taken: ClusterRecord, end: WalEnd) -> ClusterRecord:
    """One more than the chain's, forgetting numbers that were claimed and given back."""
    assert record.chain is not None
    assert taken.chain is not None
    timeline = Timeline(record.chain.current + 1)
    switch = replace(taken.chain.switches[-1], timeline=timeline)
    return replace(
        taken,
        chain=TimelineChain(taken.chain.first, (*taken.chain.switches[:-1], switch)),
        highest_timeline=timeline,
    )


# The register.


def nothing_is_damage(*_: object, **__: object) -> str | None:
    return None


def repair_without_asking(
    volume: VolumeState, holder: Holder, confirmations: Mapping[MemberId, Epoch | None]
) -> ClusterRecord | str:
    last = volume.last_record
    if last is None or last.holder is None or last.holder.member_id != holder.member_id:
        return "not the last holder"
    highest = max([last.epoch, volume.highest_epoch, *(each for each in confirmations.values() if each)])
    return replace(last, holder=holder, epoch=Epoch(highest + 1), release=None, switchover=None)


def repair_by_what_was_intended(
    volume: VolumeState, holder: Holder, confirmations: Mapping[MemberId, Epoch | None]
) -> ClusterRecord | str:
    """Whoever was promised what is no matter: as many as q of any of them answer."""
    if volume.last_record is not None and len(confirmations) < volume.last_record.quorum:
        return "too few answer"
    return repair_without_asking(volume, holder, confirmations)


def _taken_as_it_is(record: ClusterRecord, member: MemberId, holder: Holder, end: WalEnd, volume: VolumeState) -> Won:
    epoch = Epoch(max(record.epoch, volume.highest_epoch) + 1)
    voters = record.voters - {member}
    quorum = min(record.quorum, len(voters))
    return Won(taken_over(record, holder=holder, epoch=epoch, end=end, voters=voters, quorum=quorum))


def release_by_anybody(
    record: ClusterRecord, *, member: MemberId, holder: Holder, end: WalEnd, volume: VolumeState, **_: object
) -> Won | StandBack:
    if record.release is None:
        return StandBack("no stamp")
    return _taken_as_it_is(record, member, holder, end, volume)


def empty_holder_is_a_release(
    record: ClusterRecord, *, member: MemberId, holder: Holder, end: WalEnd, volume: VolumeState, **_: object
) -> Won | StandBack:
    if record.holder is None and record.release is None:
        return _taken_as_it_is(record, member, holder, end, volume)
    return StandBack("not this one")


def given_back_with_one_vote(record: ClusterRecord, found: ClusterRecord, *, promoted: bool = False) -> ClusterRecord:
    """So that somebody can be elected soon: the N that was found, and q for one promise."""
    back = given_back(record, found, promoted=promoted)
    return replace(back, voters=found.voters, quorum=max(1, len(found.voters)))


def restart_without_asking(*_: object, **__: object) -> str | None:
    return None


# Time.


def extends_whatever_was_promised(request: ExtensionRequest, voter: VoterView) -> Verdict:
    return judge_extension(request, replace(voter, volume=replace(voter.volume, promised_epoch=Epoch(0))))


def votes_during_an_extension(request: VoteRequest, voter: VoterView, *, final: bool) -> Verdict:
    return judge_vote(request, replace(voter, volume=replace(voter.volume, extension_until_s=0.0)), final=final)


def waits_a_tick_less(record: ClusterRecord, *, unchanged_for_s: float, agent_age_s: float, **_: object) -> str | None:
    """A lease duration of its own configuration, shorter than the record's (R8)."""
    return None if min(unchanged_for_s, agent_age_s) >= record.lease_duration_s - 2 else "too early"


def free_means_free(record: ClusterRecord, *, unchanged_for_s: float, agent_age_s: float, **_: object) -> str | None:
    """An empty holder is taken at once."""
    waited = min(unchanged_for_s, agent_age_s) >= record.lease_duration_s
    return None if record.holder is None or waited else "too early"
