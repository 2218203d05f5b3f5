"""What one listener may cost: connections, the time that a request takes to arrive, requests a second, bytes.

aiohttp bounds the size of a head and of a body. It does not bound how many connections there are, and a client that
sends a head byte by byte holds one for long. The agent answers its peers on the same loop, so neither may starve it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, cast

from aiohttp import ClientConnectionResetError, web
from aiohttp.http_exceptions import HttpProcessingError

from instance_manager.http.answers import ErrorBody, Handler, errors_in_json, json_response, without_server_version
from instance_manager.http.at_once import Answer, AtOnce

BODY_BYTES_MAX = 64 * 1024
HEAD_LINE_BYTES_MAX = 4096
HEAD_LINES_MAX = 64
HEAD_WITHIN_S = 10.0
"""From the connection, or from the first moment of a kept one's silence being over, to a complete head."""
KEEPALIVE_S = 60.0
CONNECTIONS_MAX = 512
REQUESTS_PER_S = 500
BURST = 1000
ADDRESSES_MAX = 1024
PEER_PREFIX = "/peer/"


class Rates:
    """How often each address may do something: a bucket for each of the last addresses that did."""

    def __init__(self, per_s: float, burst: float) -> None:
        self.per_s = per_s
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def takes(self, address: str) -> bool:
        """False: not now."""
        now_s = time.monotonic()
        left, at_s = self._buckets.pop(address, (self._burst, now_s))
        left = min(self._burst, left + (now_s - at_s) * self.per_s)
        takes = left >= 1
        self._buckets[address] = (left - 1 if takes else left, now_s)
        while len(self._buckets) > ADDRESSES_MAX:
            self._buckets.popitem(last=False)
        return takes


