"""What can be recovered, looked at by the primary's archiver for status and metrics: no decision rests on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime

from instance_manager.archive.backup.catalogue import Listed, is_part_of, list_backups
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.backup.reach import reach
from instance_manager.archive.backup.wal_range import segments_of
from instance_manager.archive.counters import ArchiverStatus, BackupsSeen
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.archive.tail import chain_of_archive
from instance_manager.archive.wal_names import Segment, SegmentSize
from instance_manager.core.types import Timeline, TimelineChain
from instance_manager.ports import ObjectStore, ObjectStoreError
from instance_manager.threads import monotonic_s
from instance_manager.wall_clock import now_utc

log = logging.getLogger("instance_manager.archive.backup")

POLL_S = 5.0
LOOK_EVERY_S = 300.0
"""It lists all of the log in the archive, a request for each thousand segments. After news it looks at once."""
AGAIN_AFTER_S = 20.0
"""After a failure, and where a gap was seen for the first time: segments are sent side by side, and a later one may be there first."""
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Recoverable:
    """A pure summary of what is in the archive."""

    good: int = 0
    newest: BackupInfo | None = None
    oldest: BackupInfo | None = None
    """From which the log goes on without a gap."""
    gap: Segment | None = None
    """Behind the newest."""


def recoverable(
    listed: Sequence[Listed], chain: TimelineChain, size: SegmentSize, there: Mapping[Timeline, Set[int]]
) -> Recoverable:
    """Of backups that are good, part of `chain`, and whose own log is there."""
    found = []
    for info in _good(listed, chain):
        reached = reach(info.begin_segment, chain, size, there)
        last, end = reached.last, info.end_segment
        if last is not None and (last.timeline, last.number) >= (end.timeline, end.number):
            found.append((info, reached.missing))
    if not found:
        return Recoverable()
    whole = [info for info, missing in found if missing is None]
    return Recoverable(len(found), found[-1][0], whole[0] if whole else None, found[-1][1])


def _good(listed: Sequence[Listed], chain: TimelineChain) -> list[BackupInfo]:
    """In the order of the log."""
    infos = [each.info for each in listed if each.state == "done" and each.info is not None]
    return sorted((info for info in infos if is_part_of(info, chain)), key=lambda info: info.begin_lsn)


class BackupWatch:
    """One per archiver; `run` until cancelled. `news`: what it returns changes when there may be another backup."""

    def __init__(
        self,
        store: ObjectStore,
        layout: Layout,
        orders: OrderBook,
        status: ArchiverStatus,
        *,
        news: Callable[[], object],
        now_s: Callable[[], float] = monotonic_s,
        now: Callable[[], datetime] = now_utc,
    ) -> None:
        self._store = store
        self._layout = layout
        self._orders = orders
        self._status = status
        self._news = news
        self._now_s = now_s
        self._now = now
        self._due_s = 0.0
        self._heard: object = None
        self._suspected: Segment | None = None
        """A gap at the last look."""

    async def run(self) -> None:
        while True:
            try:
                await self.look_when_due()
            except Exception:
                # Whatever is wrong here must not end the process that archives WAL.
                log.exception("what can be recovered cannot be looked at")
            await asyncio.sleep(POLL_S)

    async def look_when_due(self) -> None:
        """Nothing where this is no primary, or the archive is not known to be its own."""
        orders = self._orders.permitted()
        if orders is None or self._status.archive != "ok":
            # Another instance's archiver tells now, and what is here grows old.
            self._status.backups, self._due_s, self._suspected = None, 0.0, None
            return
        heard = self._news()
        if self._now_s() < self._due_s and heard == self._heard:
            return
        self._heard = heard
        try:
            self._status.backups = await self._look(orders)
        except ObjectStoreError as error:
            log.info("what can be recovered cannot be looked at: %s", error)
            self._due_s = self._now_s() + AGAIN_AFTER_S
            before = self._status.backups
            if before is not None:
                self._status.backups = replace(before, problem=str(error))

    async def _look(self, orders: Orders) -> BackupsSeen:
        looked_s, looked_at = self._now_s(), self._now()
        listed = await list_backups(self._store, self._layout, deadline_s=DEADLINE_S)
        chain = orders.chain
        if chain is None:
            chain = await chain_of_archive(self._store, self._layout, deadline_s=DEADLINE_S)
        found = recoverable(listed, chain, orders.size, await self._segments(listed, chain, orders.size))
        gap = found.gap
        waits = self._status.backlog.oldest
        if gap is not None and (gap != self._suspected or (waits and orders.size.name(gap) >= waits)):
            # Not yet to be told: it may be on its way.
            self._suspected, told = gap, ""
            self._due_s = self._now_s() + AGAIN_AFTER_S
        else:
            self._suspected, told = gap, "" if gap is None else orders.size.name(gap)
            self._due_s = self._now_s() + LOOK_EVERY_S
        return BackupsSeen(
            looked_s=looked_s,
            looked_at_unix_s=looked_at.timestamp(),
            good=found.good,
            newest="" if found.newest is None else found.newest.backup_id,
            newest_end_unix_s=_end(found.newest),
            recoverable_from_unix_s=_end(found.oldest),
            first_gap=told,
        )

    async def _segments(
        self, listed: Sequence[Listed], chain: TimelineChain, size: SegmentSize
    ) -> dict[Timeline, frozenset[int]]:
        """Of the log from the oldest good backup on, listed once for all of them."""
        infos = _good(listed, chain)
        if not infos:
            return {}
        first = infos[0].begin_segment
        there = {}
        for timeline in (chain.first, *(switch.timeline for switch in chain.switches)):
            if timeline >= first.timeline:
                found = await segments_of(
                    self._store, self._layout, size, timeline, first=first.number, deadline_s=DEADLINE_S
                )
                there[timeline] = frozenset(found)
        return there


def _end(info: BackupInfo | None) -> float | None:
    return None if info is None or info.end_time is None else info.end_time.timestamp()
