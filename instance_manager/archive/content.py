"""What is uploaded and what is read back, as bytes in memory or a file on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from instance_manager.ports import ContentDamaged, ObjectInfo, ObjectStore

CHUNK_BYTES = 1 << 20
SMALL_OBJECT_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class MemoryContent:
    """Pieces that lie in memory already."""

    pieces: tuple[bytes, ...]
    sha256: str | None = None
    """Of all of them, in hex; None: nobody has computed it."""

    @classmethod
    def of(cls, content: bytes) -> MemoryContent:
        return cls((content,))

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.pieces))

    def chunks(self) -> Iterator[bytes]:
        return iter(self.pieces)


@dataclass(frozen=True, slots=True)
class FileContent:
    """A file that stays as it is until the upload is over."""

    path: Path
    size_bytes: int

    def chunks(self) -> Iterator[bytes]:
        return file_chunks(self.path)


def file_chunks(path: Path) -> Iterator[bytes]:
    """The file from its start, at most a MiB at a time. OSError."""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def sha256_of(chunks: Iterable[bytes | memoryview]) -> str:
    """Of all chunks together, in hex."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


async def read_object(
    store: ObjectStore, name: str, *, limit_bytes: int = SMALL_OBJECT_LIMIT_BYTES, deadline_s: float
) -> bytes | None:
    """A small object, whole; None only when the store said that there is none. ContentDamaged: longer than the limit."""

    def collect(info: ObjectInfo, chunks: Iterator[bytes]) -> bytes:
        if info.size_bytes > limit_bytes:
            raise ContentDamaged(
                f"{name} has {info.size_bytes} bytes, where {limit_bytes} is the most that can be right"
            )
        return b"".join(chunks)

    return await store.receive(name, collect, deadline_s=deadline_s)
