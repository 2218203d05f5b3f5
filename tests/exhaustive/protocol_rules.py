"""The core's functions as the protocol's model asks them: by the numbers of values, each different question once.

`ProtocolRules` holds them as they are, and beside them the orders that the agent keeps (persist, then act). A broken variant
replaces one of either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Literal

from protocol_words import RECORDS, SETS, UID, VOLUMES, end_of, id_of, member_id, volume_number

from instance_manager.core.election import (
    Candidate,
    Stand,
    StandBack,
    VoteAnswer,
    Won,
    judge_pre_votes,
    judge_promises,
    taken_from_release,
)
from instance_manager.core.lease import (
    given_back,
    judge_restart,
    may_reaffirm,
    reaffirmed,
    record_damage,
    released,
    repair,
)
from instance_manager.core.quorum import QuorumStep, SynchronousSet, next_step, synchronous_for
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.rejoin import DirectoryFacts, Rejoin, RejoinPlan, plan_rejoin
from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, WalEnd
from instance_manager.core.voting import Verdict, VolumeState, VoteRequest, VoterView, judge_vote

RELEASED_LONG_AGO_S = 1000.0
TAKEOVER_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class ProtocolRules:
    """The rules as they are."""

    # The core.
    judge_vote: Callable[..., Verdict] = judge_vote
    judge_promises: Callable[..., Won | StandBack] = judge_promises
    taken_from_release: Callable[..., Won | StandBack] = taken_from_release
    released: Callable[..., ClusterRecord] = released
    repair: Callable[..., ClusterRecord | str] = repair
    record_damage: Callable[..., str | None] = record_damage
    judge_restart: Callable[..., str | None] = judge_restart
    given_back: Callable[..., ClusterRecord] = given_back
    next_step: Callable[..., QuorumStep] = next_step
    synchronous_for: Callable[..., SynchronousSet] = synchronous_for
    plan_rejoin: Callable[..., RejoinPlan] = plan_rejoin
    may_follow: Callable[[VolumeState, ClusterRecord], bool] = VolumeState.may_follow
    following: Callable[[VolumeState, ClusterRecord], VolumeState] = VolumeState.following
    claimed: Callable[[ClusterRecord, ClusterRecord, WalEnd], ClusterRecord] | None = None
    """What a takeover's write makes of the record: (before, taken, own end); None: as `taken_over` has it."""
    # What the agent does with it.
    conditional_writes: bool = True
    takeover_on_its_grounds: bool = True
    unknown_blocks: bool = True
    """No quorum step while a write's outcome is unknown, nor before a new agent's first write (R1)."""
    read_closes_unknown: bool = False
    promise_persisted: bool = True
    position: Literal["after the walreceiver is gone", "before", "replayed"] = "after the walreceiver is gone"
    new_identity_when_copied: bool = True
    holding_is_seen: bool = True
    """The members that hold the shutdown checkpoint were asked (P12)."""
    restart_writes_epoch: bool = True
    barrier: bool = True


