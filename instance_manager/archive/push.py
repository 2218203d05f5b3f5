"""WAL push: what `archive_command` asks for, and what it will ask for next.

Postgres asks for one file at a time. While that one goes out, the files behind it, found by counting up their names, go out
too, and are acknowledged one by one when they are asked for, or before that by receipts (`receipts`). What is known of them
is of this process only, and belongs to the very file: after a crash everything is asked again and found in the archive. A failure of a file that was not asked for is
nobody's until it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from instance_manager.archive.accepted import Verdict, history_until, verdict_on
from instance_manager.archive.counters import PushCounters
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import Orders
from instance_manager.archive.receipts import Receipts
from instance_manager.archive.stores.patience import without_tracebacks
from instance_manager.archive.upload import ArchiveConflict, NotArchived, Prepared, Uploader, file_identity, prepare
from instance_manager.archive.wal_names import timeline_of, wal_kind
from instance_manager.core.types import Timeline, format_lsn
from instance_manager.ports import ObjectStore, ObjectStoreError
from instance_manager.postgres.histories import ends_as, history_file_name, read_history
from instance_manager.threads import Threads, monotonic_s

log = logging.getLogger("instance_manager.archive.push")

PREPARE_DEADLINE_S = 60.0
WINDOW_FOR_EACH_UPLOAD = 4
HELD_BACK_S = 0.2
"""At most, for an answer: at 40 segments a second half a window of receipts takes as long."""
WAITING_MAX_BYTES = 4 << 20
"""What takes more memory is not put aside for its upload's turn: what is held stays within `parallel` segments and a little."""
Identity = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Begun:
    identity: Identity
    task: asyncio.Task[None] | None
    """None: it has failed."""

    @property
    def is_over(self) -> bool:
        return self.task is None or self.task.done()


