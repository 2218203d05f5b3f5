"""Carries out what retention decided: backups first, each by its safe order, and the log that nobody needs then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from instance_manager.archive.backup.catalogue import Listed, list_backups
from instance_manager.archive.backup.floor import raise_floor, replace_floors, take_floor_back
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.removal import BackupKept, delete_backup
from instance_manager.archive.backup.retention import Expiry, Policy, WalNeeded, expiry, wal_needed
from instance_manager.archive.layout import Layout
from instance_manager.archive.tail import chain_of_archive
from instance_manager.archive.wal_names import SegmentSize, wal_kind
from instance_manager.ports import ObjectStore

log = logging.getLogger("instance_manager.archive.backup")

DEADLINE_S = 60.0
NAMES_KEPT_MAX = 100_000
"""Of WAL objects that one run deletes; the next goes on."""
LOOK_EVERY = 500
"""After so many deletions the backups are looked at anew, for one that is kept meanwhile. Begun ones are `floor`'s."""


@dataclass(frozen=True, slots=True)
class Doomed:
    """What a run would delete, for people to see before."""

    expiry: Expiry
    backups: tuple[str, ...]
    wal_objects: tuple[str, ...]
    wal_bytes: int


async def foresee(store: ObjectStore, layout: Layout, policy: Policy) -> Doomed:
    """Nothing is deleted. RetentionRefused; ObjectStoreError."""
    listed = await list_backups(store, layout, deadline_s=DEADLINE_S)
    chain = await chain_of_archive(store, layout, deadline_s=DEADLINE_S)
    decided = expiry(listed, policy, chain)
    size = _segment_size(listed)
    names: list[str] = []
    size_bytes = 0
    if decided.wal is not None and size is not None:
        found = await _unneeded(store, layout, size, decided.wal)
        names, size_bytes = [name for _, name, _ in found], sum(each for _, _, each in found)
    return Doomed(decided, tuple(each.backup_id for each in decided.backups), tuple(names), size_bytes)


async def expire(
    store: ObjectStore, layout: Layout, policy: Policy, *, tell: Callable[[str], None] = lambda _: None
) -> Doomed:
    """Delete it. RetentionRefused: nothing was; ObjectStoreError: go on with another run, nothing is half."""
    doomed = await foresee(store, layout, policy)
    for backup_id in doomed.backups:
        try:
            await delete_backup(store, BackupNames(layout, backup_id), deadline_s=DEADLINE_S)
        except BackupKept as error:
            tell(str(error))
            continue
        tell(f"backup {backup_id} is deleted")
    names, size_bytes = await _expire_wal(store, layout)
    if names:
        tell(f"{len(names)} WAL objects ({size_bytes >> 20} MiB) are deleted, the last {names[-1].rpartition('/')[2]}")
    return Doomed(doomed.expiry, doomed.backups, tuple(names), size_bytes)


async def _expire_wal(store: ObjectStore, layout: Layout) -> tuple[list[str], int]:
    """What was deleted, and its bytes; from the oldest on: what is left never has a gap but at its beginning."""
    deleted: list[str] = []
    size_bytes = 0
    needed, size = await _needed_now(store, layout)
    unneeded = [] if needed is None or size is None else await _unneeded(store, layout, size, needed)
    if needed is None or not unneeded:
        return deleted, size_bytes
    # Only behind it is looked at what decides: a backup that is begun after that look sees the floor, and gives way.
    floor = await raise_floor(store, layout, needed.from_number, deadline_s=DEADLINE_S)
    while unneeded:
        # Looked at anew: another may have been kept or begun meanwhile, and the log must be there for it.
        needed, _ = await _needed_now(store, layout)
        if needed is None:
            break
        part, unneeded = unneeded[:LOOK_EVERY], unneeded[LOOK_EVERY:]
        for number, name, object_bytes in part:
            if not needed.holds(number):
                await store.delete(name, deadline_s=DEADLINE_S)
                deleted.append(name)
                size_bytes += object_bytes
    if deleted:
        await replace_floors(store, layout, floor, deadline_s=DEADLINE_S)
    else:
        await take_floor_back(store, floor, deadline_s=DEADLINE_S)
    return deleted, size_bytes


async def _needed_now(store: ObjectStore, layout: Layout) -> tuple[WalNeeded | None, SegmentSize | None]:
    listed = await list_backups(store, layout, deadline_s=DEADLINE_S)
    return wal_needed(listed), _segment_size(listed)


def _segment_size(listed: tuple[Listed, ...]) -> SegmentSize | None:
    sizes = {each.info.segment_bytes for each in listed if each.info is not None}
    return SegmentSize(sizes.pop()) if len(sizes) == 1 else None


async def _unneeded(
    store: ObjectStore, layout: Layout, size: SegmentSize, needed: WalNeeded
) -> list[tuple[int, str, int]]:
    """Segments, partial ones, labels and what forks have left of any, as (number, name, bytes), by number; histories stay for ever."""
    found: list[tuple[int, str, int]] = []
    for folder in (layout.wals, layout.all_pieces, layout.other_partials):
        async for entry in store.entries(folder, deadline_s=DEADLINE_S):
            name = layout.wal_of(entry.name) if folder == layout.wals else layout.segment_of_leftover(entry.name)
            if name is None or wal_kind(name) == "history":
                continue
            number = size.parse(name).number
            if not needed.holds(number):
                found.append((number, entry.name, entry.size_bytes))
                if len(found) >= NAMES_KEPT_MAX:
                    return sorted(found)
    return sorted(found)
