"""Sockets that are listened on, and TLS on them that is renewed while they are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

from instance_manager.http.limits import Rates

BACKLOG = 128
HANDSHAKE_TIMEOUT_S = 5.0
GOODBYE_TIMEOUT_S = 1.0
HANDSHAKES_MAX = 64
HANDSHAKES_PER_S = 20
HANDSHAKES_BURST = 100
"""Of one address. Each costs a millisecond or more of the loop that renews the Lease; a member makes a few in its life."""
ACCEPT_AGAIN_AFTER_S = 1.0
TOLD_AGAIN_AFTER_S = 60.0

_log = logging.getLogger(__name__)


class ListenError(Exception):
    """A listener could not be opened; the text names the key to change."""


def listen_on_tcp(host: str, port: int, *, where: str, key: str, host_key: str) -> socket.socket:
    """`where`: the place in the configuration; `key` and `host_key`: what to change there. ListenError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ListenError(f"{where}: host {host!r} has no address: {error}; set {host_key}") from error
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"{key} {port} is in use on {host} by another program; stop it, or set another {key}"
        elif error.errno == errno.EADDRNOTAVAIL:
            reason = f"{host} is not an address of this machine; set {host_key}"
        else:
            reason = f"{key} {port} on {host} cannot be used: {error.strerror}; set another {key}"
        raise ListenError(f"{where}: {reason}") from error
    return listener


class TlsListener:
    """One listening socket. After `renew` new connections get the new context; those that are there stay with theirs.

    It accepts by itself: asyncio's own server knows no bound of handshakes that are not done, and each costs 300 KiB before
    anybody has proven anything. Beyond HANDSHAKES_MAX the oldest of the address that has begun the most is given up. An address
    that begins them too often finds its connection closed, which to a peer is silence and no death.
    """

    def __init__(self, runner: web.AppRunner, listener: socket.socket, rates: Rates | None = None) -> None:
        self._runner = runner
        self._listener = listener
        self._context: ssl.SSLContext | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: dict[asyncio.Task[None], str] = {}
        """The address of each, oldest first."""
        self._rates = rates or Rates(HANDSHAKES_PER_S, HANDSHAKES_BURST)
        self._told_s = float("-inf")

    async def renew(self, context: ssl.SSLContext) -> None:
        """Also the start."""
        self._context = context
        if self._accepting is None:
            self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Accept nobody any more."""
        tasks = [*self._handshakes, *((self._accepting,) if self._accepting is not None else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except ConnectionAbortedError:
                await asyncio.sleep(0)
                continue
            except OSError as error:
                # No more file descriptors: the connection stays in the queue.
                _log.warning("a connection could not be accepted: %s", error.strerror)
                await asyncio.sleep(ACCEPT_AGAIN_AFTER_S)
                continue
            if not self._rates.takes(str(address[0])):
                connection.close()
                self._tell_of(str(address[0]))
                await asyncio.sleep(0)
                continue
            task = asyncio.create_task(self._shake_hands(connection))
            self._handshakes[task] = str(address[0])
            task.add_done_callback(self._handshakes.pop)
            if len(self._handshakes) > HANDSHAKES_MAX:
                greediest = Counter(self._handshakes.values()).most_common(1)[0][0]
                next(each for each, begun_by in self._handshakes.items() if begun_by == greediest).cancel()
            # Else a queue that is never empty would be all that the loop does. And only a task that has begun closes its socket.
            await asyncio.sleep(0)

    def _tell_of(self, address: str) -> None:
        """Once a minute: anybody who reaches the port can cause it."""
        now_s = time.monotonic()
        if now_s - self._told_s >= TOLD_AGAIN_AFTER_S:
            self._told_s = now_s
            _log.warning(
                "%s begins more than %g TLS connections a second: those beyond are closed; let it keep its connections open",
                address,
                self._rates.per_s,
            )

    async def _shake_hands(self, connection: socket.socket) -> None:
        handler = self._runner.server
        assert handler is not None  # noqa: S101 - the runner was set up
        # What the client does wrong is its own affair: an OSError, as all of ssl's are.
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                handler,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=GOODBYE_TIMEOUT_S,
            )


def _check_replaceable(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"instance.directory: {path} is in the way and no socket; remove it")


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """Mode 0600 before anybody can connect, and put in the place of a dead predecessor's in one step."""
    new = path.with_name(f"{path.name}.new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        listener.bind(os.fspath(new))
        new.chmod(0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        _check_replaceable(path)
        new.rename(path)
        own = path.stat()
    except OSError as error:
        listener.close()
        raise ListenError(f"instance.directory: {path} cannot be listened on: {error.strerror or error}") from error
    except ListenError:
        listener.close()
        raise
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), own):
                path.unlink()
