"""Waiting for a file of a directory to change, without looking again and again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
from pathlib import Path

_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x80, 0x100
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
POLL_S = 0.5
"""Where the kernel watches for nobody any more (fs.inotify.max_user_instances)."""
WATCHED_S = 60.0

_libc = ctypes.CDLL(None, use_errno=True)


class Changes:
    """Of one directory. `wake` may be called by any thread."""

    def __init__(self, directory: Path) -> None:
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._watch: int | None = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        mask = _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE
        if self._watch == -1:
            self._watch = None
        elif _libc.inotify_add_watch(self._watch, os.fsencode(directory), ctypes.c_uint32(mask)) == -1:
            os.close(self._watch)
            self._watch = None

    @property
    def is_watched(self) -> bool:
        return self._watch is not None

    def wait(self, at_most_s: float | None = None) -> None:
        """Until something changed, or `at_most_s` have passed. Without a watch that is half a second."""
        limit_s = min(WATCHED_S if self.is_watched else POLL_S, WATCHED_S if at_most_s is None else at_most_s)
        poll = select.poll()
        for descriptor in (self._wake_read, self._watch):
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(limit_s * 1000):
            with contextlib.suppress(BlockingIOError):
                os.read(descriptor, 65536)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def close(self) -> None:
        for descriptor in (self._wake_read, self._wake_write, self._watch):
            if descriptor is not None:
                os.close(descriptor)
