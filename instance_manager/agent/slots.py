"""The replication slots of the server that runs: one for each member while it is the primary, none while it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from instance_manager.agent.postgres_port import LocalPostgres
from instance_manager.core.types import MemberId
from instance_manager.ports import Clock

SLOTS_INTERVAL_S = 10.0
"""A slot that is missing keeps its member from streaming: the primary looks again this often."""


class Slots:
    def __init__(self, postgres: LocalPostgres, clock: Clock, running_pid: Callable[[], int | None]) -> None:
        self._postgres = postgres
        self._clock = clock
        self._running_pid = running_pid
        self._turn = asyncio.Lock()
        """Slots are dropped and made one after another, whoever asks."""
        self._made_for: frozenset[MemberId] = frozenset()
        self.of_pid: int | None = None
        """Which server's slots were last made so; None: they are to be made or dropped anew."""
        self._tried_of_pid: int | None = None
        self._kept_s = float("-inf")

    async def prepare(self, members: frozenset[MemberId]) -> None:
        """A slot for each member, none for others. Cheap while nothing changed; what is there is seen again at times."""
        if members == self._made_for and self.of_pid == self._running_pid() and self._are_fresh:
            return
        async with self._turn:
            await self._keep(members)

    async def drop_old(self, pid: int) -> None:
        """Of the time when this was the primary: they would keep WAL for ever. Never those of a promotion that has begun."""
        async with self._turn:
            just_tried = self._tried_of_pid == pid and self._are_fresh
            if pid == self._running_pid() and pid != self.of_pid and not just_tried:
                await self._keep(frozenset())

    @property
    def _are_fresh(self) -> bool:
        return self._clock.now_s() - self._kept_s < SLOTS_INTERVAL_S

    async def _keep(self, members: frozenset[MemberId]) -> None:
        pid = self._running_pid()
        self._tried_of_pid, self._kept_s = pid, self._clock.now_s()
        await self._postgres.keep_slots(members)
        self._made_for, self.of_pid = members, pid
