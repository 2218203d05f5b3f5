"""An HTTP proxy before the S3 server, which fails on purpose: one rule at a time, for as many requests as it says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import re
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

_HOP_HEADERS = frozenset({"host", "connection", "content-length", "transfer-encoding", "expect", "keep-alive"})
_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{text}</Message></Error>"


@dataclass
class Fault:
    """`kind` is one of the methods `_<kind>` of the proxy, or an HTTP status with an S3 code, such as `503 SlowDown`."""

    kind: str
    method: str = ".*"
    path: str = ".*"
    times: int = 1_000_000
    met: int = 0

    def meets(self, request: web.Request) -> bool:
        return bool(
            self.met < self.times
            and re.fullmatch(self.method, request.method)
            and re.search(self.path, request.path_qs)
        )


@dataclass
class FaultProxy:
    """Forwards to `target`; `requests` counts by method, also those that met a fault."""

    target: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    delay_s: float = 0.0

    def fail(self, kind: str, *, method: str = ".*", path: str = ".*", times: int = 1_000_000) -> Fault:
        fault = Fault(kind, method, path, times)
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        self.faults.clear()

    @contextlib.contextmanager
    def running(self, tls: ssl.SSLContext | None = None) -> Iterator[FaultProxy]:
        """In a thread of its own, so that it also serves what blocks the test's."""
        ready = threading.Event()
        stop: list[Callable[[], object]] = []

        async def serve() -> None:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            stop.append(functools.partial(loop.call_soon_threadsafe, ended.set))
            async with self._serving(tls):
                ready.set()
                await ended.wait()

        # `asyncio.run` also ends the requests that are left hanging on purpose.
        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            stop[0]()
            thread.join(10)

    @contextlib.asynccontextmanager
    async def _serving(self, tls: ssl.SSLContext | None) -> AsyncIterator[None]:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{tail:.*}", self._handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"{'https' if tls else 'http'}://{host}:{port}"
        async with aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=["Accept-Encoding"]) as self._session:
            try:
                yield
            finally:
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.method)
        fault = next((each for each in self.faults if each.meets(request)), None)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if fault is None:
            return await self._forward(request)
        fault.met += 1
        if fault.kind[:3].isdigit():
            status, _, code = fault.kind.partition(" ")
            await request.read()
            # Some stores tell in the text what they were sent.
            text = " ".join(request.headers.values()) if code == "AccessDenied-Echo" else "injected"
            body = _ERROR.format(code=code, text=text) if code else "<html>no such page</html>"
            return web.Response(
                status=int(status), text=body if request.method != "HEAD" else None, content_type="application/xml"
            )
        answer: web.StreamResponse = await getattr(self, f"_{fault.kind}")(request)
        return answer

    async def _forward(self, request: web.Request, *, without: str = "", body: bytes | None = None) -> web.Response:
        headers = {
            key: value
            for key, value in request.headers.items()
            if key.lower() not in _HOP_HEADERS and key.lower() != without
        }
        content = await request.read() if body is None else body
        async with self._session.request(
            request.method, f"{self.target}{request.raw_path}", data=content, headers=headers
        ) as answer:
            kept = {key: value for key, value in answer.headers.items() if key.lower() not in _HOP_HEADERS}
            if request.method == "HEAD":
                kept["Content-Length"] = answer.headers.get("Content-Length", "0")
            return web.Response(status=answer.status, body=await answer.read(), headers=kept)

    async def _silent(self, request: web.Request) -> web.StreamResponse:
        """Takes the request and never answers."""
        await request.read()
        await asyncio.sleep(3600)
        raise AssertionError

    async def _slow(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return await self._forward(request)

    async def _stored_but_silent(self, request: web.Request) -> web.StreamResponse:
        await self._forward(request)
        return await self._reset(request)

    async def _stored_but_500(self, request: web.Request) -> web.StreamResponse:
        await self._forward(request)
        return web.Response(status=500, text=_ERROR.format(code="InternalError", text="injected"))

    async def _reset(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _reset_in_the_body(self, request: web.Request) -> web.StreamResponse:
        whole = await self._forward(request)
        assert isinstance(whole.body, bytes)
        answer = web.StreamResponse(status=whole.status, headers=whole.headers)
        answer.content_length = len(whole.body)
        await answer.prepare(request)
        await answer.write(whole.body[: len(whole.body) // 2])
        return await self._reset(request)

    async def _short_body(self, request: web.Request) -> web.StreamResponse:
        """Half of the object, and a header that says that this is all."""
        whole = await self._forward(request)
        assert isinstance(whole.body, bytes)
        headers = {key: value for key, value in whole.headers.items() if key.lower() != "content-length"}
        return web.Response(status=200, body=whole.body[: len(whole.body) // 2], headers=headers)

    async def _byte_a_second(self, request: web.Request) -> web.StreamResponse:
        whole = await self._forward(request)
        assert isinstance(whole.body, bytes)
        answer = web.StreamResponse(status=whole.status, headers=whole.headers)
        answer.content_length = len(whole.body)
        await answer.prepare(request)
        for position in range(len(whole.body)):
            await answer.write(whole.body[position : position + 1])
            await asyncio.sleep(1)
        return answer

    async def _wrong_etag(self, request: web.Request) -> web.StreamResponse:
        answer = await self._forward(request)
        answer.headers["ETag"] = '"00000000000000000000000000000000"'
        return answer

    async def _damaged_on_the_way(self, request: web.Request) -> web.StreamResponse:
        """Another body reaches the store, which says success: its digest checks are cut off too."""
        body = bytearray(await request.read())
        body[len(body) // 2] ^= 1
        return await self._forward(request, without="content-md5", body=bytes(body))

    async def _sha256_checked(self, request: web.Request) -> web.StreamResponse:
        """As a store that checks what it gets; its ETag is none, as where it encrypts with a key of KMS."""
        return await self._checked(request, await request.read())

    async def _damaged_before_sha256_is_checked(self, request: web.Request) -> web.StreamResponse:
        body = bytearray(await request.read())
        body[len(body) // 2] ^= 1
        return await self._checked(request, bytes(body))

    async def _checked(self, request: web.Request, body: bytes) -> web.StreamResponse:
        told = request.headers.get("x-amz-checksum-sha256")
        if told is not None and base64.b64decode(told) != hashlib.sha256(body).digest():
            return web.Response(status=400, text=_ERROR.format(code="BadDigest", text="not what was told"))
        answer = await self._forward(request, body=body)
        answer.headers["ETag"] = '"not-of-the-content"'
        return answer

    async def _another_sha256_told(self, request: web.Request) -> web.StreamResponse:
        answer = await self._forward(request)
        answer.headers["x-amz-checksum-sha256"] = base64.b64encode(bytes(32)).decode()
        return answer

    async def _condition_ignored(self, request: web.Request) -> web.StreamResponse:
        return await self._forward(request, without="if-none-match")
