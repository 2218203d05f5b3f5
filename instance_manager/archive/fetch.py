"""WAL fetch: what `restore_command` asks for. "Absent" ends a recovery and promotes, so it is said only when proven.

| mode | asked by | segments | errors |
|---|---|---|---|
| standby | a standby without a stream | ahead of need, cut at the fork | "not now": it will ask again |
| recovery | recovery from the archive alone | the same, and the unfinished tail | Postgres must stop, and resume later |
| rewind | pg_rewind, for its own old log | one by one, never cut | pg_rewind must stop |
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instance_manager.archive.accepted import Served, served_part
from instance_manager.archive.counters import FetchCounters
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.archive.prefetch import Prefetch
from instance_manager.archive.restore_file import Expected, RestoreFile, restore_wal
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
    """The two answers that are not an error."""

    PRESENT = "present"
    ABSENT = "absent"


class NotFetched(Exception):
    """Whether the file is in the archive is not known, or it cannot be used; the text is for Postgres's log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSettings:
    """How long and how much."""

    standby: Patience = Patience(total_s=10.0, attempt_s=8.0, attempts_max=2)
    recovery: Patience = Patience(total_s=120.0, attempt_s=20.0, attempts_max=30)
    parallel: int = 4
    prefetch_bytes: int = 128 << 20


