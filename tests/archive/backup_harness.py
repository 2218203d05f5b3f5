"""A backup of a real server, taken by the code itself, with an archiver process beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from archiving_server import ArchivingServer

from instance_manager.archive.backup.copying import TakeSettings
from instance_manager.archive.backup.info import BackupInfo, parse_info
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.take import OnBackup, Taken, take_backup
from instance_manager.archive.codecs import Codec
from instance_manager.archive.content import read_object
from instance_manager.archive.layout import Layout
from instance_manager.archive.where import make_store
from instance_manager.config_sections import ArchiveSection, S3Section
from instance_manager.ports import ObjectStore

LAYOUT = Layout("orders", Codec("zstd"))
SETTINGS = TakeSettings(stall_s=20, wal_deadline_s=30, wal_poll_s=0.1, summaries_deadline_s=30)


def section_of(section: dict[str, Any]) -> ArchiveSection:
    if "directory" in section:
        return ArchiveSection(directory=Path(section["directory"]))
    return ArchiveSection(s3=S3Section(**section["s3"]))


def store_of(section: dict[str, Any]) -> ObjectStore:
    return make_store(section_of(section))


async def take(
    made: ArchivingServer,
    store: ObjectStore,
    *,
    name: str | None = None,
    on: OnBackup | None = None,
    layout: Layout = LAYOUT,
    **changes: Any,
) -> Taken:
    settings = replace(SETTINGS, **changes)
    return await take_backup(made.server.server, store, layout, settings, instance="orders-1", name=name, on=on)


async def objects(store: ObjectStore, prefix: str = "orders/") -> list[str]:
    return [entry.name async for entry in store.entries(prefix, deadline_s=10)]


async def info_of(store: ObjectStore, backup_id: str) -> BackupInfo:
    content = await read_object(store, BackupNames(LAYOUT, backup_id).info, deadline_s=10)
    assert content is not None
    return parse_info(backup_id, content)
