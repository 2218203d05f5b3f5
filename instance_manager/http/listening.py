"""Sockets that are listened on, and TLS on them that is renewed while they are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

BACKLOG = 128
HANDSHAKE_TIMEOUT_S = 5.0
GOODBYE_TIMEOUT_S = 1.0


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
    """One listening socket. After `renew` new connections get the new context; those that are there stay with theirs."""

    def __init__(self, runner: web.AppRunner, listener: socket.socket) -> None:
        self._runner = runner
        self._listener = listener
        self._server: asyncio.Server | None = None
        self._context: ssl.SSLContext | None = None

    async def renew(self, context: ssl.SSLContext) -> None:
        """Also the start. The queue of connections that nobody accepted yet is the socket's, and is not lost."""
        if context is self._context:
            return
        handler = self._runner.server
        assert handler is not None  # noqa: S101 - the runner was set up
        old = self._server
        self._server = await asyncio.get_running_loop().create_server(
            handler,
            sock=self._listener.dup(),
            ssl=context,
            backlog=BACKLOG,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            ssl_shutdown_timeout=GOODBYE_TIMEOUT_S,
        )
        self._context = context
        if old is not None:
            old.close()

    def close(self) -> None:
        """Accept nobody any more."""
        if self._server is not None:
            self._server.close()
        self._listener.close()


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
