"""Probes answered from the bytes of a whole request, before aiohttp has made anything for its connection.

The kubelet opens a connection each second for /readyz, and most of what an answer costs is the framework's: its parser,
request, response, and a task for each connection. Only a request of exactly the known form is answered here, GET of one probe with
nothing but common headers; anything else, and what comes in pieces, goes to aiohttp as it came. The limits count both alike.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate

from instance_manager.codec import to_json
from instance_manager.http import probes
from instance_manager.http.ports import InstanceService
from instance_manager.wall_clock import unix_seconds

REQUEST_BYTES_MAX = 1024
_PATHS = ("/readyz", "/livez", "/startupz")
_REQUEST = re.compile(
    rb"GET (?P<path>" + b"|".join(path.encode() for path in _PATHS) + rb") HTTP/1\.1\r\n"
    # Without (?i), so that "Connection" is the one below. No folded line, no control character.
    rb"(?P<headers>(?:(?:Host|User-Agent|Accept|Accept-Encoding|Connection): ?[\x20-\x7e]*\r\n)+)\r\n"
)
_CONNECTION = re.compile(rb"^Connection: ?([\x20-\x7e]*)\r\n", re.MULTILINE)
_REASON = {200: b"200 OK", 503: b"503 Service Unavailable"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes of a whole response."""

    response: bytes
    closes: bool
    """The client said that it asks nothing more on this connection."""


AtOnce = Callable[[bytes], Answer | None]
"""From the first bytes of a request; None: aiohttp's to answer."""


def probes_at_once(service: InstanceService) -> AtOnce:
    """As the routes of `probes` answer, to the byte but for the order of headers."""

    def answer(data: bytes) -> Answer | None:
        if len(data) > REQUEST_BYTES_MAX:
            return None
        request = _REQUEST.fullmatch(data)
        if request is None or request["headers"].count(b"Host:") != 1:
            return None
        connection = [value.strip().lower() for value in _CONNECTION.findall(request["headers"])]
        if connection not in ([], [b"close"], [b"keep-alive"]):
            return None
        snapshot = service.probes()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - snapshot.taken_s
        told = probes.ROUTES[request["path"].decode()](snapshot, {}, age_s)
        closes = connection == [b"close"]
        return Answer(_response(200 if told.ok else 503, to_json(told.body) + b"\n", closes=closes), closes)

    return answer


def _response(status: int, body: bytes, *, closes: bool) -> bytes:
    return (
        b"HTTP/1.1 %b\r\nCache-Control: no-store\r\nContent-Type: application/json\r\nContent-Length: %d\r\nDate: %b\r\nServer: instance-manager\r\n%b\r\n%b"
        % (
            _REASON[status],
            len(body),
            formatdate(unix_seconds(), usegmt=True).encode(),
            b"Connection: close\r\n" if closes else b"",
            body,
        )
    )
