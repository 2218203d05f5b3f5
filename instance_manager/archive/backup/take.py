"""One online base backup: begun and ended over SQL, read from the data directory, streamed to the store.

`backup.info` is created last, when all that it promises is durable: every tar, their hashes, and the WAL up to the position
that makes it consistent. What fails before is deleted again; what is killed before leaves tars without a backup.info, which no
tool lists as a backup, and which `tend` removes.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from instance_manager.archive.backup.control_file import ControlFileDamaged, read_control_file
from instance_manager.archive.backup.copying import SMALL_DEADLINE_S, BackupFailed, Copying, TakeSettings
from instance_manager.archive.backup.data_files import (
    PG_CONTROL,
    DataFile,
    TarPlan,
    data_files,
    planned,
    tablespace_files,
)
from instance_manager.archive.backup.floor import LogExpired, require_above_floor
from instance_manager.archive.backup.increment_from import Increment, stand_on
from instance_manager.archive.backup.info import DONE, BackupInfo, Tablespace, label_of, render_info
from instance_manager.archive.backup.manifest import Manifest
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.removal import remove_unlisted
from instance_manager.archive.backup.standing import Mark
from instance_manager.archive.backup.summaries import IncrementRefused
from instance_manager.archive.backup.tar_stream import MemoryFile
from instance_manager.archive.backup.wal_range import missing_in, named, segments_of
from instance_manager.archive.content import MemoryContent
from instance_manager.archive.counters import BackupProgress
from instance_manager.archive.layout import Layout
from instance_manager.codec import to_json
from instance_manager.core.types import Lsn, Timeline, parse_lsn
from instance_manager.ports import ObjectExists, ObjectStore, ObjectStoreError
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.sql import Session, session

log = logging.getLogger("instance_manager.archive.backup")

_START_LINE = re.compile(r"START WAL LOCATION: ([0-9A-F]+/[0-9A-F]+) \(file [0-9A-F]{24}\)")
_TIMELINE_LINE = re.compile(r"START TIMELINE: (\d+)")
_FACTS = """
    SELECT current_setting('server_version_num')::int AS version, current_setting('data_checksums') AS checksums,
           (SELECT bytes_per_wal_segment FROM pg_control_init()) AS segment_bytes,
           (SELECT system_identifier::text FROM pg_control_system()) AS system,
           pg_is_in_recovery() AS is_standby, clock_timestamp() AS now,
           (SELECT sum(pg_tablespace_size(oid)) FROM pg_tablespace)::bigint AS estimated_bytes
"""
_TABLESPACES = """
    SELECT spcname AS name, oid::bigint AS oid, pg_tablespace_location(oid) AS location FROM pg_tablespace
    WHERE pg_tablespace_location(oid) LIKE '/%' ORDER BY oid
"""


@dataclass(frozen=True, slots=True)
class OnBackup:
    """An incremental backup is wanted."""

    parent: str | None = None
    """The id or name of the backup that it stands on; None: the newest good one of this server's history."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A backup that is whole."""

    info: BackupInfo
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Facts:
    version: int
    has_checksums: bool
    segment_bytes: int
    system_identifier: str
    is_standby: bool
    now: datetime.datetime
    estimated_bytes: int


