"""A small API server over real HTTP: resourceVersion, watch, merge patch, and faults on demand.

It keeps to what the real one was seen to do (status objects, 409 for a stale resourceVersion or another uid, MicroTime with six
digits, bookmarks), for tests of what a client does under faults that a real one cannot be made to show. It is no
proof that the real one accepts what is sent: that is for the tests against a real one.
"""

from __future__ import annotations

import asyncio
import copy
import json
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import uuid4

from aiohttp import web

Plain = dict[str, Any]


@dataclass
class Fault:
    """What happens to one request of `method`."""

    method: str
    status: int | None = None
    """Answered instead of processing; None with `hang` or `cut`."""
    applied: bool = False
    """Processed before that."""
    hang: bool = False
    """No answer at all."""
    cut: bool = False
    """The connection is closed."""
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    """Text instead of a Status."""


class FakeApiServer:
    """`async with FakeApiServer() as server`: listens on `server.url`."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.objects: dict[tuple[str, str], Plain] = {}
        """By resource (`leases`, `pods`, `events`) and name."""
        self.faults: deque[Fault] = deque()
        self.requests: list[tuple[str, str]] = []
        self.token: str | None = None
        """None: nobody is asked who he is."""
        self.forbidden: set[tuple[str, str]] = set()
        """(method, resource)."""
        self.latest = 1000
        self._log: list[tuple[int, str, str, Plain]] = []
        self._news = asyncio.Event()
        self._hanging = asyncio.Event()
        self.watches = 0
        self.url = ""

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._hanging.set()
        self.end_watches()
        await self._runner.cleanup()

    # For tests.

    def lease(self, name: str = "demo") -> Plain:
        return self.objects["leases", name]

    def put(self, resource: str, found: Plain) -> Plain:
        """Somebody else writes."""
        name = found["metadata"]["name"]
        known = self.objects.get((resource, name))
        return self._store(resource, "ADDED" if known is None else "MODIFIED", copy.deepcopy(found))

    def delete(self, resource: str, name: str) -> None:
        found = self.objects.pop((resource, name))
        self.latest += 1
        found["metadata"]["resourceVersion"] = str(self.latest)
        self._tell("DELETED", resource, found)

    def end_watches(self) -> None:
        self._tell("END", "", {})

    def count(self, method: str, resource: str) -> int:
        return sum(each == (method, resource) for each in self.requests)

    # The API.

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        after = parts[parts.index("namespaces") + 2 :]
        resource, name = after[0], (after[1] if len(after) > 1 else "")
        watch = request.query.get("watch") == "1"
        self.requests.append(("WATCH" if watch else request.method, resource))
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized", "Unauthorized")
        if (request.method, resource) in self.forbidden:
            return _status(403, "Forbidden", f'{resource} "{name}" is forbidden')
        body = await request.json() if request.can_read_body else {}
        if not watch and self.faults and self.faults[0].method == request.method:
            return await self._misbehave(self.faults.popleft(), request, resource, name, body)
        if watch:
            return await self._watch(request, resource)
        return self._process(request, resource, name, body)

    async def _misbehave(
        self, fault: Fault, request: web.Request, resource: str, name: str, body: Plain
    ) -> web.StreamResponse:
        if fault.applied:
            self._process(request, resource, name, body)
        if fault.hang:
            await self._hanging.wait()
        if fault.cut or fault.hang:
            assert request.transport is not None
            request.transport.abort()
        if fault.body is not None:
            return web.Response(status=fault.status or 200, text=fault.body, headers=fault.headers)
        return _status(fault.status or 500, "InternalError", "so the test wants it", headers=fault.headers)

    def _process(self, request: web.Request, resource: str, name: str, body: Plain) -> web.Response:
        match request.method:
            case "GET" if name == "":
                items = [copy.deepcopy(found) for (kind, _), found in self.objects.items() if kind == resource]
                return _json(200, {"kind": "List", "metadata": {"resourceVersion": str(self.latest)}, "items": items})
            case "POST":
                name = body["metadata"]["name"]
                if (resource, name) in self.objects:
                    return _status(409, "AlreadyExists", f"{resource} {name!r} already exists")
                return _json(201, self._store(resource, "ADDED", body))
        found = self.objects.get((resource, name))
        if found is None and request.method == "PUT" and resource == "leases":
            # A Lease is created by an update too, unless the update names the uid that it stands on.
            if "uid" in body["metadata"]:
                return _status(409, "Conflict", "Precondition failed: UID in precondition")
            return _json(201, self._store(resource, "ADDED", body))
        if found is None:
            return _status(404, "NotFound", f'{resource} "{name}" not found', details={"name": name, "kind": resource})
        if request.method == "GET":
            return _json(200, found)
        changed = body if request.method == "PUT" else _merged(found, body)
        told, known = body["metadata"], found["metadata"]
        if request.method == "PATCH" and told.get("uid", known["uid"]) != known["uid"]:
            return _status(422, "Invalid", "metadata.uid: Invalid value: field is immutable")
        for key in ("resourceVersion", "uid"):
            if key in told and told[key] != known[key]:
                return _status(409, "Conflict", f"the object has been modified ({key})")
        if request.method == "PUT" and "resourceVersion" not in told:
            return _status(422, "Invalid", "metadata.resourceVersion: must be specified for an update")
        return _json(200, self._store(resource, "MODIFIED", changed))

    def _store(self, resource: str, kind: str, found: Plain) -> Plain:
        self.latest += 1
        metadata = found["metadata"]
        known = self.objects.get((resource, metadata["name"]))
        metadata["uid"] = known["metadata"]["uid"] if known is not None else metadata.get("uid", str(uuid4()))
        metadata["resourceVersion"] = str(self.latest)
        self.objects[resource, metadata["name"]] = found
        self._tell(kind, resource, found)
        return copy.deepcopy(found)

    def _tell(self, kind: str, resource: str, found: Plain) -> None:
        self._log.append((self.latest, kind, resource, copy.deepcopy(found)))
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _watch(self, request: web.Request, resource: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        wanted = _selector(request.query.get("fieldSelector", ""))
        since = request.query.get("resourceVersion", "")
        at = len(self._log)
        self.watches += 1
        try:
            if since in ("", "0"):
                for (kind, _), found in list(self.objects.items()):
                    if kind == resource and wanted(found):
                        await _send(response, "ADDED", found)
            else:
                at = next((i for i, entry in enumerate(self._log) if entry[0] > int(since)), len(self._log))
            while True:
                while at < len(self._log):
                    _, kind, of, found = self._log[at]
                    at += 1
                    if kind == "END":
                        return response
                    if of == resource and wanted(found):
                        await _send(response, kind, found)
                await self._news.wait()
        finally:
            self.watches -= 1


def _selector(text: str) -> Callable[[Plain], bool]:
    name = text.removeprefix("metadata.name=")
    return lambda found: name in ("", found["metadata"]["name"])


async def _send(response: web.StreamResponse, kind: str, found: Plain) -> None:
    await response.write(json.dumps({"type": kind, "object": found}).encode() + b"\n")


def _merged(found: Plain, patch: Plain) -> Plain:
    """RFC 7386."""
    merged = copy.deepcopy(found)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _json(status: int, content: Plain) -> web.Response:
    return web.json_response(content, status=status)


def _status(
    code: int, reason: str, message: str, *, headers: dict[str, str] | None = None, details: Plain | None = None
) -> web.Response:
    content = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": message,
        "details": details or {},
        "code": code,
    }
    return web.json_response(content, status=code, headers=headers)
