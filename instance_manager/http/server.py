"""The listeners: probes, status and peers over TCP; control over a Unix socket only.

Reading and controlling are two applications, so that no mistake in a route lets a network client control anything
(GHSA-7qwx-x8ff-3px9). Peers show a shared token; a control client is known by the kernel's word for its user.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from instance_manager.certificate_sets import Certificates
from instance_manager.config import Configuration
from instance_manager.http import openapi, telling
from instance_manager.http.answers import ErrorBody, json_response
from instance_manager.http.at_once import probes_at_once
from instance_manager.http.callers import NetworkCallers, certificate_of, is_member
from instance_manager.http.control import control_application
from instance_manager.http.lag_history import LagHistory
from instance_manager.http.limits import BODY_BYTES_MAX, LimitedRunner, Limits, limited_application
from instance_manager.http.listening import BACKLOG, ListenError, PlainListener, TlsListener, listen_on_tcp, unix_socket
from instance_manager.http.ports import (
    DEADLINE_HEADER,
    LINES_CONTENT_TYPE,
    InstanceService,
    MalformedCall,
    UnknownCall,
)
from instance_manager.http.routes import Reply, Route, read_routes
from instance_manager.http.token import PeerToken

PEER_REQUESTS_MAX = 64
SCRAPES_MAX = 4
SCRAPE_TAKEN_WITHIN_S = 10.0
"""A place is held until the answer is taken: of a large server it is megabytes."""
NETWORK_CONTROL_CONNECTIONS_MAX = 64
"""Each costs 300 KiB, and TLS without a certificate is open to anybody who reaches the port."""
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHUTDOWN_S = 0.3
PEER_DEADLINE_DEFAULT_S = 5.0
PEER_DEADLINE_MAX_S = 120.0

_log = logging.getLogger(__name__)

__all__ = ["ListenError", "Listeners", "control_application", "public_application", "serve"]


class Listeners:
    """What is listened on."""

    def __init__(self, certificates: Certificates | None) -> None:
        self._certificates = certificates
        self.peers: TlsListener | None = None
        self.control: TlsListener | None = None

    async def renew(self) -> None:
        """New connections are made with the certificates as they are now."""
        certificates = self._certificates
        if certificates is None:
            return
        if self.peers is not None and certificates.peers_server is not None:
            await self.peers.renew(certificates.peers_server)
        if self.control is not None and certificates.control_server is not None:
            await self.control.renew(certificates.control_server)


_Site = tuple[web.Application, Limits, Callable[[web.AppRunner], Awaitable[None]]]


@contextlib.asynccontextmanager
async def serve(
    service: InstanceService, configuration: Configuration, certificates: Certificates | None = None
) -> AsyncIterator[Listeners]:
    """Answer until the block is left. ListenError or TokenUnusable if it cannot start.

    `certificates`, loaded, where the configuration has `tls`: peers then have a listener of their own, and none else if TLS is
    required; so has control over the network where it is configured.
    """
    token = PeerToken(configuration.secrets.peer_token)
    tls = configuration.tls
    peers_by_tls = certificates is not None and certificates.peers_server is not None
    plain_peers = not peers_by_tls or tls is None or not tls.required
    listeners = Listeners(certificates)
    async with contextlib.AsyncExitStack() as stack:
        tcp_socket = listen_on_tcp(
            configuration.listen_host,
            configuration.me.http_port,
            where=f"members, {configuration.instance.name}",
            key="http_port",
            host_key="host, or instance.listen_host",
        )
        stack.callback(tcp_socket.close)
        control_socket = stack.enter_context(unix_socket(configuration.control_socket))

        async def plainly(runner: web.AppRunner) -> None:
            listener = PlainListener(runner, tcp_socket, public_limits)
            listener.start()
            stack.push_async_callback(listener.close)

        async def locally(runner: web.AppRunner) -> None:
            await web.SockSite(runner, control_socket, backlog=BACKLOG).start()

        at_once = probes_at_once(service)
        public_limits = Limits(is_peer=token.matches, at_once=at_once) if plain_peers else Limits(at_once=at_once)
        control_limits = Limits()
        sites: list[_Site] = [
            (public_application(service, token if plain_peers else None, public_limits), public_limits, plainly),
            (control_application(service, control_limits), control_limits, locally),
        ]
        if peers_by_tls:
            peer_socket = listen_on_tcp(
                configuration.listen_host,
                configuration.me.peer_port or 0,
                where=f"members, {configuration.instance.name}",
                key="peer_port",
                host_key="host, or instance.listen_host",
            )
            stack.callback(peer_socket.close)

            async def peers(runner: web.AppRunner) -> None:
                listeners.peers = TlsListener(runner, peer_socket)
                stack.push_async_callback(listeners.peers.close)

            peer_limits = Limits(is_peer=token.matches)
            sites.append((peer_application(service, token, configuration, peer_limits), peer_limits, peers))
        if configuration.control is not None:
            host, port = configuration.control.address
            control_tcp_socket = listen_on_tcp(
                host, port, where="control.listen", key="port", host_key="another address"
            )
            stack.callback(control_tcp_socket.close)

            async def control(runner: web.AppRunner) -> None:
                listeners.control = TlsListener(runner, control_tcp_socket)
                stack.push_async_callback(listeners.control.close)

            network_limits = Limits(connections_max=NETWORK_CONTROL_CONNECTIONS_MAX)
            callers = NetworkCallers(configuration.control)
            sites.append((control_application(service, network_limits, callers=callers), network_limits, control))
        for application, limits, listen in sites:
            runner = LimitedRunner(application, limits, shutdown_timeout=SHUTDOWN_S)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await listen(runner)
        await listeners.renew()
        yield listeners


def public_application(
    service: InstanceService, token: PeerToken | None, limits: Limits | None = None, lags: LagHistory | None = None
) -> web.Application:
    """Probes, status and peer calls; nothing here changes what a user decides. Without `token` no peer calls: they are by TLS."""
    application = limited_application(limits)
    lags = lags or LagHistory()
    reading = read_routes(service, lags)
    routes = (*reading, _metrics_route(service), _peer_route(service, token))
    for route in (*routes, openapi.route("Instance manager: reading", routes)):
        route.add_to(application.router)
    for route in reading:
        route.add_doubled_to(application.router)

    async def keep_lags(_: web.Application) -> AsyncIterator[None]:
        keeping = asyncio.create_task(lags.keep(service.status))
        yield
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping

    application.cleanup_ctx.append(keep_lags)
    return application


def peer_application(
    service: InstanceService, token: PeerToken, configuration: Configuration, limits: Limits | None = None
) -> web.Application:
    """Peer calls only, for a listener that has demanded a certificate of the authority: it must be a member's, too."""
    application = limited_application(limits)
    answer = _peer_handler(service, token)

    async def handle(request: web.Request) -> web.StreamResponse:
        shown = certificate_of(request)
        if shown is None or not is_member(configuration, shown):
            name = shown.common_name if shown is not None else None
            return json_response(403, {"error": f"the certificate of {name!r} covers no member's host"})
        return await answer(request)

    application.router.add_post("/peer/{call}", handle)
    return application


