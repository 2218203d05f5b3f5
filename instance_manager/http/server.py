"""The listeners: probes, status and peers over TCP; control over a Unix socket only.

Reading and controlling are two applications, so that no mistake in a route lets a network client control anything
(GHSA-7qwx-x8ff-3px9). Peers show a shared token; a control client is known by the kernel's word for its user.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
from aiohttp import web

from instance_manager.codec import to_json, to_plain
from instance_manager.config import Configuration
from instance_manager.http import probes, telling
from instance_manager.http.ports import (
    DEADLINE_HEADER,
    LINES_CONTENT_TYPE,
    ControlProgress,
    ControlResult,
    InstanceService,
    MalformedCall,
    UnknownCall,
)
from instance_manager.http.token import PeerToken
from instance_manager.status import Probes

BODY_BYTES_MAX = 64 * 1024
PEER_REQUESTS_MAX = 64
CONTROL_REQUESTS_MAX = 8
SCRAPES_MAX = 4
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CONTROL_BODY_TIMEOUT_S = 5.0
KEEPALIVE_S = 60.0
SHUTDOWN_S = 0.3
PEER_DEADLINE_DEFAULT_S = 5.0
PEER_DEADLINE_MAX_S = 120.0
BACKLOG = 128

_log = logging.getLogger(__name__)


class ListenError(Exception):
    """A listener could not be opened; the text names the key to change."""


@contextlib.asynccontextmanager
async def serve(service: InstanceService, configuration: Configuration) -> AsyncIterator[None]:
    """Answer until the block is left. ListenError or TokenUnusable if it cannot start."""
    token = PeerToken(configuration.secrets.peer_token)
    public = web.AppRunner(
        public_application(service, token),
        access_log=None,
        keepalive_timeout=KEEPALIVE_S,
        shutdown_timeout=SHUTDOWN_S,
    )
    control = web.AppRunner(control_application(service), access_log=None, shutdown_timeout=SHUTDOWN_S)
    async with contextlib.AsyncExitStack() as stack:
        tcp_socket = _listen_on_tcp(configuration)
        stack.callback(tcp_socket.close)
        unix_socket = stack.enter_context(_unix_socket(configuration.control_socket))
        for runner, listener in ((public, tcp_socket), (control, unix_socket)):
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.SockSite(runner, listener, backlog=BACKLOG).start()
        yield


def public_application(service: InstanceService, token: PeerToken) -> web.Application:
    """Probes, status and peer calls; nothing here changes what a user decides."""
    application = web.Application(client_max_size=BODY_BYTES_MAX)
    for path, probe in probes.ROUTES.items():
        handler = _probe_handler(service, probe)
        for method in ("GET", "HEAD", "OPTIONS"):
            application.router.add_route(method, path, handler)

    async def status(request: web.Request) -> web.Response:
        if request.method == "OPTIONS":
            return _json_response(200, None)
        return _json_response(200, to_plain(service.status()))

    for method in ("GET", "HEAD", "OPTIONS"):
        application.router.add_route(method, "/status", status)
    metrics = _metrics_handler(service)
    for method in ("GET", "HEAD", "OPTIONS"):
        application.router.add_route(method, "/metrics", metrics)
    application.router.add_post("/peer/{call}", _peer_handler(service, token))
    return application


def control_application(service: InstanceService) -> web.Application:
    """A user's verbs; to be served on a Unix socket only, and refused on anything else."""
    application = web.Application(client_max_size=BODY_BYTES_MAX)
    places = asyncio.Semaphore(CONTROL_REQUESTS_MAX)

    async def control(request: web.Request) -> web.StreamResponse:
        if (refusal := _refusal_of_caller(request)) is not None:
            return _json_response(403, {"error": refusal})
        if places.locked():
            return _json_response(503, {"error": f"{CONTROL_REQUESTS_MAX} commands are at work already"})
        async with places:
            return await _run_verb(service, request)

    application.router.add_post("/control/{verb}", control)
    return application


