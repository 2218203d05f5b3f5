"""Permits, leases and extensions over discrete time: who may write when nobody can be asked.

What is in this world. Time passes in ticks, for everybody at the same rate (the error of rates is part of the margin).
A permit lasts `hard` ticks from the *sending* of the renewal (the time to kill is in it), the lease `lease` ticks, and
an agent gives a request up after `timeout` ticks; what it wrote may land later still, or never. Requests are sent, take effect
and are answered in three steps, with any time between. The supervisor ends a writable Postgres when its permit ends, whatever
the agent does; the agent may be paused (not scheduled) or restarted at any time.

Asynchronous: a member takes over when it has seen the very same record for a whole duration (`entitled_by_time`), or at once
a release to itself. The store may be unreachable for anybody for any time (its requests take no effect); then the primary
asks the members, and with the promise of all extends its permit. Checked: never are two instances writable.

Synchronous: safety does not rest on time there, but an extension does promise something: while a permit that rests on the
promises of q voters runs, nobody else takes the Lease. That is checked.

What is left out: logs and positions, the quorum (the other models have them), proofs of death, changes of the mode, and
different clock rates.

A record's version is never named: what matters is whether a snapshot, or what a write stands on, is still what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal

from breadth_first import Violation
from permits_words import (
    DEFAULT_TICKS,
    END,
    LETTERS,
    Ask,
    Kind,
    Member,
    Request,
    Seen,
    State,
    Ticks,
    grounds_of,
    holds,
    record_of,
    renamed_state,
)

from instance_manager.core.lease import Permit, entitled_by_time, permit_of_renewal
from instance_manager.core.record import ClusterRecord, Mode
from instance_manager.core.timing import Timings
from instance_manager.core.types import Epoch, MemberId
from instance_manager.core.voting import (
    ExtensionRequest,
    Verdict,
    VolumeState,
    VoteRequest,
    VoterView,
    judge_extension,
    judge_vote,
)

NOW_S = 100.0


@dataclass(frozen=True)
class PermitRules:
    permit_of_renewal: Callable[[Epoch, float, Timings], Permit] = permit_of_renewal
    permit_counts_from: Literal["sending", "answer"] = "sending"
    entitled_by_time: Callable[..., str | None] = entitled_by_time
    judge_extension: Callable[[ExtensionRequest, VoterView], Verdict] = judge_extension
    judge_vote: Callable[..., Verdict] = judge_vote
    record_is_seen_from: Literal["the answer", "the sending"] = "the answer"
    """Since when a changed record counts as seen: it may be younger than the read that shows it."""
    time_stands_on: Literal["the version", "the grounds"] = "the version"
    """What a takeover by time is written on."""
    unknown_outcome_renews: bool = False
    conditional: bool = True
    supervisor_enforces: bool = True
    bound_is_kept: bool = True
    """Who promised not to take over by an extension does not, by time or a release (R11)."""
    bound_survives_restart: bool = True
    all_members_extend: bool = True
    stops_before_release: bool = True
    revokes: bool = True
    only_reads_count: bool = True
    """The time since the last successful read proves nothing of the record (R12)."""


class PermitsModel:
    def __init__(
        self,
        rules: PermitRules,
        *,
        mode: Mode,
        instances: int = 2,
        quorum: int = 1,
        epochs: int = 3,
        restarts: int = 1,
        releases: int = 1,
        clears: int = 0,
        extensions: bool = True,
        ticks: Ticks = DEFAULT_TICKS,
        name: str = "permits",
    ) -> None:
        self.ticks = ticks
        self.clears = clears
        self.timings = Timings(hard_s=ticks.hard, soft_s=ticks.hard, lease_duration_s=ticks.lease, clock_rate_error=0.0)
        self.rules, self.mode, self.count = rules, mode, instances
        self.quorum = quorum if mode == "synchronous" else 0
        self.epochs, self.restarts, self.releases, self.extensions = epochs, restarts, releases, extensions
        self.name = name
        parts = [mode, f"{instances} instances", f"{epochs} epochs", "ticks {}/{}/{}".format(*ticks)]
        parts += [f"{restarts} agent restarts"] * (restarts > 0) + [f"{releases} releases"] * (releases > 0)
        parts += [f"{clears} cleared by hand"] * (clears > 0) + ["extensions"] * extensions
        self.bounds = ", ".join(parts)
        self.record = cache(self._record)
        self.entitled = cache(self._entitled)
        self.extends = cache(self._extends)
        self.votes = cache(self._votes)
        # Only those that keep a, the first primary, in its place: of two instances none is left to be renamed.
        self.orders = [(0, *rest) for rest in permutations(range(1, instances))]

    def first(self) -> Iterator[tuple[str, State]]:
        seen = Seen(0, 1, -1, True)
        members = tuple(
            Member(
                writable=1 if index == 0 else 0,
                permit=self.ticks.hard if index == 0 else 0,
                by_extension=False,
                revoked=0,
                promised=1,
                bound=0,
                age=self.ticks.lease,
                seen=seen,
                unchanged=0,
                read_age=0,
                request=None,
                ask=None,
                standing=0,
                promises=0,
                takeover_open=False,
            )
            for index in range(self.count)
        )
        yield "a is the primary at epoch 1, and has just renewed", State(seen, members, (), 0, 0, 0)

    # Questions to the core.

    def _record(self, seen: Seen) -> ClusterRecord:
        quorum = self.quorum if seen.holder >= 0 else 0
        return record_of(self.mode, self.count, quorum, self.ticks.lease, seen)

    def _entitled(self, seen: Seen, unchanged: int, age: int) -> bool:
        why_not = self.rules.entitled_by_time(
            self.record(seen),
            unchanged_for_s=float(unchanged),
            agent_age_s=float(age),
            proven_dead=False,
            own_end=END,
            maximum_lag_bytes=0,
            clock_rate_error=0.0,
        )
        return why_not is None

    def _voter(self, index: int, seen: Seen, promised: int, bound: int, takeover_open: bool) -> VoterView:
        volume = VolumeState(
            cluster_uid="model",
            member_id=MemberId(f"{LETTERS[index]}_00000000"),
            promised_epoch=Epoch(promised),
            highest_epoch=Epoch(promised),
            extension_until_s=NOW_S + bound if bound else 0.0,
            boot_id="boot",
        )
        return VoterView(
            now_s=NOW_S,
            volume=volume,
            boot_id="boot",
            record=self.record(seen),
            record_read_age_s=0.0,
            renew_interval_s=2.0,
            suspects="it may always be wrong",
            fenced=False,
            damaged=False,
            takeover_open=takeover_open,
            serving=seen.holder == index,
        )

    def _extends(
        self, index: int, seen: Seen, promised: int, bound: int, takeover_open: bool, holder: int, epoch: int
    ) -> bool:
        question = ExtensionRequest(
            cluster_uid="model",
            holder=MemberId(f"{LETTERS[holder]}_00000000"),
            epoch=Epoch(epoch),
            duration_s=self.ticks.lease,
        )
        return self.rules.judge_extension(question, self._voter(index, seen, promised, bound, takeover_open)).granted

    def _votes(
        self, index: int, seen: Seen, promised: int, bound: int, takeover_open: bool, candidate: int, epoch: int
    ) -> bool:
        question = VoteRequest(
            cluster_uid="model",
            candidate=MemberId(f"{LETTERS[candidate]}_00000000"),
            epoch=Epoch(epoch),
            record_epoch=Epoch(seen.epoch),
            end=END,
        )
        voter = self._voter(index, seen, promised, bound, takeover_open)
        # Nobody asks the same member twice here, so "promised that very epoch" is always to another.
        return epoch > promised and self.rules.judge_vote(question, voter, final=True).granted

    # What may happen.

    def after(self, state: State) -> Iterator[tuple[str, State | Violation]]:
        for event, after in self._everything(state):
            wrong = self._wrong(state, after)
            yield event, after if wrong is None else Violation(wrong)

    def _wrong(self, before: State, after: State) -> str | None:
        writable = [index for index, member in enumerate(after.members) if member.writable]
        if self.mode == "asynchronous":
            if len(writable) > 1:
                return f"{' and '.join(LETTERS[index] for index in writable)} are writable at once"
            return None
        holder = after.register.holder
        if holder >= 0 and holder != before.register.holder:
            for index in writable:
                if index != holder and after.members[index].by_extension and after.members[index].permit:
                    return f"{LETTERS[holder]} takes the Lease while the extension of {LETTERS[index]} runs"
        return None

    def _everything(self, state: State) -> Iterator[tuple[str, State]]:
        yield "a tick passes", self._tick(state)
        for orphan in state.orphans:
            yield "a late write lands", self._stored(state, orphan)
        if state.clears < self.clears and state.register.holder >= 0:
            cleared = self._stored(state, state.register._replace(holder=-1))
            yield "somebody clears the holder by hand", cleared._replace(clears=state.clears + 1)
        for index, member in enumerate(state.members):
            yield from self._requests(state, index, member)
            yield from self._agent(state, index, member)
            if self.extensions:
                yield from self._extension(state, index, member)
            if state.restarts < self.restarts:
                yield f"the agent of {LETTERS[index]} restarts", self._restarted(state, index, member)

    def _tick(self, state: State) -> State:
        return state._replace(members=tuple(self._aged(index, member) for index, member in enumerate(state.members)))

    def _aged(self, index: int, member: Member) -> Member:
        permit = max(0, member.permit - 1)
        dead = permit == 0 and self.rules.supervisor_enforces
        request, ask = member.request, member.ask
        return member._replace(
            permit=permit,
            by_extension=member.by_extension and permit > 0,
            writable=0 if dead else member.writable,
            bound=max(0, member.bound - 1),
            age=min(self.ticks.lease, member.age + 1),
            read_age=0 if holds(index, member) else min(self.ticks.lease + self.ticks.timeout, member.read_age + 1),
            request=None if request is None else request._replace(age=min(self.ticks.timeout + 1, request.age + 1)),
            ask=None if ask is None or ask.age >= self.ticks.timeout else ask._replace(age=ask.age + 1),
        )

    @staticmethod
    def _with(state: State, index: int, member: Member) -> State:
        members = state.members
        return state._replace(members=(*members[:index], member, *members[index + 1 :]))

    def _stored(self, state: State, wanted: Seen, writer: int | None = None) -> State:
        """The register changes: nothing that was seen before is current any more."""

        def outdated(member: Member) -> Member:
            seen, request = member.seen, member.request
            if seen is not None and seen.current:
                seen = seen._replace(current=False)
            if request is not None and request.effect is not None and request.effect.current:
                request = request._replace(effect=request.effect._replace(current=False))
            return member._replace(seen=seen, request=request)

        members = tuple(outdated(member) for member in state.members)
        orphans = () if self.rules.conditional else tuple(each for each in state.orphans if each != wanted)
        after = state._replace(register=wanted._replace(current=True), members=members, orphans=orphans)
        if writer is not None:
            member = members[writer]
            assert member.request is not None
            done = member.request._replace(effect=wanted._replace(current=True))
            after = self._with(after, writer, member._replace(request=done))
        return after

    def _restarted(self, state: State, index: int, member: Member) -> State:
        state = self._abandoned(state, member)
        fresh = member._replace(
            age=0,
            seen=None,
            unchanged=0,
            read_age=self.ticks.lease + self.ticks.timeout,
            request=None,
            ask=None,
            standing=0,
            promises=0,
            takeover_open=False,
            bound=member.bound if self.rules.bound_survives_restart else 0,
        )
        return self._with(state, index, fresh)._replace(restarts=state.restarts + 1)

    def _abandoned(self, state: State, member: Member) -> State:
        """Whoever sent the write has given up; it may land as long as what it stands on is stored."""
        request = member.request
        if request is None or request.wanted is None or request.effect is not None:
            return state
        stands = (member.seen is not None and member.seen.current) or not self.rules.conditional
        return state._replace(orphans=tuple(sorted({*state.orphans, request.wanted}))) if stands else state

    # The store.

    def _requests(self, state: State, index: int, member: Member) -> Iterator[tuple[str, State]]:
        me, request = LETTERS[index], member.request
        if request is None:
            knows = member.seen is not None and member.seen.current and member.seen.holder == index
            if member.seen is None or (member.read_age > 0 and not knows):
                reading = Request("read", 0, None, None, None, False)
                yield f"{me} sends a read", self._with(state, index, member._replace(request=reading))
            return
        if request.effect is None:
            yield from self._takes_effect(state, index, member, request)
        elif request.age <= self.ticks.timeout:
            yield f"{me} gets the answer to its {request.kind}", self._answered(state, index, member, request)
        if request.age > self.ticks.timeout or self.rules.unknown_outcome_renews:
            dropped = member._replace(request=None, takeover_open=False)
            if self.rules.unknown_outcome_renews and request.kind == "renew":
                dropped = dropped._replace(permit=max(self.ticks.hard - request.age, member.permit))
            after = self._with(self._abandoned(state, member), index, dropped)
            yield f"{me} gives its {request.kind} up", after

    def _takes_effect(self, state: State, index: int, member: Member, request: Request) -> Iterator[tuple[str, State]]:
        me, register = LETTERS[index], state.register
        if request.wanted is None:
            same = member.seen is not None and member.seen.current
            read = request._replace(effect=register, same=same)
            yield f"the read of {me} reaches the store", self._with(state, index, member._replace(request=read))
            return
        by_time = self.mode == "asynchronous" and request.kind == "take" and register.released_to < 0
        if by_time and self.rules.time_stands_on == "the version" and not (member.seen and member.seen.current):
            # Time was counted over that very version: a renewal since ends what it proved.
            return
        if request.on_grounds == grounds_of(register) or not self.rules.conditional:
            # On a newer version it is tried again only while the grounds are the same (R12).
            yield f"the {request.kind} of {me} reaches the store", self._stored(state, request.wanted, index)

    def _answered(self, state: State, index: int, member: Member, request: Request) -> State:
        assert request.effect is not None
        gap = member.read_age - request.age
        unchanged = min(self.ticks.lease, member.unchanged + gap)
        if not request.same or gap > self.ticks.lease / 2:
            unchanged = -request.age if self.rules.record_is_seen_from == "the answer" else 0
        if request.effect.holder == index:
            # A holder counts nothing by it.
            unchanged = 0
        # A campaign stands on the grounds that it began with; on others its write would be refused (R12).
        standing = (
            member.standing if member.seen is not None and grounds_of(member.seen) == grounds_of(request.effect) else 0
        )
        after = member._replace(
            seen=request.effect,
            read_age=request.age,
            unchanged=unchanged,
            request=None,
            standing=standing,
            promises=member.promises if standing else 0,
            takeover_open=standing > 0,
        )
        if request.effect.holder == index and request.kind in ("renew", "take", "reaffirm"):
            after = self._granted(after, request.effect.epoch, request.age)
        return self._with(state, index, after)

    def _granted(self, member: Member, epoch: int, age: int, *, extension: bool = False) -> Member:
        """The supervisor accepts a permit, and never a shorter one, nor one of an epoch that was revoked (R10)."""
        sent_s = NOW_S - (age if self.rules.permit_counts_from == "sending" else 0)
        left = int(self.rules.permit_of_renewal(Epoch(epoch), sent_s, self.timings).hard_s - NOW_S)
        if left <= member.permit or epoch <= member.revoked:
            return member
        return member._replace(permit=min(left, self.ticks.hard), by_extension=extension)

    # The agent.

    def _agent(self, state: State, index: int, member: Member) -> Iterator[tuple[str, State]]:
        me, seen = LETTERS[index], member.seen
        if seen is None:
            return
        if seen.holder != index:
            if member.writable:
                yield (
                    f"{me} sees that it does not hold the Lease",
                    self._with(state, index, member._replace(writable=0)),
                )
            elif member.request is None:
                yield from self._takeover(state, index, member, seen)
            return
        if member.request is not None:
            return
        if member.writable:
            yield self._send(state, index, member, "renew", seen)
            if state.releases < self.releases:
                yield from self._release(state, index, member, seen)
        elif member.permit and seen.epoch > max(member.revoked, 0) and member.promised < seen.epoch:
            # `promised` of its own epoch marks that this epoch was opened: a holder that stopped needs a later one.
            opened = member._replace(writable=seen.epoch, promised=seen.epoch)
            yield f"{me} opens at epoch {seen.epoch}", self._with(state, index, opened)
        elif seen.epoch < self.epochs:
            wanted = Seen(index, max(seen.epoch, member.promised) + 1, -1, True)
            if wanted.epoch <= self.epochs:
                yield self._send(state, index, member, "reaffirm", wanted)

    def _send(self, state: State, index: int, member: Member, kind: Kind, wanted: Seen) -> tuple[str, State]:
        seen = member.seen
        assert seen is not None
        request = Request(kind, 0, wanted._replace(current=True), grounds_of(seen), None, False)
        return f"{LETTERS[index]} sends its {kind}", self._with(state, index, member._replace(request=request))

    def _takeover(self, state: State, index: int, member: Member, seen: Seen) -> Iterator[tuple[str, State]]:
        epoch = member.standing or max(seen.epoch, member.promised) + 1
        if epoch > self.epochs:
            return
        bound = member.bound > 0 and self.rules.bound_is_kept
        wanted = Seen(index, epoch, -1, True)
        opened = member._replace(takeover_open=True)
        if seen.released_to == index:
            if not bound:
                yield self._send(state, index, opened, "take", wanted)
            return
        if self.mode == "asynchronous":
            unchanged = member.unchanged + (0 if self.rules.only_reads_count else member.read_age)
            if not bound and self.entitled(seen._replace(current=True), unchanged, member.age):
                yield self._send(state, index, opened, "take", wanted)
            return
        yield from self._election(state, index, member, seen, epoch)

    def _election(
        self, state: State, index: int, member: Member, seen: Seen, epoch: int
    ) -> Iterator[tuple[str, State]]:
        me = LETTERS[index]
        plain = seen._replace(current=True)
        if seen.holder < 0:
            return
        if not member.standing:
            if self.votes(index, plain, member.promised, member.bound, False, index, epoch):
                standing = member._replace(standing=epoch, promises=1 << index, promised=epoch, takeover_open=True)
                yield f"{me} stands for epoch {epoch}", self._with(state, index, standing)
            return
        needed = self.record(plain).promises_needed
        if needed is not None and member.promises.bit_count() >= needed:
            wanted = Seen(index, member.standing, -1, True)
            yield self._send(state, index, member._replace(standing=0, promises=0), "take", wanted)
        for each, other in enumerate(state.members):
            if each in (index, seen.holder) or member.promises >> each & 1 or other.seen is None or other.writable:
                continue
            if self.votes(
                each,
                other.seen._replace(current=True),
                other.promised,
                other.bound,
                other.takeover_open,
                index,
                member.standing,
            ):
                after = self._with(state, each, other._replace(promised=member.standing))
                asker = member._replace(promises=member.promises | 1 << each)
                yield f"{LETTERS[each]} promises epoch {member.standing} to {me}", self._with(after, index, asker)
        ended = member._replace(standing=0, promises=0, takeover_open=False)
        yield f"{me} gives up to stand", self._with(state, index, ended)

    def _release(self, state: State, index: int, member: Member, seen: Seen) -> Iterator[tuple[str, State]]:
        for target in range(self.count):
            if target == index:
                continue
            stopped = member._replace(
                writable=0 if self.rules.stops_before_release else member.writable,
                revoked=seen.epoch if self.rules.revokes else member.revoked,
            )
            if self.rules.revokes and self.rules.stops_before_release:
                stopped = stopped._replace(permit=0, by_extension=False)
            event, after = self._send(state, index, stopped, "release", Seen(-1, seen.epoch, target, True))
            yield f"{event} to {LETTERS[target]}", after._replace(releases=state.releases + 1)

    # The store is away.

    def _extension(self, state: State, index: int, member: Member) -> Iterator[tuple[str, State]]:
        me, seen = LETTERS[index], member.seen
        if seen is None or seen.holder != index or not member.writable:
            return
        ask = member.ask
        if ask is None:
            yield f"{me} asks for an extension", self._with(state, index, member._replace(ask=Ask(0, 0)))
            return
        everybody = self.count - 1
        needed = self.quorum if self.mode == "synchronous" else everybody
        if not self.rules.all_members_extend:
            needed = 1
        if ask.granted.bit_count() >= needed:
            extended = self._granted(member._replace(ask=None), seen.epoch, ask.age, extension=True)
            yield f"{me} extends its permit", self._with(state, index, extended)
            return
        for each, other in enumerate(state.members):
            if each == index or ask.granted >> each & 1 or other.seen is None:
                continue
            plain = other.seen._replace(current=True)
            if self.extends(each, plain, other.promised, other.bound, other.takeover_open, index, seen.epoch):
                after = self._with(state, each, other._replace(bound=self.ticks.lease))
                asked = member._replace(ask=ask._replace(granted=ask.granted | 1 << each))
                yield f"{LETTERS[each]} promises {me} not to promise", self._with(after, index, asked)

    # Names do not matter.

    def canonical(self, state: State) -> Hashable:
        if len(self.orders) == 1:
            return state
        return min(hash(renamed_state(state, order)) for order in self.orders)