class Fetcher:
    """One per archiver."""

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
        require_archive: Callable[[Orders], Awaitable[None]],
    ) -> None:
        self._wal_directory = wal_directory
        self._store = store
        self._layout = layout
        self._orders = orders
        self._counters = counters
        self._settings = settings
        self._require_archive = require_archive
        self._prefetch = Prefetch(spool, parallel=settings.parallel)
        self._absent_until_s: dict[str, float] = {}
        self._found_chain: TimelineChain | None = None

    async def fetch(self, mode: Mode, name: str, destination: Path) -> Fetched:
        """PRESENT: `destination` is the file, whole and verified. ABSENT: proven, or withheld. NotFetched."""
        try:
            answer = await self._fetch(mode, name, self._checked(destination))
        except (ValueError, GapInArchive) as error:
            raise self._failed(str(error)) from error
        except (ObjectStoreError, OSError) as error:
            self._counters.damaged += isinstance(error, ContentDamaged)
            raise self._failed(f"{name}: {error}") from error
        except NotFetched as error:
            raise self._failed(str(error)) from None
        if answer is Fetched.ABSENT:
            self._counters.absent += 1
        else:
            self._counters.restored += 1
            self._counters.last_restored = name
        return answer

    async def close(self) -> None:
        await self._prefetch.drop()

    async def _fetch(self, mode: Mode, name: str, destination: Path) -> Fetched:
        kind = wal_kind(name)
        orders = self._orders.current
        if orders is None:
            raise NotFetched("the agent has not told the archiver yet which cluster this is")
        if mode == "standby" and self._is_withheld(name, orders):
            self._counters.withheld += 1
            return Fetched.ABSENT
        patience = self._settings.standby if mode == "standby" else self._settings.recovery
        await patience.call(lambda _: self._require_archive(orders), on_retry=self._count_retry)
        await self._prefetch.prepare()
        target = self._prefetch.file(destination)
        if mode == "rewind" or kind in ("label", "partial"):
            expected = Expected(name, orders.size, orders.system, orders.size.size_bytes)
            return await self._plain(expected, target, patience)
        chain = await self._chain(orders, is_history=kind == "history", patience=patience)
        if kind == "history":
            return await self._history(mode, name, chain, orders, target, patience)
        return await self._segment(mode, name, chain, orders, destination, patience)

    def _is_withheld(self, name: str, orders: Orders) -> bool:
        is_promised = orders.is_withholding and wal_kind(name) == "segment"
        return is_promised or orders.is_streaming or self._absent_until_s.get(name, 0.0) > monotonic_s()

    async def _plain(self, expected: Expected, target: RestoreFile, patience: Patience) -> Fetched:
        found = await patience.call(
            lambda left_s: restore_wal(self._store, self._layout, expected, target, deadline_s=left_s),
            on_retry=self._count_retry,
        )
        return Fetched.PRESENT if found else Fetched.ABSENT

    async def _history(
        self, mode: Mode, name: str, chain: TimelineChain, orders: Orders, target: RestoreFile, patience: Patience
    ) -> Fetched:
        timeline = timeline_of(name)
        if timeline > chain.current or timeline < chain.first:
            return Fetched.ABSENT
        if timeline != chain.first and not chain.knows(timeline):
            # Numbers that no accepted timeline has: Postgres looks for newer ones up to the first that is missing (P4).
            await asyncio.to_thread(target.write, iter(()))
            return Fetched.PRESENT
        expected = Expected(name, orders.size, orders.system, 0)
        answer = await self._plain(expected, target, patience)
        if answer is Fetched.ABSENT and mode == "recovery" and timeline != chain.first:
            raise NotFetched(
                f"{name} is not in the archive, although timeline {timeline} is part of the accepted history"
            )
        return answer

    async def _segment(
        self, mode: Mode, name: str, chain: TimelineChain, orders: Orders, destination: Path, patience: Patience
    ) -> Fetched:
        segment = orders.size.parse(name)
        part = served_part(segment, orders.size, chain)
        if part is None:
            return Fetched.ABSENT
        is_cut = part.bytes < orders.size.size_bytes
        if is_cut:
            await self._prefetch.drop()
            found = await self._get(name, part, orders, destination, patience)
        else:
            found = await self._through_prefetch(segment, chain, orders, destination, patience)
        if found:
            self._counters.cut_at_fork += is_cut
            return Fetched.PRESENT
        if mode == "recovery":
            return await self._tail(segment, part, chain, orders, destination, patience)
        self._absent_until_s = {name: monotonic_s() + _ABSENCE_HOLDS_S}
        return Fetched.ABSENT

    async def _through_prefetch(
        self, segment: Segment, chain: TimelineChain, orders: Orders, destination: Path, patience: Patience
    ) -> bool:
        size = orders.size
        count = max(0, self._settings.prefetch_bytes // size.size_bytes)
        ahead = [Segment(segment.timeline, segment.number + step) for step in range(1, count + 1)]
        names = [size.name(each) for each in ahead if served_part(each, size, chain) == Served(size.size_bytes)]

        def get(name: str, target: Path) -> Awaitable[bool]:
            return self._get(name, Served(size.size_bytes), orders, target, patience)

        name = size.name(segment)
        self._counters.from_prefetch += self._prefetch.has(name)
        return await self._prefetch.take(name, names, destination, get)

    async def _get(self, name: str, part: Served, orders: Orders, target: Path, patience: Patience) -> bool:
        expected = Expected(name, orders.size, orders.system, part.bytes)
        return await self._plain(expected, self._prefetch.file(target), patience) is Fetched.PRESENT

    async def _tail(
        self,
        segment: Segment,
        part: Served,
        chain: TimelineChain,
        orders: Orders,
        destination: Path,
        patience: Patience,
    ) -> Fetched:
        end = ArchiveEnd(self._store, self._layout, orders.size, orders.system, chain)
        await patience.call(lambda left_s: end.require_no_later(segment, deadline_s=left_s), on_retry=self._count_retry)
        target = self._prefetch.file(destination)
        found = await patience.call(
            lambda left_s: end.restore_tail(segment, part.bytes, target, deadline_s=left_s), on_retry=self._count_retry
        )
        if not found:
            return Fetched.ABSENT
        self._counters.joined_tails += 1
        log.info("%s was never finished: what was streamed of it is restored", orders.size.name(segment))
        return Fetched.PRESENT

    async def _chain(self, orders: Orders, *, is_history: bool, patience: Patience) -> TimelineChain:
        """The one that the agent told, else that of the newest timeline in the archive, looked at with each history."""
        if orders.chain is not None:
            return orders.chain
        if self._found_chain is None or is_history:
            self._found_chain = await patience.call(
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

    def _count_retry(self) -> None:
        self._counters.retries += 1
