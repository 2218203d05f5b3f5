"""Calls to the other instances: one question, and one answer or many. How a call failed tells what is known.

Nothing is retried. A refused connection says at once that nobody listens; silence says nothing but that time passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import aiohttp
from aiohttp.http_exceptions import LineTooLong

from instance_manager.config_sections import MemberSection
from instance_manager.http.ports import DEADLINE_HEADER, LINES_CONTENT_TYPE
from instance_manager.http.token import PeerToken
from instance_manager.ports import PeerRefused, PeerRejected, PeerSilent

ANSWER_BYTES_MAX = 1024 * 1024
ERROR_TEXT_MAX = 1000
CONNECT_TIMEOUT_S = 1.0
KEEPALIVE_S = 30.0
CONNECTIONS_PER_PEER_MAX = 8


@dataclass(frozen=True, slots=True)
class PeerTls:
    """How the members are asked where they have certificates."""

    context: Callable[[], ssl.SSLContext]
    """Of the moment: certificates are renewed."""
    required: bool
    """False: a member that refuses the connection at its `peer_port` is asked at its `http_port`, without TLS."""


@dataclass(frozen=True, slots=True)
class _Way:
    name: str
    host: str
    port: int
    context: ssl.SSLContext | None
    server_name: str | None
    """That the member's certificate must have: its configured host, wherever it is reached."""

    def url(self, call: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.context is not None else 'http'}://{host}:{self.port}/peer/{call}"


