"""WAL fetch: what `restore_command` asks for. "Absent" ends a recovery and promotes, so it is said only when proven.

| mode | asked by | segments | errors |
|---|---|---|---|
| standby | a standby without a stream | ahead of need, cut at the fork | "not now": it will ask again |
| recovery | recovery from the archive alone | the same, and the unfinished tail | Postgres must stop, and resume later |
| rewind | pg_rewind, for its own old log | one by one, never cut | pg_rewind must stop |
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instance_manager.archive.accepted import Served, served_part
from instance_manager.archive.counters import FetchCounters
from instance_manager.archive.gate import ArchiveGate
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.archive.prefetch import Get, Place, Prefetch
from instance_manager.archive.restore_file import Expected, restore_wal
from instance_manager.archive.spool import Spool
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.tail import ArchiveEnd, GapInArchive, chain_of_archive
from instance_manager.archive.wal_names import Segment, timeline_of, wal_kind
from instance_manager.core.types import TimelineChain
from instance_manager.ports import ContentDamaged, ObjectStore, ObjectStoreError
from instance_manager.threads import monotonic_s

log = logging.getLogger("instance_manager.archive.fetch")

Mode = Literal["standby", "recovery", "rewind"]
MODES: tuple[Mode, ...] = ("standby", "recovery", "rewind")
_ABSENCE_HOLDS_S = 1.0


class Fetched(enum.Enum):
    """The answers that are not an error."""

    PRESENT = "present"
    ABSENT = "absent"
    IN_PLACE = "in place"
    """It lies in pg_wal under its own name: Postgres is told "not there", and reads it."""


class NotFetched(Exception):
    """Whether the file is in the archive is not known, or it cannot be used; the text is for Postgres's log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSettings:
    """How long and how much."""

    standby: Patience = Patience(total_s=10.0, attempt_s=8.0, attempts_max=2)
    recovery: Patience = Patience(total_s=120.0, attempt_s=20.0, attempts_max=30)
    parallel: int = 4
    prefetch_bytes: int = 128 << 20


@dataclass(frozen=True, slots=True)
class _Request:
    """One question of Postgres, under the orders that held when it came."""

    mode: Mode
    name: str
    orders: Orders
    patience: Patience

    @property
    def whole(self) -> Served:
        return Served(self.orders.size.size_bytes)


