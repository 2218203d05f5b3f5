"""`/metrics` over HTTP: open to readers, and bounded."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest
from http_harness import FakeService

from instance_manager.config import Configuration
from instance_manager.http import server
from instance_manager.http.server import SCRAPES_MAX


async def test_a_scrape_is_answered_in_the_text_format(client: aiohttp.ClientSession) -> None:
    async with client.get("/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert (await answer.text()).endswith("\nup 1\n")
    async with client.head("/metrics") as answer:
        assert answer.status == 200
    async with client.post("/metrics") as answer:
        assert answer.status == 405


async def test_more_scrapes_at_once_than_there_are_places_are_refused(
    client: aiohttp.ClientSession, service: FakeService
) -> None:
    service.scrapes_wait = asyncio.Event()
    waiting = [asyncio.create_task(client.get("/metrics")) for _ in range(SCRAPES_MAX + 3)]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert {task.result().status for task in done} == {503}
    service.scrapes_wait.set()
    statuses = [(await task).status for task in waiting]
    assert statuses.count(200) == SCRAPES_MAX
    assert statuses.count(503) == 3


async def test_who_does_not_read_its_scrape_holds_a_place_and_no_more(
    client: aiohttp.ClientSession,
    service: FakeService,
    configuration: Configuration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Megabytes for each of 512 connections that read nothing would be the memory of the pod."""
    monkeypatch.setattr(server, "SCRAPE_TAKEN_WITHIN_S", 1.0)
    service.scrape = b"up 1\n" * 2_000_000
    deaf = []
    for _ in range(SCRAPES_MAX):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", configuration.me.http_port))
        connection.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        deaf.append(connection)
    try:
        # Their answers have begun: they are at work.
        for connection in deaf:
            await asyncio.get_running_loop().sock_recv(connection, 1)
        async with client.get("/metrics") as answer:
            assert answer.status == 503
        async with asyncio.timeout(10):
            while (await client.head("/metrics")).status != 200:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.05)
    finally:
        for connection in deaf:
            connection.close()
