"""After a promotion: what the old primary never archived, and the new one has; and what nobody has put there.

A standby marks every segment that it receives as archived, because its primary was to do it. What a crashed primary had
not archived yet, Postgres therefore never asks for again: without this, recovery to a time after it is impossible.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from instance_manager.archive.accepted import Verdict, switch_position, verdict_on
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import Orders
from instance_manager.archive.push import Pusher
from instance_manager.archive.upload import NotArchived
from instance_manager.archive.wal_names import Segment, SegmentSize, wal_kind
from instance_manager.core.types import Timeline, TimelineChain
from instance_manager.ports import ObjectStore
from instance_manager.postgres.histories import history_file_name

log = logging.getLogger("instance_manager.archive.backfill")

GAPS_TOLD_MAX = 100


@dataclass(frozen=True, slots=True)
class Backfilled:
    """What came of it."""

    uploaded: tuple[str, ...]
    gaps: tuple[str, ...]
    """Histories and segments of the accepted history that are neither in the archive nor here; segments of the last 4 GiB
    and as far back as pg_wal goes; the first `GAPS_TOLD_MAX`."""


def segments_between(chain: TimelineChain, oldest: Segment, size: SegmentSize) -> list[Segment]:
    """The segments that the accepted history went through from `oldest` until the current timeline began, in order.

    The segment of a fork is not among them: the next timeline's first one begins with what counts of it.
    """
    found = []
    number, timeline = oldest.number, oldest.timeline
    while (left_at := switch_position(chain, timeline)) is not None:
        behind = left_at // size.size_bytes
        found += [Segment(timeline, each) for each in range(number, behind)]
        number = max(number, behind)
        timeline = next(switch.timeline for switch in chain.switches if switch.parent == timeline)
    return found


async def archived_segments(
    store: ObjectStore, layout: Layout, size: SegmentSize, timelines: list[Timeline], first: int, *, deadline_s: float
) -> set[str]:
    """Names of the whole segments of these timelines in the archive, from the number `first` on."""
    found = set()
    for timeline in timelines:
        after = layout.wal_stem(size.name(Segment(timeline, first)))[:-1]
        async for entry in store.entries(f"{layout.wals}{timeline:08X}", after=after, deadline_s=deadline_s):
            name = layout.wal_of(entry.name)
            if name is not None and wal_kind(name) == "segment":
                found.add(name)
    return found


def local_segments(wal_directory: Path, orders: Orders, chain: TimelineChain) -> list[str]:
    """Segments of earlier accepted timelines in pg_wal, in order. OSError. Blocks on the disk."""
    found = []
    with os.scandir(wal_directory) as entries:
        for entry in entries:
            try:
                is_wanted = wal_kind(entry.name) == "segment" and int(entry.name[:8], 16) < chain.current
                if is_wanted and verdict_on(entry.name, orders.size, chain) is Verdict.ARCHIVE:
                    found.append(entry.name)
            except ValueError:
                continue
    return sorted(found, key=lambda name: orders.size.parse(name).number)


async def backfill(
    store: ObjectStore, layout: Layout, pusher: Pusher, orders: Orders, local: list[str], *, deadline_s: float
) -> Backfilled:
    """Upload what of `local` the archive lacks, and name what is missing then. NotArchived; ObjectStoreError; OSError."""
    chain = orders.chain
    if chain is None or not chain.switches:
        return Backfilled((), ())
    timelines = [chain.first, *(switch.timeline for switch in chain.switches)]
    # 4 GiB of log before the oldest that is here: further back nothing can be brought, and a long archive is not listed.
    oldest = orders.size.parse(local[0]).number if local else chain.switches[-1].switch_lsn // orders.size.size_bytes
    first = max(0, oldest - orders.size.per_log)
    there = await archived_segments(store, layout, orders.size, timelines, first, deadline_s=deadline_s)
    uploaded, lost = [], await _bring_histories(pusher, orders, chain)
    for name in local:
        if name not in there:
            try:
                await pusher.upload_again(name, orders)
            except NotArchived as error:
                # A file that is not what its name says: recycled, or damaged. It then counts as missing.
                log.warning("%s cannot be archived from here: %s", name, error)
                continue
            uploaded.append(name)
            there.add(name)
    in_chain = sorted(
        orders.size.parse(name) for name in there if verdict_on(name, orders.size, chain) is Verdict.ARCHIVE
    )
    if not in_chain:
        return Backfilled(tuple(uploaded), tuple(lost))
    wanted = segments_between(chain, in_chain[0], orders.size)
    gaps = lost + [name for segment in wanted if (name := orders.size.name(segment)) not in there]
    return Backfilled(tuple(uploaded), tuple(gaps[:GAPS_TOLD_MAX]))


async def _bring_histories(pusher: Pusher, orders: Orders, chain: TimelineChain) -> list[str]:
    """The histories of all accepted timelines go out; those that are nowhere.

    A timeline that began and ended within one segment has no file of its own whose push would bring its history (random trial 48),
    and recovery stops where an accepted one is missing.
    """
    lost = []
    for switch in chain.switches:
        try:
            await pusher.ensure_history(switch.timeline, orders)
        except NotArchived as error:
            log.warning("%s", error)
            lost.append(history_file_name(switch.timeline))
    return lost
