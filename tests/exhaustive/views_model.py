"""The quorum's steps over Postgres's own delays: every process of a primary decides by its own, perhaps old, view.

What is in this world. One primary, two or three standbys, and one commit whose fate is followed: a log is then "with it" or
"without it", and what is true of every single commit is true of all. Who lets a commit return (P1, P5):

- A backend waits only while a flag in shared memory is on. The checkpointer alone sets it, when it looks at the
  list at a time of its own; when it looks at an empty list it switches the flag off and releases all that wait.
- Each walsender has its own copy of the list. What matters of a copy is whether the walsender finds itself in it, and
  its own k: a walsender that is listed by its own copy releases a commit once that many of the walsenders that are listed
  by *their* own copies have flushed it. It looks at a new list at a time of its own, or ends and comes back with it.

The agent walks by `quorum.next_step` towards any wanted set, changes its mind at any time, and believes only what it can
see: that the flag is on (a canary waits), that no walsender of a dropped name lists itself any more, and at a barrier
that k members have shown flush past the mark (which proves that they loaded the list) and, if k was raised since the last
barrier, that no listed walsender is left that may have the smaller one. A write of the record may take effect
late or never. The primary may restart. At any time any allowed promisers of the current record elect a winner by
`judge_promises`. After it the former primary lives on, frozen or not, with all its views and an agent that does not
know: whatever they may yet release must be in the winner's log. There is no last epoch: the winner's world is one more
state of the same graph.

What is left out: the messages of an election (they are in protocol_model), more than one commit at a time, and a
checkpointer that is stopped between reading the list and setting the flag, longer than the agent takes for a whole step.

Members have no names in a state, only what is true of each: a state is the same whatever their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, Protocol

from breadth_first import Violation

from instance_manager.core.election import Candidate, VoteAnswer, Won, judge_promises
from instance_manager.core.quorum import (
    QuorumStep,
    RecordBehindBarrier,
    RecordVoters,
    SetSynchronous,
    SynchronousSet,
    invariant_holds,
    next_step,
    synchronous_for,
)
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, WalEnd

MEMBERS = tuple(MemberId(f"{letter}_00000000") for letter in "bcd")
UNWRITTEN, WRITTEN, ACKNOWLEDGED, INHERITED = range(4)
"""Fate of the commit. Inherited: in this primary's log from the start, and a former primary may acknowledge it."""

List = tuple[int, int]
"""A synchronous list: (k, bits of S)."""


class Primary(NamedTuple):
    """What the processes of one primary go by."""

    told: List
    """The list in the configuration."""
    flag: bool
    """Backends wait; the checkpointer's doing."""
    copies: tuple[int, ...]
    """Per standby: the k by which its walsender releases; 0: it does not find itself in its own copy."""
    confirmed: bool
    """The agent has seen all that it can see of this list."""
    lowest_k: int
    """The agent's knowledge: no listed walsender has a smaller one. 0: nothing is known."""


class State(NamedTuple):
    voters: int
    quorum: int
    primary: Primary
    late: tuple[int, int] | None
    """A write of (N, q) with an unknown outcome, that may yet land."""
    marked_before: bool
    """A barrier's mark was taken before the commit was written."""
    commit: int
    holders: int


class NextStep(Protocol):
    def __call__(
        self,
        *,
        voters: frozenset[MemberId],
        quorum: int,
        synchronous: SynchronousSet,
        confirmed: bool,
        wanted: SynchronousSet,
    ) -> QuorumStep: ...


def promises_needed(voters: int, quorum: int) -> int | None:
    return voters - quorum + 1 if quorum else None


@dataclass(frozen=True)
class ViewRules:
    """The rules as they are; a broken variant replaces one of them."""

    next_step: NextStep = next_step
    barrier: Literal["whole log", "acknowledged", "none"] = "whole log"
    mark_before_confirmed: bool = False
    dropped_names_let_go: bool = True
    flag_is_seen: bool = True
    barrier_ends_smaller_k: bool = True
    smaller_k_is_gone: Literal["before the mark", "with the mark"] = "before the mark"
    """A walsender with a smaller k releases by what *others* have flushed, also of commits after the mark."""
    barrier_counts_names: Literal["members", "walsenders"] = "members"
    unknown_closed_by_read: bool = False
    promises_needed: Callable[[int, int], int | None] = promises_needed
    only_voters_promise: bool = True
    best_log_wins: bool = True
    voters_of_winner: Literal["equal logs", "all promisers", "inherited"] = "equal logs"
    promise_stops_receiving: bool = True
    restart_from_record: bool = True
    waits_from_the_first_commit: bool = True
    """A promotion and a restart begin with the flag on (P1, P8)."""
    election_on_current_record: bool = True


def bits(mask: int) -> Iterator[int]:
    return (index for index in range(len(MEMBERS)) if mask >> index & 1)


