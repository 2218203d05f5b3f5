"""One held connection on which an instance goes on telling a peer what changes: a line of JSON each time.

The peer notices an end of the process by the end of its connection, and any other silence by its own deadline. The token
is looked at when the connection is made, so a connection is ended in order after a while and asked for again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

from aiohttp import web

from instance_manager.http.ports import LINES_CONTENT_TYPE

_log = logging.getLogger(__name__)

LASTS_S = 300.0
WRITE_TIMEOUT_S = 5.0
"""A peer that takes nothing for this time is left."""
AT_ONCE_BYTES = 16 * 1024
"""With less than this waiting for a peer nothing has to be waited for: asyncio's own limit is 64 KiB."""
TOLD_MAX = 64
"""Connections of this kind at once."""


async def tell(request: web.Request, pieces: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Send `pieces` until the peer leaves, or for LASTS_S. What the first piece raises is the caller's to answer."""
    ends_s = time.clock_gettime(time.CLOCK_BOOTTIME) + LASTS_S
    first = await anext(pieces)
    response = web.StreamResponse(headers={"Content-Type": LINES_CONTENT_TYPE, "Cache-Control": "no-store"})
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.prepare(request)
            await response.write(first + b"\n")
        async for piece in pieces:
            await _write(request, response, piece + b"\n")
            if time.clock_gettime(time.CLOCK_BOOTTIME) >= ends_s:
                break
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write_eof()
    except (ConnectionError, TimeoutError):
        # Broken, or not taken: closed without the end that would pass for an orderly one.
        _abort(request)
    except Exception:
        _log.exception("what a peer is told has failed")
        _abort(request)
    return response


async def _write(request: web.Request, response: web.StreamResponse, line: bytes) -> None:
    """TimeoutError. Many a second are told, and nearly none waits: only one that may has a timer."""
    transport = request.transport
    if transport is not None and transport.get_write_buffer_size() + len(line) < AT_ONCE_BYTES:
        await response.write(line)
        return
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await response.write(line)


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
