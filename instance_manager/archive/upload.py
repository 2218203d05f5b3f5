"""One file of pg_wal into the archive: checked, compressed, created once, and compared where the name is taken."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from instance_manager.archive.codecs import Codec
from instance_manager.archive.content import FileContent, MemoryContent, file_chunks, sha256_of
from instance_manager.archive.counters import PushCounters
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.wal_names import LARGEST_SEGMENT_BYTES, SegmentSize, timeline_of, wal_kind
from instance_manager.archive.wal_page import HEADER_BYTES, WrongSegment, check_first_page
from instance_manager.core.types import Epoch
from instance_manager.ports import Content, ObjectExists, ObjectInfo, ObjectStore, StoreUnreachable
from instance_manager.postgres.histories import HistoryInvalid, parse_history
from instance_manager.threads import monotonic_s

SMALL_FILE_LIMIT_BYTES = 1 << 20
IN_MEMORY_SEGMENT_MAX_BYTES = 32 << 20
SHA256_KEY = "sha256"
STORED_SHA256_KEY = "stored-sha256"
READ_BYTES = 256 << 10
"""Stays in the processor's cache from the reading to the digest to the compression."""


class NotArchived(Exception):
    """The file is not durable in the archive; the text is for Postgres's log."""


class ArchiveConflict(NotArchived):
    """Other content lies under this name. Nothing is overwritten, and nothing acknowledged, for ever."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What will be created: its content in the archive's form, and a digest by which it is known again."""

    content: Content
    sha256: str | None
    """Of the file itself. None for a segment that was compressed: the digest of its 16 MiB would be a fifth of all work."""
    file_bytes: int
    stored_sha256: str | None = None
    """Then instead: of the object. Objects that are alike hold the same; those that differ are compared by what is in them."""

    @property
    def held_bytes(self) -> int:
        """Of memory, until it is uploaded."""
        return self.content.size_bytes if isinstance(self.content, MemoryContent) else 0

    @property
    def metadata(self) -> dict[str, str]:
        told = {SHA256_KEY: self.sha256, STORED_SHA256_KEY: self.stored_sha256}
        return {key: digest for key, digest in told.items() if digest is not None}

    def file_sha256(self, codec: Codec) -> str:
        """Of the file itself, computed where it is not known. Blocks: call it in a thread."""
        if self.sha256 is not None:
            return self.sha256
        return sha256_of(codec.decompressed(self.content.chunks(), limit_bytes=LARGEST_SEGMENT_BYTES))


@dataclass(frozen=True, slots=True)
class CompressedFile:
    """A file too large to hold: compressed as it is sent, again for each attempt."""

    path: Path
    codec: Codec
    file_bytes: int

    @property
    def size_bytes(self) -> None:
        return None

    def chunks(self) -> Iterator[bytes]:
        return self.codec.compressed(file_chunks(self.path), self.file_bytes)


def prepare(path: Path, name: str, codec: Codec, size: SegmentSize, system_identifier: int) -> Prepared:
    """Read, check and compress. NotArchived: not what its name says. OSError. Blocks: call it in a thread."""
    before = path.stat()
    kind = wal_kind(name)
    is_segment = kind in ("segment", "partial")
    if is_segment and before.st_size != size.size_bytes:
        raise NotArchived(f"{name} has {before.st_size} bytes, a segment has {size.size_bytes}")
    if not is_segment and before.st_size > SMALL_FILE_LIMIT_BYTES:
        raise NotArchived(f"{name} has {before.st_size} bytes: no such file is as long as that")
    is_known_as_stored = kind == "segment" and codec.name != "none" and size.size_bytes <= IN_MEMORY_SEGMENT_MAX_BYTES
    digest, stored_digest = hashlib.sha256(), hashlib.sha256()

    def checked() -> Iterator[memoryview]:
        for number, chunk in enumerate(reused_chunks(path)):
            if number == 0 and is_segment:
                _check(bytes(chunk[:HEADER_BYTES]), name, size, system_identifier)
            if not is_known_as_stored:
                digest.update(chunk)
            yield chunk

    def compressed() -> Iterator[bytes]:
        for piece in codec.compressed(checked(), before.st_size):
            stored_digest.update(piece)
            yield piece

    content: Content
    if is_segment and (codec.name == "none" or size.size_bytes > IN_MEMORY_SEGMENT_MAX_BYTES):
        for _ in checked():
            pass
        content = (
            FileContent(path, before.st_size) if codec.name == "none" else CompressedFile(path, codec, before.st_size)
        )
    else:
        pieces = tuple(compressed())
        content = MemoryContent(pieces, stored_digest.hexdigest())
    if kind == "history":
        _check_history(path, name)
    after = path.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        raise NotArchived(f"{name} changed while it was read")
    if is_known_as_stored:
        return Prepared(content, None, before.st_size, stored_digest.hexdigest())
    return Prepared(content, digest.hexdigest(), before.st_size)


