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
from collections.abc import Callable, Iterator
from pathlib import Path

from aiohttp import web

from instance_manager.http.at_once import REQUEST_BYTES_MAX
from instance_manager.http.limits import Limits, Rates

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


class _Acceptor:
    """Accepts one connection at each turn of the loop, so that a queue that is never empty is not all that the loop does."""

    def __init__(self, listener: socket.socket, take: Callable[[socket.socket, str], None]) -> None:
        """`take` is given each connection and its address."""
        self._listener = listener
        self._take = take
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def stop(self) -> None:
        if self._again is not None:
            self._again.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # No more file descriptors: the connection stays in the queue.
            _log.warning("a connection could not be accepted: %s", error.strerror)
            self.stop()
            self._again = asyncio.get_running_loop().call_later(ACCEPT_AGAIN_AFTER_S, self.start)
            return
        connection.setblocking(False)
        self._take(connection, str(address[0]))


class PlainListener:
    """Without TLS. A probe whose request has come whole with its connection is answered before asyncio has made anything for it;
    every other connection is asyncio's and aiohttp's."""

    def __init__(self, runner: web.AppRunner, listener: socket.socket, limits: Limits) -> None:
        self._runner = runner
        self._limits = limits
        self._acceptor = _Acceptor(listener, self._take)
        self._handing_over: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._acceptor.start()

    async def close(self) -> None:
        """Accept nobody any more."""
        self._acceptor.stop()
        await asyncio.gather(*self._handing_over, return_exceptions=True)

    def _take(self, connection: socket.socket, address: str) -> None:
        if self._is_done(connection, address):
            connection.close()
            return
        task = asyncio.create_task(self._hand_over(connection))
        self._handing_over.add(task)
        task.add_done_callback(self._handing_over.discard)

    def _is_done(self, connection: socket.socket, address: str) -> bool:
        """It was answered, and the client said that it asks nothing more."""
        try:
            # Only looked at: what is not for us is there for asyncio as it came.
            data = connection.recv(REQUEST_BYTES_MAX + 1, socket.MSG_PEEK)
        except OSError:
            return False
        answer = self._limits.answer_at_once(data, address)
        if answer is None:
            return False
        with contextlib.suppress(OSError):
            # Taken, so that the end of the connection is no reset, with which the answer could be lost.
            connection.recv(len(data))
            # Whole: nothing was sent on it before.
            connection.send(answer.response)
        return answer.closes

    async def _hand_over(self, connection: socket.socket) -> None:
        handler = self._runner.server
        assert handler is not None  # noqa: S101 - the runner was set up
        await asyncio.get_running_loop().connect_accepted_socket(handler, connection)


class TlsListener:
    """One listening socket. After `renew` new connections get the new context; those that are there stay with theirs.

    It accepts by itself: asyncio's own server knows no bound of handshakes that are not done, and each costs 300 KiB before
    anybody has proven anything. Beyond HANDSHAKES_MAX the oldest of the address that has begun the most is given up. An address
    that begins them too often finds its connection closed, which to a peer is silence and no death.
    """

    def __init__(self, runner: web.AppRunner, listener: socket.socket, rates: Rates | None = None) -> None:
        self._runner = runner
        self._listener = listener
        self._acceptor = _Acceptor(listener, self._take)
        self._context: ssl.SSLContext | None = None
        self._handshakes: dict[asyncio.Task[None], str] = {}
        """The address of each, oldest first."""
        self._rates = rates or Rates(HANDSHAKES_PER_S, HANDSHAKES_BURST)
        self._told_s = float("-inf")

    async def renew(self, context: ssl.SSLContext) -> None:
        """Also the start."""
        if self._context is None:
            self._acceptor.start()
        self._context = context

    async def close(self) -> None:
        """Accept nobody any more."""
        self._acceptor.stop()
        # Only a task that has begun closes its socket.
        await asyncio.sleep(0)
        tasks = [*self._handshakes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    def _take(self, connection: socket.socket, address: str) -> None:
        if not self._rates.takes(address):
            connection.close()
            self._tell_of(address)
            return
        task = asyncio.create_task(self._shake_hands(connection))
        self._handshakes[task] = address
        task.add_done_callback(self._handshakes.pop)
        if len(self._handshakes) > HANDSHAKES_MAX:
            greediest = Counter(self._handshakes.values()).most_common(1)[0][0]
            next(each for each, begun_by in self._handshakes.items() if begun_by == greediest).cancel()

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
