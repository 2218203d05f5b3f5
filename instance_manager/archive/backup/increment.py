"""What of a relation's file belongs into an incremental backup, and how it is written: pure.

The format is Postgres's own (src/backend/backup/basebackup_incremental.c and src/bin/pg_combinebackup/reconstruct.c of 17 and
18): `INCREMENTAL.<name>` holds the magic number, how many blocks there are, the length in blocks below which what is missing comes from the
backup before, the numbers of the blocks, zeros up to a whole block where there are any, and the blocks.

| a file | goes |
|---|---|
| that is no relation's main fork | whole: the free space map is not in the log, and early minor releases clear the visibility map's bits without a word in the summaries |
| that the backup before does not have, or whose database is new | whole |
| that was truncated to before its begin (created anew: to 0), is empty, or is no whole number of blocks | whole |
| of which more than nine tenths have changed | whole |
| else | the blocks that a summary names, and all from where it was truncated on |

The last is stricter than the server, which trusts the summaries for what was truncated and grew again; a block that came back without a
record in the log is zeros then, and must not come from the backup before.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Set
from dataclasses import dataclass, field
from typing import NamedTuple

from instance_manager.archive.backup.page_checksums import PAGE_BYTES, PAGES_PER_FILE

PREFIX = "INCREMENTAL."
MAGIC = 0xD3AE1F0D
DEFAULT_TABLESPACE, SHARED_TABLESPACE = 1663, 1664
WHOLE_ABOVE = 0.9
"""As the server: of a file of which a greater part has changed nothing is saved."""

_HEADER = struct.Struct("=III")
_NUMBER = struct.Struct("=I")
_NAME = re.compile(r"(?:(base|PG_[0-9]+_[0-9]+)/(\d+)|(global))/(\d+)(?:\.(\d+))?")


class FormatInvalid(Exception):
    """Not an incremental file."""


class RelationFile(NamedTuple):
    """One file, a GiB at most, of a relation's main fork."""

    tablespace: int
    database: int
    """0: shared by all."""
    relation: int
    """The number of its file, not its oid."""
    segment: int


def relation_file(name: str, tablespace: int | None = None) -> RelationFile | None:
    """From a name in a tar of the data directory, or of the tablespace with that oid, whole or incremental.

    None: another file, or another fork.
    """
    folder, separator, last = name.rpartition("/")
    match = _NAME.fullmatch(folder + separator + last.removeprefix(PREFIX))
    if match is None or (tablespace is None) == (match[1] not in ("base", None)):
        return None
    relation, segment = int(match[4]), int(match[5] or 0)
    if match[3]:
        return RelationFile(SHARED_TABLESPACE, 0, relation, segment) if tablespace is None else None
    return RelationFile(tablespace or DEFAULT_TABLESPACE, int(match[2]), relation, segment)


def incremental_name(name: str) -> str:
    """`base/5/INCREMENTAL.1259` of `base/5/1259`."""
    folder, separator, last = name.rpartition("/")
    return f"{folder}{separator}{PREFIX}{last}"


def header(blocks: list[int], length_blocks: int) -> bytes:
    """What stands before the blocks; a whole number of blocks itself where there are any."""
    found = _HEADER.pack(MAGIC, len(blocks), length_blocks) + array("I", blocks).tobytes()
    return found + bytes(-len(found) % PAGE_BYTES) if blocks else found


def parse_header(content: bytes) -> tuple[list[int], int, int]:
    """The blocks' numbers, the length below which the others come from before, and where the blocks begin. FormatInvalid."""
    if len(content) < _HEADER.size:
        raise FormatInvalid("too short")
    magic, count, length_blocks = _HEADER.unpack_from(content)
    end = _HEADER.size + count * _NUMBER.size
    if magic != MAGIC or count > PAGES_PER_FILE or len(content) < end:
        raise FormatInvalid(f"magic number {magic:#x}, {count} blocks")
    blocks = array("I", content[_HEADER.size : end]).tolist()
    return blocks, length_blocks, end + (-end % PAGE_BYTES if blocks else 0)


def increment_bytes(blocks: int) -> int:
    """Size of a file that holds so many blocks."""
    begin = _HEADER.size + blocks * _NUMBER.size
    return begin + (-begin % PAGE_BYTES + blocks * PAGE_BYTES if blocks else 0)


@dataclass(slots=True)
class ChangedBlocks:
    """Of all relations' main forks between two positions of the log; a bit for each block up to the last that has changed."""

    limits: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """To how many blocks a relation was truncated, at the least."""
    databases: set[tuple[int, int]] = field(default_factory=set)
    """Created or dropped: (tablespace, database)."""
    changed: dict[RelationFile, bytearray] = field(default_factory=dict)

    def limit(self, tablespace: int, database: int, relation: int, blocks: int) -> None:
        """It was created (0), dropped (0), or truncated to so many blocks; relation 0: the database itself."""
        if relation == 0:
            self.databases.add((tablespace, database))
            return
        key = (tablespace, database, relation)
        self.limits[key] = min(blocks, self.limits.get(key, blocks))

    def change(self, file: RelationFile, blocks: array[int]) -> None:
        """Blocks of one file, counted from its begin."""
        bits = self.changed.setdefault(file, bytearray())
        bits.extend(bytes(max(0, max(blocks, default=-1) // 8 + 1 - len(bits))))
        for block in blocks:
            bits[block >> 3] |= 1 << (block & 7)

    def of_file(self, file: RelationFile, blocks: int) -> list[int]:
        """Of its first so many blocks those that have changed, ascending."""
        bits = self.changed.get(file, bytearray())
        return [
            block
            for place, byte in enumerate(bits[: -(-blocks // 8)])
            if byte
            for block in range(8 * place, min(8 * place + 8, blocks))
            if byte >> (block & 7) & 1
        ]

    def to_send(self, file: RelationFile, size_bytes: int) -> list[int] | None:
        """Of a file that the backup before has; None: all of it."""
        blocks = size_bytes // PAGE_BYTES
        if size_bytes % PAGE_BYTES or not 0 < blocks <= PAGES_PER_FILE:
            return None
        if (file.tablespace, file.database) in self.databases:
            return None
        first = file.segment * PAGES_PER_FILE
        limit = self.limits.get(file[:3], first + blocks) - first
        if limit <= 0:
            return None
        found = self.of_file(file, min(blocks, limit)) + list(range(limit, blocks))
        return None if len(found) > WHOLE_ABOVE * blocks else found


@dataclass(frozen=True, slots=True)
class Delta:
    """What has changed of one file since the backup before, for whoever reads it."""

    file: RelationFile
    changes: ChangedBlocks
    before: Set[RelationFile]
    """What the backup before has."""

    def to_send(self, size_bytes: int) -> list[int] | None:
        """None: the file goes whole."""
        return self.changes.to_send(self.file, size_bytes) if self.file in self.before else None
