"""Segments ahead of replay, straight into pg_wal, where Postgres reads them without asking this process.

A Postgres whose restore_command is empty believes whatever has the right name in pg_wal. So while it runs, all that is there was
put there for it:

1. before each of its starts every segment in pg_wal is removed: it may be from before a crash, or an old file under a new name, and
   the archive has it;
2. a segment is verified before it has its name, and a name is given by one rename;
3. what else comes there Postgres has got from restore_command, and renamed itself;
4. what Postgres has been given since its start is never replaced under it, and what it has not taken is removed again when
   the order of what it takes is another than expected, and before it opens;
5. a `.done` comes before the segment, as Postgres itself marks what it restores, so that no later life of the directory archives it.

Nothing is flushed before Postgres opens, or the directory is handed on: what a crash of the machine takes away is asked for again after
the next start (1). To flush each one took a seventh of the work of bringing it, and most are removed before the disk has seen them.

What Postgres has taken shows as it opens it. Whoever else opens a file there makes it count as taken: then it is not
removed, and more comes behind it, at most half of what is free on the volume. Postgres itself removes such files as it opens.

Between its start and its opening such a Postgres makes no files in pg_wal but by restore_command: from 15 on it neither recycles nor
prepares segments in recovery from an archive. Before, `wal_recycle = off` keeps it from the one; by the other 14 makes zeros, which it
takes for a segment that is not there yet, and never renames onto a name that is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from instance_manager.archive.recovery.openings import EventsLost, Openings
from instance_manager.archive.wal_names import SegmentSize
from instance_manager.postgres.files import fsync_directory, fsync_file
from instance_manager.postgres.server import RunAs

log = logging.getLogger("instance_manager.archive.recovery.placing")

_SEGMENT = re.compile(r"[0-9A-F]{24}")


class InPgWal:
    """A `prefetch.Place`."""

    def __init__(self, wal_directory: Path, size: SegmentSize, run_as: RunAs | None) -> None:
        self._wal = wal_directory
        self._size = size
        self._run_as = run_as
        self._openings: Openings | None = None
        self._placed: set[str] = set()
        """And not known to be taken."""
        self._taken: set[str] = set()
        """Of them: opened, and not told yet."""
        self._given: set[str] = set()
        """To this Postgres since its start; those behind the last one are forgotten."""
        self._is_lost = False

    @property
    def is_watched(self) -> bool:
        """It shows what Postgres takes by itself. Where the kernel does not tell it, Postgres has to ask for each segment."""
        return self._openings is not None

    def start(self, on_taken: Callable[[], None]) -> None:
        """`on_taken` is called when Postgres may have taken something."""
        try:
            self._openings = Openings(self._wal)
        except OSError as error:
            log.warning("replay asks for each segment, since pg_wal cannot be watched (inotify): %s", error)
            return
        asyncio.get_running_loop().add_reader(self._openings.descriptor, on_taken)

    def close(self) -> None:
        if self._openings is not None:
            asyncio.get_running_loop().remove_reader(self._openings.descriptor)
            self._openings.close()
            self._openings = None

    async def renew(self) -> None:
        """Postgres does not run: nothing that is there is believed by its next start. OSError."""
        self._look()
        self._is_lost = False
        for names in (self._given, self._placed, self._taken):
            names.clear()
        await asyncio.to_thread(self._clear)

    def holds(self, name: str) -> bool:
        """It is in place, and not known to be taken."""
        return name in self._placed

    def lost_track(self) -> bool:
        """Once, when it cannot be told any more what of that which is in place Postgres has taken."""
        is_lost, self._is_lost = self._is_lost, False
        return is_lost

    def room_bytes(self) -> int | None:
        """Half of what is free, and what is placed already is part of that: replay needs room too."""
        found = os.statvfs(self._wal)
        return (found.f_bavail * found.f_frsize + len(self._placed) * self._size.size_bytes) // 2

    async def make_durable(self) -> None:
        """What Postgres has had, and may need again: after a crash behind its opening nobody would bring it. OSError."""
        await asyncio.to_thread(self._flush)

    def keep(self, name: str, file: Path) -> Path:
        if name in self._given:
            return file
        # In the event loop, as everything that puts a file where Postgres looks: what is over can do it no more.
        return self._take_place(name, file)

    def taken(self) -> list[str]:
        self._look()
        return list(self._taken)

    def hand_over(self, name: str) -> None:
        self._placed.discard(name)
        self._taken.discard(name)
        self._given = {each for each in self._given if each > name} | {name}

    def discard(self, name: str, file: Path) -> None:
        if file != self._wal / name:
            with contextlib.suppress(OSError):
                file.unlink()
        elif name in self._placed:
            self._look()
            is_taken = name in self._taken
            self._placed.discard(name)
            self._taken.discard(name)
            if not is_taken:
                self._remove(name)

    def _look(self) -> None:
        if self._openings is None:
            return
        try:
            self._taken |= self._openings.new() & self._placed
        except EventsLost:
            self._is_lost = True

    def _take_place(self, name: str, file: Path) -> Path:
        try:
            self._mark_done(name)
            file.replace(self._wal / name)
        except OSError:
            self._mark(name).unlink(missing_ok=True)
            raise
        self._placed.add(name)
        return self._wal / name

    def _clear(self) -> None:
        for path in self._wal.iterdir():
            if _SEGMENT.fullmatch(path.name):
                self._mark(path.name).unlink(missing_ok=True)
                path.unlink()

    def _flush(self) -> None:
        for path in self._wal.iterdir():
            if _SEGMENT.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # a restart point removes what is not needed
                    fsync_file(path)
        for directory in (self._wal, self._wal / "archive_status"):
            fsync_directory(directory)

    def _mark_done(self, name: str) -> None:
        mark = self._mark(name)
        with contextlib.suppress(FileNotFoundError):
            mark.with_suffix(".ready").rename(mark)
        with contextlib.suppress(FileExistsError):
            # The directory is Postgres's user's, who could have put a link there.
            os.close(self._create(mark))

    def _mark(self, name: str) -> Path:
        return self._wal / "archive_status" / f"{name}.done"

    def _remove(self, name: str) -> None:
        """What Postgres has not taken; after a restart it comes again."""
        for path in (self._wal / name, self._mark(name)):
            with contextlib.suppress(OSError):
                path.unlink()

    def _create(self, path: Path) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if self._run_as is not None:
            os.fchown(descriptor, self._run_as.uid, self._run_as.gid)
        return descriptor