class Limits:
    """Of one listener. `is_peer`: whether this Authorization header is a peer's; only its calls are not counted by address."""

    def __init__(
        self,
        *,
        connections_max: int = CONNECTIONS_MAX,
        head_within_s: float = HEAD_WITHIN_S,
        keepalive_s: float = KEEPALIVE_S,
        requests_per_s: float = REQUESTS_PER_S,
        burst: float = BURST,
        is_peer: Callable[[str | None], bool] = lambda _: False,
        at_once: AtOnce | None = None,
    ) -> None:
        """`at_once`: what need not go through aiohttp, within the same limits."""
        self._connections_max = connections_max
        self._head_within_s = head_within_s
        self.keepalive_s = keepalive_s
        self._rates = Rates(requests_per_s, burst)
        self._is_peer = is_peer
        self._at_once = at_once
        self._guards: set[_Guard] = set()
        self._handed_over: dict[asyncio.Protocol, _Guard] = {}
        """By aiohttp's own protocol, as a request knows it."""

    @property
    def connections(self) -> int:
        return len(self._guards)

    def guarded(self, make: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """The same protocols, each behind a guard."""
        return lambda: _Guard(make, self)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """To be the application's first: the head has arrived, and is counted."""
        guard = self._handed_over.get(cast("asyncio.Protocol", request.protocol))
        if guard is not None:
            guard.begin_work()
        try:
            # A peer is known by its token and has places of its own: no flood from its address may silence it.
            if not self._is_call_of_peer(request) and not self._rates.takes(request.remote or ""):
                response = json_response(429, ErrorBody(f"more than {self._rates.per_s:g} requests a second"))
                response.headers["Retry-After"] = "1"
                return response
            return await handler(request)
        finally:
            if guard is not None:
                guard.begin_wait(self.keepalive_s + self._head_within_s)

    def _is_call_of_peer(self, request: web.Request) -> bool:
        """By the token, not by the path, which anybody can say."""
        return request.path.startswith(PEER_PREFIX) and self._is_peer(request.headers.get("Authorization"))

    def answer_at_once(self, data: bytes, address: str) -> Answer | None:
        """None: aiohttp's to answer, with its refusal where there were too many."""
        if self._at_once is None:
            return None
        try:
            answer = self._at_once(data)
        except Exception:
            return None  # which fails there too, and is told as every error is
        return answer if answer is not None and self._rates.takes(address) else None

    def end_waiting(self) -> None:
        """Connections that aiohttp does not know of; its own it ends itself."""
        for guard in [guard for guard in self._guards if guard.inner is None]:
            guard.abort()

    def admit(self, guard: _Guard) -> None:
        self._guards.add(guard)
        guard.begin_wait(self._head_within_s)
        if len(self._guards) > self._connections_max:
            self._victim().abort()

    def hand_over(self, guard: _Guard, inner: asyncio.Protocol) -> None:
        self._handed_over[inner] = guard

    def forget(self, guard: _Guard) -> None:
        self._guards.discard(guard)
        if guard.inner is not None:
            self._handed_over.pop(guard.inner, None)

    def _victim(self) -> _Guard:
        """Who has waited longest, of the address that holds the most connections; one at work only if all are."""
        waiting = [guard for guard in self._guards if guard.waits] or list(self._guards)
        held = Counter(guard.address for guard in waiting)
        greediest = held.most_common(1)[0][0]
        return min((guard for guard in waiting if guard.address == greediest), key=lambda guard: guard.since_s)


class _Guard(asyncio.Protocol):
    """Hands on all that is not answered at once, and ends the connection of a client that lets it wait too long."""

    def __init__(self, make: Callable[[], asyncio.Protocol], limits: Limits) -> None:
        self.inner: asyncio.Protocol | None = None
        """aiohttp's, from the first request on that is for it."""
        self._make = make
        self.address = ""
        self.waits = True
        self.since_s = 0.0
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._limits.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._limits.forget(self)
        if self.inner is not None:
            self.inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        if self.inner is None:
            answer = self._limits.answer_at_once(data, self.address)
            if answer is not None:
                transport.write(answer.response)
                if answer.closes:
                    transport.close()
                self.begin_wait(self._limits.keepalive_s)
                return
            self.inner = self._make()
            self._limits.hand_over(self, self.inner)
            self.inner.connection_made(transport)
        self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self.inner.eof_received() if self.inner is not None else None

    def pause_writing(self) -> None:
        if self.inner is not None:
            self.inner.pause_writing()
        elif self._transport is not None:
            self._transport.abort()  # who asks and asks, and takes no answer

    def resume_writing(self) -> None:
        if self.inner is not None:
            self.inner.resume_writing()

    def begin_work(self) -> None:
        """A request has arrived; who answers it has deadlines of its own."""
        self._cancel_timer()
        self.waits = False
        self.since_s = time.monotonic()

    def begin_wait(self, at_most_s: float) -> None:
        """For the next head, while the answer is on its way to a client that may not read it."""
        self._cancel_timer()
        self.waits = True
        self.since_s = time.monotonic()
        if self._transport is not None and not self._transport.is_closing():
            self._timer = asyncio.get_running_loop().call_later(at_most_s, self.abort)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def limited_application(limits: Limits | None) -> web.Application:
    """An empty application with what all listeners have in common; `limits` as its runner's."""
    application = web.Application(
        client_max_size=BODY_BYTES_MAX,
        middlewares=[*((limits.middleware,) if limits is not None else ()), errors_in_json],
    )
    application.on_response_prepare.append(without_server_version)
    return application


class _NotOurError(logging.Filter):
    """aiohttp logs a traceback for each request that is no HTTP, and for each client that is gone before it is told to
    go on (`Expect`): whoever reaches the port could fill the log.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError | ClientConnectionResetError)


_log = logging.getLogger(__name__)
_log.addFilter(_NotOurError())


class LimitedRunner(web.AppRunner):
    """An application within limits; serve it by a `web.SockSite` as any other."""

    def __init__(self, application: web.Application, limits: Limits, **settings: Any) -> None:
        super().__init__(
            application,
            access_log=None,
            logger=_log,
            auto_decompress=False,
            keepalive_timeout=limits.keepalive_s,
            max_line_size=HEAD_LINE_BYTES_MAX,
            max_field_size=HEAD_LINE_BYTES_MAX,
            max_headers=HEAD_LINES_MAX,
            **settings,
        )
        self._limits = limits

    async def cleanup(self) -> None:
        await super().cleanup()
        self._limits.end_waiting()

    @property
    def server(self) -> web.Server | None:
        """What a site asks for each connection's protocol."""
        made = super().server
        return None if made is None else cast("web.Server", self._limits.guarded(made))
