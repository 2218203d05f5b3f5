"""WAL files for tests without a server: a right first page, and content of which two never agree by chance."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from instance_manager.archive.wal_names import SegmentSize
from instance_manager.core.types import format_lsn

SYSTEM = 7701234567890123456
SIZE = SegmentSize(1 << 20)
MAGIC_15 = 0xD110


def first_page(
    name: str,
    *,
    size: SegmentSize = SIZE,
    system: int = SYSTEM,
    magic: int = MAGIC_15,
    timeline: int | None = None,
    info: int = 0x0006,
) -> bytes:
    segment = size.parse(name)
    return struct.pack(
        "=HHIQI4xQII",
        magic,
        info,
        segment.timeline if timeline is None else timeline,
        size.start_lsn(segment),
        0,
        system,
        size.size_bytes,
        8192,
    )


def segment_content(name: str, *, seed: int = 0, size: SegmentSize = SIZE, timeline: int | None = None) -> bytes:
    """A segment that compresses about as well as WAL does."""
    chance = random.Random(f"{name} {seed}")
    page = chance.randbytes(900) + bytes(8192 - 900)
    whole = bytearray(page * (size.size_bytes // 8192))
    head = first_page(name, size=size, timeline=timeline)
    whole[: len(head)] = head
    return bytes(whole)


def paged_segment(name: str, *, filled_bytes: int | None = None, size: SegmentSize = SIZE) -> bytes:
    """As Postgres writes it: each page says its position. Behind `filled_bytes` zeros, as after pg_switch_wal."""
    segment = size.parse(name)
    whole = bytearray(segment_content(name, size=size))
    for offset in range(8192, size.size_bytes, 8192):
        header = struct.pack("=HHIQ", MAGIC_15, 0, segment.timeline, size.start_lsn(segment) + offset)
        whole[offset : offset + len(header)] = header
    if filled_bytes is not None:
        whole[filled_bytes:] = bytes(size.size_bytes - filled_bytes)
    return bytes(whole)


def make_ready(wal_directory: Path, name: str, content: bytes) -> None:
    """As Postgres leaves a file that is to be archived."""
    (wal_directory / "archive_status").mkdir(parents=True, exist_ok=True)
    (wal_directory / name).write_bytes(content)
    (wal_directory / "archive_status" / f"{name}.ready").touch()


def history_content(*switches: tuple[int, int]) -> bytes:
    return "".join(f"{parent}\t{format_lsn(lsn)}\tno recovery target specified\n" for parent, lsn in switches).encode()
