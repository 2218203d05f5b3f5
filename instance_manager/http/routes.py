"""The read routes: one table, from which they are served and described (`openapi.py`)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from instance_manager.http import page, patroni, probes
from instance_manager.http.answers import ErrorBody, Handler, json_response
from instance_manager.http.lag_history import LagHistory
from instance_manager.http.ports import InstanceService
from instance_manager.status import ClusterStatus, Probes
from instance_manager.wall_clock import unix_seconds

READ_METHODS = ("GET", "HEAD", "OPTIONS")
JSON = "application/json"
HTML = "text/html"


@dataclass(frozen=True, slots=True)
class Parameter:
    """Of a query."""

    name: str
    description: str
    pattern: str | None = None
    choices: tuple[str, ...] = ()
    example: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """`body`: the type of the JSON, None for no body."""

    description: str
    body: Any = None
    content_types: tuple[str, ...] = (JSON,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    path: str
    handler: Handler
    summary: str
    replies: Mapping[int, Reply]
    methods: tuple[str, ...] = READ_METHODS
    parameters: tuple[Parameter, ...] = ()
    needs: str | None = None
    """Who may call it; None: everybody who reaches the port."""

    def add_to(self, router: web.UrlDispatcher) -> None:
        for method in self.methods:
            router.add_route(method, self.path, self.handler)

    def add_doubled_to(self, router: web.UrlDispatcher) -> None:
        """Also with two slashes, as Patroni answers it: who joins an address that ends with one and a path asks for that."""
        if self.path != "/":
            for method in self.methods:
                router.add_route(method, f"/{self.path}", self.handler)


SIZE = r"^\s*[0-9]{1,15}(B|kB|KB|KiB|MB|MiB|GB|GiB|TB|TiB)?\s*$"
_LAG = Parameter("lag", "no further behind than this: bytes, or a whole number with kB, MB, GB, TB", SIZE, (), "16MB")
_MAX = Parameter("max", "503 when further behind than this", SIZE, (), "16MB")
_MODE = Parameter("mode", "what counts: replayed (apply), or received (write)", None, ("apply", "write"))
_REPLICATION_STATE = Parameter("replication_state", "`streaming`: not one that still catches up")
_WITHOUT_LAG = frozenset(
    ("/primary", "/read-write", "/leader", "/master", "/standby-leader", "/standby_leader", "/health")
)
_MALFORMED = Reply("a parameter that cannot be read", ErrorBody)


@dataclass(slots=True)
class _Served:
    service: InstanceService
    lags: LagHistory = field(default_factory=LagHistory)

    def looked(self, request: web.Request) -> patroni.Looked:
        snapshot = self.service.probes()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - snapshot.taken_s
        return patroni.Looked(snapshot, self.service.details(), dict(request.query), age_s)


def read_routes(service: InstanceService, lags: LagHistory) -> tuple[Route, ...]:
    """Everything that tells and changes nothing; it may be open to the network."""
    served = _Served(service, lags)
    return (
        Route(
            path="/",
            handler=_root(served),
            summary="The status page for a browser (Accept: text/html); for everybody else as /primary.",
            replies={
                200: Reply("the page; or it is the primary", patroni.NodeStatus, (JSON, HTML)),
                503: Reply("it is not", patroni.NodeStatus),
            },
        ),
        *(_probe(service, path, probe) for path, probe in probes.ROUTES.items()),
        *(_patroni_check(served, path, check) for path, check in patroni.CHECKS.items()),
        _bare(served, "/liveness", patroni.liveness, ()),
        _bare(served, "/readiness", patroni.readiness, (_LAG, _MODE)),
        _told("/status", "Everything that is known.", ClusterStatus, lambda _: service.status()),
        _told(
            "/patroni",
            "This node, as Patroni describes one.",
            patroni.NodeStatus,
            lambda request: patroni.node_status(served.looked(request), now_unix_s=unix_seconds()),
        ),
        _told(
            "/cluster",
            "Every member, as Patroni describes a cluster.",
            patroni.Cluster,
            lambda _: patroni.cluster(service.status(), service.details()),
        ),
        _told(
            "/history",
            "The changes of the timeline.",
            tuple[patroni.HistoryRow, ...],
            lambda _: patroni.history(service.details()),
        ),
        _told(
            "/config",
            "The cluster's configuration in Patroni's words; read-only, without what could be secret.",
            dict[str, Any],
            lambda _: service.details().settings,
        ),
    )


def _probe(
    service: InstanceService,
    path: str,
    probe: Callable[[Probes, Mapping[str, str], float], probes.ProbeAnswer],
) -> Route:
    async def handle(request: web.Request) -> web.Response:
        snapshot = service.probes()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - snapshot.taken_s
        answer = probe(snapshot, dict(request.query), age_s)
        return json_response(200 if answer.ok else 503, None if request.method == "OPTIONS" else answer.body)

    body = probes.LagBody if path == "/lag" else probes.ProbeBody
    replies = {200: Reply("yes", body), 503: Reply("no, and why", body)}
    if path == "/lag":
        replies[400] = _MALFORMED
    return Route(
        path=path,
        handler=_refusing_malformed(handle),
        summary=_first_line(probe),
        replies=replies,
        parameters=(_MAX,) if path == "/lag" else (),
    )


def _patroni_check(served: _Served, path: str, check: Callable[[patroni.Looked], list[str]]) -> Route:
    replies = {200: Reply("yes", patroni.NodeStatus), 503: Reply("no, and why", patroni.NodeStatus)}
    parameters: tuple[Parameter, ...] = ()
    if path not in _WITHOUT_LAG:
        parameters = (_LAG, _REPLICATION_STATE)
        replies[400] = _MALFORMED
    return Route(
        path=path,
        handler=_refusing_malformed(functools.partial(_answer_check, served, check)),
        summary=_first_line(check),
        replies=replies,
        parameters=parameters,
    )


async def _answer_check(
    served: _Served, check: Callable[[patroni.Looked], list[str]], request: web.Request
) -> web.Response:
    looked = served.looked(request)
    refusals = check(looked)
    if request.method == "OPTIONS":
        return json_response(503 if refusals else 200, None)
    body = patroni.node_status(looked, now_unix_s=unix_seconds(), reasons=tuple(refusals))
    return json_response(503 if refusals else 200, body)


def _bare(
    served: _Served, path: str, check: Callable[[patroni.Looked], list[str]], parameters: tuple[Parameter, ...]
) -> Route:
    """As Patroni answers these two: the code alone."""

    async def handle(request: web.Request) -> web.Response:
        return json_response(503 if check(served.looked(request)) else 200, None)

    replies = {200: Reply("yes"), 503: Reply("no")}
    if parameters:
        replies[400] = _MALFORMED
    return Route(
        path=path,
        handler=_refusing_malformed(handle),
        summary=_first_line(check),
        replies=replies,
        parameters=parameters,
    )


def _told(path: str, summary: str, body: Any, tell: Callable[[web.Request], object]) -> Route:
    async def handle(request: web.Request) -> web.Response:
        return json_response(200, None if request.method == "OPTIONS" else tell(request))

    return Route(path=path, handler=handle, summary=summary, replies={200: Reply("what is known", body)})


def _root(served: _Served) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        if request.method == "GET" and HTML in request.headers.get("Accept", ""):
            return page.response(served.service.status(), served.service.details(), served.lags)
        return await _answer_check(served, patroni.primary, request)

    return handle


def _refusing_malformed(handler: Handler) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except probes.MalformedQuery as error:
            return json_response(400, ErrorBody(str(error)))

    return handle


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]
