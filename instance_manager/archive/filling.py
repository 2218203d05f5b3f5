"""A gap in the archive that only a standby can fill: what the lost primary never archived, and the new one does not hold.

The primary tells of gaps; its standbys look into their own pg_wal and put there what they hold. No permit is needed for it, because
the content of these files was settled before the primary's epoch began: they are segments of timelines that the accepted history has left, before
the fork. Only one server ever wrote them, so whoever sends them, and however late, sends the same bytes; nothing is overwritten.

That a file is whole is proven twice. This server streams the accepted history's current timeline and has replayed past the
last fork, so it has replayed every byte of these segments; and each page of the file says its own position, so a file that was taken
for a later segment meanwhile is seen.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from instance_manager.archive.accepted import history_until
from instance_manager.archive.backfill import archived_segments, local_segments
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.archive.upload import ArchiveConflict, NotArchived, Uploader, file_identity, prepare
from instance_manager.archive.wal_names import timeline_of, wal_kind
from instance_manager.archive.wal_page import WrongSegment, check_pages
from instance_manager.core.types import Lsn, Timeline, TimelineChain
from instance_manager.ports import ObjectStore
from instance_manager.postgres.histories import ends_as, history_file_name, read_history
from instance_manager.threads import Threads

log = logging.getLogger("instance_manager.archive.filling")

T = TypeVar("T")

READ_DEADLINE_S = 60.0
REPLAYED_QUERY = """
SELECT received_tli AS timeline, pg_last_wal_replay_lsn()::text AS lsn FROM pg_stat_wal_receiver
WHERE status = 'streaming' AND pg_is_in_recovery() AND pg_last_wal_replay_lsn() IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a standby that streams has replayed of the log."""

    timeline: Timeline
    """Which it streams."""
    lsn: Lsn


ReplayedPosition = Callable[[], Awaitable[Replayed | None]]
"""Port: asks Postgres; None: it is no standby, or does not stream. LocalPostgresError."""


class GapFiller:
    """One per archiver; works only on a standby, and only while its primary tells of gaps."""

    def __init__(
        self,
        wal_directory: Path,
        store: ObjectStore,
        layout: Layout,
        uploader: Uploader,
        orders: OrderBook,
        replayed: ReplayedPosition,
        *,
        ensure_archive: Callable[[Orders], Awaitable[None]],
    ) -> None:
        self._wal_directory = wal_directory
        self._store = store
        self._layout = layout
        self._uploader = uploader
        self._orders = orders
        self._replayed = replayed
        self._ensure_archive = ensure_archive
        self._threads = Threads("filling")

    async def fill(self) -> tuple[str, ...]:
        """What was brought; nothing where nothing is asked for. NotArchived; ObjectStoreError; OSError; LocalPostgresError: try again."""
        orders = self._orders.current
        if orders is None or not is_asked(orders) or orders.chain is None:
            return ()
        chain = orders.chain
        replayed = await self._replayed()
        if replayed is None or not covers(replayed, chain):
            return ()
        history = await self._in_thread(lambda: read_history(self._wal_directory, chain.current))
        if not ends_as(history, history_until(chain, chain.current)):
            log.warning("nothing is brought to the archive: this server's history is not the accepted one")
            return ()
        await self._ensure_archive(orders)
        brought = [name for name in await self._missing_histories(chain) if await self._bring(name, orders)]
        for name in await self._missing_segments(orders, chain):
            if await self._bring(name, orders):
                brought.append(name)
        if brought:
            log.warning("the primary lacked %d files that are archived from here: %s first", len(brought), brought[0])
        return tuple(brought)

    async def _missing_histories(self, chain: TimelineChain) -> list[str]:
        missing = []
        for switch in chain.switches:
            name = history_file_name(switch.timeline)
            if await self._store.info(self._layout.wal(name), deadline_s=self._uploader.attempt_s) is None:
                missing.append(name)
        return missing

    async def _missing_segments(self, orders: Orders, chain: TimelineChain) -> list[str]:
        local = await self._in_thread(lambda: local_segments(self._wal_directory, orders, chain))
        if not local:
            return []
        timelines = sorted({timeline_of(name) for name in local})
        first = orders.size.parse(local[0]).number
        there = await archived_segments(
            self._store, self._layout, orders.size, timelines, first, deadline_s=self._uploader.attempt_s
        )
        return [name for name in local if name not in there]

    async def _bring(self, name: str, orders: Orders) -> bool:
        """False: the file here is not what its name says, or differs from what is there, or another standby was faster."""
        path = self._wal_directory / name
        try:
            before = await self._in_thread(lambda: self._checked(path, name, orders))
            prepared = await self._in_thread(
                lambda: prepare(path, name, self._layout.codec, orders.size, orders.system)
            )
            after = await self._in_thread(lambda: file_identity(path))
        except (NotArchived, FileNotFoundError) as error:
            log.warning("%s cannot be archived from here: %s", name, error)
            return False
        if after != before:
            log.warning("%s cannot be archived from here: it changed while it was read", name)
            return False
        try:
            return await self._uploader.create(
                self._layout.wal(name), prepared, orders.epoch, allowed=lambda: self._require_same(orders)
            )
        except ArchiveConflict as conflict:
            log.error("%s", conflict)  # noqa: TRY400 - the text says it all
            return False

    def _checked(self, path: Path, name: str, orders: Orders) -> tuple[int, int, int]:
        identity = file_identity(path)
        if wal_kind(name) == "history":
            wanted = () if orders.chain is None else history_until(orders.chain, timeline_of(name))
            if not ends_as(read_history(self._wal_directory, timeline_of(name)), wanted):
                raise NotArchived(f"{name} is not the accepted history of its timeline")
            return identity
        try:
            with path.open("rb") as file:
                check_pages(file, orders.size.parse(name), orders.size, orders.system)
        except WrongSegment as error:
            raise NotArchived(f"{name} is not what its name says: {error}") from error
        return identity

    def _require_same(self, orders: Orders) -> None:
        """NotArchived: the agent has said something else since, be it only another epoch."""
        now = self._orders.current
        if now is None or not is_asked(now) or (now.epoch, now.chain) != (orders.epoch, orders.chain):
            raise NotArchived("the orders have changed: what the archive lacks is looked at anew")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await self._threads.call(work, deadline_s=READ_DEADLINE_S)


def is_asked(orders: Orders) -> bool:
    """A standby that streams, and has promised itself to nobody, whose primary tells of gaps."""
    return orders.role == "standby" and orders.is_streaming and not orders.is_withholding and orders.has_gaps


def covers(replayed: Replayed, chain: TimelineChain) -> bool:
    """Has everything of the timelines that the accepted history has left been replayed here?"""
    return (
        bool(chain.switches)
        and replayed.timeline == chain.current
        and replayed.lsn > max(switch.switch_lsn for switch in chain.switches)
    )