def _probe_handler(
    service: InstanceService, probe: Callable[[Probes, dict[str, str], float], probes.ProbeAnswer]
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        snapshot = service.probes()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - snapshot.taken_s
        try:
            answer = probe(snapshot, dict(request.query), age_s)
        except probes.MalformedSize as error:
            return _json_response(400, {"error": str(error)})
        return _json_response(200 if answer.ok else 503, None if request.method == "OPTIONS" else answer.body)

    return handle


def _metrics_handler(service: InstanceService) -> Callable[[web.Request], Awaitable[web.Response]]:
    places = asyncio.Semaphore(SCRAPES_MAX)

    async def handle(request: web.Request) -> web.Response:
        if request.method == "OPTIONS":
            return _json_response(200, None)
        if places.locked():
            return _json_response(503, {"error": f"{SCRAPES_MAX} scrapes are at work already"})
        async with places:
            body = await service.metrics()
        return web.Response(body=body, headers={"Content-Type": METRICS_CONTENT_TYPE, "Cache-Control": "no-store"})

    return handle


def _peer_handler(service: InstanceService, token: PeerToken) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    places, held = asyncio.Semaphore(PEER_REQUESTS_MAX), asyncio.Semaphore(telling.TOLD_MAX)

    async def handle(request: web.Request) -> web.StreamResponse:
        authorization = request.headers.get("Authorization")
        if not token.matches(authorization):
            await token.read_again()
            if not token.matches(authorization):
                return _json_response(401, {"error": "the token of secrets.peer_token is missing or another"})
        call, deadline_s = request.match_info["call"], _deadline_of(request)
        listens = request.headers.get("Accept") == LINES_CONTENT_TYPE
        if (held if listens else places).locked():
            return _json_response(503, {"error": "too many peer calls are at work already"})
        try:
            if listens:
                async with held:
                    return await _tell(service, request, call)
            async with places, asyncio.timeout(deadline_s):
                body = await request.read()
                answer = await service.answer_peer(call, body)
        except UnknownCall as error:
            return _json_response(404, {"error": str(error) or f"no such call: {call}"})
        except MalformedCall as error:
            return _json_response(400, {"error": str(error)})
        except TimeoutError:
            return _json_response(504, {"error": f"no answer within {deadline_s:g} s"})
        except web.HTTPException:
            raise
        except Exception as error:
            _log.exception("a peer call failed", extra={"call": call})
            return _json_response(500, {"error": f"{type(error).__name__}: {error}"})
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


async def _run_verb(service: InstanceService, request: web.Request) -> web.StreamResponse:
    verb = request.match_info["verb"]
    try:
        async with asyncio.timeout(CONTROL_BODY_TIMEOUT_S):
            arguments = msgspec.json.decode(await request.read() or b"{}", type=dict[str, object])
        items = service.control(verb, arguments)
        first = await anext(items)
    except UnknownCall as error:
        return _json_response(404, {"error": str(error) or f"no such command: {verb}"})
    except (MalformedCall, msgspec.DecodeError) as error:
        return _json_response(400, {"error": str(error)})
    except TimeoutError:
        return _json_response(408, {"error": "the request's body did not come in time"})
    except web.HTTPException:
        raise
    except Exception as error:
        _log.exception("a command failed", extra={"verb": verb})
        return _json_response(500, {"error": f"{type(error).__name__}: {error}"})
    response = web.StreamResponse(headers={"Content-Type": "application/jsonl", "Cache-Control": "no-store"})
    connected = await _try_to_write(response.prepare(request))
    item: ControlProgress | ControlResult = first
    while True:
        if connected:
            connected = await _try_to_write(response.write(_control_line(item)))
        if isinstance(item, ControlResult):
            break
        try:
            # To the end even when nobody listens any more: a switchover is not given up half-way with its terminal.
            item = await anext(items)
        except StopAsyncIteration:
            item = ControlResult(ok=False, message=f"{verb} ended without a result")
        except Exception as error:
            _log.exception("a command failed", extra={"verb": verb})
            item = ControlResult(ok=False, message=f"{type(error).__name__}: {error}")
    if connected:
        await _try_to_write(response.write_eof())
    return response


async def _try_to_write(writing: Awaitable[object]) -> bool:
    try:
        async with asyncio.timeout(CONTROL_BODY_TIMEOUT_S):
            await writing
    except (ConnectionError, TimeoutError):
        return False
    return True


def _control_line(item: ControlProgress | ControlResult) -> bytes:
    if isinstance(item, ControlProgress):
        return to_json({"progress": item.progress}) + b"\n"
    return to_json({"result": item}) + b"\n"


def _refusal_of_caller(request: web.Request) -> str | None:
    connection = request.transport.get_extra_info("socket") if request.transport is not None else None
    if connection is None or connection.family != socket.AF_UNIX:
        return "control is possible through the control socket only"
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    if uid not in (0, os.geteuid()):
        return f"the user with id {uid} may not control this instance"
    return None


def _json_response(status: int, body: object | None) -> web.Response:
    headers = {"Cache-Control": "no-store"}
    if body is None:
        return web.Response(status=status, headers={**headers, "Allow": "GET, HEAD, OPTIONS"})
    return web.Response(status=status, body=to_json(body) + b"\n", content_type="application/json", headers=headers)


def _listen_on_tcp(configuration: Configuration) -> socket.socket:
    host, port = configuration.listen_host, configuration.me.http_port
    where = f"members, {configuration.instance.name}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ListenError(f"{where}: host {host!r} has no address: {error}; set it, or instance.listen_host") from error
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"http_port {port} is in use on {host} by another program; stop it, or set another http_port"
        elif error.errno == errno.EADDRNOTAVAIL:
            reason = f"{host} is not an address of this machine; set host, or instance.listen_host"
        else:
            reason = f"http_port {port} on {host} cannot be used: {error.strerror}; set another http_port"
        raise ListenError(f"{where}: {reason}") from error
    return listener


def _check_replaceable(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"instance.directory: {path} is in the way and no socket; remove it")


@contextlib.contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
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
