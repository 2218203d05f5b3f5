"""Which TCP ports the demo uses: a block that is free, or the one that was asked for."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

FIRST_DEFAULT_PORT = 15432
_BLOCK_STEP = 100
_BLOCKS_TRIED = 100


class PortsTaken(Exception):
    """The text names the ports in use and what to do."""


def ports_in_use(ports: range, host: str = "127.0.0.1") -> tuple[int, ...]:
    """Those that somebody else listens on, or that may not be bound."""
    return tuple(port for port in ports if not _is_free(host, port))


def choose_base_port(count: int, wanted: int | None, *, spread: bool = False) -> int:
    """The first port of `count` free ones in a row, from 15432 on; `spread`: from anywhere above.

    PortsTaken: the wanted ones are not free, or none are.
    """
    if wanted is not None:
        if not 1024 <= wanted <= 65536 - count:
            raise PortsTaken(f"--base-port must be between 1024 and {65536 - count}, not {wanted}")
        if taken := ports_in_use(range(wanted, wanted + count)):
            raise PortsTaken(
                f"in use by another program: port {', '.join(map(str, taken))}; give another --base-port, "
                f"with {count} free ports from it on"
            )
        return wanted
    # Two that choose at the same time must not choose the same: each begins its search elsewhere.
    first = os.getpid() % _BLOCKS_TRIED if spread else 0
    for number in range(_BLOCKS_TRIED):
        base = FIRST_DEFAULT_PORT + (first + number) % _BLOCKS_TRIED * _BLOCK_STEP
        if not ports_in_use(range(base, base + count)):
            return base
    raise PortsTaken(f"no {count} free ports in a row found from {FIRST_DEFAULT_PORT} on; give --base-port")


def _is_free(host: str, port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