class PeerClient:
    """Asks the members by name. To be closed in the loop that called; also an async context manager.

    `members`: all there are, or how one is found by its name. `address`: where one is now, if anything tells; else it is
    asked at its configured host. TokenUnusable when the file cannot be used.
    """

    def __init__(
        self,
        members: Iterable[MemberSection] | Callable[[str], MemberSection | None],
        token_file: Path,
        *,
        address: Callable[[str], str | None] = lambda _: None,
        tls: PeerTls | None = None,
    ) -> None:
        self._find = members if callable(members) else {member.name: member for member in members}.get
        self._address = address
        self._tls = tls
        self._token = PeerToken(token_file)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> PeerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every kept connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0, limit_per_host=CONNECTIONS_PER_PEER_MAX, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=10
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session

    async def call(self, name: str, call: str, body: bytes, *, deadline_s: float) -> bytes:
        """The answer of the member `name`; PeerRefused, PeerSilent (also: there is no such member) or PeerRejected.

        The peer is told the deadline, and works no longer than it is waited for.
        """
        ends_s = time.clock_gettime(time.CLOCK_BOOTTIME) + deadline_s
        *earlier, last = self._ways(name)
        for way in earlier:
            with contextlib.suppress(PeerRefused):
                return await self._call(way, call, body, ends_s)
        return await self._call(last, call, body, ends_s)

    async def _call(self, way: _Way, call: str, body: bytes, ends_s: float) -> bytes:
        deadline_s = max(0.001, ends_s - time.clock_gettime(time.CLOCK_BOOTTIME))
        async with (
            _told_apart(way, deadline_s),
            asyncio.timeout(deadline_s),
            self._post(way, call, body, {DEADLINE_HEADER: f"{deadline_s:.3f}"}) as response,
        ):
            answer = await _read_bounded(response)
            await self._require_ok(response, answer)
            return answer

    async def listen(self, name: str, call: str, body: bytes, *, silence_s: float) -> AsyncGenerator[bytes, None]:
        """What the member `name` goes on telling, a line each; errors as of `call`, and PeerSilent after `silence_s`.

        Ends when the peer has ended it in order. To be closed (`contextlib.aclosing`) by whoever leaves it before.
        """
        *earlier, way = self._ways(name)
        async with contextlib.AsyncExitStack() as connection:
            response = None
            for each in earlier:
                with contextlib.suppress(PeerRefused):
                    response, way = await self._open(connection, each, call, body, silence_s), each
                    break
            if response is None:
                response = await self._open(connection, way, call, body, silence_s)
            loop = asyncio.get_running_loop()
            async with _told_apart(way, silence_s, held=True), asyncio.timeout(silence_s) as silence:
                while line := await response.content.readuntil(b"\n", max_size=ANSWER_BYTES_MAX):
                    # What whoever listens does with it is not the peer's silence.
                    silence.reschedule(None)
                    yield line
                    silence.reschedule(loop.time() + silence_s)

    async def _open(
        self, connection: contextlib.AsyncExitStack, way: _Way, call: str, body: bytes, silence_s: float
    ) -> aiohttp.ClientResponse:
        """Of a peer that goes on telling; `connection` ends it."""
        async with _told_apart(way, silence_s), asyncio.timeout(silence_s):
            response = await connection.enter_async_context(self._post(way, call, body, {"Accept": LINES_CONTENT_TYPE}))
            # Never to be used again: nobody knows what is on its way.
            connection.callback(response.close)
            if response.status != 200:
                await self._require_ok(response, await _read_bounded(response))
        return response

    def _ways(self, name: str) -> tuple[_Way, ...]:
        """In the order in which they are tried; a later one only where the earlier refused the connection."""
        member = self._find(name)
        if member is None:
            raise PeerSilent(f"{name} is no member of this cluster")
        host = self._address(name) or member.host
        plain = _Way(name, host, member.http_port, None, None)
        if self._tls is None or member.peer_port is None:
            return (plain,)
        by_tls = _Way(name, host, member.peer_port, self._tls.context(), member.host)
        return (by_tls,) if self._tls.required else (by_tls, plain)

    def _post(
        self, way: _Way, call: str, body: bytes, headers: dict[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._open_session().post(
            way.url(call),
            data=body,
            headers={"Authorization": self._token.bearer, "Content-Type": "application/json", **headers},
            allow_redirects=False,
            ssl=way.context or True,
            server_hostname=way.server_name,
        )

    async def _require_ok(self, response: aiohttp.ClientResponse, answer: bytes) -> None:
        if response.status == 401:
            await self._token.read_again()
        if response.status != 200:
            raise PeerRejected(response.status, answer[:ERROR_TEXT_MAX].decode("utf-8", "replace"))


@contextlib.asynccontextmanager
async def _told_apart(way: _Way, deadline_s: float, *, held: bool = False) -> AsyncIterator[None]:
    """Whatever goes wrong within, as PeerRefused or PeerSilent; nothing takes longer than the deadline, which is one of each line
    where the connection is `held`."""
    name = way.name
    ends_s = float("inf") if held else time.clock_gettime(time.CLOCK_BOOTTIME) + deadline_s
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as error:
        raise PeerSilent(f"{name}: its certificate is refused: {error.certificate_error}") from error
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, ConnectionRefusedError):
            raise PeerRefused(f"{name}: {way.host}:{way.port} refused the connection") from error
        raise PeerSilent(f"{name}: {error.os_error.strerror or error.os_error}") from error
    except TimeoutError as error:
        raise PeerSilent(f"{name}: no answer within {deadline_s:g} s") from error
    except (aiohttp.ClientError, OSError, LineTooLong) as error:
        # A kept connection breaks when its agent dies: is anybody listening now?
        if await _is_refused(way, ends_s):
            raise PeerRefused(f"{name}: the connection broke, and a new one was refused") from error
        raise PeerSilent(f"{name}: {type(error).__name__} {error}") from error


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > ANSWER_BYTES_MAX:
            response.close()
            raise PeerRejected(response.status, f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
    return b"".join(pieces)


async def _is_refused(way: _Way, ends_s: float) -> bool:
    left_s = min(ends_s - time.clock_gettime(time.CLOCK_BOOTTIME), CONNECT_TIMEOUT_S)
    try:
        async with asyncio.timeout(max(left_s, 0)):
            _, writer = await asyncio.open_connection(way.host, way.port)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return False
