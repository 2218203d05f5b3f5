"""An incremental backup and all that it stands on, put together by Postgres's own pg_combinebackup of the same major.

Everything lies in hidden folders below the places where it will be, so that no other disk is needed, nothing is copied at the end, and whoever
empties a half-restored place removes it too. pg_control of the result is taken away before anything is moved to its place.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from instance_manager.archive.backup.catalogue import Listed
from instance_manager.archive.backup.data_files import PG_CONTROL
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.backup.manifest import Manifest, read_members
from instance_manager.archive.backup.names import BackupNames, parse_tar_name
from instance_manager.archive.backup.tar_stream import Member
from instance_manager.archive.backup.view import size_text
from instance_manager.archive.layout import Layout
from instance_manager.archive.recovery.extract import (
    Destination,
    Extracted,
    extract_backup,
    link_tablespaces,
    write_control,
)
from instance_manager.archive.stores.patience import Patience
from instance_manager.core.types import format_lsn
from instance_manager.ports import ContentDamaged, ObjectStore
from instance_manager.postgres.server import LocalServer, RunAs, run_program

STAGE = ".instance-manager.chain"
PROGRAM = "pg_combinebackup"
COMBINE_DEADLINE_S = 7 * 86400.0
LINKS_SINCE = 18
"""Files that are whole in one backup need not be copied (`--link`)."""
_RESULT = "combined"
MANIFEST = "backup_manifest"
MEMBERS_DEADLINE_S = 60.0
_VERSION = re.compile(r"pg_combinebackup \(PostgreSQL\) (\d+)")


class CannotCombine(Exception):
    """Nothing was written; says what is missing."""


@dataclass(frozen=True, slots=True)
class Room:
    """On disk, until the result is there alone."""

    backups_bytes: int
    result_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.backups_bytes + self.result_bytes

    def __str__(self) -> str:
        return (
            f"{size_text(self.needed_bytes)} on disk for a while: {size_text(self.backups_bytes)} for the backups and "
            f"{size_text(self.result_bytes)} for what they make"
        )


def room_for(chain: Sequence[Listed]) -> Room:
    """At the most; less where files can be linked."""
    sizes = [each.info.size_bytes or 0 for each in chain if each.info is not None]
    last = chain[-1].manifest
    whole = None if last is None else last.whole_bytes
    return Room(sum(sizes), max(sizes, default=0) if whole is None else whole)


async def require_means(server: LocalServer, chain: Sequence[Listed], destination: Destination) -> Room:
    """The program and the room. CannotCombine."""
    info, full = chain[-1].info, chain[0].backup_id
    major = 0 if info is None else info.major
    instead = f"or restore the full backup: --backup {full}"
    program = server.program(PROGRAM)
    if not await asyncio.to_thread(Path(program).exists):
        raise CannotCombine(
            f"{program} is not there, and an incremental backup cannot be restored without it: install all programs of Postgres {major}, {instead}"
        )
    version = _VERSION.search(await run_program(server, [program, "--version"], deadline_s=30))
    if version is None or int(version[1]) != major:
        told = "of an unknown version" if version is None else f"of Postgres {version[1]}"
        raise CannotCombine(
            f"{program} is {told}, and the backups are of Postgres {major}: give that one's programs, {instead}"
        )
    room = room_for(chain)
    free = await asyncio.to_thread(_free_bytes, [destination.data_directory, *destination.tablespaces.values()])
    if free < room.needed_bytes:
        raise CannotCombine(f"it needs {room}; {size_text(free)} are free: make room, {instead}")
    return room


def _free_bytes(places: Iterable[Path]) -> int:
    """Of all file systems of the places together, each counted once. OSError."""
    devices = {}
    for place in places:
        there = next(each for each in (place, *place.parents) if each.exists())
        devices[there.stat().st_dev] = shutil.disk_usage(there).free
    return sum(devices.values())


async def extract_chain(
    server: LocalServer,
    store: ObjectStore,
    layout: Layout,
    chain: Sequence[Listed],
    destination: Destination,
    *,
    parallel: int,
    patience: Patience,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Extracted:
    """The last of `chain` put together in its place, but for pg_control, which is in the answer, as `extract_backup` does it.

    ContentDamaged; ObjectStoreError; OSError; LocalPostgresError: pg_combinebackup failed.
    """
    result, size_bytes = await combined(
        server,
        store,
        layout,
        chain,
        destination,
        parallel=parallel,
        patience=patience,
        on_progress=on_progress,
    )
    return await asyncio.to_thread(_move, result, destination, size_bytes)


async def combined(
    server: LocalServer,
    store: ObjectStore,
    layout: Layout,
    chain: Sequence[Listed],
    destination: Destination,
    *,
    parallel: int,
    patience: Patience,
    on_progress: Callable[[str], None] = lambda _: None,
) -> tuple[Destination, int]:
    """Where the last of `chain` lies then, whole and flushed, with a backup_manifest, and the bytes that were read for it."""
    stages, size_bytes = [], 0
    for each in chain:
        if each.info is None or each.manifest is None:
            raise ContentDamaged(f"backup {each.backup_id} has no list of its files")
        on_progress(f"reading backup {each.backup_id}")
        stage = _stage(destination, each.backup_id, each.info)
        await asyncio.to_thread(_make_places, stage)
        names = BackupNames(layout, each.backup_id)
        extracted = await extract_backup(
            store, names, each.info, each.manifest, stage, parallel=parallel, patience=patience
        )
        if extracted.control is None:
            raise ContentDamaged(f"backup {each.backup_id} holds no {PG_CONTROL}")
        await asyncio.to_thread(_finish_stage, stage, extracted.control)
        await _write_manifest(store, names, each.info, each.manifest, stage)
        stages.append(stage)
        size_bytes += extracted.size_bytes
    last = chain[-1].info
    assert last is not None  # noqa: S101 - as each of them
    result = _stage(destination, _RESULT, last)
    for place in result.tablespaces.values():
        await asyncio.to_thread(_make_directory, place, destination.run_as)
    on_progress(f"putting {len(chain)} backups together")
    argv = _command(server, last.major, stages, result)
    await run_program(server, argv, deadline_s=COMBINE_DEADLINE_S, ends_with_parent=True)
    return result, size_bytes


def _stage(destination: Destination, name: str, info: BackupInfo) -> Destination:
    """Hidden places for one backup of the chain, or for the result."""
    data = destination.data_directory / STAGE
    # A tablespace that is no more has no place of its own.
    spaces = {
        each.oid: destination.tablespaces.get(each.oid, destination.data_directory) / STAGE / f"{name}-{each.oid}"
        for each in info.tablespaces
    }
    return Destination(data / name, spaces, destination.run_as)


def _make_places(stage: Destination) -> None:
    for place in (stage.data_directory, *stage.tablespaces.values()):
        _make_directory(place, stage.run_as)


def _make_directory(place: Path, run_as: RunAs | None) -> None:
    for each in (place.parent, place):
        each.mkdir(mode=0o700, exist_ok=True)
        if run_as is not None:
            os.chown(each, run_as.uid, run_as.gid)


def _finish_stage(stage: Destination, control: bytes) -> None:
    _make_directory(stage.data_directory / "pg_tblspc", stage.run_as)
    link_tablespaces(stage)
    write_control(stage, control)


def _command(server: LocalServer, major: int, stages: Sequence[Destination], result: Destination) -> list[str]:
    argv = [server.program(PROGRAM), "--manifest-checksums=SHA256", "-o", str(result.data_directory)]
    if major >= LINKS_SINCE:
        argv.append("--link")
    for oid, place in result.tablespaces.items():
        argv += ["-T", f"{_escaped(stages[-1].tablespaces[oid])}={_escaped(place)}"]
    return argv + [str(stage.data_directory) for stage in stages]


def _escaped(path: Path) -> str:
    """For `OLDDIR=NEWDIR`."""
    return str(path).replace("=", "\\=")


async def _write_manifest(
    store: ObjectStore, names: BackupNames, info: BackupInfo, manifest: Manifest, stage: Destination
) -> None:
    """Of what was extracted, every hash compared: `backup_manifest`, as Postgres writes it (version 2)."""
    path = stage.data_directory / MANIFEST
    writer = ManifestWriter(info)
    with path.open("wb") as file:
        file.write(writer.head())
        for entry in manifest.tars:
            members = await read_members(store, names, entry.name, deadline_s=MEMBERS_DEADLINE_S)
            tar = parse_tar_name(entry.object_name)
            if members is None or tar is None:
                raise ContentDamaged(f"{names.members(entry.name)} is gone")
            prefix = "" if tar.tablespace_oid is None else f"pg_tblspc/{tar.tablespace_oid}/"
            file.write(writer.files(prefix, members.values()))
        file.write(writer.end())
    if stage.run_as is not None:
        os.chown(path, stage.run_as.uid, stage.run_as.gid)


class ManifestWriter:
    """The parts of a backup_manifest, in order; a hash of all before it is its last line."""

    def __init__(self, info: BackupInfo) -> None:
        self._info = info
        self._digest = hashlib.sha256()
        self._separator = ""

    def head(self) -> bytes:
        system = int(self._info.system_identifier)
        return self._counted(f'{{ "PostgreSQL-Backup-Manifest-Version": 2,\n"System-Identifier": {system},\n"Files": [')

    def files(self, prefix: str, members: Iterable[Member]) -> bytes:
        """The folders among them have no line."""
        return self._counted("".join(self._line(prefix + each.name, each) for each in members if each.sha256))

    def end(self) -> bytes:
        info = self._info
        end = format_lsn(info.end_lsn if info.end_lsn is not None else info.begin_lsn)
        text = f'\n],\n"WAL-Ranges": [\n{{ "Timeline": {info.timeline}, "Start-LSN": "{format_lsn(info.begin_lsn)}", "End-LSN": "{end}" }}\n],\n'
        last = self._counted(text)
        return last + f'"Manifest-Checksum": "{self._digest.hexdigest()}"}}\n'.encode()

    def _line(self, path: str, member: Member) -> str:
        raw = path.encode(errors="surrogateescape")
        try:
            name = f'"Path": {json.dumps(raw.decode(), ensure_ascii=False)}'
        except UnicodeDecodeError:
            name = f'"Encoded-Path": "{raw.hex()}"'
        # Nobody asks for its time, but there has to be one.
        time = '"Last-Modified": "1970-01-01 00:00:00 GMT"'
        checksum = f'"Checksum-Algorithm": "SHA256", "Checksum": "{member.sha256}"'
        line = f'{self._separator}\n{{ {name}, "Size": {member.size_bytes}, {time}, {checksum} }}'
        self._separator = ","
        return line

    def _counted(self, text: str) -> bytes:
        content = text.encode()
        self._digest.update(content)
        return content


def _move(result: Destination, destination: Destination, size_bytes: int) -> Extracted:
    """The result to its place, without the rest."""
    data = result.data_directory
    extracted = Extracted(size_bytes=size_bytes)
    extracted.control = (data / PG_CONTROL).read_bytes()
    for path in (data / PG_CONTROL, data / MANIFEST):
        path.unlink()
    # Its links name the hidden folders; the right ones are made where every restore makes them.
    for link in (data / "pg_tblspc").iterdir():
        link.unlink()
    for oid, place in result.tablespaces.items():
        _move_all(place, destination.tablespaces[oid])
    _move_all(data, destination.data_directory)
    for root in (destination.data_directory, *destination.tablespaces.values()):
        shutil.rmtree(root / STAGE, ignore_errors=True)
        extracted.directories.add(root)
    extracted.directories.add(destination.data_directory / "global")
    return extracted


def _move_all(source: Path, place: Path) -> None:
    for entry in sorted(source.iterdir()):
        entry.rename(place / entry.name)
