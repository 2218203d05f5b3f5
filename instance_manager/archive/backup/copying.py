"""The copying half of a backup: the files of the data directory as tars into the store, some at a time, watched for standstill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from instance_manager.archive.backup.data_files import DataFile, TarPlan
from instance_manager.archive.backup.manifest import TarEntry, tar_entry, write_members
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.tar_stream import DamagedBlock, Flow, MemoryFile, TarContent
from instance_manager.archive.codecs import Codec
from instance_manager.archive.counters import BackupProgress
from instance_manager.archive.stores.patience import Patience
from instance_manager.core.types import Lsn
from instance_manager.ports import Content, ObjectExists, ObjectStore

SMALL_DEADLINE_S = 30.0
LANDING_S = 10.0
"""What a backup that ends waits for the last objects on their way; a store that hangs for longer leaves what no backup names."""


class BackupFailed(Exception):
    """There is no backup, and nothing of it is left, unless the text says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeSettings:
    """How a backup is taken."""

    codec: Codec = Codec("lz4")
    parallel: int = 2
    split_bytes: int = 1 << 30
    rate_limit_bytes_per_s: int | None = None
    verify_checksums: bool = True
    start_deadline_s: float = 1800.0
    """For the checkpoint that begins it, though asked to be fast."""
    stall_s: float = 300.0
    """Without a byte read for so long it is given up."""
    wal_deadline_s: float = 600.0
    """For the log up to its end to come into the archive."""
    wal_poll_s: float = 1.0
    summaries_deadline_s: float = 300.0
    """For the server's WAL summaries to come to where an incremental backup begins."""
    patience: Patience = Patience(total_s=7 * 86400.0, attempt_s=86400.0, attempts_max=4)


@dataclass(slots=True)
class Copied:
    """Collected by the workers."""

    tars: list[TarEntry] = field(default_factory=list)
    damaged: list[DamagedBlock] = field(default_factory=list)
    damaged_count: int = 0
    checked_pages: int = 0
    whole_bytes: int = 0


class Copying:
    """Everything of one backup that goes into the store goes through here; `copied` is what has arrived."""

    def __init__(
        self, store: ObjectStore, names: BackupNames, settings: TakeSettings, progress: BackupProgress
    ) -> None:
        self._store = store
        self._names = names
        self._settings = settings
        self._progress = progress
        self._flow = Flow(settings.rate_limit_bytes_per_s)
        self.copied = Copied()

    async def copy(self, plans: Iterator[TarPlan], *, checksums_before: Lsn | None) -> int:
        """All of them, some at a time; the number of the last tar of the data directory.

        `checksums_before`: pages last written behind it are not judged (`page_checksums.wrong_pages`); None: no page is.
        """
        turn = asyncio.Lock()
        last = 0

        async def work() -> None:
            nonlocal last
            while True:
                async with turn:
                    plan = await asyncio.to_thread(next, plans, None)
                if plan is None:
                    return
                if plan.name.startswith("data_"):
                    last = max(last, int(plan.name.removeprefix("data_")))
                await self.upload(plan.name, list(plan.files), checksums_before=checksums_before)

        async with self._watched():
            await _all([work() for _ in range(self._settings.parallel)])
        return last

    async def upload(
        self, tar_name: str, files: list[DataFile | MemoryFile], *, checksums_before: Lsn | None = None
    ) -> None:
        """One tar, and the list of its members."""
        content = TarContent(files, self._settings.codec, self._flow, checksums_before=checksums_before)
        object_name = self._names.tar(tar_name, self._settings.codec.suffix)
        await self.create(object_name, content)
        outcome = content.outcome
        await write_members(self._store, self._names, tar_name, outcome.members, deadline_s=SMALL_DEADLINE_S)
        copied = self.copied
        copied.tars.append(tar_entry(tar_name, object_name.rpartition("/")[2], outcome))
        copied.checked_pages += outcome.checked_pages
        copied.whole_bytes += outcome.whole_bytes
        copied.damaged_count += outcome.damaged_count
        copied.damaged += outcome.damaged[: 1000 - len(copied.damaged)]

    async def create(self, object_name: str, content: Content) -> None:
        """Also where an attempt of which no answer came has created it before."""

        async def attempt(deadline_s: float) -> None:
            try:
                await self._landed(self._store.create(object_name, content, deadline_s=deadline_s))
            except ObjectExists:
                # The id is ours alone, so this is an attempt of which no answer came: of a file that lives, another content.
                await self._store.delete(object_name, deadline_s=SMALL_DEADLINE_S)
                await self._landed(self._store.create(object_name, content, deadline_s=deadline_s))

        await self._settings.patience.call(attempt)

    async def _landed(self, creating: Coroutine[None, None, None]) -> None:
        """The store's thread cannot be cancelled: what it has sent comes there before anything is cleaned up."""
        task = asyncio.ensure_future(creating)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._flow.abort()
            await asyncio.wait({task}, timeout=LANDING_S)
            if task.done() and not task.cancelled():
                task.exception()  # so that asyncio does not report it
            task.cancel()
            raise

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """The block is ended when nothing is read for too long; the store's threads with it, whatever ends it."""
        watch = asyncio.current_task()
        stalled = False

        async def look() -> None:
            nonlocal stalled
            before, since_s = -1, 0.0
            loop = asyncio.get_running_loop()
            while True:
                self._progress.read_bytes = self._flow.read_bytes
                if self._flow.read_bytes != before:
                    before, since_s = self._flow.read_bytes, loop.time()
                elif loop.time() - since_s > self._settings.stall_s:
                    stalled = True
                    if watch is not None:
                        watch.cancel()
                    return
                await asyncio.sleep(min(1.0, self._settings.stall_s / 4))

        looking = asyncio.create_task(look(), name="progress of a backup")
        try:
            yield
        except asyncio.CancelledError:
            self._flow.abort()
            if not stalled:
                raise
            raise BackupFailed(f"nothing was read or stored for {self._settings.stall_s:g} s") from None
        except BaseException:
            self._flow.abort()
            raise
        finally:
            looking.cancel()
            self._progress.read_bytes = self._flow.read_bytes


async def _all(works: list[Awaitable[None]]) -> None:
    """Of several workers the first failure ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
