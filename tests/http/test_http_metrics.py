"""`/metrics` over HTTP: open to readers, and bounded."""

from __future__ import annotations

import asyncio

import aiohttp
from http_harness import FakeService

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