class Core:
    """Questions to the core, remembered."""

    def __init__(self, rules: ProtocolRules, *, k: int) -> None:
        self.rules = rules
        self.k = k
        for name in (
            "damage",
            "grounds",
            "verdict",
            "epoch_to_stand",
            "won",
            "won_release",
            "released",
            "repaired",
            "restart_refusal",
            "reaffirmed",
            "given_back",
            "steps",
            "opening",
            "plan",
            "promising",
            "following",
            "writing",
            "seen",
            "with_voters",
            "opened",
            "contains",
            "renamed_directory",
        ):
            setattr(self, name, cache(getattr(self, name)))

    def damage(self, record: int, volume: int) -> bool:
        found = RECORDS[record] if record > 0 else None
        return self.rules.record_damage(found, VOLUMES[volume], cluster_uid=UID, data_known=True) is not None

    def grounds(self, record: int) -> tuple[object, ...]:
        return RECORDS[record].grounds()

    # A volume's memory.

    def promising(self, volume: int, epoch: int, candidate: MemberId) -> int | None:
        try:
            return volume_number(VOLUMES[volume].promising(Epoch(epoch), candidate))
        except ValueError:
            return None

    def following(self, volume: int, record: int) -> int | None:
        if not self.rules.may_follow(VOLUMES[volume], RECORDS[record]):
            return None
        return volume_number(replace(self.rules.following(VOLUMES[volume], RECORDS[record]), was_primary=False))

    def writing(self, volume: int, record: int, intended: int = 0, *, primary: bool = False) -> int:
        wanted = RECORDS[intended] if intended else None
        state = VOLUMES[volume].writing(RECORDS[record], wanted)
        return volume_number(replace(state, was_primary=True) if primary else state)

    def seen(self, volume: int, epoch: int) -> int:
        return volume_number(VOLUMES[volume].seen(Epoch(epoch)))

    def renamed_directory(self, volume: int, index: int, incarnation: int) -> int:
        state = VOLUMES[volume]
        if self.rules.new_identity_when_copied:
            state = replace(state, member_id=member_id(index, incarnation))
        return volume_number(replace(state, was_primary=False))

    # Elections.

    def contains(self, record: int, log: int) -> bool:
        chain = RECORDS[record].chain
        return chain is not None and chain.contains(end_of(log))

    def verdict(
        self,
        volume: int,
        record: int,
        candidate: MemberId,
        epoch: int,
        record_epoch: int,
        serving: bool,
        takeover_open: bool,
        final: bool,
    ) -> bool:
        request = VoteRequest(
            cluster_uid=UID,
            candidate=candidate,
            epoch=Epoch(epoch),
            record_epoch=Epoch(record_epoch),
            # It is not looked at here: whoever is ahead is found out when promises are judged.
            end=WalEnd(Timeline(1), Lsn(1)),
        )
        voter = VoterView(
            now_s=0.0,
            volume=VOLUMES[volume],
            boot_id="boot",
            record=RECORDS[record],
            record_read_age_s=0.0,
            renew_interval_s=2.0,
            suspects="it may always be wrong",
            fenced=False,
            damaged=self.damage(record, volume),
            takeover_open=takeover_open,
            serving=serving,
        )
        return self.rules.judge_vote(request, voter, final=final).granted

    def epoch_to_stand(self, record: int, volume: int, log: int, answers: tuple[tuple[int, int], ...]) -> int | None:
        """The epoch to ask promises of, after a pre-vote with these (volume, log) in favour, the own first."""
        found = {
            id_of(voter): VoteAnswer(
                voter=id_of(voter),
                granted=True,
                reason="",
                highest_epoch=VOLUMES[voter].highest_epoch,
                end=end_of(its_log),
            )
            for voter, its_log in answers
        }
        me = Candidate(member_id=id_of(volume), end=end_of(log), priority=0)
        judged = judge_pre_votes(RECORDS[record], VOLUMES[volume], me, found)
        return judged.epoch if isinstance(judged, Stand) else None

    def won(self, record: int, volume: int, life: int, epoch: int, promises: tuple[tuple[MemberId, int], ...]) -> int:
        """The record to be written; 0: not elected. `promises`: (voter, log)."""
        me = id_of(volume)
        ends = {voter: end_of(log) for voter, log in promises}
        answers = {
            voter: VoteAnswer(voter=voter, granted=True, reason="", highest_epoch=Epoch(0), end=end)
            for voter, end in ends.items()
        }
        judged = self.rules.judge_promises(
            RECORDS[record],
            Candidate(member_id=me, end=ends[me], priority=0),
            Holder(member_id=me, incarnation=str(life)),
            Epoch(epoch),
            answers,
            wanted_k=self.k,
        )
        return self._number(record, judged, ends[me])

    def won_release(self, record: int, volume: int, life: int, log: int) -> int:
        judged = self.rules.taken_from_release(
            RECORDS[record],
            member=id_of(volume),
            holder=Holder(member_id=id_of(volume), incarnation=str(life)),
            end=end_of(log),
            volume=VOLUMES[volume],
            released_for_s=RELEASED_LONG_AGO_S,
            takeover_timeout_s=TAKEOVER_TIMEOUT_S,
            wanted_k=self.k,
            now_s=0.0,
        )
        return self._number(record, judged, end_of(log))

    def _number(self, record: int, judged: Won | StandBack, end: WalEnd) -> int:
        if isinstance(judged, StandBack):
            return 0
        taken = judged.record
        if self.rules.claimed is not None:
            taken = self.rules.claimed(RECORDS[record], taken, end)
        return RECORDS.number(taken)

    # The holder.

    def opening(self, record: int, others: frozenset[MemberId]) -> int:
        found = RECORDS[record]
        return SETS.number(self.rules.synchronous_for(found.voters, found.quorum, others))

    def steps(self, record: int, view: int, others: frozenset[MemberId], few: bool) -> tuple[QuorumStep, ...]:
        """Every step towards any set of others; which one is wanted changes all the time."""
        found = RECORDS[record]
        wanted = [SynchronousSet(0, frozenset())]
        for size in range(len(others) if few else 1, len(others) + 1):
            for members in combinations(sorted(others), size):
                wanted += [
                    SynchronousSet(k, frozenset(members)) for k in range(self.k if few else 1, min(self.k, size) + 1)
                ]
        steps = {
            self.rules.next_step(
                voters=found.voters, quorum=found.quorum, synchronous=SETS[view], confirmed=True, wanted=each
            )
            for each in wanted
        }
        return tuple(sorted(steps, key=str))

    def with_voters(self, record: int, voters: frozenset[MemberId], quorum: int) -> int:
        return RECORDS.number(replace(RECORDS[record], voters=voters, quorum=quorum))

    def opened(self, record: int) -> int:
        return RECORDS.number(replace(RECORDS[record], opened=True))

    def restart_refusal(
        self, record: int, log: int, ends: tuple[tuple[MemberId, int], ...], same_boot: bool
    ) -> str | None:
        told: dict[MemberId, WalEnd | None] = {voter: end_of(its_log) for voter, its_log in ends}
        return self.rules.judge_restart(RECORDS[record], end_of(log), told, same_boot=same_boot)

    def reaffirmed(self, record: int, volume: int, life: int, highest: int, would_follow: frozenset[MemberId]) -> int:
        if not may_reaffirm(RECORDS[record], would_follow):
            return 0
        holder = Holder(member_id=id_of(volume), incarnation=str(life))
        return RECORDS.number(reaffirmed(RECORDS[record], holder=holder, highest_epoch=Epoch(highest)))

    def released(self, record: int, log: int, holding: frozenset[MemberId], named: MemberId, me: MemberId) -> int:
        """As the agent's `_released`: a release to itself is stamped so after the core has made it."""
        target = named if named in holding else None
        changed = self.rules.released(RECORDS[record], end=end_of(log), holding=holding, target=target)
        if named == me and changed.release is not None:
            changed = replace(changed, release=replace(changed.release, target=me))
        return RECORDS.number(changed)

    def given_back(self, record: int, found: int, promoted: bool) -> int:
        return RECORDS.number(self.rules.given_back(RECORDS[record], RECORDS[found], promoted=promoted))

    def repaired(self, volume: int, life: int, confirmations: tuple[tuple[MemberId, int], ...]) -> int:
        told: dict[MemberId, Epoch | None] = {voter: Epoch(epoch) for voter, epoch in confirmations}
        holder = Holder(member_id=id_of(volume), incarnation=str(life))
        outcome = self.rules.repair(VOLUMES[volume], holder, told)
        return 0 if isinstance(outcome, str) else RECORDS.number(outcome)

    # Coming back.

    def plan(self, record: int, log: int, volume: int) -> Rejoin:
        chain = RECORDS[record].chain
        assert chain is not None
        facts = DirectoryFacts(
            exists=True,
            half_rewound=False,
            foreign=None,
            system_identifier="1",
            end=end_of(log),
            needs=None,
            member_id=id_of(volume),
            failed_rewinds=0,
            excluded=False,
        )
        return self.rules.plan_rejoin(RECORDS[record], facts, chain=chain).rejoin