class Pusher:
    """One per archiver. `push` is called by one or several callers; each file is uploaded by one task only."""

    def __init__(
        self,
        wal_directory: Path,
        store: ObjectStore,
        layout: Layout,
        uploader: Uploader,
        counters: PushCounters,
        *,
        parallel: int,
        ensure_archive: Callable[[Orders], Awaitable[None]],
        receipts: Receipts,
        on_durable: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._wal_directory = wal_directory
        self._store = store
        self._layout = layout
        self._uploader = uploader
        self._counters = counters
        # More than there are processors only take each other's caches and memory.
        preparing = min(parallel, len(os.sched_getaffinity(0)))
        self._preparing = asyncio.Semaphore(preparing)
        self._uploading = asyncio.Semaphore(parallel)
        self._window = WINDOW_FOR_EACH_UPLOAD * parallel
        self._ensure_archive = ensure_archive
        self._receipts = receipts
        self._asked: set[str] = set()
        """Somebody waits for their answers."""
        self._one_is_over = asyncio.Event()
        self._on_durable = on_durable
        self._begun: dict[str, _Begun] = {}
        self._histories: set[Timeline] = set()
        self._history_turn = asyncio.Lock()
        self._threads = Threads("compression", kept_max=preparing)

    async def push(self, name: str) -> None:
        """Returns when `name` is durable in the archive, or proven to be no part of the accepted history.

        NotArchived: what Postgres's log is to say; it will ask again.
        """
        try:
            await self._push(name)
        except ValueError as error:
            raise self._refused(NotArchived(str(error))) from error
        except (ObjectStoreError, OSError) as error:
            raise self._refused(NotArchived(f"{name}: {error}")) from error
        except NotArchived as error:
            raise self._refused(error) from None

    async def ensure_history(self, timeline: Timeline, orders: Orders) -> None:
        """The history of `timeline` is durable in the archive when it returns. NotArchived; ObjectStoreError; OSError."""
        await self._ensure_history(timeline, "the unfinished segment", orders)

    async def upload_again(self, name: str, orders: Orders) -> None:
        """A segment that Postgres does not ask for (`backfill`); durable when it returns. NotArchived; ObjectStoreError."""
        self._uploader.require_permit(orders.epoch)
        await self._ensure_archive(orders)
        await self._upload_in_turn(name, orders)

    async def close(self) -> None:
        """Cancel what is under way; nothing of it has been acknowledged."""
        tasks = [begun.task for begun in self._begun.values() if begun.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _push(self, name: str) -> None:
        wal_kind(name)
        orders = self._uploader.require_permit()
        await self._ensure_archive(orders)
        if self._is_left_out(name, orders):
            return
        task = self._begin(name, orders)
        self._asked.add(name)
        self._look_ahead(name, orders)
        try:
            # Shielded: an impatient client does not end the upload that its next one will ask for.
            await asyncio.shield(task)
            await self._collect_receipts(name)
        finally:
            self._asked.discard(name)
            self._receipts.withdraw(name)
            begun = self._begun.get(name)
            if begun is not None and begun.task in (task, None) and task.done():
                del self._begun[name]
            del task
        self._counters.last_archived = name

    async def _collect_receipts(self, name: str) -> None:
        """Hold the answer back a little while files behind `name` become durable: so one client's start is enough for several."""
        if not self._receipts.are_given or wal_kind(name) != "segment":
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELD_BACK_S):
                while self._receipts.count < self._window // 2 and self._are_under_way_behind(name):
                    self._one_is_over.clear()
                    await self._one_is_over.wait()

    def _are_under_way_behind(self, name: str) -> bool:
        return any(each > name and not begun.is_over for each, begun in self._begun.items())

    def note_taken(self, name: str) -> None:
        """`archive_command` has acknowledged it by its receipt."""
        self._begun.pop(name, None)
        self._counters.look_ahead_hits += 1
        self._counters.last_archived = name
        with contextlib.suppress(NotArchived):
            self._look_ahead(name, self._uploader.require_permit())

    def _is_left_out(self, name: str, orders: Orders) -> bool:
        verdict = verdict_on(name, orders.size, orders.chain)
        if verdict is Verdict.NOT_YET:
            raise NotArchived(f"{name} is of a timeline that the agent has not told of yet")
        is_empty_history = wal_kind(name) == "history" and (self._wal_directory / name).stat().st_size == 0
        if verdict is Verdict.ARCHIVE and not is_empty_history:
            return False
        self._counters.past_the_fork += 1
        where = "the history of a dead end" if is_empty_history else f"not part of {_told(orders)}"
        log.warning("%s is not archived: it is %s", name, where)
        return True

    def _begin(self, name: str, orders: Orders) -> asyncio.Task[None]:
        identity = file_identity(self._wal_directory / name)
        begun = self._begun.get(name)
        if begun is not None and begun.task is not None and begun.identity == identity and not _has_failed(begun.task):
            self._counters.look_ahead_hits += begun.task.done()
            return begun.task
        task = asyncio.create_task(self._send(name, identity, orders), name=f"archive {name}")
        self._begun[name] = _Begun(identity, task)
        task.add_done_callback(partial(self._look_at_outcome, name, identity))
        return task

    def _look_at_outcome(self, name: str, identity: Identity, task: asyncio.Task[None]) -> None:
        self._one_is_over.set()
        if not _has_failed(task):
            return
        if not task.cancelled() and isinstance(error := task.exception(), NotArchived | ObjectStoreError | OSError):
            without_tracebacks(error)
        begun = self._begun.get(name)
        if begun is not None and begun.task is task:
            self._begun[name] = _Begun(identity, None)

    def _look_ahead(self, name: str, orders: Orders) -> None:
        """Begin files behind `name` that are ready, as far as the window allows: one look at the disk for each new one."""
        if wal_kind(name) != "segment":
            return
        for behind in [each for each, begun in self._begun.items() if each < name and begun.is_over]:
            del self._begun[behind]  # Postgres asks in order: nobody will
            self._receipts.withdraw(behind)
        following = name
        for _ in range(self._window - 1):
            following = orders.size.next_name(following)
            begun = self._begun.get(following)
            if begun is not None:
                continue
            if len(self._begun) >= 2 * self._window or not self._is_ready(following):
                return
            if verdict_on(following, orders.size, orders.chain) is not Verdict.ARCHIVE:
                return
            try:
                self._begin(following, orders)
            except OSError as error:
                log.debug("%s cannot be sent ahead: %s", following, error)
                return

    def _is_ready(self, name: str) -> bool:
        return (self._wal_directory / "archive_status" / f"{name}.ready").exists()

    async def _send(self, name: str, identity: Identity, orders: Orders) -> None:
        await self._upload_in_turn(name, orders)
        if name not in self._asked and self._uploader.are_standing(orders):
            await self._receipts.give(name, modified_ns=identity[2])

    async def _upload_in_turn(self, name: str, orders: Orders) -> None:
        """The processor works on the next file while the store is waited for."""
        async with contextlib.AsyncExitStack() as preparing:
            await preparing.enter_async_context(self._preparing)
            await self._ensure_history(timeline_of(name), name, orders)
            prepared = await self._prepared(name, orders)
            if prepared.held_bytes <= WAITING_MAX_BYTES:
                await preparing.aclose()
            async with self._uploading:
                await self._create(name, prepared, orders)

    async def _upload(self, name: str, orders: Orders) -> None:
        await self._create(name, await self._prepared(name, orders), orders)

    async def _create(self, name: str, prepared: Prepared, orders: Orders) -> None:
        if wal_kind(name) == "history":
            await asyncio.to_thread(self._check_accepted, name, orders)
        try:
            is_new = await self._uploader.create(self._layout.wal(name), prepared, orders.epoch)
        except ArchiveConflict as conflict:
            if wal_kind(name) != "partial":
                log.error("%s", conflict)  # noqa: TRY400 - the text says it all
                raise
            # Two promotions may leave one timeline at different places: nobody asks for either by name.
            sha256 = await asyncio.to_thread(prepared.file_sha256, self._layout.codec)
            is_new = await self._uploader.create(self._layout.other_partial(name, sha256), prepared, orders.epoch)
            self._counters.other_partials += 1
        if is_new:
            self._counters.archived += 1
            self._counters.wal_bytes += prepared.file_bytes
        else:
            self._counters.already_there += 1
        if wal_kind(name) == "history":
            self._histories.add(timeline_of(name))
        self._on_durable(name)

    def _check_accepted(self, name: str, orders: Orders) -> None:
        """A timeline of the accepted history has that history, and no other that happens to bear its number."""
        wanted = () if orders.chain is None else history_until(orders.chain, timeline_of(name))
        if wanted and not ends_as(read_history(self._wal_directory, timeline_of(name)), wanted):
            raise NotArchived(f"{name} is not the history that was accepted for its timeline: {_told(orders)}")

    async def _prepared(self, name: str, orders: Orders) -> Prepared:
        path = self._wal_directory / name
        began_s = monotonic_s()
        try:
            return await self._threads.call(
                lambda: prepare(path, name, self._layout.codec, orders.size, orders.system),
                deadline_s=PREPARE_DEADLINE_S,
            )
        except TimeoutError:
            raise NotArchived(f"{name}: not read within {PREPARE_DEADLINE_S:g} s: is the disk stalled?") from None
        finally:
            self._counters.prepare_seconds += monotonic_s() - began_s

    async def _ensure_history(self, timeline: Timeline, name: str, orders: Orders) -> None:
        """No file of a timeline goes out before its history: without that recovery never finds the timeline."""
        if timeline == 1 or timeline in self._histories:
            return
        async with self._history_turn:
            history = history_file_name(timeline)
            if timeline in self._histories or name == history:
                return
            if (self._wal_directory / history).exists():
                await self._upload(history, orders)
                return
            if await self._store.info(self._layout.wal(history), deadline_s=self._uploader.attempt_s) is None:
                raise NotArchived(
                    f"{name} waits: {history}, which must be archived first, is neither in pg_wal nor in the archive"
                )
            self._histories.add(timeline)

    def _refused(self, error: NotArchived) -> NotArchived:
        self._counters.refused += 1
        self._counters.last_error = str(error)
        return error


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _told(orders: Orders) -> str:
    if orders.chain is None:
        return "the accepted history"
    left = ", ".join(f"{switch.parent} until {format_lsn(switch.switch_lsn)}" for switch in orders.chain.switches)
    return f"the accepted history (timelines {left + ', ' if left else ''}{orders.chain.current})"
