"""Segments ahead of need, on the file system of pg_wal, so that handing one over is a rename.

What is not there is not remembered: absence is proven when it is asked for. Anything but the next segment that was expected
drops all of it: a timeline change, a restart of recovery.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from instance_manager.archive.counters import look_at_outcome
from instance_manager.archive.restore_file import RestoreFile
from instance_manager.ports import ObjectStoreError

log = logging.getLogger("instance_manager.archive.prefetch")

Get = Callable[[str, Path], Awaitable[bool]]
"""Restore the segment of this name as this file; False: proven absent."""


class Prefetch:
    """At most as many files as the caller names; empty at the start."""

    def __init__(self, spool: Path, *, parallel: int) -> None:
        self._spool = spool
        self._turns = asyncio.Semaphore(parallel)
        self._under_way: dict[str, asyncio.Task[bool]] = {}
        self._is_clean = False

    def file(self, path: Path) -> RestoreFile:
        """What becomes `path`."""
        return RestoreFile(path, self._spool, self._owner)

    @property
    def _owner(self) -> tuple[int, int] | None:
        """Whose the files must be: the owner of pg_wal, where this process is root."""
        if os.geteuid() != 0:
            return None
        found = self._spool.parent.stat()
        return found.st_uid, found.st_gid

    def has(self, name: str) -> bool:
        """Is it here, or on its way?"""
        return name in self._under_way

    async def take(self, name: str, ahead: list[str], destination: Path, get: Get) -> bool:
        """The segment as `destination`; False: proven absent. Then those of `ahead` are begun; all others are dropped."""
        task = self._under_way.pop(name, None)
        if task is None:
            await self.drop()
            await self.prepare()
            found = await get(name, destination)
        else:
            found = await self._handed_over(name, task, destination) or await get(name, destination)
        if found:
            self._begin(ahead, get)
        return found

    async def drop(self) -> None:
        """Forget everything; `prepare` deletes it."""
        tasks = list(self._under_way.values())
        if not tasks:
            return
        self._under_way.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._is_clean = False

    async def _handed_over(self, name: str, task: asyncio.Task[bool], destination: Path) -> bool:
        """False: it has to be asked for again, whatever became of it."""
        try:
            found = await task
            if found:
                await asyncio.to_thread((self._spool / name).replace, destination)
        except (ObjectStoreError, OSError) as error:
            log.debug("%s was not brought ahead of need: %s", name, error)
            return False
        return found

    def _begin(self, names: list[str], get: Get) -> None:
        for name in [each for each in self._under_way if each not in names]:
            self._under_way.pop(name).cancel()
            (self._spool / name).unlink(missing_ok=True)
        for name in names:
            if name not in self._under_way:
                task = asyncio.create_task(self._ahead(name, get), name=f"prefetch {name}")
                task.add_done_callback(look_at_outcome)
                self._under_way[name] = task

    async def _ahead(self, name: str, get: Get) -> bool:
        async with self._turns:
            return await get(name, self._spool / name)

    async def prepare(self) -> None:
        """The directory is there, and nothing is in it of a former process or of what was dropped."""
        if not self._is_clean:
            await asyncio.to_thread(self._make)
            self._is_clean = True

    def _make(self) -> None:
        # What an abandoned thread still writes there is in its way at most until the next time.
        shutil.rmtree(self._spool, ignore_errors=True)
        self._spool.mkdir(mode=0o700, exist_ok=True)
        if self._owner is not None:
            os.chown(self._spool, *self._owner)
