"""pg_control for a base backup: read again until its own checksum says that it was not being written just then.

Postgres writes it in place while it runs, and a reader may see a half of each (its documentation and its own get_controlfile say so);
a restore from such a copy does not start.
"""

from __future__ import annotations

import time
from pathlib import Path

FILE_BYTES = 8192
_READS = 20
_PAUSE_S = 0.01
# The checksum is the structure's last field. Where that is depends on the version (288 from 14 to 17, 292 in 18), but not what it covers.
_FIRST_PLACE_BYTES, _LAST_PLACE_BYTES, _STEP_BYTES = 256, 512, 4
_POLYNOMIAL = 0x82F63B78


class ControlFileDamaged(Exception):
    """Its checksum was wrong each time."""


def read_control_file(path: Path) -> bytes:
    """The whole file, right in itself. ControlFileDamaged; OSError. Blocks on the disk."""
    for _ in range(_READS):
        content = path.read_bytes()
        if is_whole(content):
            return content
        time.sleep(_PAUSE_S)
    raise ControlFileDamaged(
        f"{path.name}'s checksum was wrong {_READS} times: a server that starts from it would not; check the volume, and "
        "take the backup from another instance"
    )


def is_whole(content: bytes) -> bool:
    """Does some field hold the CRC-32C of all that is before it, and is nothing behind it?"""
    if len(content) != FILE_BYTES:
        return False
    crc = 0xFFFFFFFF
    for place, byte in enumerate(content[:_LAST_PLACE_BYTES]):
        if place >= _FIRST_PLACE_BYTES and place % _STEP_BYTES == 0:
            told = int.from_bytes(content[place : place + 4], "little")
            if told == crc ^ 0xFFFFFFFF and not any(content[place + 4 :]):
                return True
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return False


def _table() -> tuple[int, ...]:
    found = []
    for number in range(256):
        crc = number
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        found.append(crc)
    return tuple(found)


_TABLE = _table()
