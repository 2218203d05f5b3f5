"""Segments ahead of replay, straight into pg_wal, where Postgres reads them without asking this process.

Postgres asks restore_command for each segment, and where that says "not there" opens the file of the name in pg_wal. A segment
that was placed has a *marker* in a directory of this recovery's own; the shell line of restore_command
(`commands.where_placed`) says "not there" by itself where there is one, and empties it. Everything else goes the long way.

A name in pg_wal alone says nothing: it may be from before a crash, or an old file under a new name. So

1. a marker comes last: the whole segment is verified and flushed beside, renamed into place, and the directory flushed;
2. a marker is good for one answer. Who asks again, also because he could not read what he found, gets the file anew from the archive;
3. a marker dies with its Postgres and with this process: its directory is a new one each time;
4. what Postgres has been given since its start is never replaced under it, and what it has not asked for is removed again when
   the order of its questions is another than expected, before each of its starts, and before it opens;
5. a `.done` comes before the segment, as Postgres itself marks what it restores, so that no later life of the directory archives it.

Between its start and its opening such a Postgres makes no files in pg_wal but by restore_command: from 15 on it neither recycles nor
prepares segments in recovery from an archive, and before, `wal_recycle = off` keeps it from the one, and from the other that
it never renames onto a name that is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from instance_manager.archive.wal_names import SegmentSize
from instance_manager.postgres.files import fsync_directory, fsync_file
from instance_manager.postgres.server import RunAs

log = logging.getLogger("instance_manager.archive.recovery.placing")

_MARK = b"placed\n"


class InPgWal:
    """A `prefetch.Place`. `work_directory` is this recovery's own, and new."""

    def __init__(self, wal_directory: Path, work_directory: Path, size: SegmentSize, run_as: RunAs | None) -> None:
        self._wal = wal_directory
        self._size = size
        self._run_as = run_as
        self.markers = work_directory / "placed"
        self.bell = work_directory / "taken"
        """A pipe at which the shell rings when it has emptied a marker."""
        self._bell_descriptor: int | None = None
        self._marked: set[str] = set()
        self._given: set[str] = set()
        """To this Postgres since its start; those behind the last one are forgotten."""

    def start(self, on_taken: Callable[[], None]) -> None:
        """`on_taken` is called when Postgres may have taken something. OSError."""
        self.markers.mkdir(mode=0o700)
        os.mkfifo(self.bell, 0o600)
        self._own(self.markers)
        self._own(self.bell)
        # For writing too: so it has no end while nobody rings.
        self._bell_descriptor = os.open(self.bell, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(self._bell_descriptor, self._rung, on_taken)

    def close(self) -> None:
        if self._bell_descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._bell_descriptor)
            os.close(self._bell_descriptor)
            self._bell_descriptor = None

    def renew(self) -> None:
        """Postgres does not run: nothing is believed of its last start. OSError."""
        self._given.clear()
        self._marked.clear()
        for marker in self.markers.iterdir():
            marker.unlink()

    def room_bytes(self) -> int | None:
        """Half of what is free, and what is placed already is part of that: replay needs room too."""
        found = os.statvfs(self._wal)
        return (found.f_bavail * found.f_frsize + len(self._marked) * self._size.size_bytes) // 2

    async def make_durable(self, file: Path) -> None:
        await asyncio.to_thread(fsync_file, file)

    async def keep(self, name: str, file: Path) -> Path:
        if name in self._given:
            return file
        # In the event loop, as everything that puts a file where Postgres looks: what is over can do it no more.
        number = self._take_place(name, file)
        try:
            await asyncio.to_thread(fsync_directory, self._wal)
            self._mark(name, number)
        except BaseException:
            self._remove(name)
            raise
        return self._wal / name

    def taken(self) -> list[str]:
        return [name for name in self._marked if self._is_taken(name)]

    def hand_over(self, name: str) -> None:
        self._marked.discard(name)
        with contextlib.suppress(FileNotFoundError):
            (self.markers / name).unlink()
        self._given = {each for each in self._given if each > name} | {name}

    def discard(self, name: str, file: Path) -> None:
        if file != self._wal / name:
            with contextlib.suppress(OSError):
                file.unlink()
        elif name in self._marked:
            is_taken = self._is_taken(name)
            self._marked.discard(name)
            (self.markers / name).unlink(missing_ok=True)
            if not is_taken:
                self._remove(name)

    def _rung(self, on_taken: Callable[[], None]) -> None:
        assert self._bell_descriptor is not None  # noqa: S101
        with contextlib.suppress(BlockingIOError):
            os.read(self._bell_descriptor, 4096)
        on_taken()

    def _is_taken(self, name: str) -> bool:
        """The shell has said "not there" for it. A marker that is gone counts: nobody else may have removed it."""
        try:
            return (self.markers / name).stat().st_size == 0
        except FileNotFoundError:
            return True

    def _take_place(self, name: str, file: Path) -> int:
        """The file's number on its file system."""
        self._mark_done(name)
        file.replace(self._wal / name)
        return (self._wal / name).stat().st_ino

    def _mark(self, name: str, number: int) -> None:
        """FileNotFoundError: another file is there by now."""
        if (self._wal / name).stat().st_ino != number:
            raise FileNotFoundError(f"{name} in pg_wal is not the file that was placed")
        descriptor = self._create(self.markers / name)
        try:
            os.write(descriptor, _MARK)
        finally:
            os.close(descriptor)
        self._marked.add(name)

    def _mark_done(self, name: str) -> None:
        status = self._wal / "archive_status"
        with contextlib.suppress(FileNotFoundError):
            (status / f"{name}.ready").rename(status / f"{name}.done")
        with contextlib.suppress(FileExistsError):
            os.close(self._create(status / f"{name}.done"))

    def _remove(self, name: str) -> None:
        """What Postgres has not asked for; a restart that finds it replaces it."""
        for path in (self.markers / name, self._wal / name, self._wal / "archive_status" / f"{name}.done"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _create(self, path: Path) -> int:
        """A new file of Postgres's: the directory is its user's, who could have put a link there."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if self._run_as is not None:
            os.fchown(descriptor, self._run_as.uid, self._run_as.gid)
        return descriptor

    def _own(self, path: Path) -> None:
        if self._run_as is not None:
            os.chown(path, self._run_as.uid, self._run_as.gid, follow_symlinks=False)
