"""What an incremental backup stands on: which one, and what that one holds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from instance_manager.archive.backup.catalogue import (
    Listed,
    NoSuchBackup,
    chain_of,
    find_backup,
    is_part_of,
    list_backups,
)
from instance_manager.archive.backup.data_files import DataFile
from instance_manager.archive.backup.increment import (
    ChangedBlocks,
    Delta,
    RelationFile,
    increment_bytes,
    relation_file,
)
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.backup.manifest import Manifest, read_members
from instance_manager.archive.backup.names import BackupNames, parse_tar_name
from instance_manager.archive.backup.standing import is_there
from instance_manager.archive.backup.summaries import (
    IncrementRefused,
    changes_in,
    covers_begin,
    require_summaries,
    spans_between,
    timeline_now,
)
from instance_manager.archive.layout import Layout
from instance_manager.archive.tail import chain_from_history, chain_of_archive
from instance_manager.core.types import Lsn, Timeline, TimelineChain, format_lsn
from instance_manager.ports import ContentDamaged, ObjectStore
from instance_manager.postgres.histories import read_history
from instance_manager.postgres.sql import Session

CHAIN_MAX = 100
"""So many backups at most are put together at a restore, and are on disk at once for it."""
DEADLINE_S = 60.0
_SERVER = """
    SELECT (SELECT system_identifier::text FROM pg_control_system()) AS system,
           current_setting('server_version_num')::int / 10000 AS major, current_setting('data_checksums') AS checksums
"""


@dataclass(frozen=True, slots=True)
class Parent:
    """The backup that the next one stands on."""

    info: BackupInfo
    manifest: Manifest
    length: int
    """Of its chain, itself included."""

    @property
    def backup_id(self) -> str:
        return self.info.backup_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a backup must have in common with what it stands on."""

    system_identifier: str
    major: int
    has_checksums: bool
    """pg_checksums changes every page without a word in the log."""


def choose_parent(listed: Sequence[Listed], chain: TimelineChain, server: ServerFacts, wanted: str | None) -> Parent:
    """By id or name; None: the newest good one of `chain`. IncrementRefused."""
    try:
        named = listed if wanted is None else [find_backup(listed, wanted)]
    except NoSuchBackup as error:
        raise IncrementRefused(str(error)) from error
    found, reasons = [], []
    for each in named:
        info, manifest = each.info, each.manifest
        if each.state != "done" or info is None:
            reasons.append(f"backup {each.backup_id} is {each.state}")
        elif manifest is None:
            reasons.append(f"barman took backup {each.backup_id}: there is no list of its files")
        elif (info.major, manifest.has_checksums) != (server.major, server.has_checksums):
            reasons.append(
                f"backup {each.backup_id} is of Postgres {info.major}, {_checksums(manifest.has_checksums)}: the server is "
                f"{server.major}, {_checksums(server.has_checksums)}"
            )
        elif info.system_identifier != server.system_identifier or not is_part_of(info, chain):
            reasons.append(f"backup {each.backup_id} is not part of this server's history")
        elif (length := len(chain_of(listed, each))) >= CHAIN_MAX:
            reasons.append(f"{length} backups stand on one another up to {each.backup_id}: no more may")
        else:
            found.append(Parent(info, manifest, length))
    if not found:
        raise IncrementRefused("; ".join(reasons[-3:]) or "there is no backup that it could stand on: take a full one")
    return max(found, key=lambda each: (each.info.end_lsn or 0, each.backup_id))


def _checksums(there: bool | None) -> str:
    return (
        "with checksums" if there else "of which an earlier version took it" if there is None else "without checksums"
    )


