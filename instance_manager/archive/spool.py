"""Restored files before they are handed over: on the file system of pg_wal, whole, each under a name of its own.

Whoever asked for a file renames it himself, in the event loop: a request that is over can no longer put anything into
Postgres's place, whatever its threads still do.

A file is not flushed here, at most the disk begins on it. Nothing in this directory outlives the archiver that wrote it; Postgres
flushes each file that it takes over before it reads it (`durable_rename` in KeepFileRestoredFromArchive, 14 to 18), pg_rewind the whole directory at
its end; and what a crash of the machine loses is asked for again. A second flush in front of Postgres's own made replay a fifth slower.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def begin_writing(file_descriptor: int) -> bool:
    """The disk starts on what was written, and nobody waits for it; False: it cannot, and will later by itself."""
    whole = 0  # as a length: until the end
    return bool(_libc.sync_file_range(file_descriptor, 0, whole, _SYNC_FILE_RANGE_WRITE) == 0)


def allocate(file_descriptor: int, size_bytes: int) -> bool:
    """Its place on the disk at once, a third less work than piece by piece. False: it cannot, and whoever writes learns why."""
    return bool(_libc.fallocate(file_descriptor, 0, 0, size_bytes) == 0)


class Spool:
    """One directory; `prepare` empties it."""

    def __init__(self, directory: Path, *, niceness: int = 0, is_flushed_soon: bool = True) -> None:
        """`niceness`: above 0, each thread that writes here gives way to Postgres from then on, for good. `is_flushed_soon`: by whoever
        takes a file over, so that the disk begins on it at once."""
        self._directory = directory
        self._niceness = niceness
        self._is_flushed_soon = is_flushed_soon
        self._is_prepared = False

    async def prepare(self) -> None:
        """The directory is there, and at the first call after `abandon`, empty. OSError."""
        if not self._is_prepared:
            await asyncio.to_thread(self._make)
            self._is_prepared = True

    def abandon(self) -> None:
        """Nothing in it is wanted any more: the next `prepare` deletes it."""
        self._is_prepared = False

    def write(self, name: str, chunks: Iterator[bytes], *, size_bytes: int = 0) -> Path:
        """A file of these chunks, `size_bytes` long where that is known. Whatever the chunks raise leaves none. Blocks."""
        thread = threading.get_native_id()
        if os.getpriority(os.PRIO_PROCESS, thread) < self._niceness:
            os.setpriority(os.PRIO_PROCESS, thread, self._niceness)
        path = self._directory / f"{name}.{secrets.token_hex(4)}"
        try:
            with path.open("xb", buffering=0) as file:
                os.fchmod(file.fileno(), 0o600)
                owner = self._owner
                if owner is not None:
                    os.fchown(file.fileno(), *owner)
                if size_bytes:
                    allocate(file.fileno(), size_bytes)
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
                if self._is_flushed_soon:
                    begin_writing(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return path

    @property
    def _owner(self) -> tuple[int, int] | None:
        """Whose the files must be: the owner of pg_wal, where this process is root."""
        if os.geteuid() != 0:
            return None
        found = self._directory.parent.stat()
        return found.st_uid, found.st_gid

    def _make(self) -> None:
        # What an abandoned thread still writes there is in the way at most until the next time.
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        if self._owner is not None:
            os.chown(self._directory, *self._owner)
