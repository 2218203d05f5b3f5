"""Standard output as the relay needs it: whole lines, never torn by those of other processes, and never waited for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import termios
import time
from array import array

PIECE_BYTES = select.PIPE_BUF
"""What a pipe takes in one piece or not at all; lines of other processes go to the same one."""
_PAUSE_S = 0.01
_GONE_PAUSE_S = 0.5


class Output:
    """The file behind a descriptor, opened anew: O_NONBLOCK belongs to the open file, which others share."""

    def __init__(self, descriptor: int = 1) -> None:
        try:
            self._fd = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._fd = os.dup(descriptor)  # a socket: poll() below is then the only guard
        self._is_pipe = stat.S_ISFIFO(os.fstat(self._fd).st_mode)
        self._rest = b""
        """Of a line that a file or a terminal took a part of."""

    def close(self) -> None:
        os.close(self._fd)

    def write(self, lines: list[bytes], wait_s: float) -> int:
        """How many of the lines were taken within `wait_s`, from the first on."""
        until_s = _now_s() + wait_s
        taken = 0
        while taken < len(lines):
            count, size = 1, len(lines[taken])
            while taken + count < len(lines) and size + len(lines[taken + count]) <= PIECE_BYTES:
                size += len(lines[taken + count])
                count += 1
            if not self._write(b"".join(lines[taken : taken + count]), until_s):
                break
            taken += count
        return taken

    def _write(self, piece: bytes, until_s: float) -> bool:
        while not self._has_room(len(piece), until_s):
            if _now_s() >= until_s:
                return False
        piece = self._rest or piece
        try:
            written = os.write(self._fd, piece)
        except BlockingIOError:
            return False
        except OSError:
            # Its reader is gone: as one that does not read.
            time.sleep(max(0.0, min(_GONE_PAUSE_S, until_s - _now_s())))
            return False
        self._rest = piece[written:]
        return not self._rest

    def _has_room(self, size: int, until_s: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(max(0.0, until_s - _now_s()) * 1000):
            return False
        if not self._is_pipe or size <= PIECE_BYTES:
            return True
        # A longer one stays whole only in an empty pipe, which has room for it.
        held = array("i", [0])
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fd, termios.FIONREAD, held)
        if held[0]:
            time.sleep(_PAUSE_S)
        return not held[0]


def _now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