class Increment:
    """What an incremental backup leaves out: of the files that its parent has, all that has not changed since that one began."""

    def __init__(self, store: ObjectStore, layout: Layout, wal: Path, parent: Parent, files: Set[RelationFile]) -> None:
        self._store = store
        self._layout = layout
        self._wal = wal
        self._files = files
        self._changes = ChangedBlocks()
        self.parent = parent

    @property
    def label_lines(self) -> str:
        """For backup_label: by these Postgres does not start from it, and pg_combinebackup checks what it is put together with."""
        info = self.parent.info
        return f"INCREMENTAL FROM LSN: {format_lsn(info.begin_lsn)}\nINCREMENTAL FROM TLI: {info.timeline}\n"

    async def require_parent(self, *, deadline_s: float) -> None:
        """Only after the mark of this one: a deletion that this look does not see sees that mark (`standing`). IncrementRefused."""
        if not await is_there(self._store, self._layout, self.parent.backup_id, deadline_s=deadline_s):
            raise IncrementRefused(f"backup {self.parent.backup_id}, which it would stand on, is being deleted")

    async def read_changes(self, sql: Session, begun_lsn: Lsn, *, deadline_s: float) -> Timeline:
        """Up to the begin of this one; the timeline that it began on, as it seems. IncrementRefused; as `find_parent`."""
        timeline = await timeline_now(sql)
        chain = await history_of(self._wal, self._store, self._layout, timeline)
        spans = spans_between(self.parent.info, chain, begun_lsn)
        self._changes = await changes_in(sql, spans, deadline_s=deadline_s)
        return timeline

    def only_changed(self, files: Iterator[DataFile], tablespace: int | None) -> Iterator[DataFile]:
        """The same files; of relations' only what has changed is to be read. `tablespace`: None in the data directory."""
        for file in files:
            relation = None if file.is_directory else relation_file(file.name, tablespace)
            if relation is None:
                yield file
                continue
            delta = Delta(relation, self._changes, self._files)
            blocks = delta.to_send(file.size_bytes)
            size_bytes = file.size_bytes if blocks is None else increment_bytes(len(blocks))
            yield replace(file, delta=delta, size_bytes=size_bytes)


async def stand_on(sql: Session, wal: Path, store: ObjectStore, layout: Layout, wanted: str | None) -> Increment:
    """For a backup of this server, whose pg_wal is `wal`. As `find_parent`."""
    parent = await find_parent(sql, wal, store, layout, wanted)
    return Increment(store, layout, wal, parent, await files_of(store, layout, parent))


async def history_of(wal: Path, store: ObjectStore, layout: Layout, timeline: Timeline) -> TimelineChain:
    """By the server's own file, which is there before the archive's. HistoryInvalid; OSError; ObjectStoreError."""
    own = await asyncio.to_thread(read_history, wal, timeline)
    if own is not None:
        return chain_from_history(timeline, own)
    return await chain_of_archive(store, layout, timeline=timeline, deadline_s=DEADLINE_S)


async def find_parent(sql: Session, wal: Path, store: ObjectStore, layout: Layout, wanted: str | None) -> Parent:
    """For a backup of this server. IncrementRefused; HistoryInvalid; OSError; ObjectStoreError."""
    await require_summaries(sql)
    chain = await history_of(wal, store, layout, await timeline_now(sql))
    row = await sql.fetchrow(_SERVER)
    if row is None:
        raise IncrementRefused("the server says nothing of itself")
    server = ServerFacts(system_identifier=row["system"], major=row["major"], has_checksums=row["checksums"] == "on")
    return choose_parent(await list_backups(store, layout, deadline_s=DEADLINE_S), chain, server, wanted)


async def could_tell_since(sql: Session, wal: Path, store: ObjectStore, layout: Layout, wanted: str | None) -> bool:
    """Does this server know what has changed since the backup, as far as that is seen before one has begun? As `find_parent`."""
    return await covers_begin(sql, (await find_parent(sql, wal, store, layout, wanted)).info)


async def files_of(store: ObjectStore, layout: Layout, parent: Parent) -> frozenset[RelationFile]:
    """The relations' main files that it holds, whole or in part. ContentDamaged; ObjectStoreError."""
    names, found = BackupNames(layout, parent.backup_id), set()
    for entry in parent.manifest.tars:
        members = await read_members(store, names, entry.name, deadline_s=DEADLINE_S)
        tar = parse_tar_name(entry.object_name)
        if members is None or tar is None:
            raise ContentDamaged(f"{names.members(entry.name)} is gone")
        for name in members:
            file = relation_file(name, tar.tablespace_oid)
            if file is not None:
                found.add(file)
    return frozenset(found)
