"""One tar of a backup as it is read: members, hashes and page checksums in one pass, compressed, never on disk."""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from instance_manager.archive.backup.data_files import DataFile
from instance_manager.archive.backup.increment import header, increment_bytes, incremental_name
from instance_manager.archive.backup.page_checksums import PAGE_BYTES, wrong_pages
from instance_manager.archive.codecs import Codec
from instance_manager.core.types import Lsn
from instance_manager.threads import monotonic_s

CHUNK_BYTES = 1 << 20
DAMAGED_BLOCKS_KEPT = 1000
_REREADS = 3
_REREAD_PAUSE_S = 0.01
_SLEEP_MAX_S = 1.0


class BackupAborted(Exception):
    """Somebody has given the backup up while a tar of it was being read."""


class Flow:
    """Counts what all tars of a backup read, slows them down, and ends them. Shared by the store's threads."""

    def __init__(self, rate_limit_bytes_per_s: int | None = None) -> None:
        self._rate = rate_limit_bytes_per_s
        self._mutex = threading.Lock()
        self._free_at_s = 0.0
        self._aborted = False
        self.read_bytes = 0

    def abort(self) -> None:
        """Every tar ends at its next chunk."""
        self._aborted = True

    def passed(self, count: int) -> None:
        """Blocks as long as the rate wants. BackupAborted."""
        with self._mutex:
            self.read_bytes += count
            now_s = monotonic_s()
            self._free_at_s = max(self._free_at_s, now_s) + (count / self._rate if self._rate else 0.0)
            wait_until_s = self._free_at_s if self._rate else 0.0
        while True:
            if self._aborted:
                raise BackupAborted
            left_s = wait_until_s - monotonic_s()
            if left_s <= 0:
                return
            time.sleep(min(left_s, _SLEEP_MAX_S))


@dataclass(frozen=True, slots=True)
class Member:
    """What a tar holds under one name."""

    name: str
    size_bytes: int
    mode: int
    sha256: str | None
    """None: a directory."""


@dataclass(frozen=True, slots=True)
class DamagedBlock:
    """A page whose checksum is wrong, on a second look too."""

    file: str
    block: int


