"""A small world around `quorum.next_step`, walked through every interleaving.

One primary, a few standbys, and one commit whose fate is followed: a log is then "with it" or "without it", and what is
true of every single commit is true of all. In this world anything may happen at any time: the wanted set changes, a walsender
still runs by an old view, a write of the record takes effect late or never, a standby flushes, the primary restarts, and
an election wins with any allowed promisers of the current record. After it the former primary lives on, frozen or not, with
all its views: whatever it may still acknowledge must be in the winner's log. There is no last epoch: the winner's world is one
more state of the same graph.

A state that breaks the promise is returned with the events that lead to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations
from typing import Literal, NamedTuple, Protocol

from instance_manager.core.election import Candidate, VoteAnswer, Won, judge_promises
from instance_manager.core.quorum import (
    QuorumStep,
    RecordBehindBarrier,
    RecordVoters,
    SetSynchronous,
    SynchronousSet,
    next_step,
    synchronous_for,
)
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, WalEnd

MEMBERS = tuple(MemberId(f"{letter}_00000000") for letter in "abc")
UNWRITTEN, WRITTEN, ACKNOWLEDGED, INHERITED = range(4)
"""Fate of the commit. Inherited: in this primary's log from the start, and a former primary may acknowledge it."""

View = tuple[int, int]
"""(k, bits of S)."""


class State(NamedTuple):
    voters: int
    quorum: int
    view: View
    stale: tuple[View, ...]
    """Older views by which some walsender may still release commits."""
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


@dataclass(frozen=True)
class Rules:
    """The rules as they are; a broken variant replaces one of them."""

    next_step: NextStep = next_step
    barrier: Literal["whole log", "acknowledged", "none"] = "whole log"
    mark_before_confirmed: bool = False
    unknown_closed_by_read: bool = False
    stale_views_wait: bool = True
    """An older view that may still be in use counts as not confirmed."""
    promises_needed: Callable[[int, int], int | None] = lambda voters, quorum: voters - quorum + 1 if quorum else None
    only_voters_promise: bool = True
    best_log_wins: bool = True
    voters_of_winner: Literal["equal logs", "all promisers", "inherited"] = "equal logs"
    promise_stops_receiving: bool = True
    restart_from_record: bool = True
    election_on_current_record: bool = True


@dataclass
class Result:
    states: int = 0
    loss: str | None = None
    events: list[str] = field(default_factory=list)


def bits(mask: int) -> Iterator[int]:
    return (index for index in range(len(MEMBERS)) if mask >> index & 1)


@cache
def names(mask: int) -> frozenset[MemberId]:
    return frozenset(MEMBERS[index] for index in bits(mask))


def mask_of(members: frozenset[MemberId]) -> int:
    return sum(1 << MEMBERS.index(member) for member in members)


@cache
def synchronous(view: View) -> SynchronousSet:
    return SynchronousSet(view[0], names(view[1]))


def view_of(value: SynchronousSet) -> View:
    return (value.k, mask_of(value.members))


def subsets(mask: int) -> list[int]:
    return [part for part in range(mask + 1) if part & ~mask == 0]


def releases(view: View, members: int) -> bool:
    """Is a commit acknowledged by this view once exactly `members` hold it?"""
    return (members & view[1]).bit_count() >= view[0]