def reused_chunks(path: Path, first: int = 0, behind: int | None = None) -> Iterator[memoryview]:
    """A file, or its bytes from `first` to `behind`, each chunk in the same place as the one before: new memory for each costs a fifth more.

    Fewer where the file ends earlier. OSError.
    """
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(first)
        while length := file.readinto(buffer if behind is None else buffer[: behind - first]):
            first += length
            yield buffer[:length]


def _check(start: bytes, name: str, size: SegmentSize, system_identifier: int) -> None:
    try:
        check_first_page(start, size.parse(name), size, system_identifier)
    except (WrongSegment, ValueError) as error:
        raise NotArchived(f"{name} is not what its name says: {error}") from error


def _check_history(path: Path, name: str) -> None:
    try:
        parents = parse_history(timeline_of(name), path.read_text(errors="replace"))
    except HistoryInvalid as error:
        raise NotArchived(str(error)) from error
    if not parents:
        raise NotArchived(f"{name} names no parent: it is the history of nothing")


def content_digest(codec: Codec, _: ObjectInfo, chunks: Iterator[bytes]) -> str:
    """SHA-256 of what is compressed in an object; a receiver."""
    digest = hashlib.sha256()
    for chunk in codec.decompressed(chunks, limit_bytes=LARGEST_SEGMENT_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


class Uploader:
    """Creates objects for files; retries what may pass, within `patience`; writes only under a valid permit."""

    def __init__(
        self,
        store: ObjectStore,
        layout: Layout,
        orders: OrderBook,
        instance: str,
        patience: Patience,
        counters: PushCounters,
    ) -> None:
        self._store = store
        self._layout = layout
        self._orders = orders
        self._instance = instance
        self._patience = patience
        self._counters = counters

    async def create(
        self, object_name: str, prepared: Prepared, epoch: Epoch, *, allowed: Callable[[], None] | None = None
    ) -> bool:
        """Durable when it returns; False: it was there with the same content. ArchiveConflict; ObjectStoreError.

        NotArchived: the permit is over, or of another epoch. `allowed`: asked instead of the permit, for what needs none (`filling`).
        """
        metadata = {**prepared.metadata, "epoch": str(epoch), "instance": self._instance}

        async def attempt(deadline_s: float) -> bool:
            if allowed is None:
                self.require_permit(epoch)
            else:
                allowed()
            try:
                await self._store.create(object_name, prepared.content, metadata=metadata, deadline_s=deadline_s)
            except ObjectExists:
                await self._compare(object_name, prepared, deadline_s)
                return False
            return True

        began_s = monotonic_s()
        try:
            is_new = await self._patience.call(attempt, on_retry=self._count_retry)
        finally:
            self._counters.store_seconds += monotonic_s() - began_s
        if is_new:
            self._counters.stored_bytes += prepared.content.size_bytes or 0
        return is_new

    @property
    def attempt_s(self) -> float:
        """Deadline of one request."""
        return self._patience.attempt_s

    def require_permit(self, epoch: Epoch | None = None) -> Orders:
        """The orders under which may be written now. NotArchived."""
        orders = self._orders.permitted()
        if orders is None:
            raise NotArchived("this instance has no valid write permit now: only the primary archives")
        if epoch is not None and orders.epoch != epoch:
            raise NotArchived(f"epoch {epoch} is over, {orders.epoch} has begun")
        return orders

    def are_standing(self, orders: Orders) -> bool:
        """Whether what was done under these orders may be told under those that hold now."""
        now = self._orders.permitted()
        return now is not None and now.standing == orders.standing

    async def _compare(self, object_name: str, prepared: Prepared, deadline_s: float) -> None:
        info = await self._store.info(object_name, deadline_s=deadline_s)
        if info is None:
            raise StoreUnreachable(f"{object_name} was there and is gone")
        told = info.metadata if info.vouched else {}
        if prepared.stored_sha256 is not None and told.get(STORED_SHA256_KEY) == prepared.stored_sha256:
            return
        found = told.get(SHA256_KEY)
        if found is None:
            # Written by another tool, another version of the codec, or by a store that does not vouch: only its content tells.
            receiver = partial(content_digest, self._layout.codec)
            found = await self._store.receive(object_name, receiver, deadline_s=deadline_s)
        if found is None:
            raise StoreUnreachable(f"{object_name} was there and is gone")
        own = await asyncio.to_thread(prepared.file_sha256, self._layout.codec)
        if found != own:
            self._counters.conflicts += 1
            raise ArchiveConflict(
                f"{object_name} is in the archive with other content (sha256 {found[:16]}..., this file has {own[:16]}...): "
                "two servers have written the same name. Nothing is overwritten; find out which is right, and move "
                "the other away"
            )

    def _count_retry(self) -> None:
        self._counters.retries += 1


def file_identity(path: Path) -> tuple[int, int, int]:
    """What changes when another file takes the name. OSError."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
