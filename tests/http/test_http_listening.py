"""How connections are taken: a probe's request that has come with its connection is answered before anything is made for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import cast

import pytest
from aiohttp import web
from http_harness import FakeService, now_s, primary_probes

from instance_manager.http import listening
from instance_manager.http.at_once import probes_at_once
from instance_manager.http.limits import LimitedRunner, Limits, limited_application
from instance_manager.http.listening import PlainListener

KUBELET = b"GET /readyz HTTP/1.1\r\nHost: 10.0.0.7:8008\r\nUser-Agent: kube-probe/1.34\r\nConnection: close\r\n\r\n"
OTHER = KUBELET.replace(b"/readyz", b"/other")
NOBODY = cast("web.AppRunner", None)
"""Whoever were asked to serve by it would fail."""


@dataclass
class Taking:
    socket: socket.socket
    limits: Limits

    @contextlib.asynccontextmanager
    async def listening(self, runner: web.AppRunner = NOBODY) -> AsyncIterator[PlainListener]:
        listener = PlainListener(runner, self.socket, self.limits)
        listener.start()
        try:
            yield listener
        finally:
            await listener.close()

    async def asked(self, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Whole in the queue of connections."""
        reader, writer = await asyncio.open_connection(*self.socket.getsockname())
        writer.write(request)
        return reader, writer


@pytest.fixture
def taking() -> Taking:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    service = FakeService(snapshot=replace(primary_probes(), taken_s=now_s()))
    return Taking(listener, Limits(at_once=probes_at_once(service), requests_per_s=0.001, burst=2))


@pytest.fixture
async def runner(taking: Taking) -> AsyncIterator[LimitedRunner]:
    async def other(_: web.Request) -> web.Response:
        return web.Response(text="by aiohttp")

    application = limited_application(taking.limits)
    application.router.add_get("/{any}", other)
    made = LimitedRunner(application, taking.limits)
    await made.setup()
    yield made
    await made.cleanup()


async def test_a_probe_that_came_with_its_connection_is_answered_and_ended_with_nothing_made_for_it(
    taking: Taking,
) -> None:
    reader, writer = await taking.asked(KUBELET)
    async with asyncio.timeout(5), taking.listening():
        # To the end: a reset instead would raise.
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b'"role":"primary","timeline":2}\n')
    writer.close()


@pytest.mark.parametrize("first", [OTHER, OTHER[:30], b""], ids=["whole", "begun", "nothing yet"])
async def test_anything_else_is_handed_over_as_it_came(taking: Taking, runner: LimitedRunner, first: bytes) -> None:
    reader, writer = await taking.asked(first)
    async with asyncio.timeout(5), taking.listening(runner):
        if first != OTHER:
            await _until_connected(taking.limits)
            writer.write(OTHER[len(first) :])
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"by aiohttp")
    writer.close()


async def test_who_keeps_the_connection_may_ask_anything_next(taking: Taking, runner: LimitedRunner) -> None:
    kept = KUBELET.replace(b"Connection: close\r\n", b"")
    reader, writer = await taking.asked(kept)
    async with asyncio.timeout(5), taking.listening(runner):
        assert b'"role":"primary"' in await reader.readuntil(b"}\n")
        assert taking.limits.connections == 1
        writer.write(kept.replace(b"/readyz", b"/other"))
        assert (await reader.readuntil(b"by aiohttp")).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def test_probes_are_counted_where_nothing_is_made_for_them(taking: Taking, runner: LimitedRunner) -> None:
    async with asyncio.timeout(5), taking.listening(runner):
        codes = []
        for _ in range(3):
            reader, writer = await taking.asked(KUBELET)
            codes.append((await reader.read())[9:12])
            writer.close()
    assert codes == [b"200", b"200", b"429"]


async def test_a_client_that_is_gone_already_harms_nobody(taking: Taking, runner: LimitedRunner) -> None:
    gone = socket.create_connection(taking.socket.getsockname())
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.send(KUBELET)
    gone.close()
    reader, writer = await taking.asked(KUBELET)
    async with asyncio.timeout(5), taking.listening(runner):
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def test_without_descriptors_a_connection_waits_in_the_queue(
    taking: Taking, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A listening socket of a process that may open no more."""

        refusals = 2

        def fileno(self) -> int:
            return taking.socket.fileno()

        def accept(self) -> tuple[socket.socket, object]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return taking.socket.accept()

    monkeypatch.setattr(listening, "ACCEPT_AGAIN_AFTER_S", 0.05)
    full = Full()
    listener = PlainListener(NOBODY, cast("socket.socket", full), taking.limits)
    reader, writer = await taking.asked(KUBELET)
    listener.start()
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    assert full.refusals == 0
    await listener.close()
    writer.close()


async def _until_connected(limits: Limits) -> None:
    while not limits.connections:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
