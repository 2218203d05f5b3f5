"""Requests to the API server: one question, one answer, one deadline, and the knowledge of whether it was ever sent.

Made with aiohttp, which the agent has loaded anyway. kubernetes-asyncio's client cannot be imported in part (its package
imports every model of every API), and does not tell a request that was never sent from one that was not answered; the
difference is what a conditional write stands on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp

from instance_manager import __version__
from instance_manager.coordination.kubernetes_access import Access, AccessUnusable
from instance_manager.threads import monotonic_s

ANSWER_BYTES_MAX = 8 * 1024 * 1024
CONNECT_TIMEOUT_S = 1.0
KEEPALIVE_S = 30.0
WATCH_LASTS_S = 290
"""Then the server ends it, and another is begun."""
WATCH_SILENCE_MAX_S = 75.0
"""The server sends a bookmark each minute; a watch that is silent for longer is dead, or its network is."""
OBEYED_RETRY_AFTER_MAX_S = 2.0
"""A server that asks for more patience is asked again after this time nevertheless: a primary must renew within `soft_s`."""
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"

Plain = dict[str, Any]


class NotSent(Exception):
    """Not a byte of the request has left this machine: certainly not applied."""


class NoAnswer(Exception):
    """It was sent, or may have been, and no answer came that can be understood."""


class WatchEnded(Exception):
    """Begin again: with what is there now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    content: Plain
    """Empty where the body was no JSON object, as from something that is no API server."""
    retry_after_s: float | None = None

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def from_api_server(self) -> bool:
        return self.is_good or self.content.get("kind") == "Status"

    @property
    def reason(self) -> str:
        return str(self.content.get("reason") or "")

    def says_not_found(self, kind: str, name: str) -> bool:
        """404 is also what a server says that has not registered its APIs yet, and any proxy: none of these counts."""
        details = self.content.get("details") or {}
        return (
            self.status == 404
            and self.content.get("kind") == "Status"
            and self.reason == "NotFound"
            and (details.get("kind"), details.get("name")) == (kind, name)
        )

    def __str__(self) -> str:
        text = self.content.get("message") or self.reason or "no word of why"
        return f"{self.status}: {text}"


@dataclass(slots=True)
class _Way:
    """Of one request, told by aiohttp as it goes."""

    connected: bool = False


