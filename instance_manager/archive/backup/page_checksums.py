"""Page checksums as Postgres computes them (checksum_impl.h, the same from 9.3 to 18): is a page what was written?

32 sums run side by side, each multiplied and mixed with every 32nd word of the page. Here the sums of many pages lie in one
long integer, 64 bits for each, the even and the odd ones apart, so that a product never reaches its neighbour.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from instance_manager.core.types import Lsn

PAGE_BYTES = 8192
PAGES_PER_FILE = (1 << 30) // PAGE_BYTES
PAGES_AT_ONCE = 16
_PRIME = 16777619
_OFFSETS = (
    *(0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C),
    *(0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB),
    *(0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4),
    *(0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756),
)
_ROW_BYTES = 4 * len(_OFFSETS)
_ROWS = PAGE_BYTES // _ROW_BYTES
_HEADER = struct.Struct("<IIHHH")
_NEW_PAGE = bytes(PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class _Constants:
    """For a number of pages at once."""

    start: int
    words: int
    """Selects every second 32-bit word."""
    shifted: int
    """Selects what is left of a word that was shifted by 17."""


@lru_cache(maxsize=PAGES_AT_ONCE)
def _constants(pages: int) -> _Constants:
    slots = len(_OFFSETS) // 2 * pages
    start = b"".join(struct.pack("<I", offset) for offset in _OFFSETS) * pages
    words = int.from_bytes(b"\xff\xff\xff\xff\0\0\0\0" * slots, "little")
    shifted = int.from_bytes(b"\xff\x7f\0\0\0\0\0\0" * slots, "little")
    return _Constants(int.from_bytes(start, "little"), words, shifted)


def checksums(pages: bytes, first_block: int) -> list[int]:
    """What `pd_checksum` of each page must be; `first_block`: its number in the relation's fork, from 0."""
    count = len(pages) // PAGE_BYTES
    constants = _constants(count)
    words, shifted = constants.words, constants.shifted
    even, odd = constants.start & words, (constants.start >> 32) & words
    # The field itself counts as 0.
    cleared = [
        pages[at : at + 8] + b"\0\0" + pages[at + 10 : at + PAGE_BYTES] for at in range(0, len(pages), PAGE_BYTES)
    ]
    for row in range(_ROWS):
        at = row * _ROW_BYTES
        value = int.from_bytes(b"".join([page[at : at + _ROW_BYTES] for page in cleared]), "little")
        mixed = even ^ (value & words)
        even = ((mixed * _PRIME) ^ ((mixed >> 17) & shifted)) & words
        mixed = odd ^ ((value >> 32) & words)
        odd = ((mixed * _PRIME) ^ ((mixed >> 17) & shifted)) & words
    for _ in range(2):
        even = ((even * _PRIME) ^ ((even >> 17) & shifted)) & words
        odd = ((odd * _PRIME) ^ ((odd >> 17) & shifted)) & words
    folded = (even ^ odd).to_bytes(_ROW_BYTES * count, "little")
    found = []
    for number in range(count):
        sums = int.from_bytes(folded[number * _ROW_BYTES : (number + 1) * _ROW_BYTES], "little")
        for bits in (512, 256, 128, 64):
            sums ^= sums >> bits
        found.append(((sums & 0xFFFFFFFF) ^ (first_block + number)) % 0xFFFF + 1)
    return found


def wrong_pages(pages: bytes, first_block: int, newer_than: Lsn | None) -> Iterator[int]:
    """Block numbers of the pages whose checksum is wrong. A new page has none.

    `newer_than`: pages written since a backup began may be read torn, and are not judged: the log holds them whole.
    """
    for at in range(0, len(pages), PAGE_BYTES * PAGES_AT_ONCE):
        part = pages[at : at + PAGE_BYTES * PAGES_AT_ONCE]
        block = first_block + at // PAGE_BYTES
        for number, expected in enumerate(checksums(part, block)):
            page = part[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
            high, low, told, _, lower = _HEADER.unpack_from(page)
            if told == expected or page == _NEW_PAGE:
                continue
            # A page whose header is zero while something else is not is damaged, whatever its position says.
            if newer_than is not None and (high << 32 | low) >= newer_than and lower:
                continue
            yield block + number
