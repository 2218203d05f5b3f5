"""Bodies of requests: read from their content as they are sent, so that nothing is held twice."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from instance_manager.ports import Content, ContentDamaged
from instance_manager.threads import monotonic_s

PIECE_BYTES = 256 << 10
"""The client asks for 16 KiB at a time and sends what it is given: in so small pieces a segment costs a millisecond more."""


class Body(io.RawIOBase):
    """A file-like object over a content of known size. Reading past the deadline raises TimeoutError."""

    def __init__(self, content: Content | Part, size_bytes: int, end_s: float) -> None:
        super().__init__()
        self._content = content
        self._size_bytes = size_bytes
        self._end_s = end_s
        self._position = 0
        self._chunks: Iterator[bytes | memoryview] = content.chunks()
        self._left = memoryview(b"")

    def __len__(self) -> int:
        return self._size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """To the start or the end only, as far as a client of S3 ever goes."""
        if (offset, whence) == (0, io.SEEK_END):
            self._position = self._size_bytes
        elif (offset, whence) == (0, io.SEEK_SET):
            self._rewind()
        elif (offset, whence) != (0, io.SEEK_CUR) and (offset, whence) != (self._position, io.SEEK_SET):
            raise io.UnsupportedOperation(f"seek({offset}, {whence})")
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes: fewer than asked for, or up to `PIECE_BYTES`. ContentDamaged when the content ends before its size."""
        if monotonic_s() > self._end_s:
            raise TimeoutError
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        if self._position >= self._size_bytes or size == 0:
            return b""
        while not self._left:
            try:
                self._left = memoryview(next(self._chunks))
            except StopIteration:
                raise ContentDamaged(f"a file ended after {self._position} of {self._size_bytes} bytes") from None
        wanted = max(size, PIECE_BYTES)
        found, self._left = self._left[:wanted], self._left[wanted:]
        self._position += len(found)
        return bytes(found)

    def _rewind(self) -> None:
        self._position = 0
        self._chunks = self._content.chunks()
        self._left = memoryview(b"")


@dataclass(frozen=True)
class Part:
    """One part of a larger upload, in memory, in the pieces that it came in: joined it would be there twice."""

    pieces: tuple[memoryview, ...]

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.pieces))

    @cached_property
    def md5(self) -> bytes:
        digest = hashlib.md5(usedforsecurity=False)
        self.add_to(digest)
        return digest.digest()

    def add_to(self, digest: hashlib._Hash) -> None:
        for piece in self.pieces:
            digest.update(piece)

    def chunks(self) -> Iterator[memoryview]:
        return iter(self.pieces)


def parts_of(chunks: Iterable[bytes], part_bytes: int) -> Iterator[Part]:
    """The chunks in parts of `part_bytes`, the last one shorter; one empty part for no chunks. None is held here once the next is asked for."""
    pieces: list[memoryview] = []
    room, sent = part_bytes, False
    for chunk in chunks:
        left = memoryview(chunk)
        while len(left) >= room:
            pieces.append(left[:room])
            left = left[room:]
            part, pieces, room, sent = Part(tuple(pieces)), [], part_bytes, True
            yield part
            del part
        if left:
            pieces.append(left)
            room -= len(left)
    if pieces or not sent:
        yield Part(tuple(pieces))