class Walk:
    """Breadth first, so that a loss comes with one of its shortest stories."""

    def __init__(
        self, rules: Rules, *, standbys: int, k_max: int, stale_max: int = 1, state_limit: int = 400_000
    ) -> None:
        self.rules = rules
        self.everybody = (1 << standbys) - 1
        self.k_max = k_max
        self.stale_max = stale_max
        self.state_limit = state_limit
        self.wanted = [(0, 0)] + [
            (k, mask) for mask in subsets(self.everybody) for k in range(1, min(k_max, mask.bit_count()) + 1)
        ]
        self.orders = [self._order(order) for order in permutations(range(standbys))]
        self.steps = cache(self._steps)
        self.won = cache(self._won)
        self.future_views = cache(self._future_views)

    def run(self) -> Result:
        result = Result()
        first = State(0, 0, view_of(synchronous_for(frozenset(), 0, names(self.everybody))), (), None, False, 0, 0)
        came_from: dict[State, tuple[State, str] | None] = {first: None}
        todo = deque([first])
        while todo and len(came_from) < self.state_limit:
            state = todo.popleft()
            for event, after in self._after(state):
                if isinstance(after, str):
                    result.loss = after
                    result.events = [*self._story(came_from, state), event]
                    result.states = len(came_from)
                    return result
                canonical = self._canonical(after)
                if canonical not in came_from:
                    came_from[canonical] = (state, event)
                    todo.append(canonical)
        assert not todo, f"more than {self.state_limit} states"
        result.states = len(came_from)
        return result

    @staticmethod
    def _story(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
        story = []
        link = came_from[state]
        while link is not None:
            story.append(link[1])
            state = link[0]
            link = came_from[state]
        return story[::-1]

    def _after(self, state: State) -> Iterator[tuple[str, State | str]]:
        yield from self._world(state)
        yield from self._agent(state)
        yield from self._elections(state, state.voters, state.quorum)

    def _world(self, state: State) -> Iterator[tuple[str, State]]:
        """What happens by itself."""
        if state.commit == UNWRITTEN:
            yield "a commit is written", state._replace(commit=WRITTEN)
        else:
            for index in bits(self.everybody & ~state.holders):
                yield f"{MEMBERS[index]} flushes it", state._replace(holders=state.holders | 1 << index)
        if state.commit == WRITTEN and any(releases(view, state.holders) for view in (state.view, *state.stale)):
            yield "it is acknowledged", state._replace(commit=ACKNOWLEDGED)
        for view in state.stale:
            stale = tuple(other for other in state.stale if other != view)
            yield f"nobody runs by {synchronous(view)} any more", state._replace(stale=stale)
        if state.late is not None:
            voters, quorum = state.late
            yield "the late write lands", state._replace(voters=voters, quorum=quorum, late=None)
            yield "a write of our own closes the unknown one", state._replace(late=None)

    def _agent(self, state: State) -> Iterator[tuple[str, State | str]]:
        """What the primary does: any of its steps towards any set, and its restart."""
        if state.late is not None and not self.rules.unknown_closed_by_read:
            return
        if state.late is None:
            value = synchronous_for(names(state.voters), state.quorum, names(self.everybody))
            view = view_of(value) if self.rules.restart_from_record else (0, 0)
            yield "the primary restarts", state._replace(view=view, stale=(), marked_before=False)
        confirmed = not state.stale or not self.rules.stale_views_wait
        for step in self.steps(state.voters, state.quorum, state.view, confirmed):
            if isinstance(step, SetSynchronous):
                view = view_of(step.synchronous)
                stale = tuple(sorted({*state.stale, state.view} - {view}))
                if view != state.view and len(stale) <= self.stale_max:
                    yield f"set {step.synchronous}", state._replace(view=view, stale=stale, marked_before=False)
            elif isinstance(step, RecordVoters):
                for event, after in self._write(state, step.voters, step.quorum):
                    yield event, after
                    if not self.rules.election_on_current_record:
                        yield from self._elections(after, state.voters, state.quorum)
            elif isinstance(step, RecordBehindBarrier):
                yield from self._barrier(state, step)
        if self.rules.mark_before_confirmed and state.stale and state.commit == UNWRITTEN:
            yield "the barrier's mark is taken", state._replace(marked_before=True)

    def _steps(self, voters: int, quorum: int, view: View, confirmed: bool) -> tuple[QuorumStep, ...]:
        found = {
            self.rules.next_step(
                voters=names(voters),
                quorum=quorum,
                synchronous=synchronous(view),
                confirmed=confirmed,
                wanted=synchronous(wanted),
            )
            for wanted in self.wanted
        }
        return tuple(sorted(found, key=str))

    def _barrier(self, state: State, step: RecordBehindBarrier) -> Iterator[tuple[str, State]]:
        if state.commit == UNWRITTEN and not state.marked_before:
            yield "the barrier's mark is taken", state._replace(marked_before=True)
        covered = (
            state.commit == UNWRITTEN
            or state.marked_before
            or self.rules.barrier == "none"
            or (self.rules.barrier == "acknowledged" and state.commit != ACKNOWLEDGED)
        )
        if covered or releases(view_of(step.synchronous), state.holders):
            yield from self._write(state._replace(marked_before=False), step.voters, step.quorum)

    @staticmethod
    def _write(state: State, voters: frozenset[MemberId], quorum: int) -> Iterator[tuple[str, State]]:
        what = f"record N = {{{', '.join(sorted(voters))}}}, q = {quorum}"
        yield what, state._replace(voters=mask_of(voters), quorum=quorum, late=None)
        if state.late is None:
            yield f"{what}: outcome unknown", state._replace(late=(mask_of(voters), quorum))

    def _elections(self, state: State, voters: int, quorum: int) -> Iterator[tuple[str, State | str]]:
        needed = self.rules.promises_needed(voters.bit_count(), quorum)
        if needed is None:
            return
        views = {state.view, *state.stale, *self.future_views(state.voters, state.quorum)}
        for promisers in subsets(voters if self.rules.only_voters_promise else self.everybody):
            if promisers.bit_count() < max(needed, 1):
                continue
            event = f"elected by {', '.join(sorted(names(promisers)))}"
            left = self.everybody & ~promisers if self.rules.promise_stops_receiving else self.everybody
            if any(releases(view, left) for view in views):
                yield event, "the former primary can acknowledge something new"
                return
            possible = state.commit in (ACKNOWLEDGED, INHERITED) or (
                state.commit == WRITTEN and any(releases(view, state.holders | left) for view in views)
            )
            best = promisers & state.holders or promisers
            for winner in bits(best if self.rules.best_log_wins else promisers):
                has_it = bool(state.holders >> winner & 1)
                if possible and not has_it:
                    yield event, f"{MEMBERS[winner]} wins without an acknowledged commit"
                    return
                for wanted_k in range(1, self.k_max + 1):
                    record = self.won(voters, quorum, promisers, state.holders, winner, wanted_k)
                    view = view_of(synchronous_for(names(record[0]), record[1], names(self.everybody)))
                    inherited = has_it and possible
                    # The winner's bit now stands for the former primary's directory, that joins anew with nothing.
                    yield (
                        f"{event}, {MEMBERS[winner]} wins",
                        State(
                            *record,
                            view,
                            (),
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
        record = ClusterRecord(
            cluster_name="model",
            cluster_uid="model",
            mode="synchronous",
            lease_duration_s=10.0,
            epoch=Epoch(1),
            system_identifier="1",
            chain=TimelineChain(Timeline(1)),
            highest_timeline=Timeline(1),
            voters=names(voters),
            quorum=quorum,
        )
        ends = {index: WalEnd(Timeline(1), Lsn(1 + (holders >> index & 1))) for index in bits(promisers)}
        answers = {
            MEMBERS[index]: VoteAnswer(
                voter=MEMBERS[index], granted=True, reason="", highest_epoch=Epoch(1), end=ends[index]
            )
            for index in bits(promisers)
        }
        me = Candidate(member_id=MEMBERS[winner], end=ends[winner], priority=0)
        holder = Holder(member_id=me.member_id, incarnation="model")
        outcome = judge_promises(record, me, holder, Epoch(2), answers, wanted_k=wanted_k)
        if not isinstance(outcome, Won):
            # The variant lets win whom the rules do not.
            kept = promisers & ~(1 << winner)
            return kept, min(wanted_k, kept.bit_count())
        return mask_of(outcome.record.voters), outcome.record.quorum

    def _future_views(self, voters: int, quorum: int) -> frozenset[View]:
        """What a former primary that does not know of its end may still tell its Postgres: its record can no longer change."""
        return frozenset(
            view_of(step.synchronous)
            for view in self.wanted
            for step in self.steps(voters, quorum, view, True)
            if isinstance(step, SetSynchronous)
        )

    def _order(self, order: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sum(1 << order[index] for index in bits(mask)) for mask in range(self.everybody + 1))

    def _canonical(self, state: State) -> State:
        """Names do not matter: one state stands for all its renamings."""
        voters, quorum, (k, members), stale, late, marked_before, commit, holders = state
        return min(
            (
                State(
                    order[voters],
                    quorum,
                    (k, order[members]),
                    tuple(sorted((stale_k, order[mask]) for stale_k, mask in stale)),
                    None if late is None else (order[late[0]], late[1]),
                    marked_before,
                    commit,
                    order[holders],
                )
                for order in self.orders
            ),
            key=_sort_key,
        )


def _sort_key(state: State) -> tuple[object, ...]:
    return (*state[:4], state.late or (), *state[5:])