async def take_backup(
    server: LocalServer,
    store: ObjectStore,
    layout: Layout,
    settings: TakeSettings,
    *,
    instance: str,
    name: str | None = None,
    on: OnBackup | None = None,
    on_begun: Callable[[str], Awaitable[None]] | None = None,
    want_wal: Callable[[Lsn], Awaitable[None]] | None = None,
    progress: BackupProgress | None = None,
) -> Taken:
    """BackupFailed: there is none. Cancelled, it cleans up first.

    `on`: None takes a full one. An incremental one never becomes a full one by itself: BackupFailed tells why it cannot be had.
    `on_begun` is told the id when only the id's mark is in the store; what it raises ends the backup. `want_wal`: called on a standby with the
    position that the primary must archive.
    """
    shown = progress or BackupProgress()
    try:
        async with session(server, statement_timeout_s=settings.start_deadline_s) as sql:
            # It idles while files are read, for hours perhaps.
            await sql.execute("SET idle_session_timeout = 0")
            facts = await _facts(sql)
            wal = server.data_directory / "pg_wal"
            increment = None if on is None else await stand_on(sql, wal, store, layout, on.parent)
            names = await _begin(store, layout, facts.now, None if increment is None else increment.parent.backup_id)
            shown.backup_id, shown.estimated_bytes = names.backup_id, facts.estimated_bytes
            backup = _Backup(server.data_directory, store, names, settings, instance, name, facts, shown, increment)
            try:
                if on_begun is not None:
                    await on_begun(names.backup_id)
                return await backup.run(sql, want_wal)
            except BaseException:
                await _clean_up(store, names)
                raise
    except (LocalPostgresError, asyncpg.PostgresError) as error:
        raise BackupFailed(f"Postgres: {error}") from error
    except IncrementRefused as error:
        raise BackupFailed(f"no incremental backup: {error}") from error
    except (ObjectStoreError, ControlFileDamaged, OSError) as error:
        raise BackupFailed(str(error)) from error


async def _facts(sql: Session) -> _Facts:
    row = await sql.fetchrow(_FACTS, deadline_s=60)
    if row is None:
        raise BackupFailed("the server says nothing of itself")
    return _Facts(
        row["version"],
        row["checksums"] == "on",
        row["segment_bytes"],
        row["system"],
        row["is_standby"],
        row["now"],
        row["estimated_bytes"] or 0,
    )


async def _begin(store: ObjectStore, layout: Layout, now: datetime.datetime, parent: str | None) -> BackupNames:
    """An id that nobody else has: barman's are of a second. From its mark on `parent` is not deleted any more."""
    for later_s in range(60):
        time = now.astimezone(datetime.UTC) + datetime.timedelta(seconds=later_s)
        full = BackupNames(layout, time.strftime("%Y%m%dT%H%M%S"))
        incremental = BackupNames(layout, f"{full.backup_id}i")
        names, other = (full, incremental) if parent is None else (incremental, full)
        # One of each in a second would not be listed in the order in which they were taken.
        if await store.info(other.begun, deadline_s=SMALL_DEADLINE_S) is not None:
            continue
        async for _ in store.entries(names.folder, deadline_s=SMALL_DEADLINE_S):
            break
        else:
            try:
                content = MemoryContent.of(to_json(Mark(now.isoformat(), parent)))
                await store.create(names.begun, content, deadline_s=SMALL_DEADLINE_S)
            except ObjectExists:
                continue
            return names
    raise BackupFailed("no free id within a minute: is somebody taking backups without end?")


async def _clean_up(store: ObjectStore, names: BackupNames) -> None:
    try:
        await asyncio.shield(remove_unlisted(store, names, deadline_s=SMALL_DEADLINE_S))
    except ObjectStoreError as error:
        log.warning("what was stored of backup %s is left there, unlisted: %s", names.backup_id, error)


