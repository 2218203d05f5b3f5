"""Receipts: by them `archive_command` learns without a client, and so without the start of a program, that a segment is durable.

The start of a client is a tenth of what archiving a segment costs. So for what was sent ahead and has become durable a file of
the segment's name is put into a directory of Postgres's; the shell of archive_command (`receipt.sh`) acknowledges by it. An
acknowledgement lets Postgres remove the segment, so it counts only while the archiver itself would acknowledge:

1. *durable first*: a receipt comes after the store's matching answer, never before;
2. *in this life only*: it names the process that wrote it, and the shell asks /proc for that very process. With the archiver's end, by
   whatever, all are void, so that what is asked again is compared with the archive again, which may be another one; the next one removes them;
3. *of this very file*: it has the segment's time of modification to the nanosecond. Another file of the name is compared with the archive;
4. *while pushing is allowed*: the shell reads the agent's word (`postgres.archive_commands.ALLOWS`), as the client does;
5. *under the same orders*: another epoch, role or accepted history, and a permit that is over, withdraw them all (`Archiver`).
   The permit itself the shell cannot see; an acknowledgement needs none: the object was created under one, and is there;
6. *once*: the shell empties it. Who asks again, because Postgres fell between the answer and its rename, gets the long way.

Where one of these cannot be told, a client asks. Nothing here is flushed: what a power cut leaves is void by (2).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from instance_manager.threads import Threads, TooManyCalls

log = logging.getLogger("instance_manager.archive.receipts")

RECEIPTS = "archive-receipts"
"""Below the state directory."""
DEADLINE_S = 1.0
"""For the writing of one; whoever asks for that file waits for it."""
_BELL = "taken"
"""A pipe at which the shell rings with the name when it has used a receipt."""
_BELL_READ_BYTES = 64 << 10


class Receipts:
    """Given by the one who knows that a file is durable. Without a directory, or where the disk refuses, none is."""

    def __init__(self, directory: Path | None, owner_uid: int | None) -> None:
        self._directory = directory
        self._owner_uid = owner_uid
        self._descriptor: int | None = None
        self._bell: int | None = None
        self._given: dict[str, object] = {}
        """Each with what tells this one from an earlier one of the name."""
        self._used: list[str] = []
        """Empty by now; removed with the next one's writing."""
        self._threads = Threads("receipts", kept_max=1)
        self._text = b"%d %s\n" % (os.getpid(), _began())

    @property
    def are_given(self) -> bool:
        return self._descriptor is not None

    @property
    def count(self) -> int:
        """Of those that were given and not used."""
        return len(self._given)

    def start(self, on_taken: Callable[[str], None]) -> None:
        """Remove an earlier process's; `on_taken` is called with each name that the shell has acknowledged. OSError."""
        if self._directory is None:
            return
        _remove(self._directory)
        self._directory.mkdir(mode=0o700)
        # From here on by its descriptor: the directory above is Postgres's, whose user could put a link in its place.
        self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.mkfifo(_BELL, 0o600, dir_fd=self._descriptor)
            flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            # For writing too: so it has no end while nobody rings.
            self._bell = os.open(_BELL, flags, dir_fd=self._descriptor)
            for descriptor in (self._bell, self._descriptor):
                self._own(descriptor)
        except BaseException:
            self.close()
            raise
        asyncio.get_running_loop().add_reader(self._bell, self._rung, on_taken)

    def close(self) -> None:
        """None is valid any more, and none given."""
        self.withdraw_all()
        if self._bell is not None:
            asyncio.get_running_loop().remove_reader(self._bell)
            os.close(self._bell)
            self._bell = None
        # Not closed: a thread that the disk holds up may come back to it. It ends with the process.
        self._descriptor = None
        if self._directory is not None:
            with contextlib.suppress(OSError):
                _remove(self._directory)

    async def give(self, name: str, modified_ns: int) -> None:
        """`name` is durable, as the file that was last modified then. What the disk refuses, or does not do soon, is not given."""
        directory = self._descriptor
        if directory is None:
            return
        mark = self._given[name] = object()
        used, self._used = self._used, []

        def write() -> None:
            for each in used:
                _unlink(each, directory)
            self._write(name, modified_ns, directory)
            if self._given.get(name) is not mark:
                _unlink(name, directory)  # withdrawn meanwhile

        try:
            # A new file waits for the file system's journal, and so for whoever flushes: not in the event loop.
            await self._threads.call(write, deadline_s=DEADLINE_S)
        except (TimeoutError, TooManyCalls, OSError) as error:
            log.debug("no receipt for %s: %s", name, error)
            self.withdraw(name)

    def _write(self, name: str, modified_ns: int, directory: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        receipt = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            self._own(receipt)
            os.write(receipt, self._text)
            # Last: until then it is of another time than the segment.
            os.utime(receipt, ns=(modified_ns, modified_ns))
        finally:
            os.close(receipt)

    def withdraw(self, name: str) -> None:
        """It is not acknowledged by the shell any more, if it was not yet."""
        if self._given.pop(name, None) is None or self._descriptor is None:
            return
        try:
            _unlink(name, self._descriptor)
        except OSError as error:
            # What cannot be removed cannot be emptied either, and only what was emptied is acknowledged.
            log.warning("the receipt of %s cannot be removed: %s", name, error)

    def withdraw_all(self) -> None:
        for name in tuple(self._given):
            self.withdraw(name)

    def _rung(self, on_taken: Callable[[str], None]) -> None:
        assert self._bell is not None  # noqa: S101
        with contextlib.suppress(BlockingIOError):
            for name in os.read(self._bell, _BELL_READ_BYTES).decode(errors="replace").split():
                if self._given.pop(name, None) is not None:
                    self._used.append(name)
                    on_taken(name)

    def _own(self, descriptor: int) -> None:
        if self._owner_uid is not None and os.geteuid() == 0:
            os.fchown(descriptor, self._owner_uid, -1)


def _began() -> bytes:
    """When this process began, in ticks since the machine did: with its number, what no other process has."""
    return Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19]


def _unlink(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _remove(directory: Path) -> None:
    if directory.is_symlink():
        directory.unlink()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
