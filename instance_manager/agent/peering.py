"""What this instance knows of its peers, by listening to each of them, and asking again at once when one hangs up.

`watch` is one held connection on which a peer tells its state when that changes, and at each beat of its heart: so a change,
a crash (the kernel closes the connection) and silence are each noticed when they happen. What is told is a fact with an age.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from instance_manager.codec import from_json, to_json
from instance_manager.core.observation import PeerState, PeerView
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Epoch, MemberId, MemberName, WalEnd
from instance_manager.ports import Clock, PeerCaller, PeerRefused, PeerSilent, PeerUnreachable

log = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT_S = 1.0
"""A peer tells its state after this time although nothing changed."""
SILENCE_S = 2.0
"""A peer that tells nothing for this time is asked anew: it, or only this connection, is silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRequest:
    record_epoch: Epoch
    """So that a peer that has not yet heard of a takeover reads the Lease now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchAnswer:
    digest: str
    state: PeerState


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRequest:
    """Asks for the proven end of a log without a promise (R16, a planned handover)."""

    cluster_uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndAnswer:
    member_id: MemberId | None
    end: WalEnd | None
    promised_epoch: Epoch
    highest_epoch: Epoch
    extended_for_s: float
    """How long it is bound yet by a promise to the primary not to promise (R11)."""
    record: ClusterRecord | None
    """What the peer knows of the Lease, or remembers when it is gone (R3)."""


@dataclass(slots=True)
class _Known:
    state: PeerState | None = None
    digest: str = ""
    answers: bool = False
    refused: bool = False
    answered_s: float = float("-inf")


class Peers:
    """One task per peer keeps its view fresh."""

    def __init__(
        self,
        caller: PeerCaller,
        names: tuple[MemberName, ...],
        clock: Clock,
        *,
        interval_s: float,
        record_epoch: Callable[[], Epoch],
        on_change: Callable[[], None],
        on_later_epoch: Callable[[], None],
    ) -> None:
        self._caller = caller
        self._clock = clock
        self._interval_s = interval_s
        self._record_epoch = record_epoch
        self._on_change = on_change
        self._on_later_epoch = on_later_epoch
        self._known: dict[MemberName, _Known] = {name: _Known() for name in names}
        self._changed = asyncio.Event()

    @property
    def names(self) -> tuple[MemberName, ...]:
        return tuple(self._known)

    def set_names(self, names: frozenset[MemberName]) -> None:
        """From now on these are asked; what is known of those that stay is kept."""
        if names != set(self._known):
            log.info("the peers are %s now, were %s", ", ".join(sorted(names)), ", ".join(sorted(self._known)))
            self._known = {name: self._known.get(name) or _Known() for name in sorted(names)}
            self._changed.set()

    def views(self) -> Mapping[MemberName, PeerView]:
        now_s = self._clock.now_s()
        return {
            name: PeerView(
                state=known.state, answers=known.answers, refused=known.refused, silent_for_s=now_s - known.answered_s
            )
            for name, known in self._known.items()
        }

    def was_paused(self) -> None:
        """This process itself did not run for a while: the peers' silence is not theirs."""
        now_s = self._clock.now_s()
        for known in self._known.values():
            if known.answers:
                known.answered_s = max(known.answered_s, now_s)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            watching: dict[MemberName, asyncio.Task[None]] = {}
            while True:
                self._changed.clear()
                for name in self._known:
                    if name not in watching:
                        watching[name] = tasks.create_task(self._watch(name, self._known[name]))
                for name in watching.keys() - self._known.keys():
                    watching.pop(name).cancel()
                await self._changed.wait()

    async def ask(self, name: MemberName, call: str, question: object, kind: type[T], *, deadline_s: float) -> T:
        """One call; PeerUnreachable (refused, silent, rejected) or ValueError when the answer is not understood."""
        answer = await self._caller.call(name, call, to_json(question), deadline_s=deadline_s)
        return _understood(answer, kind, name, call)

    async def ask_all(
        self, names: tuple[MemberName, ...], call: str, question: object, kind: type[T], *, deadline_s: float
    ) -> dict[MemberName, T]:
        """Ask several at once; who does not answer in time is missing from the result."""
        answers: dict[MemberName, T] = {}

        async def one(name: MemberName) -> None:
            try:
                answers[name] = await self.ask(name, call, question, kind, deadline_s=deadline_s)
            except PeerUnreachable as error:
                log.info("%s did not answer %s: %s", name, call, error)

        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(one(name))
        return answers

    async def nudge(self, names: tuple[MemberName, ...]) -> None:
        """Tell peers that the Lease has changed, so that they read it now. Best effort."""
        await self.ask_all(names, "nudge", None, bool, deadline_s=0.5)

    async def _watch(self, name: MemberName, known: _Known) -> None:
        while True:
            began_s = self._clock.now_s()
            try:
                await self._listen(name, known)
            except PeerUnreachable as error:
                before = (known.answers, known.refused)
                known.answers, known.refused = False, isinstance(error, PeerRefused)
                if before != (known.answers, known.refused):
                    self._on_change()
            # Also where a peer ends what it has hardly begun.
            await self._clock.sleep(max(0.05, min(0.25, self._interval_s) - (self._clock.now_s() - began_s)))

    async def _listen(self, name: MemberName, known: _Known) -> None:
        question = to_json(WatchRequest(record_epoch=self._record_epoch()))
        async with contextlib.aclosing(self._caller.listen(name, "watch", question, silence_s=SILENCE_S)) as told:
            heard = False
            async for piece in told:
                heard = True
                answer = _understood(piece, WatchAnswer, name, "watch")
                before = (known.answers, known.digest)
                known.answers, known.refused = True, False
                known.answered_s = self._clock.now_s()
                known.state, known.digest = answer.state, answer.digest
                if answer.state.record_epoch > self._record_epoch():
                    self._on_later_epoch()
                if before != (known.answers, known.digest):
                    self._on_change()
            if not heard:
                raise PeerSilent(f"{name} ended its answer before it told anything")


def _understood(answer: bytes, kind: type[T], name: str, call: str) -> T:
    try:
        return from_json(answer, kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise PeerSilent(f"{name} answered {call} with what is no {kind.__name__}: {error}") from error
