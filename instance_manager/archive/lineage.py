"""Whose archive this is: written once, before the first WAL, and checked at every start.

It replaces the question whether the archive is empty: after a failover it never is, and another cluster's never becomes
ours by being empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import msgspec

from instance_manager.archive.codecs import SUFFIXES, Codec, CodecName, codec_of_suffix
from instance_manager.archive.content import MemoryContent, read_object
from instance_manager.archive.layout import Layout
from instance_manager.archive.wal_names import LARGEST_SEGMENT_BYTES, SegmentSize, wal_kind
from instance_manager.archive.wal_page import WrongSegment, check_first_page
from instance_manager.codec import from_json, to_json
from instance_manager.ports import ObjectExists, ObjectInfo, ObjectStore
from instance_manager.wall_clock import timestamp

FORMAT = 1


class ForeignArchive(Exception):
    """The archive is another cluster's, or of another kind, than what would be written to it; says what to do."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What never changes in the life of an archive."""

    system_identifier: str
    cluster_uid: str
    wal_segment_bytes: int
    codec: str
    created_at: str = ""
    """For people only."""
    format: int = FORMAT


async def read_lineage(store: ObjectStore, layout: Layout, *, deadline_s: float) -> Lineage | None:
    """What is stored; None: nothing. ForeignArchive: something that this version cannot read."""
    content = await read_object(store, layout.lineage, limit_bytes=1 << 16, deadline_s=deadline_s)
    if content is None:
        return None
    try:
        lineage = from_json(content, Lineage)
    except msgspec.MsgspecError as error:
        raise ForeignArchive(f"{layout.lineage} cannot be read: {error}: was it written by a later version?") from error
    if lineage.format != FORMAT or lineage.codec not in SUFFIXES:
        raise ForeignArchive(f"{layout.lineage} was written by a later version; update this instance manager")
    return lineage


async def claim_archive(
    store: ObjectStore,
    layout: Layout,
    *,
    system_identifier: int,
    cluster_uid: str,
    size: SegmentSize,
    codec: CodecName,
    deadline_s: float,
) -> Lineage:
    """Make the archive this cluster's, or see that it is. ForeignArchive: it is not, and nothing may be written to it.

    WAL that lies there without a lineage, as barman-cloud leaves it, is taken over if it is of this very system and
    of this codec.
    """
    wanted = Lineage(str(system_identifier), cluster_uid, size.size_bytes, codec, created_at=timestamp())
    found = await read_lineage(store, layout, deadline_s=deadline_s)
    if found is None:
        await _check_unmarked(store, layout, wanted, deadline_s)
        try:
            await store.create(layout.lineage, MemoryContent.of(to_json(wanted)), deadline_s=deadline_s)
        except ObjectExists:
            found = await read_lineage(store, layout, deadline_s=deadline_s)
    found = found or wanted
    problem = _difference(found, wanted)
    if problem is not None:
        raise ForeignArchive(f"{layout.server}: {problem}")
    return found


def _difference(found: Lineage, wanted: Lineage) -> str | None:
    if found.system_identifier != wanted.system_identifier:
        return (
            f"the archive is of the system {found.system_identifier}, this cluster is {wanted.system_identifier}: "
            "give this cluster another archive.server_name"
        )
    if found.cluster_uid != wanted.cluster_uid:
        return (
            f"the archive is of the cluster with uid {found.cluster_uid}, of which this one ({wanted.cluster_uid}) is a "
            "restored copy: two clusters never write to one archive; give this one another archive.server_name"
        )
    if found.wal_segment_bytes != wanted.wal_segment_bytes:
        return (
            f"the archive has segments of {found.wal_segment_bytes} bytes, this cluster of {wanted.wal_segment_bytes}"
        )
    if found.codec != wanted.codec:
        return f"the archive was begun with the codec {found.codec}: set archive.codec to that"
    return None


async def _check_unmarked(store: ObjectStore, layout: Layout, wanted: Lineage, deadline_s: float) -> None:
    """An archive without a lineage is empty, or holds the WAL of this system in this codec."""
    size = SegmentSize(wanted.wal_segment_bytes)
    async for entry in store.entries(layout.wals, deadline_s=deadline_s):
        name = layout.wal_of(entry.name)
        if name is None or wal_kind(name) != "segment":
            continue
        codec = codec_of_suffix(entry.name)
        if codec.name != wanted.codec:
            raise ForeignArchive(f"{entry.name} is there already: set archive.codec to {codec.name}")

        head = await store.receive(entry.name, partial(_first_chunk, codec), deadline_s=deadline_s)
        try:
            check_first_page(head or b"", size.parse(name), size, int(wanted.system_identifier))
        except (WrongSegment, ValueError) as error:
            raise ForeignArchive(
                f"{entry.name} is there already, and {error}: give this cluster another archive.server_name"
            ) from error
        return


def _first_chunk(codec: Codec, _: ObjectInfo, chunks: Iterator[bytes]) -> bytes:
    return next(codec.decompressed(chunks, limit_bytes=2 * LARGEST_SEGMENT_BYTES), b"")