@dataclass(slots=True)
class ApiServer:
    """To be closed in the loop that asked."""

    access: Access
    client: str = "instance-manager"
    """Who asks, for the server's log."""
    _session: aiohttp.ClientSession | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _not_before_s: float = float("-inf")

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        deadline_s: float,
        query: Mapping[str, str] | None = None,
        body: Plain | None = None,
        content_type: str = JSON,
    ) -> Answer:
        """One try. NotSent or NoAnswer; an answer that refuses is an answer."""
        way = _Way()
        if (left_s := self._not_before_s - monotonic_s()) > 0:
            raise NotSent(f"the API server asked for patience, {left_s:.1f} s yet")
        try:
            async with asyncio.timeout(deadline_s):
                answer = await self._ask(method, path, query or {}, body, content_type, way)
        except TimeoutError as error:
            raise _unanswered(way, f"no answer within {deadline_s:g} s") from error
        except AccessUnusable as error:
            raise NotSent(str(error)) from error
        except aiohttp.ClientConnectorCertificateError as error:
            await self.close()  # the authority may have been replaced: its file is read again
            raise NotSent(f"{self.access.server}: {error.certificate_error}") from error
        except aiohttp.ClientConnectorError as error:
            raise NotSent(f"{self.access.server}: {_words(error.os_error)}") from error
        except (aiohttp.ClientError, OSError, _Broken) as error:
            raise _unanswered(way, f"{type(error).__name__}: {error}") from error
        if answer.retry_after_s is not None and answer.status in (429, 503):
            self._not_before_s = monotonic_s() + min(answer.retry_after_s, OBEYED_RETRY_AFTER_MAX_S)
        if answer.status == 401:
            await self.access.was_refused()
        return answer

    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[tuple[str, Plain]]:
        """(type, object) of each event, bookmarks too. WatchEnded in the end, whatever ended it."""
        try:
            session = await self._open()
            async with session.get(
                f"{self.access.server}{path}",
                params={**query, "watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_LASTS_S)},
                headers=self._headers(JSON),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=WATCH_SILENCE_MAX_S
                ),
                allow_redirects=False,
                trace_request_ctx=_Way(),
            ) as response:
                if response.status == 401:
                    await self.access.was_refused()
                if response.status != 200:
                    raise WatchEnded(
                        f"{Answer(status=response.status, content=_object(await _read_bounded(response)))}"
                    )
                async for line in _lines(response):
                    event = _object(line)
                    if event.get("type") == "ERROR" or not isinstance(event.get("object"), dict):
                        raise WatchEnded(str(event.get("object", {})))
                    yield str(event.get("type")), event["object"]
        except (aiohttp.ClientError, OSError, TimeoutError, AccessUnusable, _Broken) as error:
            raise WatchEnded(f"{type(error).__name__}: {error}") from error
        raise WatchEnded("the server ended it")

    async def _ask(
        self, method: str, path: str, query: Mapping[str, str], body: Plain | None, content_type: str, way: _Way
    ) -> Answer:
        session = await self._open()
        async with session.request(
            method,
            f"{self.access.server}{path}",
            params=query,
            data=json.dumps(body).encode() if body is not None else None,
            headers=self._headers(content_type),
            allow_redirects=False,
            trace_request_ctx=way,
        ) as response:
            content = await _read_bounded(response)
            return Answer(
                status=response.status,
                content=_object(content),
                retry_after_s=_seconds(response.headers.get("Retry-After")),
            )

    async def _open(self) -> aiohttp.ClientSession:
        async with self._opening:
            if self._session is None:
                context = await self.access.open()
                connector = aiohttp.TCPConnector(
                    limit=0, keepalive_timeout=KEEPALIVE_S, ssl=context if context is not None else True
                )
                self._session = aiohttp.ClientSession(
                    connector=connector,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    trace_configs=[_tracing()],
                    middlewares=(_once,),
                )
            return self._session

    def _headers(self, content_type: str) -> dict[str, str]:
        headers = {"Accept": JSON, "Content-Type": content_type, "User-Agent": f"{self.client}/{__version__}"}
        authorization = self.access.authorization()
        return headers if authorization is None else {**headers, "Authorization": authorization}


class _Broken(Exception):
    """A connection that broke under a request. No subclass of aiohttp's own, which it would answer with a second try."""


async def _once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """aiohttp repeats a PUT whose kept connection broke: the first may have been applied, and the second would be a conflict."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _Broken(f"the connection broke: {error}") from error


def _tracing() -> aiohttp.TraceConfig:
    async def connected(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        way = context.trace_request_ctx
        if isinstance(way, _Way):
            way.connected = True

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_create_end.append(connected)
    tracing.on_connection_reuseconn.append(connected)
    return tracing


def _unanswered(way: _Way, text: str) -> NotSent | NoAnswer:
    return NoAnswer(text) if way.connected else NotSent(f"not connected: {text}")


def _words(error: OSError) -> str:
    """asyncio's own texts name the address once more, and not what was wrong with it."""
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)


def _object(content: bytes) -> Plain:
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    return {}


def _seconds(text: str | None) -> float | None:
    """Kubernetes gives whole seconds, never a date."""
    return float(text) if text is not None and text.isascii() and text.isdigit() else None


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > ANSWER_BYTES_MAX:
            raise _Broken(f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
    return b"".join(pieces)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    left = b""
    async for piece in response.content.iter_any():
        *whole, left = (left + piece).split(b"\n")
        for line in whole:
            if line:
                yield line
        if len(left) > ANSWER_BYTES_MAX:
            raise _Broken(f"an event is longer than {ANSWER_BYTES_MAX} bytes")
