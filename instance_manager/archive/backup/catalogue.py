"""Which backups are in the archive, what each is worth, and how far the log goes on from it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from instance_manager.archive.backup.info import BackupInfo, InfoInvalid, parse_info
from instance_manager.archive.backup.manifest import Manifest, read_manifest
from instance_manager.archive.backup.names import (
    BackupNames,
    incremental_backups,
    is_backup_id,
    is_incremental_id,
    own_backups,
)
from instance_manager.archive.backup.reach import Reach, reach
from instance_manager.archive.backup.standing import read_mark
from instance_manager.archive.backup.wal_range import segments_of
from instance_manager.archive.content import read_object
from instance_manager.archive.layout import Layout
from instance_manager.archive.tail import chain_of_archive
from instance_manager.core.types import Timeline, TimelineChain, WalEnd
from instance_manager.ports import ContentDamaged, ObjectStore

State = Literal["done", "damaged", "failed", "started", "incomplete", "deleting", "unreadable", "orphaned"]
"""Only `done` and `damaged` (whole, but with pages whose checksum is wrong) can be restored."""

INFO_LIMIT_BYTES = 1 << 20
_AT_ONCE = 8


class NoSuchBackup(LookupError):
    """There is no backup of this id or name, or more than one; says which there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One id of the archive."""

    backup_id: str
    state: State
    info: BackupInfo | None = None
    manifest: Manifest | None = None
    """None: barman's."""
    keep: str | None = None
    """barman's word: `full` (with the log from it on) or `standalone` (only what makes it consistent)."""
    problem: str = ""
    parent_id: str | None = None
    """The backup that an incremental one stands on, also where it is not finished; None: a full one."""

    @property
    def is_restorable(self) -> bool:
        return self.state in ("done", "damaged") and self.info is not None


@dataclass(frozen=True, slots=True)
class Window:
    """What can be recovered from one backup: from its end to where the log ends or has a gap."""

    backup_id: str
    chain: TimelineChain
    reach: Reach


async def list_backups(store: ObjectStore, layout: Layout, *, deadline_s: float) -> tuple[Listed, ...]:
    """All of them, oldest first. ObjectStoreError."""
    ids = set()
    for folder in (layout.base, incremental_backups(layout), own_backups(layout)):
        async for entry in store.entries(folder, shallow=True, deadline_s=deadline_s):
            backup_id = entry.name.removeprefix(folder).rstrip("/")
            misplaced = folder == layout.base and is_incremental_id(backup_id)
            if entry.name.endswith("/") and is_backup_id(backup_id) and not misplaced:
                ids.add(backup_id)
    turns = asyncio.Semaphore(_AT_ONCE)

    async def one(backup_id: str) -> Listed | None:
        async with turns:
            names = BackupNames(layout, backup_id)
            listed = await look_at(store, names, deadline_s=deadline_s)
            # In a directory the folder outlives what was in it.
            if listed.state == "incomplete" and not await holds_anything(store, names, deadline_s):
                return None
            return listed

    found = await asyncio.gather(*(one(backup_id) for backup_id in sorted(ids)))
    return with_chains(each for each in found if each is not None)


async def holds_anything(store: ObjectStore, names: BackupNames, deadline_s: float) -> bool:
    """Is there any object of it? ObjectStoreError."""
    for folder in (names.folder, names.own_folder):
        async for _ in store.entries(folder, deadline_s=deadline_s):
            return True
    return False


async def look_at(store: ObjectStore, names: BackupNames, *, deadline_s: float) -> Listed:
    """One backup as it is now. ObjectStoreError."""
    backup_id = names.backup_id
    deleting = await store.info(names.deleting, deadline_s=deadline_s)
    content = await read_object(store, names.info, limit_bytes=INFO_LIMIT_BYTES, deadline_s=deadline_s)
    kept = await read_object(store, names.keep, limit_bytes=1000, deadline_s=deadline_s)
    keep = None if kept is None else kept.decode(errors="replace").strip()
    if deleting is not None:
        text = f"it is being deleted: `backup delete {backup_id}` finishes that"
        return Listed(backup_id=backup_id, state="deleting", keep=keep, problem=text)
    if content is None:
        text = "it has no backup.info: never finished"
        return Listed(
            backup_id=backup_id,
            state="incomplete",
            keep=keep,
            problem=text,
            parent_id=await _parent_of_unfinished(store, names, deadline_s),
        )
    try:
        info = parse_info(backup_id, content)
        manifest = await read_manifest(store, names, deadline_s=deadline_s)
    except (InfoInvalid, ContentDamaged) as error:
        return Listed(backup_id=backup_id, state="unreadable", keep=keep, problem=str(error))
    if manifest is None and info.is_own:
        # Its instance was taken for dead, and wrote backup.info behind the removal of all else.
        problem = f"its manifest is gone: it was removed while it was taken; `backup delete {backup_id}` finishes that"
        return Listed(backup_id=backup_id, state="unreadable", keep=keep, problem=problem)
    problem, state = "", _state_of(info, manifest)
    if state == "damaged" and manifest is not None:
        problem = f"{manifest.damaged_count} pages had a wrong checksum when it was taken"
    elif state != "done":
        problem = info.error or f"barman says {info.status}"
    return Listed(
        backup_id=backup_id,
        state=state,
        info=info,
        manifest=manifest,
        keep=keep,
        problem=problem,
        parent_id=info.parent_id,
    )


