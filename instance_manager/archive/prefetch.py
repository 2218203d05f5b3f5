"""Segments ahead of need, so that handing one over is a rename, or nothing at all.

What is not there is not remembered: absence is proven when it is asked for. Anything but a segment that was expected
drops all of it: a timeline change, a restart of recovery.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from instance_manager.archive.spool import Spool
from instance_manager.ports import ObjectStoreError

log = logging.getLogger("instance_manager.archive.prefetch")

Get = Callable[[str], Awaitable[Path | None]]
"""Restore the segment of this name into the spool; None: proven absent."""


class Place(Protocol):
    """Where files that have come ahead of need wait."""

    def room_bytes(self) -> int | None:
        """How much may lie there at once; None: as much as is wanted. OSError."""

    def keep(self, name: str, file: Path) -> Path:
        """Bring it there; where it is then. OSError: it is nowhere."""

    def holds(self, name: str) -> bool:
        """It lies where Postgres takes it by itself, and that was not told yet."""

    def taken(self) -> list[str]:
        """What Postgres has taken from there by itself since the last `hand_over` of it."""

    def hand_over(self, name: str) -> None:
        """From now on it is Postgres's."""

    def discard(self, name: str, file: Path) -> None:
        """It is not wanted any more."""


class InSpool:
    """Where they were restored to."""

    def room_bytes(self) -> int | None:
        return None

    def keep(self, name: str, file: Path) -> Path:
        return file

    def holds(self, name: str) -> bool:
        return False

    def taken(self) -> list[str]:
        return []

    def hand_over(self, name: str) -> None:
        return

    def discard(self, name: str, file: Path) -> None:
        with contextlib.suppress(OSError):
            file.unlink()


class Prefetch:
    """At most as many files as the caller names; empty at the start."""

    def __init__(self, spool: Spool, *, parallel: int, place: Place | None = None) -> None:
        self._spool = spool
        self._place: Place = place or InSpool()
        self._turns = asyncio.Semaphore(parallel)
        self._under_way: dict[str, asyncio.Task[Path | None]] = {}

    def has(self, name: str) -> bool:
        """Is it here, or on its way?"""
        return name in self._under_way

    def is_coming(self, name: str) -> bool:
        """Postgres can take it by itself, or will be able to, as far as is known."""
        task = self._under_way.get(name)
        return task is not None and (not task.done() or self._place.holds(name))

    def room_bytes(self, wanted_bytes: int) -> int:
        """How much of `wanted_bytes` may be ahead. OSError."""
        room = self._place.room_bytes()
        return wanted_bytes if room is None else min(wanted_bytes, room)

    async def take(self, name: str, ahead: Callable[[], list[str]], get: Get) -> Path | None:
        """The segment's file; None: proven absent. Then those that `ahead` tells are begun; all others are dropped."""
        task = self._under_way.pop(name, None)
        if task is None:
            await self.drop()
            await self._spool.prepare()
            found = await get(name)
        else:
            found = await self._come(name, task) or await get(name)
        if found is not None:
            self._place.hand_over(name)
            self.begin(ahead(), get)
        return found

    def hand_over(self, name: str) -> None:
        """Postgres has been given it, wherever it came from."""
        self._place.hand_over(name)

    def taken(self) -> list[str]:
        """What Postgres has taken by itself since the last call, in the order of the log."""
        names = sorted(self._place.taken())
        for name in names:
            self._under_way.pop(name, None)
            self._place.hand_over(name)
        return names

    def begin(self, names: list[str], get: Get) -> None:
        """Those that are not here or on their way; all others are dropped."""
        for name in [each for each in self._under_way if each not in names]:
            task = self._under_way.pop(name)
            task.add_done_callback(lambda done, name=name: self._discard(name, done))  # type: ignore[misc]
        for name in names:
            if name not in self._under_way:
                task = asyncio.create_task(self._ahead(name, get), name=f"prefetch {name}")
                task.add_done_callback(_look_at_outcome)
                self._under_way[name] = task

    async def drop(self) -> None:
        """Forget everything."""
        tasks = dict(self._under_way)
        if not tasks:
            return
        self._under_way.clear()
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        for name, task in tasks.items():
            self._discard(name, task)
        self._spool.abandon()

    async def _come(self, name: str, task: asyncio.Task[Path | None]) -> Path | None:
        """None: it has to be asked for again, whatever became of it."""
        try:
            return await task
        except (ObjectStoreError, OSError) as error:
            log.debug("%s was not brought ahead of need: %s", name, error)
            return None

    async def _ahead(self, name: str, get: Get) -> Path | None:
        async with self._turns:
            found = await get(name)
            if found is not None and self._is_ahead(name):
                return self._place.keep(name, found)
            return found

    def _is_ahead(self, name: str) -> bool:
        """The running task's file has been neither dropped nor asked for meanwhile."""
        return self._under_way.get(name) is asyncio.current_task()

    def _discard(self, name: str, task: asyncio.Task[Path | None]) -> None:
        if not task.cancelled() and task.exception() is None and (file := task.result()) is not None:
            self._place.discard(name, file)


def _look_at_outcome(task: asyncio.Task[Path | None]) -> None:
    if not task.cancelled():
        task.exception()