@cache
def names(mask: int) -> frozenset[MemberId]:
    return frozenset(MEMBERS[index] for index in bits(mask))


def mask_of(members: frozenset[MemberId]) -> int:
    return sum(1 << MEMBERS.index(member) for member in members)


@cache
def synchronous(told: List) -> SynchronousSet:
    return SynchronousSet(told[0], names(told[1]))


def list_of(value: SynchronousSet) -> List:
    return (value.k, mask_of(value.members))


def subsets(mask: int) -> list[int]:
    return [part for part in range(mask + 1) if part & ~mask == 0]


def may_release(primary: Primary, members: int) -> bool:
    """Is there a process that lets a commit return once exactly `members` hold it?"""
    if not primary.flag:
        return True
    candidates = sum(1 << index for index, k in enumerate(primary.copies) if k)
    held = (candidates & members).bit_count()
    return any(0 < k <= held for k in primary.copies)


def loaded(told: List, index: int) -> int:
    """The copy of a walsender that has looked."""
    return told[0] if told[1] >> index & 1 else 0


def _look(primary: Primary, index: int) -> Primary:
    new = loaded(primary.told, index)
    if primary.copies[index] == new:
        return primary
    return primary._replace(copies=(*primary.copies[:index], new, *primary.copies[index + 1 :]))


