"""The archiver: its parts put together, its tasks, and its answers over the socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from instance_manager.archive.backfill import backfill, local_segments
from instance_manager.archive.backlog import BacklogWatch, Thresholds
from instance_manager.archive.codecs import Codec, CodecName
from instance_manager.archive.counters import ArchiverStatus, BackfillState
from instance_manager.archive.fetch import MODES, Fetched, Fetcher, FetchSettings, NotFetched
from instance_manager.archive.filling import GapFiller, ReplayedPosition, is_asked
from instance_manager.archive.gate import ArchiveGate
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import OrderBook, Orders, OrdersRefused, parse_orders
from instance_manager.archive.push import Pusher
from instance_manager.archive.receipts import Receipts
from instance_manager.archive.server import ArchiverSocket
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.streaming import FlushedPosition, Streamer, StreamingTask, sweep_pieces
from instance_manager.archive.telling import state_of
from instance_manager.archive.upload import NotArchived, Uploader
from instance_manager.codec import to_json
from instance_manager.core.types import TimelineChain
from instance_manager.ports import ObjectStore, ObjectStoreError
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.threads import TooManyCalls, monotonic_s

log = logging.getLogger("instance_manager.archive")

SPOOL = ".instance-manager-restore"
BACKFILL_INTERVAL_S = 1.0
GAPS_PAUSE_S = 2.0
"""Between two looks whether a standby has brought what is missing; doubled up to `GAPS_PAUSE_MAX_S`: each lists a part of the archive."""
GAPS_PAUSE_MAX_S = 120.0
FILL_PAUSE_S = 2.0
BACKLOG_INTERVAL_S = 2.0
GATE_INTERVAL_S = 1.0
SWEEP_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiverSettings:
    """What the archiver is told at its start; the rest comes as orders."""

    instance: str
    server_name: str
    wal_directory: Path
    socket: Path
    postgres_uid: int | None = None
    receipts: Path | None = None
    """A directory of this process's own, below one of Postgres's; None: `archive_command` asks for each file."""
    codec: CodecName = "zstd"
    level: int | None = None
    parallel: int = 4
    stream_interval_s: float = 1.0
    """0: no streaming."""
    patience: Patience = Patience(total_s=30.0, attempt_s=20.0)
    fetch: FetchSettings = FetchSettings()
    thresholds: Thresholds = field(default_factory=Thresholds)


async def _unknown() -> None:
    return None


class Archiver:
    """One per instance, in a process of its own; `run` until cancelled."""

    def __init__(
        self,
        settings: ArchiverSettings,
        store: ObjectStore,
        flushed: FlushedPosition,
        now_s: Callable[[], float] = monotonic_s,
        *,
        replayed: ReplayedPosition = _unknown,
    ) -> None:
        self._settings = settings
        self._now_s = now_s
        self._store = store
        self.status = ArchiverStatus()
        self.orders = OrderBook(now_s)
        layout = self._layout = self.layout = Layout(settings.server_name, Codec(settings.codec, settings.level))
        gate = self._gate = ArchiveGate(store, layout, settings.codec, self.status)
        self._uploader = Uploader(store, layout, self.orders, settings.instance, settings.patience, self.status.push)
        self._receipts = Receipts(settings.receipts, settings.postgres_uid)
        self.pusher = Pusher(
            settings.wal_directory,
            store,
            layout,
            self._uploader,
            self.status.push,
            parallel=settings.parallel,
            ensure_archive=gate.require_writable,
            receipts=self._receipts,
            on_durable=self._is_durable,
        )
        self.streamer = Streamer(
            settings.wal_directory,
            store,
            layout,
            self._uploader,
            self.status.stream,
            flushed,
            ensure_archive=gate.require_writable,
            ensure_history=self.pusher.ensure_history,
        )
        self.fetcher = Fetcher(
            settings.wal_directory,
            settings.wal_directory / SPOOL,
            store,
            layout,
            self.orders,
            self.status.fetch,
            settings.fetch,
            gate=gate,
        )
        self.filler = GapFiller(
            settings.wal_directory,
            store,
            layout,
            self._uploader,
            self.orders,
            replayed,
            ensure_archive=gate.require_writable,
        )
        self._backlog = BacklogWatch(settings.wal_directory, now_s, settings.thresholds)

    async def run(self) -> None:
        """Serve the socket, watch the backlog, stream. OSError: the socket cannot be bound."""
        handlers = {"push": self._push, "fetch": self._fetch, "orders": self._take_orders, "status": self._tell_status}
        server = ArchiverSocket(
            self._settings.socket,
            handlers,
            postgres_uid=self._settings.postgres_uid,
            owned_verbs=frozenset({"orders"}),
            # An upload goes on for the next who asks; a restored file must find nobody's place.
            ended_with_client=frozenset({"fetch"}),
        )
        try:
            self._receipts.start(self.pusher.note_taken)
        except OSError as error:
            log.warning("archive_command starts a client for each file, which costs more: no receipts: %s", error)
        await server.start()
        log.info("archiver of %s listens at %s", self._settings.instance, self._settings.socket)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._open_gate(), name="gate")
                tasks.create_task(self._watch_backlog(), name="backlog")
                tasks.create_task(self._sweep(), name="sweep")
                tasks.create_task(self._backfill(), name="backfill")
                tasks.create_task(self._fill(), name="filling")
                if self._settings.stream_interval_s > 0:
                    task = StreamingTask(self.streamer, self._settings.stream_interval_s, self._is_behind)
                    tasks.create_task(task.run(), name="streaming")
        finally:
            await server.close()
            self._receipts.close()
            await self.pusher.close()
            await self.fetcher.close()
            await self._store.close()

    async def _push(self, words: list[str]) -> str:
        if len(words) != 1:
            return "failed push takes one name"
        try:
            await self.pusher.push(words[0])
        except NotArchived as error:
            self.status.push_trouble = str(error)
            return f"failed {error}"
        self.status.push_trouble = ""
        return "done"

    async def _fetch(self, words: list[str]) -> str:
        if len(words) != 3 or words[0] not in MODES:
            return f"failed fetch takes a mode ({', '.join(MODES)}), a name and a path"
        mode = next(each for each in MODES if each == words[0])
        try:
            answer = await self.fetcher.fetch(mode, words[1], Path(words[2]))
        except NotFetched as error:
            return f"failed {error}"
        return "done" if answer is Fetched.PRESENT else "absent"

    async def _take_orders(self, words: list[str]) -> str:
        before = self.orders.current
        try:
            self.orders.take(orders := parse_orders("\t".join(words)))
        except OrdersRefused as error:
            return f"failed {error}"
        if before is not None and before.standing != orders.standing:
            self._receipts.withdraw_all()
        state = state_of(self.status, self.orders.permitted(), self._now_s())
        return f"done {to_json(state).decode()}"

    async def _tell_status(self, words: list[str]) -> str:
        return to_json(self.status).decode()

    async def _open_gate(self) -> None:
        """A wrong archive is told when the primary starts, not with its first segment, which would also wait for it."""
        while True:
            orders = self.orders.permitted()
            if orders is not None:
                with contextlib.suppress(NotArchived):  # it is in the status
                    await self._gate.require_writable(orders)
            else:
                self._receipts.withdraw_all()
            await asyncio.sleep(GATE_INTERVAL_S)

    async def _watch_backlog(self) -> None:
        level = "calm"
        while True:
            try:
                archives = self.orders.permitted() is not None
                self.status.backlog = await asyncio.to_thread(self._backlog.look, archives=archives)
            except OSError as error:
                log.debug("pg_wal cannot be looked at: %s", error)
            if self.status.backlog.level != level:
                level = self.status.backlog.level
                log.warning("archiving is %s: %d files wait", level, self.status.backlog.ready)
            await asyncio.sleep(BACKLOG_INTERVAL_S)

    async def _backfill(self) -> None:
        """Once for each timeline of this primary, tried until it is done; and again while there are gaps, which a standby may fill."""
        done_for, pause_s = None, GAPS_PAUSE_S
        while True:
            await asyncio.sleep(BACKFILL_INTERVAL_S)
            orders = self.orders.permitted()
            if orders is None or orders.chain is None:
                continue
            if orders.chain == done_for:
                if not self.status.backfill.gaps:
                    continue
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, GAPS_PAUSE_MAX_S)
            else:
                pause_s = GAPS_PAUSE_S
            try:
                await self.backfill_once(orders, orders.chain)
            except (NotArchived, ObjectStoreError, OSError, TooManyCalls) as error:
                self.status.backfill.last_error = str(error)
                log.warning("what the last primary did not archive cannot be looked for: %s", error)
            else:
                done_for = orders.chain

    async def backfill_once(self, orders: Orders, chain: TimelineChain) -> None:
        """NotArchived; ObjectStoreError; OSError: try again."""
        local = await asyncio.to_thread(local_segments, self._settings.wal_directory, orders, chain)
        attempt_s = self._settings.patience.attempt_s
        done = await backfill(self._store, self._layout, self.pusher, orders, local, deadline_s=attempt_s)
        before = self.status.backfill
        if done.gaps and done.gaps != before.gaps:
            log.error(
                "the archive has gaps: %d files are missing, %s first; the standbys are asked",
                len(done.gaps),
                done.gaps[0],
            )
        uploaded = len(done.uploaded) + (before.uploaded if before.epoch == orders.epoch else 0)
        self.status.backfill = BackfillState(orders.epoch, uploaded, done.gaps, before.brought)

    async def _fill(self) -> None:
        """On a standby: what its primary cannot bring to the archive; more and more rarely where this does not help."""
        loop = asyncio.get_running_loop()
        asked_by: tuple[int, TimelineChain | None] | None = None
        pause_s, due_s = FILL_PAUSE_S, 0.0
        while True:
            await asyncio.sleep(FILL_PAUSE_S)
            orders = self.orders.current
            asking = (orders.epoch, orders.chain) if orders is not None and is_asked(orders) else None
            if asking != asked_by:
                asked_by, pause_s, due_s = asking, FILL_PAUSE_S, 0.0
            if asking is None or loop.time() < due_s:
                continue
            due_s, pause_s = loop.time() + pause_s, min(2 * pause_s, GAPS_PAUSE_MAX_S)
            try:
                brought = await self.filler.fill()
            except (NotArchived, ObjectStoreError, LocalPostgresError, OSError, TooManyCalls) as error:
                log.info("what the primary lacks cannot be brought to the archive now: %s", error)
            else:
                self.status.backfill.brought += len(brought)

    async def _sweep(self) -> None:
        """What crashes have left of streamed segments; never in the way of anything."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            if self.orders.permitted() is None:
                continue
            try:
                removed = await sweep_pieces(
                    self._store, self._layout, self.streamer.current_name, deadline_s=self._settings.patience.attempt_s
                )
            except ObjectStoreError as error:
                log.info("pieces of finished segments could not be looked for: %s", error)
            else:
                self.status.stream.removed += removed

    def _is_durable(self, name: str) -> None:
        self.streamer.segment_is_durable(name)

    def _is_behind(self) -> bool:
        return self.status.backlog.level != "calm"
