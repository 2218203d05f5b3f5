"""Removing backups: the one thing that cannot be undone.

The order makes every crash visible: first a mark that it is being deleted (from then on nothing restores it), then backup.info
(no tool lists it), then the tars, the manifest, and the mark last. A crash between leaves what `backups` shows as "deleting".
"""

from __future__ import annotations

import contextlib

from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.standing import holders_of
from instance_manager.archive.content import MemoryContent
from instance_manager.codec import to_json
from instance_manager.ports import ObjectExists, ObjectStore
from instance_manager.wall_clock import timestamp


class BackupKept(Exception):
    """It carries a keep, or others stand on it, and is not deleted."""


async def delete_backup(store: ObjectStore, names: BackupNames, *, deadline_s: float) -> None:
    """Gone when it returns. BackupKept: somebody keeps it, and nothing was deleted. ObjectStoreError: go on later."""
    if await store.info(names.keep, deadline_s=deadline_s) is not None:
        if await store.info(names.deleting, deadline_s=deadline_s) is not None:
            await store.delete(names.deleting, deadline_s=deadline_s)
        raise _kept(names)
    await _require_free(store, names, deadline_s)
    with contextlib.suppress(ObjectExists):
        await store.create(names.deleting, MemoryContent.of(to_json({"at": timestamp()})), deadline_s=deadline_s)
    # Whoever keeps a backup looks for the mark afterwards: one of both sees the other.
    if await store.info(names.keep, deadline_s=deadline_s) is not None:
        await store.delete(names.deleting, deadline_s=deadline_s)
        raise _kept(names)
    try:
        await _require_free(store, names, deadline_s)
    except BackupKept:
        await store.delete(names.deleting, deadline_s=deadline_s)
        raise
    await store.delete(names.info, deadline_s=deadline_s)
    await remove_unlisted(store, names, deadline_s=deadline_s)


async def _require_free(store: ObjectStore, names: BackupNames, deadline_s: float) -> None:
    """BackupKept: others stand on it. Where its backup.info is gone, its deletion can only go on."""
    if await store.info(names.info, deadline_s=deadline_s) is None:
        return
    if holders := await holders_of(store, names, deadline_s=deadline_s):
        raise BackupKept(
            f"backup {names.backup_id} is needed by {', '.join(holders)}, which cannot be restored without it: delete those first"
        )


def _kept(names: BackupNames) -> BackupKept:
    return BackupKept(f"backup {names.backup_id} is kept: `backup unkeep {names.backup_id}` first")


async def discard_backup(store: ObjectStore, names: BackupNames, *, deadline_s: float) -> None:
    """All of one whose attempt was given up. Whoever took it may live after all: marked first, it is no backup whatever he writes."""
    with contextlib.suppress(ObjectExists):
        await store.create(names.deleting, MemoryContent.of(to_json({"at": timestamp()})), deadline_s=deadline_s)
    await remove_unlisted(store, names, deadline_s=deadline_s)


async def remove_unlisted(store: ObjectStore, names: BackupNames, *, deadline_s: float) -> None:
    """All objects of a backup that has no backup.info (any more)."""
    await _delete_all(store, names.folder, deadline_s)
    last = {names.deleting, names.begun}
    await _delete_all(store, names.own_folder, deadline_s, but=last)
    for name in sorted(last):
        await store.delete(name, deadline_s=deadline_s)


async def keep_backup(store: ObjectStore, names: BackupNames, target: str, *, deadline_s: float) -> None:
    """BackupKept: it is being deleted, and cannot be kept any more."""
    with contextlib.suppress(ObjectExists):
        await store.create(names.keep, MemoryContent.of(target.encode()), deadline_s=deadline_s)
    if await store.info(names.deleting, deadline_s=deadline_s) is not None:
        await store.delete(names.keep, deadline_s=deadline_s)
        raise BackupKept(f"backup {names.backup_id} is being deleted, and cannot be kept any more")


async def _delete_all(store: ObjectStore, prefix: str, deadline_s: float, but: set[str] | None = None) -> None:
    found = [entry.name async for entry in store.entries(prefix, deadline_s=deadline_s)]
    for name in found:
        if name not in (but or ()):
            await store.delete(name, deadline_s=deadline_s)
