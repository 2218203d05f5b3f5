"""Calls to the other instances: one question, one answer, one deadline. How a call failed tells what is known.

Nothing is retried. A refused connection says at once that nobody listens; silence says nothing but that time passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import aiohttp

from instance_manager.config_sections import MemberSection
from instance_manager.http.ports import DEADLINE_HEADER
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
        member = self._find(name)
        if member is None:
            raise PeerSilent(f"{name} is no member of this cluster")
        ways = self._ways(member, self._address(name) or member.host)
        ends_s = time.clock_gettime(time.CLOCK_BOOTTIME) + deadline_s
        for way in ways[:-1]:
            with contextlib.suppress(PeerRefused):
                return await self._try(name, way, call, body, ends_s)
        return await self._try(name, ways[-1], call, body, ends_s)

    def _ways(self, member: MemberSection, host: str) -> tuple[_Way, ...]:
        """In the order in which they are tried; a later one only where the earlier refused the connection."""
        plain = _Way(host, member.http_port, None, None)
        if self._tls is None or member.peer_port is None:
            return (plain,)
        by_tls = _Way(host, member.peer_port, self._tls.context(), member.host)
        return (by_tls,) if self._tls.required else (by_tls, plain)

    async def _try(self, name: str, way: _Way, call: str, body: bytes, ends_s: float) -> bytes:
        session = self._open_session()
        deadline_s = max(0.001, ends_s - time.clock_gettime(time.CLOCK_BOOTTIME))
        try:
            async with asyncio.timeout(deadline_s):
                return await self._ask(session, way, call, body, deadline_s)
        except aiohttp.ClientConnectorCertificateError as error:
            raise PeerSilent(f"{name}: its certificate is refused: {error.certificate_error}") from error
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError):
                raise PeerRefused(f"{name}: {way.host}:{way.port} refused the connection") from error
            raise PeerSilent(f"{name}: {error.os_error.strerror or error.os_error}") from error
        except TimeoutError as error:
            raise PeerSilent(f"{name}: no answer within {deadline_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            # A kept connection breaks when its agent dies: is anybody listening now?
            if await _is_refused(way, ends_s):
                raise PeerRefused(f"{name}: the connection broke, and a new one was refused") from error
            raise PeerSilent(f"{name}: {type(error).__name__} {error}") from error

    async def _ask(self, session: aiohttp.ClientSession, way: _Way, call: str, body: bytes, deadline_s: float) -> bytes:
        async with session.post(
            way.url(call),
            data=body,
            headers={
                "Authorization": self._token.bearer,
                "Content-Type": "application/json",
                DEADLINE_HEADER: f"{deadline_s:.3f}",
            },
            allow_redirects=False,
            ssl=way.context or True,
            server_hostname=way.server_name,
        ) as response:
            answer = await _read_bounded(response)
            if response.status == 401:
                await self._token.read_again()
            if response.status != 200:
                raise PeerRejected(response.status, answer[:ERROR_TEXT_MAX].decode("utf-8", "replace"))
            return answer


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
