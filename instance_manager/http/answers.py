"""One form of every short answer."""

from __future__ import annotations

from aiohttp import web

from instance_manager.codec import to_json


def json_response(status: int, body: object | None) -> web.Response:
    """Never kept by a cache; without a body it is the answer to OPTIONS."""
    headers = {"Cache-Control": "no-store"}
    if body is None:
        return web.Response(status=status, headers={**headers, "Allow": "GET, HEAD, OPTIONS"})
    return web.Response(status=status, body=to_json(body) + b"\n", content_type="application/json", headers=headers)
