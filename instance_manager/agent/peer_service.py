"""The calls that other instances make of this one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from instance_manager.agent.context import OperationFailed
from instance_manager.agent.operator_failover import lossy_failover_as_best
from instance_manager.agent.own_verbs import reinitialise, restart_postgres
from instance_manager.agent.peering import EndAnswer, EndRequest, WatchAnswer, WatchRequest
from instance_manager.codec import from_json, to_json
from instance_manager.core.voting import ExtensionRequest, VoteRequest
from instance_manager.http.ports import MalformedCall, UnknownCall
from instance_manager.ports import CoordinationError
from instance_manager.postgres.server import LocalPostgresError

if TYPE_CHECKING:
    from instance_manager.agent.agent import Agent

T = TypeVar("T")

TOGETHER_S = 0.01
"""Peers that are told at most this much apart are told the same."""


class PeerService:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._answering = asyncio.Lock()
        """One vote at a time: a promise is judged on the state that the one before it left."""
        self._told: tuple[asyncio.Event, float, bytes] | None = None

    async def answer(self, call: str, body: bytes) -> bytes:
        c = self._agent.context
        match call:
            case "pre_vote":
                try:
                    return to_json(await self._agent.elections.answer_pre_vote(_read(body, VoteRequest)))
                except CoordinationError as error:
                    raise MalformedCall(f"the Lease cannot be read here: {error}") from error
            case "promise":
                request = _read(body, VoteRequest)
                async with self._answering:
                    return to_json(await self._agent.elections.answer_promise(request))
            case "extend":
                question = _read(body, ExtensionRequest)
                async with self._answering:
                    return to_json(await self._agent.elections.answer_extension(question))
            case "end":
                return to_json(await self._end(_read(body, EndRequest)))
            case "nudge":
                c.keeper.hint()
                c.wake.set()
                return to_json(True)
            case "restart":
                return to_json(await self._verb(lambda: restart_postgres(c)))
            case "reinit":
                return to_json(await self._verb(lambda: reinitialise(c)))
            case "lossy_failover":
                return to_json(await self._verb(lambda: lossy_failover_as_best(c, self._agent.reporting.own_state())))
        raise UnknownCall(call)

    async def _verb(self, verb: Callable[[], Awaitable[str]]) -> str:
        try:
            return await verb()
        except (OperationFailed, LocalPostgresError, CoordinationError) as error:
            raise MalformedCall(str(error)) from error

    async def tell(self, call: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """`watch`: the state of this instance, now, at each change and at each beat of its heart."""
        if call != "watch":
            raise UnknownCall(call)
        c = self._agent.context
        request = _read(body, WatchRequest)
        record = c.keeper.record
        if record is None or request.record_epoch > record.epoch:
            c.keeper.hint()
        while True:
            announced = c.announced
            yield self._state_of(announced)
            await announced.wait()

    def _state_of(self, announced: asyncio.Event) -> bytes:
        """Made once for all who are woken together; never an older one for who comes later."""
        now_s = self._agent.context.clock.now_s()
        if self._told is None or self._told[0] is not announced or now_s - self._told[1] > TOGETHER_S:
            reporting = self._agent.reporting
            answer = WatchAnswer(digest=reporting.digest(), state=reporting.own_state())
            self._told = (announced, now_s, to_json(answer))
        return self._told[2]

    async def _end(self, request: EndRequest) -> EndAnswer:
        c = self._agent.context
        state = c.volume.state
        record = c.keeper.record if c.keeper.view().damage is None else None
        record = record or state.remembered()
        end = None
        if record is not None and record.chain is not None and request.cluster_uid == record.cluster_uid:
            with contextlib.suppress(LocalPostgresError, OSError):
                end = await c.database.proven_end(record.chain)
        return EndAnswer(
            member_id=state.member_id,
            end=end,
            promised_epoch=state.promised_epoch,
            highest_epoch=state.highest_epoch,
            extended_for_s=max(0.0, state.extension_until_s - c.clock.now_s()),
            record=record,
        )


def _read(body: bytes, kind: type[T]) -> T:
    try:
        return from_json(body, kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise MalformedCall(f"not a {kind.__name__}: {error}") from error