async def _peers_elsewhere(_: web.Request) -> web.Response:
    return json_response(403, {"error": "peers are asked at peer_port, with TLS"})


def _peer_route(service: InstanceService, token: PeerToken | None) -> Route:
    return Route(
        path="/peer/{call}",
        handler=_peer_handler(service, token) if token is not None else _peers_elsewhere,
        summary="A call between the instances of a cluster.",
        methods=("POST",),
        needs="the token of secrets.peer_token",
        replies={
            200: Reply("the answer to this call", Any),
            401: Reply("the token is missing or another", ErrorBody),
            403: Reply("peers are asked at peer_port, with TLS", ErrorBody),
            404: Reply("no such call", ErrorBody),
            413: Reply(f"more than {BODY_BYTES_MAX} bytes", ErrorBody),
            503: Reply("too many calls at once", ErrorBody),
            504: Reply("no answer in time", ErrorBody),
        },
    )


def _metrics_route(service: InstanceService) -> Route:
    return Route(
        path="/metrics",
        handler=_metrics_handler(service),
        summary="One scrape for Prometheus.",
        replies={
            200: Reply("Prometheus's text format", str, ("text/plain",)),
            503: Reply("too many scrapes at once", ErrorBody),
        },
    )


def _metrics_handler(service: InstanceService) -> Callable[[web.Request], Awaitable[web.Response]]:
    places = asyncio.Semaphore(SCRAPES_MAX)

    async def handle(request: web.Request) -> web.Response:
        if request.method == "OPTIONS":
            return json_response(200, None)
        if places.locked():
            return json_response(503, {"error": f"{SCRAPES_MAX} scrapes are at work already"})
        async with places:
            body = await service.metrics()
            response = web.Response(
                body=body, headers={"Content-Type": METRICS_CONTENT_TYPE, "Cache-Control": "no-store"}
            )
            try:
                async with asyncio.timeout(SCRAPE_TAKEN_WITHIN_S):
                    await response.prepare(request)
                    await response.write_eof()
            except (ConnectionError, TimeoutError):
                if request.transport is not None:
                    request.transport.abort()
        return response

    return handle


def _peer_handler(service: InstanceService, token: PeerToken) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    places, held = asyncio.Semaphore(PEER_REQUESTS_MAX), asyncio.Semaphore(telling.TOLD_MAX)

    async def handle(request: web.Request) -> web.StreamResponse:
        authorization = request.headers.get("Authorization")
        if not token.matches(authorization):
            await token.read_again()
            if not token.matches(authorization):
                return json_response(401, {"error": "the token of secrets.peer_token is missing or another"})
        call, deadline_s = request.match_info["call"], _deadline_of(request)
        listens = request.headers.get("Accept") == LINES_CONTENT_TYPE
        if (held if listens else places).locked():
            return json_response(503, {"error": "too many peer calls are at work already"})
        try:
            if listens:
                async with held:
                    return await _tell(service, request, call)
            async with places, asyncio.timeout(deadline_s):
                body = await request.read()
                answer = await service.answer_peer(call, body)
        except UnknownCall as error:
            return json_response(404, {"error": str(error) or f"no such call: {call}"})
        except MalformedCall as error:
            return json_response(400, {"error": str(error)})
        except TimeoutError:
            return json_response(504, {"error": f"no answer within {deadline_s:g} s"})
        except web.HTTPException:
            raise
        except Exception as error:
            _log.exception("a peer call failed", extra={"call": call})
            return json_response(500, {"error": f"{type(error).__name__}: {error}"})
        return web.Response(body=answer, content_type="application/json")

    return handle


async def _tell(service: InstanceService, request: web.Request, call: str) -> web.StreamResponse:
    async with asyncio.timeout(PEER_DEADLINE_DEFAULT_S):
        body = await request.read()
    async with contextlib.aclosing(service.tell_peer(call, body)) as pieces:
        return await telling.tell(request, pieces)


def _deadline_of(request: web.Request) -> float:
    """What the peer says that it waits, within bounds."""
    try:
        wanted_s = float(request.headers.get(DEADLINE_HEADER, PEER_DEADLINE_DEFAULT_S))
    except ValueError:
        return PEER_DEADLINE_DEFAULT_S
    return min(wanted_s, PEER_DEADLINE_MAX_S) if wanted_s > 0 else PEER_DEADLINE_DEFAULT_S