class _Backup:
    """Its state between start and stop."""

    def __init__(
        self,
        data_directory: Path,
        store: ObjectStore,
        names: BackupNames,
        settings: TakeSettings,
        instance: str,
        name: str | None,
        facts: _Facts,
        progress: BackupProgress,
        increment: Increment | None,
    ) -> None:
        self._data_directory = data_directory
        self._store = store
        self._names = names
        self._settings = settings
        self._instance = instance
        self._name = name
        self._facts = facts
        self._progress = progress
        self._copying = Copying(store, names, settings, progress)
        self._increment = increment

    async def run(self, sql: Session, want_wal: Callable[[Lsn], Awaitable[None]] | None) -> Taken:
        facts = self._facts
        increment = self._increment
        if increment is not None:
            await increment.require_parent(deadline_s=SMALL_DEADLINE_S)
        self._progress.phase = "checkpoint"
        begun_lsn = await self._start(sql)
        await self._require_log(begun_lsn)
        begun_at = await sql.fetchval("SELECT clock_timestamp()")
        verifies = self._settings.verify_checksums and facts.has_checksums
        began_on = None
        if increment is not None:
            self._progress.phase = "waiting for WAL summaries"
            deadline_s = self._settings.summaries_deadline_s
            began_on = await increment.read_changes(sql, begun_lsn, deadline_s=deadline_s)
        tablespaces = tuple(Tablespace(*row) for row in await sql.fetch(_TABLESPACES))
        self._progress.phase = "copy"
        plans = self._plans(tablespaces)
        last = await self._copying.copy(plans, checksums_before=begun_lsn if verifies else None)
        # On a standby its minimum recovery point is where the backup ends: read after every file, before the stop.
        control = await asyncio.to_thread(read_control_file, self._data_directory / PG_CONTROL)
        end_lsn, label, spaces = await self._stop(sql)
        ended_at = await sql.fetchval("SELECT clock_timestamp()")
        timeline, begin_lsn = _from_label(label)
        if facts.is_standby:
            await self._require_same_timeline(sql, timeline)
        if increment is not None:
            if began_on != timeline:
                raise BackupFailed(
                    f"it began on timeline {timeline}, and the changes were looked up for timeline {began_on}"
                )
            label += increment.label_lines
        await self._copying.upload(
            f"data_{last + 1:04d}", [MemoryFile(PG_CONTROL, control), MemoryFile("backup_label", label.encode())]
        )
        info = self._info(begin_lsn, timeline, end_lsn, begun_at, ended_at, tablespaces, label)
        self._progress.phase = "waiting for WAL"
        await self._wait_for_wal(info, want_wal)
        copied = self._copying.copied
        manifest = Manifest(
            backup_id=info.backup_id,
            instance=self._instance,
            was_standby=facts.is_standby,
            tars=tuple(sorted(copied.tars, key=lambda entry: entry.name)),
            checked_pages=copied.checked_pages,
            damaged_count=copied.damaged_count,
            damaged=tuple(copied.damaged),
            tablespace_map=spaces,
            parent_id=info.parent_id,
            has_checksums=facts.has_checksums,
            whole_bytes=copied.whole_bytes,
        )
        await self._copying.create(self._names.manifest, MemoryContent.of(to_json(manifest)))
        await self._require_ours()
        if increment is not None:
            await increment.require_parent(deadline_s=SMALL_DEADLINE_S)
        await self._copying.create(self._names.info, MemoryContent.of(render_info(info)))
        self._progress.phase = "done"
        return Taken(info, manifest)

    async def _start(self, sql: Session) -> Lsn:
        new = self._facts.version >= 150000
        query = "pg_backup_start($1, fast => true)" if new else "pg_start_backup($1, fast => true, exclusive => false)"
        label = label_of(self._names.backup_id)
        text = await sql.fetchval(f"SELECT {query}::text", label, deadline_s=self._settings.start_deadline_s)
        return parse_lsn(text)

    async def _require_log(self, begun_lsn: Lsn) -> None:
        """Its id is marked as begun: an expiry that this look does not see sees that mark (`floor`)."""
        number = begun_lsn // self._facts.segment_bytes
        try:
            await require_above_floor(self._store, self._names.layout, number, deadline_s=SMALL_DEADLINE_S)
        except LogExpired as error:
            raise BackupFailed(str(error)) from error

    async def _stop(self, sql: Session) -> tuple[Lsn, str, str]:
        new = self._facts.version >= 150000
        query = "pg_backup_stop(false)" if new else "pg_stop_backup(exclusive => false, wait_for_archive => false)"
        row = await sql.fetchrow(f"SELECT lsn::text AS lsn, labelfile, spcmapfile FROM {query}", deadline_s=60)  # noqa: S608
        if row is None:
            raise BackupFailed("the server ended the backup without a word")
        return parse_lsn(row["lsn"]), row["labelfile"], row["spcmapfile"] or ""

    async def _require_same_timeline(self, sql: Session, timeline: Timeline) -> None:
        ended_on = await sql.fetchval("SELECT min_recovery_end_timeline FROM pg_control_recovery()")
        if ended_on != timeline:
            raise BackupFailed(f"it began on timeline {timeline} and ended on {ended_on}: a failover came between")

    def _plans(self, tablespaces: tuple[Tablespace, ...]) -> Iterator[TarPlan]:
        major, split = self._facts.version // 10000, self._settings.split_bytes
        for each in tablespaces:
            files = tablespace_files(Path(each.location), major)
            yield from planned(str(each.oid), self._only_changed(files, each.oid), split)
        yield from planned("data", self._only_changed(data_files(self._data_directory), None), split)

    def _only_changed(self, files: Iterator[DataFile], tablespace: int | None) -> Iterator[DataFile]:
        return files if self._increment is None else self._increment.only_changed(files, tablespace)

    async def _require_ours(self) -> None:
        """Somebody may have deleted it meanwhile, by hand, or because this instance was taken for dead."""
        begun = await self._store.info(self._names.begun, deadline_s=SMALL_DEADLINE_S)
        deleting = await self._store.info(self._names.deleting, deadline_s=SMALL_DEADLINE_S)
        if begun is None or deleting is not None:
            raise BackupFailed("it was deleted while it was taken")

    async def _wait_for_wal(self, info: BackupInfo, want_wal: Callable[[Lsn], Awaitable[None]] | None) -> None:
        first, last = info.begin_segment.number, info.end_segment.number
        size, timeline = info.segment_size, info.timeline
        if self._facts.is_standby and want_wal is not None and info.end_lsn is not None:
            await want_wal(info.end_lsn)
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._settings.wal_deadline_s
        while True:
            found = await segments_of(
                self._store, self._names.layout, size, timeline, first=first, deadline_s=SMALL_DEADLINE_S
            )
            missing = missing_in(found, first, last)
            if not missing:
                return
            if loop.time() > end_s:
                raise BackupFailed(
                    f"the WAL that makes it consistent did not come into the archive within "
                    f"{self._settings.wal_deadline_s:g} s: {named(size, timeline, missing)}. Does the primary archive?"
                )
            await asyncio.sleep(self._settings.wal_poll_s)

    def _info(
        self,
        begin_lsn: Lsn,
        timeline: Timeline,
        end_lsn: Lsn,
        begun_at: datetime.datetime,
        ended_at: datetime.datetime,
        tablespaces: tuple[Tablespace, ...],
        label: str,
    ) -> BackupInfo:
        codec = self._settings.codec.name
        return BackupInfo(
            backup_id=self._names.backup_id,
            status=DONE,
            name=self._name,
            timeline=timeline,
            begin_lsn=begin_lsn,
            end_lsn=end_lsn,
            begin_time=begun_at,
            end_time=ended_at,
            system_identifier=self._facts.system_identifier,
            segment_bytes=self._facts.segment_bytes,
            version_number=self._facts.version,
            data_directory=str(self._data_directory),
            tablespaces=tablespaces,
            compression=None if codec == "none" else codec,
            size_bytes=sum(entry.content_bytes for entry in self._copying.copied.tars),
            stored_bytes=sum(entry.object_bytes for entry in self._copying.copied.tars),
            backup_label=label,
            parent_id=None if self._increment is None else self._increment.parent.backup_id,
        )


def _from_label(label: str) -> tuple[Timeline, Lsn]:
    start, timeline = _START_LINE.search(label), _TIMELINE_LINE.search(label)
    if start is None or timeline is None:
        raise BackupFailed("the server's backup_label cannot be read")
    return Timeline(int(timeline[1])), parse_lsn(start[1])
