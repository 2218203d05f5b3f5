"""Every codec gives back what it took, and tells damage from an end."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from instance_manager.archive.codecs import SUFFIXES, Codec, codec_of_suffix
from instance_manager.ports import ContentDamaged

WRITABLE = ("zstd", "lz4", "gzip", "none")
CONTENT = os.urandom(100_000) + bytes(900_000)


def packed(codec: Codec, content: bytes, chunk: int = 1 << 16) -> bytes:
    chunks = [content[start : start + chunk] for start in range(0, len(content), chunk)]
    return b"".join(codec.compressed(chunks, len(content)))


def unpacked(codec: Codec, stored: bytes, limit_bytes: int = 1 << 24, chunk: int = 1000) -> bytes:
    chunks = (stored[start : start + chunk] for start in range(0, len(stored), chunk))
    return b"".join(codec.decompressed(chunks, limit_bytes=limit_bytes))


@pytest.mark.parametrize("name", WRITABLE)
@given(content=st.binary(max_size=5000), chunk=st.integers(1, 3000))
@settings(max_examples=40, deadline=None)
def test_what_goes_in_comes_out(name: str, content: bytes, chunk: int) -> None:
    codec = Codec(name)
    assert unpacked(codec, packed(codec, content, chunk), chunk=chunk) == content


@pytest.mark.parametrize(("name", "compress"), [("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_codecs_of_other_tools_are_read_but_not_written(name: str, compress: Callable[[bytes], bytes]) -> None:
    assert unpacked(codec_of_suffix(f"x{SUFFIXES[name]}"), compress(CONTENT)) == CONTENT
    with pytest.raises(ValueError, match="not written"):
        packed(Codec(name), b"x")


@pytest.mark.parametrize("name", ["zstd", "lz4", "gzip"])
def test_a_stream_that_is_cut_off_or_damaged_is_no_content(name: str) -> None:
    stored = packed(Codec(name), CONTENT)
    for cut in (0, 10, len(stored) // 2, len(stored) - 1):
        with pytest.raises(ContentDamaged):
            unpacked(Codec(name), stored[:cut])
    with pytest.raises(ContentDamaged):
        unpacked(Codec(name), b"not compressed at all")


@pytest.mark.parametrize("name", WRITABLE)
def test_more_than_a_segment_is_refused(name: str) -> None:
    with pytest.raises(ContentDamaged, match="more than 999999 bytes"):
        unpacked(Codec(name), packed(Codec(name), CONTENT), limit_bytes=999_999)


@pytest.mark.parametrize("name", ["zstd", "lz4", "gzip"])
def test_content_has_a_checksum_of_its_own(name: str) -> None:
    """It vouches for what is in an object of which only the stored bytes have a digest."""
    stored = packed(Codec(name), os.urandom(100_000))
    # What cannot be compressed lies there as it is: only a checksum tells that a byte of it is another one.
    damaged = stored[:50_000] + bytes([stored[50_000] ^ 1]) + stored[50_001:]
    with pytest.raises(ContentDamaged):
        unpacked(Codec(name), damaged)


def test_what_repeats_itself_in_short_runs_takes_less_room_than_with_plain_level_1() -> None:
    words = [os.urandom(6) for _ in range(300)]
    content = b"".join(random.Random(1).choices(words, k=50_000))
    plain = zstandard.ZstdCompressor(level=1).compress(content)
    assert len(packed(Codec("zstd"), content)) < 0.8 * len(plain)
    assert zstandard.ZstdDecompressor().decompress(packed(Codec("zstd"), content)) == content


def test_text_that_does_not_repeat_is_compressed_too() -> None:
    """Left as it is, which is quicker and right for most WAL, it would take a third more."""
    chance = random.Random(1)
    content = bytes(chance.choices(b"etaoinshrdlu ", k=1_000_000))
    assert len(packed(Codec("zstd"), content)) < 0.6 * len(content)


@pytest.mark.parametrize("name", ["zstd", "lz4", "gzip"])
def test_what_comes_in_one_piece_is_unpacked_bit_by_bit(name: str) -> None:
    """16 MiB in one would go through memory, instead of the processor's cache, and cost as much again as decompressing."""
    content = random.Random(1).randbytes(1 << 20)
    pieces = list(Codec(name).decompressed([packed(Codec(name), content)], limit_bytes=1 << 20))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= 256 << 10


def test_the_level_is_the_callers() -> None:
    assert len(packed(Codec("gzip", 0), CONTENT)) > len(CONTENT) > len(packed(Codec("gzip"), CONTENT))
    assert gzip.decompress(packed(Codec("gzip"), CONTENT)) == CONTENT