class Fetcher:
    """One per archiver. Postgres asks for one file at a time: a new request ends the one before."""

    def __init__(
        self,
        wal_directory: Path,
        spool: Path,
        store: ObjectStore,
        layout: Layout,
        orders: OrderBook,
        counters: FetchCounters,
        settings: FetchSettings,
        *,
        gate: ArchiveGate,
        place: Place | None = None,
        niceness: int = 0,
    ) -> None:
        """`place`: where segments wait that have come ahead of need; None: in the spool. `niceness`: of the threads that write them."""
        self._wal_directory = wal_directory
        self._store = store
        self._layout = layout
        self._orders = orders
        self._counters = counters
        self._settings = settings
        self._gate = gate
        self._spool = Spool(spool, niceness=niceness, is_flushed_soon=place is None)
        self._prefetch = Prefetch(self._spool, parallel=settings.parallel, place=place)
        self._followed: tuple[_Request, TimelineChain] | None = None
        """The last question behind which segments were begun."""
        self._looks_ahead = True
        self._absent_until_s: dict[str, float] = {}
        self._found_chain: TimelineChain | None = None
        self._under_way: asyncio.Task[Path | None] | None = None

    async def fetch(self, mode: Mode, name: str, destination: Path) -> Fetched:
        """PRESENT: `destination` is the file, whole and verified. IN_PLACE. ABSENT: proven, or withheld. NotFetched.

        Cancelled, or followed by another request, it puts nothing at `destination` any more.
        """
        try:
            place = self._checked(destination)
            found = await self._superseding(self._fetch(mode, name))
            is_in_place = found == self._wal_directory / name
            if found is not None and not is_in_place:
                found.replace(place)
        except (ValueError, GapInArchive) as error:
            raise self._failed(str(error)) from error
        except (ObjectStoreError, OSError) as error:
            self._counters.damaged += isinstance(error, ContentDamaged)
            raise self._failed(f"{name}: {error}") from error
        except NotFetched as error:
            raise self._failed(str(error)) from None
        if found is None:
            self._counters.absent += 1
            return Fetched.ABSENT
        if wal_kind(name) == "segment":
            self._prefetch.hand_over(name)
        self._count_restored(name)
        return Fetched.IN_PLACE if is_in_place else Fetched.PRESENT

    def is_coming(self, name: str) -> bool:
        """The segment lies in pg_wal, or is on its way there, and Postgres has not been given it."""
        return self._prefetch.is_coming(name)

    def go_on(self) -> list[str]:
        """The segments that Postgres has taken by itself from where they lay ahead; what is behind them is begun."""
        names = self._prefetch.taken()
        for name in names:
            self._counters.from_prefetch += 1
            self._count_restored(name)
        if names and self._followed is not None:
            request, chain = self._followed
            segment = request.orders.size.parse(names[-1])
            with contextlib.suppress(OSError):  # whoever asks next is told
                self._prefetch.begin(self._behind(segment, request, chain), self._get(request))
        return names

    async def look_ahead(self, looks_ahead: bool) -> None:
        """What is ahead is forgotten; whether more may come ahead from now on."""
        self._looks_ahead = looks_ahead
        self._followed = None
        await self._prefetch.drop()

    async def close(self) -> None:
        await _end(self._under_way)
        await self.look_ahead(self._looks_ahead)

    async def _superseding(self, request: Coroutine[None, None, Path | None]) -> Path | None:
        """A client that was killed leaves its request behind: its file must not take the place of a later one's.

        Nothing may be awaited between the return of this and what is done with the file.
        """
        task = asyncio.create_task(request)
        before, self._under_way = self._under_way, task
        try:
            await _end(before)
            await asyncio.wait({task})
        finally:
            task.cancel()
        if self._under_way is not task or task.cancelled():
            raise NotFetched("another request has come since")
        return task.result()

    async def _fetch(self, mode: Mode, name: str) -> Path | None:
        kind = wal_kind(name)
        orders = self._orders.current
        if orders is None:
            raise NotFetched("the agent has not told the archiver yet which cluster this is")
        if mode == "standby" and self._is_withheld(name, orders):
            self._counters.withheld += 1
            return None
        patience = self._settings.standby if mode == "standby" else self._settings.recovery
        request = _Request(mode, name, orders, patience)
        is_recovery = mode == "recovery"
        await patience.call(
            lambda _: self._gate.require_readable(orders, any_cluster=is_recovery), on_retry=self._count_retry
        )
        await self._spool.prepare()
        if mode == "rewind" or kind in ("label", "partial"):
            return await self._restore(request, name, request.whole)
        chain = await self._chain(request, is_history=kind == "history")
        if kind == "history":
            return await self._history(request, chain)
        return await self._segment(request, chain)

    def _is_withheld(self, name: str, orders: Orders) -> bool:
        is_promised = orders.is_withholding and wal_kind(name) == "segment"
        return is_promised or orders.is_streaming or self._absent_until_s.get(name, 0.0) > monotonic_s()

    async def _restore(self, request: _Request, name: str, part: Served) -> Path | None:
        expected = Expected(name, request.orders.size, request.orders.system, part.bytes)
        return await request.patience.call(
            lambda left_s: restore_wal(self._store, self._layout, expected, self._spool, deadline_s=left_s),
            on_retry=self._count_retry,
        )

    async def _history(self, request: _Request, chain: TimelineChain) -> Path | None:
        timeline = timeline_of(request.name)
        if timeline > chain.current or timeline < chain.first:
            return None
        if timeline != chain.first and not chain.knows(timeline):
            # Numbers that no accepted timeline has: Postgres looks for newer ones up to the first that is missing (P4).
            return await asyncio.to_thread(self._spool.write, request.name, iter(()))
        found = await self._restore(request, request.name, request.whole)
        if found is None and request.mode == "recovery" and timeline != chain.first:
            raise NotFetched(
                f"{request.name} is not in the archive, although timeline {timeline} is part of the accepted history"
            )
        return found

    async def _segment(self, request: _Request, chain: TimelineChain) -> Path | None:
        segment = request.orders.size.parse(request.name)
        part = served_part(segment, request.orders.size, chain)
        if part is None:
            return None
        if part == request.whole:
            found = await self._through_prefetch(request, segment, chain)
        else:
            await self._prefetch.drop()
            await self._spool.prepare()
            found = await self._restore(request, request.name, part)
            self._counters.cut_at_fork += found is not None
        if found is None and request.mode == "recovery":
            return await self._tail(request, segment, part, chain)
        if found is None:
            self._absent_until_s = {request.name: monotonic_s() + _ABSENCE_HOLDS_S}
        return found

    async def _through_prefetch(self, request: _Request, segment: Segment, chain: TimelineChain) -> Path | None:
        self._counters.from_prefetch += self._prefetch.has(request.name)
        self._followed = request, chain
        return await self._prefetch.take(
            request.name, lambda: self._behind(segment, request, chain), self._get(request)
        )

    def _behind(self, segment: Segment, request: _Request, chain: TimelineChain) -> list[str]:
        """The segments behind it that may come ahead of need: of its timeline, and not of what a fork has left. OSError."""
        if not self._looks_ahead:
            return []
        size = request.orders.size
        count = self._prefetch.room_bytes(self._settings.prefetch_bytes) // size.size_bytes
        ahead = [Segment(segment.timeline, segment.number + step) for step in range(1, count + 1)]
        return [size.name(each) for each in ahead if served_part(each, size, chain) == request.whole]

    def _get(self, request: _Request) -> Get:
        return lambda name: self._restore(request, name, request.whole)

    async def _tail(self, request: _Request, segment: Segment, part: Served, chain: TimelineChain) -> Path | None:
        """Recovery ends with what this returns, so the whole archive is looked at once more."""
        orders, patience = request.orders, request.patience
        await patience.call(
            lambda _: self._gate.require_readable(orders, any_cluster=True, again=True), on_retry=self._count_retry
        )
        end = ArchiveEnd(self._store, self._layout, orders.size, orders.system, chain)
        await patience.call(lambda left_s: end.require_no_later(segment, deadline_s=left_s), on_retry=self._count_retry)
        found = await patience.call(
            lambda left_s: end.restore_tail(segment, part.bytes, self._spool, deadline_s=left_s),
            on_retry=self._count_retry,
        )
        if found is not None:
            self._counters.joined_tails += 1
            log.info("%s was never finished: what was streamed of it is restored", request.name)
        return found

    async def _chain(self, request: _Request, *, is_history: bool) -> TimelineChain:
        """The one that the agent told, else that of the newest timeline in the archive, looked at with each history."""
        if request.orders.chain is not None:
            return request.orders.chain
        if self._found_chain is None or is_history:
            self._found_chain = await request.patience.call(
                lambda left_s: chain_of_archive(self._store, self._layout, deadline_s=left_s),
                on_retry=self._count_retry,
            )
        return self._found_chain

    def _checked(self, destination: Path) -> Path:
        """Postgres names a file in pg_wal; nothing else is ever written."""
        if destination.parent.resolve() != self._wal_directory.resolve() or destination.name in ("", ".", ".."):
            raise NotFetched(f"{destination} is not a file in {self._wal_directory}")
        return self._wal_directory / destination.name

    def _failed(self, text: str) -> NotFetched:
        self._counters.failures += 1
        self._counters.last_error = text
        log.warning("not restored: %s", text)
        return NotFetched(text)

    def _count_restored(self, name: str) -> None:
        self._counters.restored += 1
        self._counters.last_restored = name

    def _count_retry(self) -> None:
        self._counters.retries += 1


async def _end(task: asyncio.Task[Path | None] | None) -> None:
    if task is not None and not task.done():
        task.cancel()
        await asyncio.wait({task})