async def _parent_of_unfinished(store: ObjectStore, names: BackupNames, deadline_s: float) -> str | None:
    if not is_incremental_id(names.backup_id):
        return None
    try:
        mark = await read_mark(store, names, deadline_s=deadline_s)
    except ContentDamaged:
        return None
    return None if mark is None else mark.parent


def with_chains(listed: Iterable[Listed]) -> tuple[Listed, ...]:
    """Oldest first, as they are given. What stands on a backup that cannot be restored cannot either; and damage is inherited."""
    seen: dict[str, Listed] = {}
    backups = list(listed)
    # By the log: a backup's parent ends before it begins, whatever the ids say.
    for each in sorted(backups, key=lambda each: (each.info.begin_lsn if each.info else 0, each.backup_id)):
        seen[each.backup_id] = _in_its_chain(each, seen)
    return tuple(seen[each.backup_id] for each in backups)


def _in_its_chain(listed: Listed, seen: Mapping[str, Listed]) -> Listed:
    if not is_incremental_id(listed.backup_id) or not listed.is_restorable:
        return listed
    parent = seen.get(listed.parent_id or "")
    if parent is None or not parent.is_restorable:
        why = "is gone" if parent is None else f"is {parent.state}"
        return replace(listed, state="orphaned", problem=f"it stands on backup {listed.parent_id}, which {why}")
    if parent.state == "damaged" and listed.state == "done":
        return replace(
            listed, state="damaged", problem=f"it stands on backup {parent.backup_id}, which has damaged pages"
        )
    return listed


def chain_of(listed: Iterable[Listed], backup: Listed) -> tuple[Listed, ...]:
    """The full backup, what stands on it, and so on to `backup`. NoSuchBackup: one of them is not there."""
    by_id = {each.backup_id: each for each in listed}
    found = [backup]
    while (parent_id := found[-1].parent_id) is not None:
        parent = by_id.get(parent_id)
        if parent is None or parent in found:
            raise NoSuchBackup(f"backup {found[-1].backup_id} stands on {parent_id}, which is not there")
        found.append(parent)
    return tuple(reversed(found))


def _state_of(info: BackupInfo, manifest: Manifest | None) -> State:
    if info.is_done:
        return "damaged" if manifest is not None and manifest.damaged_count else "done"
    return "started" if info.status in ("STARTED", "EMPTY") else "failed"


def find_backup(listed: Iterable[Listed], wanted: str) -> Listed:
    """By id, or by a name that only one has, or `latest`. NoSuchBackup."""
    backups = list(listed)
    if wanted == "latest":
        restorable = [each for each in backups if each.is_restorable]
        if restorable:
            return restorable[-1]
    found = [
        each for each in backups if wanted == each.backup_id or (each.info is not None and each.info.name == wanted)
    ]
    if len(found) == 1:
        return found[0]
    ids = ", ".join(each.backup_id for each in found or backups) or "none"
    if found:
        raise NoSuchBackup(f"{len(found)} backups are named {wanted!r}: give the id of one: {ids}")
    raise NoSuchBackup(f"there is no backup {wanted!r}; there are: {ids}")


async def window_of(
    store: ObjectStore, layout: Layout, info: BackupInfo, *, chain: TimelineChain | None = None, deadline_s: float
) -> Window:
    """Along `chain`, by default the newest history of the archive, where the backup is part of it. ObjectStoreError."""
    if chain is None or not is_part_of(info, chain):
        chain = await chain_for(store, layout, info, deadline_s=deadline_s)
    size, there = info.segment_size, {}
    for timeline in (info.timeline, *(each.timeline for each in chain.switches if each.timeline > info.timeline)):
        found = await segments_of(store, layout, size, timeline, first=info.begin_segment.number, deadline_s=deadline_s)
        there[timeline] = frozenset(found)
    return Window(info.backup_id, chain, reach(info.begin_segment, chain, size, there))


async def chain_for(
    store: ObjectStore, layout: Layout, info: BackupInfo, *, timeline: Timeline | None = None, deadline_s: float
) -> TimelineChain:
    """The history of `timeline`, by default the newest of the archive; the backup's own where that one left it before."""
    chain = await chain_of_archive(store, layout, timeline=timeline, deadline_s=deadline_s)
    if timeline is None and not is_part_of(info, chain):
        return await chain_of_archive(store, layout, timeline=info.timeline, deadline_s=deadline_s)
    return chain


def is_part_of(info: BackupInfo, chain: TimelineChain) -> bool:
    """Does the history go on from this backup? Not when it left the backup's timeline before the backup's end."""
    return info.end_lsn is not None and chain.contains(WalEnd(info.timeline, info.end_lsn))
