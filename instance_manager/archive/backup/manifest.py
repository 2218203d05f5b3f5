"""The hashes of a backup of ours: of each object, and of each file in it. barman writes none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.tar_stream import DamagedBlock, Member, TarOutcome
from instance_manager.archive.codecs import Codec
from instance_manager.archive.content import MemoryContent, read_object
from instance_manager.codec import from_json, to_json
from instance_manager.ports import ContentDamaged, ObjectInfo, ObjectStore

FORMAT = 1
MEMBERS_LIMIT_BYTES = 64 << 20
_GZIP = Codec("gzip", 1)


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One object of the backup."""

    name: str
    """`data_0001`."""
    object_name: str
    """Without its folder: `data_0001.tar.lz4`."""
    object_bytes: int
    object_sha256: str
    content_bytes: int
    """Of the files in it."""
    members: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `backup.info` has no room for."""

    backup_id: str
    instance: str
    """Where it was taken."""
    was_standby: bool
    tars: tuple[TarEntry, ...]
    checked_pages: int = 0
    """Pages whose checksum was looked at; 0 where the cluster has none."""
    damaged_count: int = 0
    damaged: tuple[DamagedBlock, ...] = ()
    """The first thousand."""
    tablespace_map: str = ""
    parent_id: str | None = None
    """The backup that an incremental one stands on."""
    has_checksums: bool | None = None
    """Of its pages. None: an earlier version took it, and did not say."""
    whole_bytes: int | None = None
    """Of all files as they were in the data directory; of an incremental backup more than it holds. None: not counted yet then."""
    format: int = FORMAT


def tar_entry(name: str, object_name: str, outcome: TarOutcome) -> TarEntry:
    return TarEntry(
        name,
        object_name,
        outcome.object_bytes,
        outcome.object_sha256,
        outcome.content_bytes,
        len(outcome.members),
    )


async def write_members(
    store: ObjectStore, names: BackupNames, tar_name: str, members: list[Member], *, deadline_s: float
) -> None:
    """The list of a tar's members, for a backup that is not listed yet. ObjectExists: it was written before."""
    content = MemoryContent(tuple(_GZIP.compressed(iter([to_json(members)]), 0)))
    await store.create(names.members(tar_name), content, deadline_s=deadline_s)


async def read_members(
    store: ObjectStore, names: BackupNames, tar_name: str, *, deadline_s: float
) -> dict[str, Member] | None:
    """None: there is no list. ContentDamaged: it cannot be read."""

    def receive(_: ObjectInfo, chunks: Iterator[bytes]) -> list[Member]:
        content = b"".join(_GZIP.decompressed(chunks, limit_bytes=MEMBERS_LIMIT_BYTES))
        try:
            return from_json(content, list[Member])
        except msgspec.MsgspecError as error:
            raise ContentDamaged(f"{names.members(tar_name)} cannot be read: {error}") from error

    found = await store.receive(names.members(tar_name), receive, deadline_s=deadline_s)
    return None if found is None else {member.name: member for member in found}


async def read_manifest(store: ObjectStore, names: BackupNames, *, deadline_s: float) -> Manifest | None:
    """None: there is none: another tool's backup. ContentDamaged: it cannot be read."""
    content = await read_object(store, names.manifest, deadline_s=deadline_s)
    if content is None:
        return None
    try:
        manifest = from_json(content, Manifest)
    except msgspec.MsgspecError as error:
        raise ContentDamaged(f"{names.manifest} cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise ContentDamaged(f"{names.manifest} was written by a later version; update this instance manager")
    return manifest
