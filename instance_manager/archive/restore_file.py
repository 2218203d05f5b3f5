"""One object of the archive into a file: decompressed and verified. A file that is there is whole and right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instance_manager.archive.codecs import codec_of_suffix
from instance_manager.archive.layout import Layout, without_suffix
from instance_manager.archive.spool import Spool
from instance_manager.archive.upload import SHA256_KEY, SMALL_FILE_LIMIT_BYTES, STORED_SHA256_KEY
from instance_manager.archive.wal_names import SegmentSize, wal_kind
from instance_manager.archive.wal_page import HEADER_BYTES, WrongSegment, check_first_page
from instance_manager.ports import ContentDamaged, ObjectInfo, ObjectStore

ZEROS = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a restored file must be."""

    name: str
    size: SegmentSize
    system_identifier: int
    keep_bytes: int
    """Of a segment: what follows is zeros (the whole segment's size: nothing is)."""

    @property
    def is_segment(self) -> bool:
        return wal_kind(self.name) in ("segment", "partial")

    @property
    def limit_bytes(self) -> int:
        return self.size.size_bytes if self.is_segment else SMALL_FILE_LIMIT_BYTES


def verified(chunks: Iterator[bytes], info: ObjectInfo, expected: Expected) -> Iterator[bytes]:
    """The chunks of a WAL file, cut where the expectation says; ContentDamaged: anything about them is wrong."""
    told = info.metadata.get(SHA256_KEY)
    digest = hashlib.sha256()
    length = 0
    head = b""
    for chunk in chunks:
        if told is not None:
            digest.update(chunk)
        if expected.is_segment:
            if length < HEADER_BYTES:
                head += chunk[:HEADER_BYTES]
                _check_head(head, info, expected)
            kept = max(0, min(len(chunk), expected.keep_bytes - length))
            if kept:
                yield chunk[:kept]
            yield from zeros(len(chunk) - kept)
        else:
            yield chunk
        length += len(chunk)
    if expected.is_segment and length != expected.size.size_bytes:
        raise ContentDamaged(f"{info.name} holds {length} bytes, a segment has {expected.size.size_bytes}")
    if told is not None and told != digest.hexdigest():
        raise ContentDamaged(
            f"{info.name} holds other content than was archived: sha256 {digest.hexdigest()}, not {told}"
        )


def verified_as_stored(chunks: Iterator[bytes], info: ObjectInfo) -> Iterator[bytes]:
    """The chunks of an object as it lies in the archive; ContentDamaged behind the last one: not the object that was stored."""
    told = info.metadata.get(STORED_SHA256_KEY)
    if told is None:
        yield from chunks
        return
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if told != digest.hexdigest():
        raise ContentDamaged(f"{info.name} is not the object that was stored: sha256 {digest.hexdigest()}, not {told}")


def _check_head(head: bytes, info: ObjectInfo, expected: Expected) -> None:
    if len(head) < HEADER_BYTES:
        return  # the length tells when nothing more comes
    try:
        check_first_page(head, expected.size.parse(expected.name), expected.size, expected.system_identifier)
    except (WrongSegment, ValueError) as error:
        raise ContentDamaged(f"{info.name} is not what its name says: {error}") from error


def zeros(length: int) -> Iterator[bytes]:
    """That many zero bytes."""
    while length > 0:
        part = ZEROS[:length]
        length -= len(part)
        yield part


async def restore_object(
    store: ObjectStore, object_name: str, expected: Expected, spool: Spool, *, deadline_s: float
) -> Path | None:
    """The object, verified, as a file; None: the store said that there is none. ContentDamaged; ObjectStoreError."""
    codec = codec_of_suffix(object_name)

    def receive(info: ObjectInfo, chunks: Iterator[bytes]) -> Path:
        content = codec.decompressed(verified_as_stored(chunks, info), limit_bytes=expected.limit_bytes)
        size_bytes = expected.size.size_bytes if expected.is_segment else 0
        return spool.write(expected.name, verified(content, info, expected), size_bytes=size_bytes)

    return await store.receive(object_name, receive, deadline_s=deadline_s)


async def restore_wal(
    store: ObjectStore, layout: Layout, expected: Expected, spool: Spool, *, deadline_s: float
) -> Path | None:
    """A WAL file, whatever codec it lies in. None is proven twice: no such object, and none listed under its name."""
    own = layout.wal(expected.name)
    found = await restore_object(store, own, expected, spool, deadline_s=deadline_s)
    if found is not None:
        return found
    stem = layout.wal_stem(expected.name)
    async for entry in store.entries(stem, deadline_s=deadline_s):
        if without_suffix(entry.name) == stem:
            return await restore_object(store, entry.name, expected, spool, deadline_s=deadline_s)
    return None
