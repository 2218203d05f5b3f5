"""The lock file: on one machine, the proof that the whole cluster is dead.

The kernel drops a flock when the last process that holds the open file is gone. Postgres and all its descendants inherit
it, the agent does not: it is free exactly when the supervisor and every Postgres process are gone.
"""

import fcntl
import os
from collections.abc import Callable


class LockBusyError(Exception):
    """The lock was not free in time; the text tells who wrote the file last."""


def acquire(path: str, content: str, attempts: int, pause: Callable[[], None]) -> int:
    """Lock the file, write `content` (one line) into it, and return its descriptor (not inheritable).

    It is created with mode 0600 if absent, its folder is not. Between `attempts`, `pause` is called, which may raise.
    Raises LockBusyError after the last attempt, and OSError if the file cannot be opened.
    """
    for attempt in range(attempts):
        if attempt:
            pause()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still_at(path, fd):  # somebody removed it meanwhile: a lock on nothing
                os.close(fd)
                continue
        except BlockingIOError:
            os.close(fd)
            continue
        os.ftruncate(fd, 0)
        os.pwrite(fd, content.encode() + b"\n", 0)
        return fd
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        holder = file.read(200).strip()
    raise LockBusyError(f"{path} is held by another supervisor or a Postgres left behind by one: {holder or 'unknown'}")


def _is_still_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))  # noqa: PTH116
    except FileNotFoundError:
        return False
