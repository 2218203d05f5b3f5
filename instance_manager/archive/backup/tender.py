"""The archiver's part in backups: takes what is asked for where it is best placed, ends what is dead, and expires.

A standby that streams takes a request at once; a primary only after nobody else did for a while. Backups are rare: one at a
time. They share the archiver's process, its store and its processor with WAL; `archive.backup.rate_limit_bytes_per_s` bounds what they take.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg

from instance_manager.archive.backup.catalogue import chain_of, holds_anything, list_backups
from instance_manager.archive.backup.copying import BackupFailed, TakeSettings
from instance_manager.archive.backup.expire import expire
from instance_manager.archive.backup.increment_from import could_tell_since
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.removal import discard_backup
from instance_manager.archive.backup.requests import (
    ATTEMPTS_MAX,
    Attempt,
    Beat,
    Begun,
    Claim,
    Ended,
    Open,
    Request,
    Requests,
    Schedule,
    WalWanted,
    outdated,
    scheduled_id,
)
from instance_manager.archive.backup.retention import Policy, RetentionRefused
from instance_manager.archive.backup.summaries import IncrementRefused
from instance_manager.archive.backup.take import OnBackup, take_backup
from instance_manager.archive.counters import BackupProgress, BackupState
from instance_manager.archive.layout import Layout
from instance_manager.archive.lineage import ForeignArchive, read_lineage
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.core.types import Lsn
from instance_manager.ports import ObjectStore, ObjectStoreError
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.sql import session
from instance_manager.threads import monotonic_s
from instance_manager.wall_clock import now_utc, timestamp

log = logging.getLogger("instance_manager.archive.backup")

SMALL_DEADLINE_S = 20.0
PRIMARY_WAITS_S = 20.0
SCHEDULE = "schedule"
"""Who asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenderSettings:
    """When and how."""

    instance: str
    take: TakeSettings
    schedule: Schedule | None = None
    full_every: int = 1
    """Of the scheduled backups; those between are incremental."""
    policy: Policy = Policy()
    poll_s: float = 5.0
    beat_s: float = 10.0
    dead_after_s: float = 90.0
    """A claim whose beats stand still for so long is given up for dead."""
    primary_waits_s: float = PRIMARY_WAITS_S
    """So long a primary leaves a request to the standbys."""


@dataclass(slots=True)
class _Watched:
    """An attempt or a free request, and since when it has looked like that."""

    looks: tuple[int, int]
    since_s: float


