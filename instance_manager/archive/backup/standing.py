"""Which backup stands on which: an incremental one is of use only with the one before it, back to a full one.

Its mark `begun.json`, which is there from before its first object until after its last, names the one that it stands on. A deletion and a
backup that begins at the same time see one another, as with a keep: the deletion marks first and then looks who stands on it; the backup
marks first, and then looks whether what it stands on is being deleted.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from instance_manager.archive.backup.names import BackupNames, is_backup_id, is_incremental_id, own_backups
from instance_manager.archive.content import read_object
from instance_manager.archive.layout import Layout
from instance_manager.codec import from_json
from instance_manager.ports import ContentDamaged, ObjectStore

MARK_LIMIT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Mark:
    """`begun.json`: the id is taken."""

    begun_at: str
    parent: str | None = None
    """The backup that it stands on; None: a full one."""


async def read_mark(store: ObjectStore, names: BackupNames, *, deadline_s: float) -> Mark | None:
    """None: there is none. ContentDamaged: it cannot be read; ObjectStoreError."""
    content = await read_object(store, names.begun, limit_bytes=MARK_LIMIT_BYTES, deadline_s=deadline_s)
    if content is None:
        return None
    try:
        return from_json(content, Mark)
    except msgspec.MsgspecError as error:
        raise ContentDamaged(f"{names.begun} cannot be read: {error}") from error


async def holders_of(store: ObjectStore, names: BackupNames, *, deadline_s: float) -> list[str]:
    """Ids of the backups, unfinished ones included, that stand directly on this one. ContentDamaged; ObjectStoreError."""
    folder, found = own_backups(names.layout), []
    async for entry in store.entries(folder, shallow=True, deadline_s=deadline_s):
        backup_id = entry.name.removeprefix(folder).rstrip("/")
        if is_backup_id(backup_id) and is_incremental_id(backup_id):
            found.append(backup_id)
    return [
        each
        for each in sorted(found)
        if await _stands_on(store, BackupNames(names.layout, each), names.backup_id, deadline_s)
    ]


async def _stands_on(store: ObjectStore, names: BackupNames, parent: str, deadline_s: float) -> bool:
    mark = await read_mark(store, names, deadline_s=deadline_s)
    if mark is None or mark.parent != parent:
        return False
    # Until its backup.info is gone a deletion may yet be taken back.
    return (
        await store.info(names.deleting, deadline_s=deadline_s) is None
        or await store.info(names.info, deadline_s=deadline_s) is not None
    )


async def is_there(store: ObjectStore, layout: Layout, backup_id: str, *, deadline_s: float) -> bool:
    """Is it whole, and is nobody deleting it? ObjectStoreError."""
    names = BackupNames(layout, backup_id)
    return (
        await store.info(names.deleting, deadline_s=deadline_s) is None
        and await store.info(names.info, deadline_s=deadline_s) is not None
    )
