"""Which files of a directory somebody has opened, as the kernel tells it (inotify): how it shows what Postgres has taken by itself."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

_IN_OPEN, _IN_Q_OVERFLOW, _IN_ISDIR = 0x20, 0x4000, 0x40000000
_HEAD = struct.Struct("iIII")
"""inotify(7): watch, mask, cookie, and how long the name is that follows, its padding included."""
_READ_BYTES = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


class EventsLost(Exception):
    """There were more than the kernel keeps (fs.inotify.max_queued_events): what else was opened is not known."""


class Openings:
    """Of one directory, from now on; `descriptor` can be read when there are new ones."""

    def __init__(self, directory: Path) -> None:
        """OSError: the kernel watches for nobody any more (fs.inotify.max_user_instances)."""
        self.descriptor: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor == -1:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if _libc.inotify_add_watch(self.descriptor, os.fsencode(directory), ctypes.c_uint32(_IN_OPEN)) == -1:
            number = ctypes.get_errno()
            os.close(self.descriptor)
            raise OSError(number, os.strerror(number), str(directory))

    def new(self) -> set[str]:
        """The names since the last call; all that was opened before it is among them. EventsLost."""
        found: set[str] = set()
        is_lost = False
        while True:
            try:
                events = os.read(self.descriptor, _READ_BYTES)
            except BlockingIOError:
                break
            at = 0
            while at < len(events):
                _, mask, _, length = _HEAD.unpack_from(events, at)
                at += _HEAD.size + length
                is_lost |= bool(mask & _IN_Q_OVERFLOW)
                if length and not mask & _IN_ISDIR:
                    found.add(os.fsdecode(events[at - length : at].rstrip(b"\0")))
        if is_lost:
            raise EventsLost
        return found

    def close(self) -> None:
        os.close(self.descriptor)