@dataclass(slots=True)
class TarOutcome:
    """What is known when a tar has been read to its end."""

    members: list[Member] = field(default_factory=list)
    damaged: list[DamagedBlock] = field(default_factory=list)
    damaged_count: int = 0
    checked_pages: int = 0
    content_bytes: int = 0
    whole_bytes: int = 0
    """Of the files, also where only a part of one is in it."""
    object_bytes: int = 0
    object_sha256: str = ""


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file of a backup that is no file of the data directory."""

    name: str
    content: bytes
    mode: int = 0o600


class TarContent:
    """`Content` of a store. Read again from the start at each attempt; `outcome` is of the last that came to its end."""

    def __init__(
        self,
        files: list[DataFile | MemoryFile],
        codec: Codec,
        flow: Flow,
        *,
        checksums_before: Lsn | None,
    ) -> None:
        self._files = files
        self._codec = codec
        self._flow = flow
        self._checksums_before = checksums_before
        self.outcome = TarOutcome()

    @property
    def size_bytes(self) -> None:
        return None

    def chunks(self) -> Iterator[bytes]:
        """OSError; BackupAborted."""
        outcome = TarOutcome()
        digest = hashlib.sha256()
        # 0: lz4's and gzip's word for a size that is not known before.
        for chunk in self._codec.compressed(self._tar(outcome), 0):
            digest.update(chunk)
            outcome.object_bytes += len(chunk)
            yield chunk
        outcome.object_sha256 = digest.hexdigest()
        self.outcome = outcome

    def _tar(self, outcome: TarOutcome) -> Iterator[bytes]:
        length = 0
        for file in self._files:
            for chunk in self._memory(file, outcome) if isinstance(file, MemoryFile) else self._file(file, outcome):
                length += len(chunk)
                self._flow.passed(len(chunk))
                yield chunk
        # Two empty blocks end a tar; readers expect whole records.
        yield bytes(2 * tarfile.BLOCKSIZE + -(length + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)

    def _memory(self, file: MemoryFile, outcome: TarOutcome) -> Iterator[bytes]:
        info = tarfile.TarInfo(file.name)
        info.size, info.mode = len(file.content), file.mode
        yield _header(info)
        yield file.content + _padding(info.size)
        outcome.content_bytes += info.size
        outcome.whole_bytes += info.size
        outcome.members.append(Member(file.name, info.size, file.mode, hashlib.sha256(file.content).hexdigest()))

    def _file(self, file: DataFile, outcome: TarOutcome) -> Iterator[bytes]:
        info = tarfile.TarInfo(file.name)
        try:
            if file.is_directory:
                found = file.path.stat()
                info.type, info.mode, info.mtime = tarfile.DIRTYPE, stat.S_IMODE(found.st_mode), int(found.st_mtime)
                yield _header(info)
                outcome.members.append(Member(file.name, 0, info.mode, None))
                return
            opened = file.path.open("rb", buffering=0)
        except FileNotFoundError:
            return
        with opened:
            found = os.fstat(opened.fileno())
            info.size, info.mode, info.mtime = found.st_size, stat.S_IMODE(found.st_mode), int(found.st_mtime)
            info.uid, info.gid = found.st_uid, found.st_gid
            blocks = None if file.delta is None else file.delta.to_send(found.st_size)
            if blocks is None:
                content = self._content(file, opened, info.size, outcome)
            else:
                info.name, info.size = incremental_name(file.name), increment_bytes(len(blocks))
                content = self._blocks(file, opened, blocks, found.st_size // PAGE_BYTES, outcome)
            yield _header(info)
            digest = hashlib.sha256()
            for chunk in content:
                digest.update(chunk)
                yield chunk
            yield _padding(info.size)
        outcome.content_bytes += info.size
        outcome.whole_bytes += found.st_size
        outcome.members.append(Member(info.name, info.size, info.mode, digest.hexdigest()))

    def _content(self, file: DataFile, opened: BinaryIO, size: int, outcome: TarOutcome) -> Iterator[bytes]:
        """Exactly `size` bytes: zeros where the file has become shorter, as a truncation in the log will make it."""
        first_block = file.first_block if self._checksums_before is not None else None
        position = 0
        while position < size:
            wanted = min(CHUNK_BYTES, size - position)
            chunk = _read(opened, wanted)
            is_whole = len(chunk) == wanted
            if first_block is not None and is_whole and len(chunk) % PAGE_BYTES == 0:
                chunk = self._checked(file, opened, chunk, position, first_block, outcome)
            yield chunk if is_whole else chunk + bytes(wanted - len(chunk))
            position += wanted

    def _blocks(
        self, file: DataFile, opened: BinaryIO, blocks: list[int], length: int, outcome: TarOutcome
    ) -> Iterator[bytes]:
        """An incremental file: zeros for blocks that are no longer there, as in `_content`."""
        first_block = file.first_block if self._checksums_before is not None else None
        yield header(blocks, length)
        for first, count in _runs(blocks, CHUNK_BYTES // PAGE_BYTES):
            opened.seek(first * PAGE_BYTES)
            wanted = count * PAGE_BYTES
            chunk = _read(opened, wanted)
            is_whole = len(chunk) == wanted
            if first_block is not None and is_whole:
                chunk = self._checked(file, opened, chunk, first * PAGE_BYTES, first_block, outcome)
            yield chunk if is_whole else chunk + bytes(wanted - len(chunk))

    def _checked(
        self, file: DataFile, opened: BinaryIO, chunk: bytes, position: int, first_block: int, outcome: TarOutcome
    ) -> bytes:
        """The chunk, pages that were caught while they were being written read once more."""
        start = first_block + position // PAGE_BYTES
        outcome.checked_pages += len(chunk) // PAGE_BYTES
        for block in wrong_pages(chunk, start, self._checksums_before):
            at = (block - start) * PAGE_BYTES
            page = self._reread(opened, position + at, block)
            if page is None:
                outcome.damaged_count += 1
                if len(outcome.damaged) < DAMAGED_BLOCKS_KEPT:
                    outcome.damaged.append(DamagedBlock(file.name, block))
            else:
                chunk = chunk[:at] + page + chunk[at + PAGE_BYTES :]
        opened.seek(position + len(chunk))
        return chunk

    def _reread(self, opened: BinaryIO, offset: int, block: int) -> bytes | None:
        """The page as it is right now; None: still wrong."""
        for _ in range(_REREADS):
            time.sleep(_REREAD_PAUSE_S)
            opened.seek(offset)
            page = _read(opened, PAGE_BYTES)
            if len(page) < PAGE_BYTES:
                return page + bytes(PAGE_BYTES - len(page))
            if not list(wrong_pages(page, block, self._checksums_before)):
                return page
        return None


def _runs(blocks: list[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, count) of neighbours in an ascending list."""
    begin = 0
    for place in range(1, len(blocks) + 1):
        if place == len(blocks) or blocks[place] != blocks[place - 1] + 1 or place - begin == most:
            yield blocks[begin], place - begin
            begin = place


def _read(opened: BinaryIO, wanted: int) -> bytes:
    """As much as there is, up to `wanted`."""
    parts = bytearray()
    while len(parts) < wanted and (part := opened.read(wanted - len(parts))):
        parts += part
    return bytes(parts)


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
