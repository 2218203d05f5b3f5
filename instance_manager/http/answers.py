"""How answers look on every listener: JSON that nobody keeps, also where a request is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from instance_manager.codec import to_json

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ErrorBody(msgspec.Struct, frozen=True):
    error: str


def json_response(status: int, body: object | None) -> web.Response:
    """Without a body for None, as OPTIONS is answered."""
    headers = {"Cache-Control": "no-store"}
    if body is None:
        return web.Response(status=status, headers={**headers, "Allow": "GET, HEAD, OPTIONS"})
    return web.Response(status=status, body=to_json(body) + b"\n", content_type="application/json", headers=headers)


@web.middleware
async def errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What the router or the reading of a body refuses (404, 405, 413) is told as every other refusal is."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        response = json_response(error.status, ErrorBody(error.reason))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response


async def without_server_version(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: what serves, and in which version, is nobody's business."""
    response.headers["Server"] = "instance-manager"
