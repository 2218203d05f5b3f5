"""Where glibc puts what the threads of a process ask for."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8


def use_one_heap() -> None:
    """To be called before the first thread: glibc would give each a heap of its own, and what is freed in those stays.

    1 MiB less for the agent, for the archiver dozens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