class ViewsModel:
    def __init__(
        self, rules: ViewRules, *, standbys: int, k_max: int, late_writes: bool = True, name: str = "views"
    ) -> None:
        self.name = name
        self.bounds = f"{standbys} standbys, k up to {k_max}, any number of epochs" + (
            ", late writes" if late_writes else ""
        )
        self.rules = rules
        self.standbys = standbys
        self.everybody = (1 << standbys) - 1
        self.k_max = k_max
        self.late_writes = late_writes
        self.wanted = [(0, 0)] + [
            (k, mask) for mask in subsets(self.everybody) for k in range(1, min(k_max, mask.bit_count()) + 1)
        ]
        self.steps = cache(self._steps)
        self.won = cache(self._won)
        self.futures = cache(self._futures)

    def first(self) -> Iterator[tuple[str, State]]:
        yield "a primary opens, and no voter is recorded", State(0, 0, self._opening(0, 0), None, False, UNWRITTEN, 0)

    def canonical(self, state: State) -> tuple[object, ...]:
        """All that is true of each member, in no order of names."""
        voters, quorum, primary, late, marked_before, commit, holders = state
        late_voters, late_quorum = late if late is not None else (0, -1)
        members = sorted(
            (
                primary.copies[index] * 16
                + (voters >> index & 1) * 8
                + (primary.told[1] >> index & 1) * 4
                + (late_voters >> index & 1) * 2
                + (holders >> index & 1)
            )
            for index in range(self.standbys)
        )
        flags = primary.flag * 4 + primary.confirmed * 2 + marked_before
        return (*members, quorum, primary.told[0], flags, primary.lowest_k, late_quorum, commit)

    def after(self, state: State) -> Iterator[tuple[str, State | Violation]]:
        held = self.rules.promises_needed is not promises_needed or invariant_holds(
            names(state.voters), state.quorum, synchronous(state.primary.told)
        )
        if not held and self.rules == ViewRules():
            yield "and now", Violation("the record elects where this list acknowledges")
            return
        yield from self._commit(state)
        for event, primary in self._postgres(state.primary):
            commit = state.commit
            if state.primary.flag and not primary.flag and commit == WRITTEN:
                commit = ACKNOWLEDGED
            yield event, state._replace(primary=primary, commit=commit)
        if state.late is not None:
            voters, quorum = state.late
            yield "the late write lands", state._replace(voters=voters, quorum=quorum, late=None)
            yield "a write of our own closes the unknown one", state._replace(late=None)
        yield from self._agent(state)
        yield from self._elections(state, state.voters, state.quorum)

    def _commit(self, state: State) -> Iterator[tuple[str, State]]:
        if state.commit == UNWRITTEN:
            yield "a commit is written", state._replace(commit=WRITTEN)
            return
        for index in bits(self.everybody & ~state.holders):
            primary = state.primary
            if state.marked_before:
                # It comes after the mark: a walsender that hears of it has looked at the list since (P5).
                primary = _look(primary, index)
            yield f"{MEMBERS[index]} flushes it", state._replace(holders=state.holders | 1 << index, primary=primary)
        if state.commit == WRITTEN and may_release(state.primary, state.holders):
            yield "it is acknowledged", state._replace(commit=ACKNOWLEDGED)

    def _postgres(self, primary: Primary) -> Iterator[tuple[str, Primary]]:
        """Each process looks at the list when it gets to it."""
        wanted_flag = primary.told[0] > 0
        if primary.flag != wanted_flag:
            yield "the checkpointer looks at the list", primary._replace(flag=wanted_flag)
        for index in range(self.standbys):
            after = _look(primary, index)
            if after is not primary:
                yield f"the walsender of {MEMBERS[index]} looks at the list", after

    def _seen(self, primary: Primary) -> bool:
        """Is all that the agent must see of this list to be seen (P1, P5)?"""
        if primary.told[0] == 0:
            return True
        if self.rules.flag_is_seen and not primary.flag:
            return False
        return not self.rules.dropped_names_let_go or not any(
            copy and not primary.told[1] >> index & 1 for index, copy in enumerate(primary.copies)
        )

    def _told(self, primary: Primary, told: List) -> Primary:
        """The configuration is written and SIGHUP sent; who has looked is another matter."""
        known = 0 if told[0] == 0 else min(primary.lowest_k, told[0])
        return primary._replace(told=told, confirmed=told[0] == 0, lowest_k=known)

    def _opening(self, voters: int, quorum: int) -> Primary:
        """A promotion or a restart: all walsenders are new, and every standby ran with a list that nobody satisfies."""
        told = list_of(synchronous_for(names(voters), quorum, names(self.everybody)))
        if not self.rules.restart_from_record:
            told = (0, 0)
        flag = told[0] > 0 and self.rules.waits_from_the_first_commit
        return Primary(told, flag, (0,) * self.standbys, False, 0)

    def _agent(self, state: State) -> Iterator[tuple[str, State | Violation]]:
        """What the primary does: any of its steps towards any set, and its restart."""
        if state.late is not None and not self.rules.unknown_closed_by_read:
            return
        primary = state.primary
        if state.late is None:
            opening = self._opening(state.voters, state.quorum)
            yield "the primary restarts", state._replace(primary=opening, marked_before=False)
        if not primary.confirmed and self._seen(primary):
            yield "the list is confirmed", state._replace(primary=primary._replace(confirmed=True))
        for step in self.steps(state.voters, state.quorum, primary.told, primary.confirmed):
            if isinstance(step, SetSynchronous):
                told = list_of(step.synchronous)
                if told != primary.told:
                    after = self._told(primary, told)
                    yield f"set {step.synchronous}", state._replace(primary=after, marked_before=False)
            elif isinstance(step, RecordVoters):
                for event, after_write in self._write(state, step.voters, step.quorum):
                    yield event, after_write
                    if not self.rules.election_on_current_record:
                        yield from self._elections(after_write, state.voters, state.quorum)
            elif isinstance(step, RecordBehindBarrier):
                yield from self._barrier(state, step)
        if self.rules.mark_before_confirmed and not primary.confirmed and state.commit == UNWRITTEN:
            yield "the barrier's mark is taken too early", state._replace(marked_before=True)

    def _steps(self, voters: int, quorum: int, told: List, confirmed: bool) -> tuple[QuorumStep, ...]:
        found = {
            self.rules.next_step(
                voters=names(voters),
                quorum=quorum,
                synchronous=synchronous(told),
                confirmed=confirmed,
                wanted=synchronous(wanted),
            )
            for wanted in self.wanted
        }
        return tuple(sorted(found, key=str))

    def _barrier(self, state: State, step: RecordBehindBarrier) -> Iterator[tuple[str, State]]:
        primary, (k, members) = state.primary, list_of(step.synchronous)
        raised = self.rules.barrier_ends_smaller_k and primary.lowest_k < k
        smaller = raised and any(primary.copies[index] not in (0, k) for index in bits(members))
        if smaller and self.rules.smaller_k_is_gone == "before the mark":
            return
        if state.commit == UNWRITTEN and not state.marked_before:
            yield "the barrier's mark is taken", state._replace(marked_before=True)
        if self.rules.barrier != "none":
            covered = (
                state.commit == UNWRITTEN
                or state.marked_before
                or (self.rules.barrier == "acknowledged" and state.commit != ACKNOWLEDGED)
            )
            # Who shows flush past the mark has loaded the list; the commit comes before the mark.
            passed = [
                index
                for index in bits(members)
                if primary.copies[index] == k and (covered or state.holders >> index & 1)
            ]
            counted = len(passed)
            if self.rules.barrier_counts_names == "walsenders" and passed:
                # A half-open walsender and its successor: one member, counted twice.
                counted += 1
            if counted < k or smaller:
                return
        after = state._replace(primary=primary._replace(lowest_k=k), marked_before=False)
        yield from self._write(after, step.voters, step.quorum)

    def _write(self, state: State, voters: frozenset[MemberId], quorum: int) -> Iterator[tuple[str, State]]:
        what = f"record N = {{{', '.join(sorted(voters))}}}, q = {quorum}"
        yield what, state._replace(voters=mask_of(voters), quorum=quorum, late=None)
        if state.late is None and self.late_writes:
            yield f"{what}: outcome unknown", state._replace(late=(mask_of(voters), quorum))

    def _elections(self, state: State, voters: int, quorum: int) -> Iterator[tuple[str, State | Violation]]:
        needed = self.rules.promises_needed(voters.bit_count(), quorum)
        if needed is None:
            return
        agent_steps = state.late is None
        futures = self.futures(state.primary, state.voters if agent_steps else -1, state.quorum)
        for promisers in subsets(voters if self.rules.only_voters_promise else self.everybody):
            if promisers.bit_count() < max(needed, 1):
                continue
            event = f"elected by {', '.join(sorted(names(promisers)))}"
            left = self.everybody & ~promisers if self.rules.promise_stops_receiving else self.everybody
            if any(may_release(primary, left) for primary in futures):
                yield event, Violation("the former primary can acknowledge something new")
                return
            possible = state.commit in (ACKNOWLEDGED, INHERITED) or (
                state.commit == WRITTEN and any(may_release(primary, state.holders | left) for primary in futures)
            )
            best = promisers & state.holders or promisers
            for winner in bits(best if self.rules.best_log_wins else promisers):
                has_it = bool(state.holders >> winner & 1)
                if possible and not has_it:
                    yield event, Violation(f"{MEMBERS[winner]} wins without an acknowledged commit")
                    return
                for wanted_k in range(1, self.k_max + 1):
                    new_voters, new_quorum = self.won(voters, quorum, promisers, state.holders, winner, wanted_k)
                    inherited = has_it and possible
                    # The winner's bit now stands for the former primary's directory, that joins anew with nothing.
                    yield (
                        f"{event}, {MEMBERS[winner]} wins",
                        State(
                            new_voters,
                            new_quorum,
                            self._opening(new_voters, new_quorum),
                            None,
                            False,
                            INHERITED if inherited else UNWRITTEN,
                            state.holders & ~(1 << winner) if inherited else 0,
                        ),
                    )

    def _won(
        self, voters: int, quorum: int, promisers: int, holders: int, winner: int, wanted_k: int
    ) -> tuple[int, int]:
        """(N, q) of the winner, by `judge_promises` itself unless the variant breaks it."""
        if self.rules.voters_of_winner != "equal logs" or not self.rules.best_log_wins or not quorum:
            kept = voters if self.rules.voters_of_winner == "inherited" else promisers
            kept &= ~(1 << winner)
            return kept, min(wanted_k, kept.bit_count())
        ends = {index: WalEnd(Timeline(1), Lsn(1 + (holders >> index & 1))) for index in bits(promisers)}
        answers = {
            MEMBERS[index]: VoteAnswer(
                voter=MEMBERS[index], granted=True, reason="", highest_epoch=Epoch(1), end=ends[index]
            )
            for index in bits(promisers)
        }
        me = Candidate(member_id=MEMBERS[winner], end=ends[winner], priority=0)
        holder = Holder(member_id=me.member_id, incarnation="model")
        record = _record(names(voters), quorum)
        outcome = judge_promises(record, me, holder, Epoch(2), answers, wanted_k=wanted_k)
        if not isinstance(outcome, Won):
            # The variant lets win whom the rules do not.
            kept = promisers & ~(1 << winner)
            return kept, min(wanted_k, kept.bit_count())
        return mask_of(outcome.record.voters), outcome.record.quorum

    def _futures(self, primary: Primary, voters: int, quorum: int) -> frozenset[Primary]:
        """All that a former primary's processes may come to go by; its record can no longer change.

        `voters` < 0: its agent waits for the outcome of a write, and tells Postgres nothing new.
        """
        found = {primary}
        todo = [primary]
        while todo:
            each = todo.pop()
            following = [after for _, after in self._postgres(each)]
            if not each.confirmed and self._seen(each):
                following.append(each._replace(confirmed=True))
            if voters >= 0:
                following += [
                    self._told(each, list_of(step.synchronous))
                    for step in self.steps(voters, quorum, each.told, each.confirmed)
                    if isinstance(step, SetSynchronous) and list_of(step.synchronous) != each.told
                ]
            for after in following:
                if after not in found:
                    found.add(after)
                    todo.append(after)
        # Only what can release matters: one of each kind.
        kinds = {(each.flag, each.copies): each for each in found}
        return frozenset(kinds.values())


@cache
def _record(voters: frozenset[MemberId], quorum: int) -> ClusterRecord:
    return ClusterRecord(
        cluster_name="model",
        cluster_uid="model",
        mode="synchronous",
        lease_duration_s=10.0,
        epoch=Epoch(1),
        system_identifier="1",
        chain=TimelineChain(Timeline(1)),
        highest_timeline=Timeline(1),
        voters=voters,
        quorum=quorum,
    )
