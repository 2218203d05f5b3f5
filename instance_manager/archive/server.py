"""The archiver's Unix socket: one request a connection, a line of words parted by tabs; the answer is a line too.

| request | by | answer |
|---|---|---|
| `push NAME` | archive_command | `done`, or `failed WHY` |
| `fetch MODE NAME PATH` | restore_command | `done`, `absent`, or `failed WHY` |
| `orders JSON` | the agent | `done`, or `failed WHY` |
| `status` | the agent, a user's command | JSON |

Only this process's own user, root and Postgres's user are answered; orders are not taken from Postgres's user where it is
another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

log = logging.getLogger("instance_manager.archive.server")

REQUEST_MAX_BYTES = 1 << 20
REQUEST_DEADLINE_S = 5.0
_CREDENTIALS = struct.Struct("3i")

Handler = Callable[[list[str]], Awaitable[str]]
"""From the words behind the verb to the answer's line."""


class ArchiverSocket:
    """Listens at `path`; a stale socket file is replaced."""

    def __init__(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        *,
        postgres_uid: int | None,
        owned_verbs: frozenset[str] = frozenset(),
        ended_with_client: frozenset[str] = frozenset(),
    ) -> None:
        self._path = path
        self._handlers = handlers
        self._postgres_uid = postgres_uid
        self._owned_verbs = owned_verbs
        self._ended_with_client = ended_with_client
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """OSError: it cannot be bound."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=REQUEST_MAX_BYTES)
        self._path.chmod(0o600)
        if self._postgres_uid is not None and os.geteuid() == 0:
            os.chown(self._path, self._postgres_uid, -1)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answer(reader, _peer_uid(writer))
            writer.write(answer.replace("\n", " ").encode() + b"\n")
            async with asyncio.timeout(REQUEST_DEADLINE_S):
                await writer.drain()
        except (
            TimeoutError,
            ConnectionError,
            ValueError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
        ) as error:
            log.debug("a request broke off: %s", error)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, uid: int) -> str:
        async with asyncio.timeout(REQUEST_DEADLINE_S):
            line = await reader.readuntil(b"\n")
        # Only now: an answer to what was not read would be lost by the reset that follows.
        if uid not in (0, os.geteuid(), self._postgres_uid):
            return f"failed user {uid} may not ask"
        verb, *words = line.decode().rstrip("\n").split("\t")
        handler = self._handlers.get(verb)
        if handler is None:
            return f"failed {verb[:20]!r} is none of {', '.join(self._handlers)}"
        if verb in self._owned_verbs and uid not in (0, os.geteuid()):
            return f"failed user {uid} may not give {verb}"
        try:
            if verb in self._ended_with_client:
                return await _while_connected(handler(words), reader)
            return await handler(words)
        except Exception as error:
            log.exception("%s failed", verb)
            return f"failed {type(error).__name__}: {error}"


async def _while_connected(answering: Awaitable[str], reader: asyncio.StreamReader) -> str:
    """Cancelled when the client goes."""
    answer, gone = asyncio.ensure_future(answering), asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not answer.done():
            answer.cancel()
            await asyncio.wait({answer})
    return "failed the client is gone" if answer.cancelled() else answer.result()


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    peer = writer.get_extra_info("socket")
    _, uid, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)
