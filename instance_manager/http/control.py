"""Control: a user's verbs, on listeners of their own. Whoever asks is judged before anything is read of the request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Protocol

import msgspec
from aiohttp import web

from instance_manager.codec import to_json
from instance_manager.http import control_routes, openapi
from instance_manager.http.answers import json_response
from instance_manager.http.callers import Caller, LocalCallers, Refused
from instance_manager.http.limits import Limits, limited_application
from instance_manager.http.ports import ControlProgress, ControlResult, InstanceService, MalformedCall, UnknownCall

CONTROL_REQUESTS_MAX = 8
CONTROL_BODY_TIMEOUT_S = 5.0
REFUSALS_TOLD_MAX = 20
"""Lines of the log in a minute: anybody who reaches the port can cause one."""
LOOKING = frozenset({"status", "lease"})
"""Verbs that change nothing: not worth a line of the log for each."""

_log = logging.getLogger(__name__)


class Callers(Protocol):
    async def judge(self, request: web.Request) -> Caller | Refused: ...


def control_application(
    service: InstanceService, limits: Limits | None = None, *, callers: Callers | None = None
) -> web.Application:
    """A user's verbs, for those whom `callers` lets: by default for a Unix socket only, and refused on anything else."""
    application = limited_application(limits)
    places = asyncio.Semaphore(CONTROL_REQUESTS_MAX)
    judge = (callers or LocalCallers()).judge
    refusals = _Refusals()

    async def control(request: web.Request) -> web.StreamResponse:
        is_patronis = request.path in control_routes.VERBS
        verb = request.path[1:] if is_patronis else request.match_info["verb"]
        match await judge(request):
            case Refused(status, reason):
                refusals.tell(reason, verb, request.remote)
                return json_response(status, {"error": reason})
            case Caller(name, by_certificate):
                # A page of anybody's can make a browser with that certificate post a form, but not JSON (CSRF).
                if by_certificate and request.content_type != "application/json":
                    refusals.tell("with a certificate, but not as application/json", verb, request.remote)
                    return json_response(415, {"error": "say Content-Type: application/json, also without a body"})
                if verb not in LOOKING:
                    _log.info("control: %s by %s", verb[:40], name, extra={"from": request.remote})
        if places.locked():
            return json_response(503, {"error": f"{CONTROL_REQUESTS_MAX} commands are at work already"})
        async with places:
            return await (_run_patronis_verb if is_patronis else _run_verb)(service, request)

    routes = control_routes.routes(control)
    for route in (*routes, openapi.route("Instance manager: control", routes)):
        route.add_to(application.router)
    return application


class _Refusals:
    """Tells of callers that were refused, of so many in a minute."""

    def __init__(self) -> None:
        self._since_s = float("-inf")
        self._told = 0
        self._untold = 0

    def tell(self, reason: str, verb: str, address: str | None) -> None:
        now_s = time.monotonic()
        if now_s - self._since_s >= 60:
            self._since_s, self._told = now_s, 0
        if self._told >= REFUSALS_TOLD_MAX:
            self._untold += 1
            return
        self._told += 1
        fields = {"verb": verb[:40], "from": address, **({"untold_before": self._untold} if self._untold else {})}
        self._untold = 0
        _log.warning("control refused: %s", reason, extra=fields)


async def _run_patronis_verb(service: InstanceService, request: web.Request) -> web.StreamResponse:
    try:
        async with asyncio.timeout(CONTROL_BODY_TIMEOUT_S):
            body = await request.read()
    except TimeoutError:
        return json_response(408, {"error": "the request's body did not come in time"})
    return await control_routes.answer(service, request, body)


async def _run_verb(service: InstanceService, request: web.Request) -> web.StreamResponse:
    verb = request.match_info["verb"]
    try:
        async with asyncio.timeout(CONTROL_BODY_TIMEOUT_S):
            arguments = msgspec.json.decode(await request.read() or b"{}", type=dict[str, object])
        items = service.control(verb, arguments)
        first = await anext(items)
    except UnknownCall as error:
        return json_response(404, {"error": str(error) or f"no such command: {verb}"})
    except (MalformedCall, msgspec.DecodeError) as error:
        return json_response(400, {"error": str(error)})
    except TimeoutError:
        return json_response(408, {"error": "the request's body did not come in time"})
    except web.HTTPException:
        raise
    except Exception as error:
        _log.exception("a command failed", extra={"verb": verb})
        return json_response(500, {"error": f"{type(error).__name__}: {error}"})
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
