"""Compression of what lies in the archive. One codec per archive; each is readable by the usual tools of its name."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import lz4.frame
import zstandard

from instance_manager.ports import ContentDamaged

CodecName = Literal["zstd", "lz4", "gzip", "none"]
"""What may be chosen for an archive of ours."""

SUFFIXES = {"zstd": ".zst", "lz4": ".lz4", "gzip": ".gz", "none": "", "bzip2": ".bz2", "xz": ".xz"}
"""Of every codec that can be read, as barman-cloud names them."""

_GZIP = 31
_DEFAULT_LEVELS = {"zstd": 1, "lz4": 0, "gzip": 1}
_ZSTD_1 = {"min_match": 5}
"""Instead of 7, for WAL repeats itself in short runs: a seventh smaller for the same work (docs/benchmarks.md)."""
_ZSTD_1_QUICK = {"min_match": 5, "hash_log": 13, "target_length": 1}
"""What does not repeat is left as it is (that is what a target length means at this level): a fifth less work."""
_QUICK_MAY_BE_LARGER = 1.1
_SLICE_BYTES = 32 << 10
_ERRORS = (zstandard.ZstdError, zlib.error, OSError, EOFError, lzma.LZMAError, RuntimeError, ValueError)


class _Compressor(Protocol):
    def compress(self, chunk: bytes | memoryview) -> bytes: ...
    def flush(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Codec:
    """How to write, and to read again. Both work on chunks, so memory does not grow with the object."""

    name: str
    level: int | None = None

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.name]

    def compressed(self, chunks: Iterable[bytes | memoryview], size_bytes: int) -> Iterator[bytes]:
        """The chunks, which have `size_bytes` together, in the archive's form. None is looked at after the next was taken."""
        if self.name == "none":
            yield from map(bytes, chunks)
            return
        waiting = iter(chunks)
        first = next(waiting, b"")
        compressor = self._compressor(size_bytes, first)
        if done := compressor.compress(first):
            yield done
        for chunk in waiting:
            if done := compressor.compress(chunk):
                yield done
        if done := compressor.flush():
            yield done

    def decompressed(self, chunks: Iterable[bytes], *, limit_bytes: int) -> Iterator[bytes]:
        """The content again. ContentDamaged: not of this codec, cut off, or more than `limit_bytes`."""
        length = 0
        for chunk in chunks if self.name == "none" else self._decompressed(chunks):
            length += len(chunk)
            if length > limit_bytes:
                raise ContentDamaged(f"more than {limit_bytes} bytes come out of it")
            yield chunk

    def _compressor(self, size_bytes: int, sample: bytes | memoryview) -> _Compressor:
        if self.name not in _DEFAULT_LEVELS:
            raise ValueError(f"{self.name} can be read but not written")
        level = _DEFAULT_LEVELS[self.name] if self.level is None else self.level
        if self.name == "zstd":
            tuning = _tuning_for(sample) if level == 1 else {}
            return _zstd(level, size_bytes, tuning).compressobj(size=size_bytes)
        if self.name == "lz4":
            return _Lz4(level, size_bytes)
        return zlib.compressobj(level, zlib.DEFLATED, _GZIP)

    def _decompressed(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        decompressor = self._decompressor()
        for chunk in _slices(chunks):
            try:
                done = decompressor.decompress(chunk)
            except _ERRORS as error:
                raise ContentDamaged(f"not {self.name}: {error}") from error
            if done:
                yield done
        if not decompressor.eof:
            raise ContentDamaged(f"its {self.name} stream ends too early")

    def _decompressor(self) -> Any:
        makers: dict[str, Any] = {
            "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
            "lz4": lz4.frame.LZ4FrameDecompressor,
            "gzip": lambda: zlib.decompressobj(_GZIP),
            "bzip2": bz2.BZ2Decompressor,
            "xz": lzma.LZMADecompressor,
        }
        return makers[self.name]()


def _slices(chunks: Iterable[bytes]) -> Iterator[memoryview]:
    """In small parts, so that what comes out of one is small too and stays in the processor's cache: half the time for a segment."""
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _SLICE_BYTES):
            yield view[start : start + _SLICE_BYTES]


def _zstd(level: int, size_bytes: int, tuning: dict[str, int]) -> zstandard.ZstdCompressor:
    # The checksum is what vouches for the content itself where only the digest of the object is known (`upload.Prepared`).
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(
            level, source_size=size_bytes, write_checksum=True, **tuning
        )
    )


def _tuning_for(sample: bytes | memoryview) -> dict[str, int]:
    """pgbench's WAL becomes 7 % larger the quick way, rows of text a third: it is tried with the beginning."""
    quick, full = (len(_zstd(1, len(sample), tuning).compress(sample)) for tuning in (_ZSTD_1_QUICK, _ZSTD_1))
    return _ZSTD_1_QUICK if quick <= _QUICK_MAY_BE_LARGER * full else _ZSTD_1


class _Lz4:
    """lz4's frame compressor, which wants to be begun."""

    def __init__(self, level: int, size_bytes: int) -> None:
        self._frame = lz4.frame.LZ4FrameCompressor(compression_level=level, content_checksum=True)
        self._head: bytes = self._frame.begin(size_bytes)

    def compress(self, chunk: bytes | memoryview) -> bytes:
        head, self._head = self._head, b""
        return b"".join((head, self._frame.compress(chunk)))

    def flush(self) -> bytes:
        return b"".join((self._head, self._frame.flush()))


def codec_of_suffix(name: str) -> Codec:
    """The codec by which an object of this name is read."""
    for codec, suffix in SUFFIXES.items():
        if suffix and name.endswith(suffix):
            return Codec(codec)
    return Codec("none")