class BackupTender:
    """One per archiver; `run` until cancelled."""

    def __init__(
        self,
        settings: TenderSettings,
        server: LocalServer,
        store: ObjectStore,
        layout: Layout,
        orders: OrderBook,
        switch_wal: Callable[[], Awaitable[None]],
        *,
        now_s: Callable[[], float] = monotonic_s,
        now: Callable[[], datetime.datetime] = now_utc,
    ) -> None:
        self._settings = settings
        self._server = server
        self._store = store
        self._layout = layout
        self._orders = orders
        self._switch_wal = switch_wal
        self._now_s = now_s
        self._now = now
        self._requests = Requests(store, layout)
        self._watched: dict[str, _Watched] = {}
        self._switched: set[str] = set()
        self._over: set[str] = set()
        self._is_own: tuple[str, str] | None = None
        self._taking: asyncio.Task[None] | None = None
        self._taken: str | None = None
        """The request for which a backup is taken here now."""
        self.status = BackupState()

    @property
    def over(self) -> frozenset[str]:
        """Requests that are known to be over: another one, and there may be another backup."""
        return frozenset(self._over)

    async def run(self) -> None:
        try:
            while True:
                try:
                    await self.look()
                except (ObjectStoreError, ForeignArchive) as error:
                    log.debug("requests for backups cannot be looked at: %s", error)
                except Exception:
                    # Whatever is wrong with backups must not end the process that archives WAL.
                    log.exception("requests for backups cannot be looked at")
                await asyncio.sleep(self._settings.poll_s)
        finally:
            await self.close()

    async def close(self) -> None:
        """What is being taken is ended, and cleared up."""
        if self._taking is not None and not self._taking.done():
            self._taking.cancel()
            await asyncio.wait({self._taking})

    async def idle(self) -> None:
        """Until nothing is being taken."""
        if self._taking is not None:
            await asyncio.wait({self._taking})

    async def look(self) -> None:
        """One round. A backup that is begun in it goes on beside the next ones, which attend to the others' requests meanwhile.

        ObjectStoreError; ForeignArchive.
        """
        orders = self._orders.current
        if orders is None or not await self._owns(orders):
            return
        await self._ask_when_due()
        requests = await self._requests.listing()
        over = set()
        for request in requests.values():
            if await self._attend(request, orders):
                over.add(request.request_id)
        self._over &= set(requests)
        self._watched = {key: value for key, value in self._watched.items() if key in requests}
        if self._orders.permitted() is not None:
            for request_id in outdated(list(requests), over):
                await self._requests.forget(request_id)

    async def _owns(self, orders: Orders) -> bool:
        """Only in the archive that is this very cluster's: a restored copy touches nothing of its source."""
        whose = (orders.system_identifier, orders.cluster_uid)
        if self._is_own != whose:
            lineage = await read_lineage(self._store, self._layout, deadline_s=SMALL_DEADLINE_S)
            if lineage is None or (lineage.system_identifier, lineage.cluster_uid) != whose:
                return False
            self._is_own = whose
        return True

    async def _ask_when_due(self) -> None:
        schedule = self._settings.schedule
        due = None if schedule is None else schedule.last_due(self._now())
        if due is not None:
            await self._requests.ask(
                scheduled_id(due), Request(None, SCHEDULE, due.isoformat(), incremental=self._settings.full_every > 1)
            )

    async def _attend(self, request: Open, orders: Orders) -> bool:
        """True: it is over. What is to be done for it here is done."""
        if request.request_id == self._taken:
            # Its own task does all for it, also when its beats have not reached the store for long.
            return False
        last = request.last
        if last is None:
            await self._maybe_take(request, 1, orders)
            return False
        if request.request_id in self._over:
            return True
        if last.is_over:
            ended = await self._requests.ended(request.request_id, last.number)
            has_failed = ended is not None and ended.backup_id is None
            is_primary = self._orders.permitted() is not None
            if has_failed and is_primary:
                await self._clear_up(request, last)
            if not has_failed or last.number >= ATTEMPTS_MAX:
                if is_primary or not has_failed:
                    self._over.add(request.request_id)
                return True
            await self._maybe_take(request, last.number + 1, orders)
            return False
        if "wal" in last.kinds:
            await self._finish_segment(request, last)
        if self._stood_still(request, last) > self._settings.dead_after_s:
            await self._bury(request, last)
        return False

    async def _maybe_take(self, request: Open, number: int, orders: Orders) -> None:
        waited_s = self._stood_still(request, Attempt(number))
        is_primary = orders.role == "primary"
        # A standby that has lost its stream would wait for ever for the end of its own backup.
        fit = self._orders.permitted() is not None if is_primary else orders.is_streaming
        if self._taken is not None or not fit or (is_primary and waited_s < self._settings.primary_waits_s):
            return
        if not is_primary and not await self._can_tell_changes(request.request_id):
            # The primary may have the summaries that this one has not, and takes it, or says why not.
            return
        claim = Claim(self._settings.instance, timestamp())
        if await self._requests.claim(request.request_id, number, claim):
            self._taken = request.request_id
            self._taking = asyncio.create_task(self._take_beside(request.request_id, number), name="backup")

    async def _can_tell_changes(self, request_id: str) -> bool:
        """True too where the backup is to be a full one. ObjectStoreError."""
        request = await self._requests.request(request_id)
        on = None if request is None else await self._on(request_id, request, 1)
        if on is None:
            return True
        try:
            async with session(self._server, statement_timeout_s=SMALL_DEADLINE_S) as sql:
                wal = self._server.data_directory / "pg_wal"
                return await could_tell_since(sql, wal, self._store, self._layout, on.parent)
        except (IncrementRefused, LocalPostgresError, asyncpg.PostgresError, OSError) as error:
            log.debug("request %s is left to the primary: %s", request_id, error)
            return False

    async def _on(self, request_id: str, request: Request, number: int) -> OnBackup | None:
        """None: a full one is taken. ObjectStoreError."""
        if not request.incremental:
            return None
        if request.by != SCHEDULE:
            return OnBackup(request.on)
        if number > 1:
            log.warning("request %s: an attempt has failed, and a full backup is taken instead", request_id)
            return None
        listed = await list_backups(self._store, self._layout, deadline_s=SMALL_DEADLINE_S)
        good = [each for each in listed if each.state == "done" and each.info is not None]
        newest = max(good, key=lambda each: each.info.begin_lsn if each.info else 0, default=None)
        # The first one ever, and the first after so many, is a full one.
        return None if newest is None or len(chain_of(listed, newest)) >= self._settings.full_every else OnBackup()

    async def _take_beside(self, request_id: str, number: int) -> None:
        try:
            await self._take(request_id, number)
        except (ObjectStoreError, ForeignArchive) as error:
            self.status.last_error = str(error)
            log.warning("the backup for request %s: %s", request_id, error)
        except Exception:
            # As in `run`.
            log.exception("the backup for request %s", request_id)
        finally:
            self._taken = None

    def _stood_still(self, request: Open, attempt: Attempt) -> float:
        looks = (attempt.number, attempt.beat)
        seen = self._watched.get(request.request_id)
        if seen is None or seen.looks != looks:
            seen = self._watched[request.request_id] = _Watched(looks, self._now_s())
        return self._now_s() - seen.since_s

    async def _take(self, request_id: str, number: int) -> None:
        request = await self._requests.request(request_id)
        on = None if request is None else await self._on(request_id, request, number)
        progress = self.status.running = BackupProgress()
        log.info("taking a backup for request %s", request_id)

        async def begun(backup_id: str) -> None:
            await self._requests.begun(request_id, number, Begun(backup_id))

        async def want_wal(lsn: Lsn) -> None:
            await self._requests.want_wal(request_id, number, WalWanted(lsn))

        taking = asyncio.create_task(
            take_backup(
                self._server,
                self._store,
                self._layout,
                self._settings.take,
                instance=self._settings.instance,
                name=None if request is None else request.name,
                on=on,
                on_begun=begun,
                want_wal=want_wal,
                progress=progress,
            )
        )
        beating = asyncio.create_task(self._beat(request_id, number, progress, taking))
        try:
            taken = await taking
        except BackupFailed as error:
            ended = Ended(None, str(error))
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not taking.cancelled() or (current is not None and current.cancelling()):
                taking.cancel()
                await asyncio.wait({taking})
                raise
            ended = Ended(None, "another instance has taken this one for dead")
        else:
            ended = Ended(taken.info.backup_id, damaged_pages=taken.manifest.damaged_count)
        finally:
            beating.cancel()
            self.status.running = None
        await self._end(request_id, number, ended)

    async def _end(self, request_id: str, number: int, ended: Ended) -> None:
        if not await self._requests.end(request_id, number, ended) and ended.backup_id is not None:
            told = await self._requests.ended(request_id, number)
            if told is not None and told.backup_id != ended.backup_id:
                await discard_backup(
                    self._store, BackupNames(self._layout, ended.backup_id), deadline_s=SMALL_DEADLINE_S
                )
                ended = Ended(None, "another instance has taken this one for dead")
        self.status.last_error, self.status.damaged_pages = ended.error, ended.damaged_pages
        if ended.backup_id is None:
            log.warning("no backup: %s", ended.error)
            return
        self.status.last_backup = ended.backup_id
        log.info("backup %s is complete", ended.backup_id)
        if ended.damaged_pages:
            log.error("backup %s: %d pages have a wrong checksum", ended.backup_id, ended.damaged_pages)
        if self._settings.policy.keeps_all:
            return
        try:
            await expire(self._store, self._layout, self._settings.policy, tell=log.info)
        except RetentionRefused as error:
            self.status.last_error = str(error)
            log.warning("nothing expires: %s", error)

    async def _beat(self, request_id: str, number: int, progress: BackupProgress, taking: asyncio.Task[object]) -> None:
        count = 0
        while True:
            count += 1
            beat = Beat(progress.phase, progress.read_bytes, progress.estimated_bytes)
            with contextlib.suppress(ObjectStoreError):
                await self._requests.beat(request_id, number, count, beat)
                if await self._requests.ended(request_id, number) is not None and not taking.done():
                    taking.cancel()
            await asyncio.sleep(self._settings.beat_s)

    async def _finish_segment(self, request: Open, attempt: Attempt) -> None:
        """The primary: a standby's backup waits for the segment in which it ended."""
        key = f"{request.request_id}/{attempt.number}"
        if self._orders.permitted() is None or key in self._switched:
            return
        try:
            await self._switch_wal()
        except LocalPostgresError as error:
            log.debug("the segment cannot be finished now: %s", error)
        else:
            self._switched.add(key)

    async def _bury(self, request: Open, attempt: Attempt) -> None:
        """Who took it is dead: is there a backup all the same? Else what it left is removed, and the request is free again."""
        begun = await self._requests.begun_of(request.request_id, attempt.number)
        names = None if begun is None else BackupNames(self._layout, begun.backup_id)
        if names is not None and await self._store.info(names.info, deadline_s=SMALL_DEADLINE_S) is not None:
            await self._requests.end(request.request_id, attempt.number, Ended(names.backup_id))
            return
        # Who ends it first decides: an instance that comes back in this moment has a whole backup, or none at all.
        if not await self._requests.end(request.request_id, attempt.number, Ended(None, "its instance fell silent")):
            return
        log.warning("request %s: attempt %d fell silent, and is given up", request.request_id, attempt.number)
        if names is not None:
            await discard_backup(self._store, names, deadline_s=SMALL_DEADLINE_S)

    async def _clear_up(self, request: Open, attempt: Attempt) -> None:
        """What a failed attempt could not remove itself, because the store failed or it was killed: no WAL expires while it is there."""
        begun = await self._requests.begun_of(request.request_id, attempt.number)
        if begun is None:
            return
        names = BackupNames(self._layout, begun.backup_id)
        # A listed one may be another's that got the same id, in the second in which it was free again.
        if await self._store.info(names.info, deadline_s=SMALL_DEADLINE_S) is None and await holds_anything(
            self._store, names, SMALL_DEADLINE_S
        ):
            log.warning("request %s: what attempt %d has left is removed", request.request_id, attempt.number)
            await discard_backup(self._store, names, deadline_s=SMALL_DEADLINE_S)
