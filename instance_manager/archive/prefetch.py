"""Segments ahead of need, so that handing one over is a rename.

What is not there is not remembered: absence is proven when it is asked for. Anything but a segment that was expected
drops all of it: a timeline change, a restart of recovery.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from instance_manager.archive.spool import Spool
from instance_manager.ports import ObjectStoreError

log = logging.getLogger("instance_manager.archive.prefetch")

Get = Callable[[str], Awaitable[Path | None]]
"""Restore the segment of this name into the spool; None: proven absent."""


class Prefetch:
    """At most as many files as the caller names; empty at the start."""

    def __init__(self, spool: Spool, *, parallel: int) -> None:
        self._spool = spool
        self._turns = asyncio.Semaphore(parallel)
        self._under_way: dict[str, asyncio.Task[Path | None]] = {}

    def has(self, name: str) -> bool:
        """Is it here, or on its way?"""
        return name in self._under_way

    async def take(self, name: str, ahead: list[str], get: Get) -> Path | None:
        """The segment's file; None: proven absent. Then those of `ahead` are begun; all others are dropped."""
        task = self._under_way.pop(name, None)
        if task is None:
            await self.drop()
            await self._spool.prepare()
            found = await get(name)
        else:
            found = await self._come(name, task) or await get(name)
        if found is not None:
            self._begin(ahead, get)
        return found

    async def drop(self) -> None:
        """Forget everything."""
        tasks = list(self._under_way.values())
        if not tasks:
            return
        self._under_way.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._spool.abandon()

    async def _come(self, name: str, task: asyncio.Task[Path | None]) -> Path | None:
        """None: it has to be asked for again, whatever became of it."""
        try:
            return await task
        except (ObjectStoreError, OSError) as error:
            log.debug("%s was not brought ahead of need: %s", name, error)
            return None

    def _begin(self, names: list[str], get: Get) -> None:
        for name in [each for each in self._under_way if each not in names]:
            self._under_way.pop(name).add_done_callback(_unlink_outcome)
        for name in names:
            if name not in self._under_way:
                task = asyncio.create_task(self._ahead(name, get), name=f"prefetch {name}")
                task.add_done_callback(_look_at_outcome)
                self._under_way[name] = task

    async def _ahead(self, name: str, get: Get) -> Path | None:
        async with self._turns:
            return await get(name)


def _look_at_outcome(task: asyncio.Task[Path | None]) -> None:
    if not task.cancelled():
        task.exception()


def _unlink_outcome(task: asyncio.Task[Path | None]) -> None:
    if not task.cancelled() and task.exception() is None and (path := task.result()) is not None:
        with contextlib.suppress(OSError):
            path.unlink()
