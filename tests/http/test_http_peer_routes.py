# ruff: noqa: ASYNC240
"""The peers' route: only with the token, bounded in size and time."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from http_harness import TOKEN, FakeService

from instance_manager.config import Configuration
from instance_manager.http import server, telling, token

KNOWN = {"Authorization": f"Bearer {TOKEN}"}


async def test_a_peer_with_the_token_is_answered(client: aiohttp.ClientSession) -> None:
    async with client.post("/peer/echo", data=b'{"a":1}', headers=KNOWN) as response:
        assert (response.status, await response.read()) == (200, b'{"a":1}')


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong-token-wrong-token"},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xe9"},
    ],
)
async def test_without_the_right_token_nothing_is_asked_of_the_instance(
    client: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    async with client.post("/peer/break", data=b"{}", headers=headers) as response:
        assert response.status == 401
        assert TOKEN not in await response.text()


async def test_a_peer_route_is_not_for_get(client: aiohttp.ClientSession) -> None:
    async with client.get("/peer/echo", headers=KNOWN) as response:
        assert response.status == 405


@pytest.mark.parametrize(("call", "code"), [("unheard-of", 404), ("refuse", 400), ("break", 500)])
async def test_each_error_of_a_call_has_its_status(client: aiohttp.ClientSession, call: str, code: int) -> None:
    async with client.post(f"/peer/{call}", data=b"{}", headers=KNOWN) as response:
        assert response.status == code
        assert (await response.json())["error"]


async def test_a_body_above_64_kib_is_refused(client: aiohttp.ClientSession) -> None:
    async with client.post("/peer/echo", data=b"x" * (64 * 1024 + 1), headers=KNOWN) as response:
        assert response.status == 413
    async with client.post("/peer/echo", data=b"x" * 64 * 1024, headers=KNOWN) as response:
        assert response.status == 200


@pytest.mark.parametrize("wait_s", ["0.2", None, "nan", "-1", "much"])
async def test_a_call_is_ended_when_nobody_waits_for_it_any_more(
    client: aiohttp.ClientSession, wait_s: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PEER_DEADLINE_DEFAULT_S", 0.1)
    headers = KNOWN if wait_s is None else {**KNOWN, "Deadline-Seconds": wait_s}
    async with client.post("/peer/hang", data=b"", headers=headers) as response:
        assert response.status == 504


async def test_a_peer_is_not_worked_for_longer_than_the_limit(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PEER_DEADLINE_MAX_S", 0.1)
    async with client.post("/peer/hang", data=b"", headers={**KNOWN, "Deadline-Seconds": "1e9"}) as response:
        assert response.status == 504


async def test_a_rotated_token_is_taken_up(
    client: aiohttp.ClientSession, configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token, "_READ_AGAIN_AFTER_S", 0.0)
    rotated = {"Authorization": "Bearer another-token-of-good-length"}
    Path(configuration.secrets.peer_token).write_text("short")
    async with client.post("/peer/echo", data=b"", headers=rotated) as response:
        assert response.status == 401
    async with client.post("/peer/echo", data=b"", headers=KNOWN) as response:
        assert response.status == 200
    Path(configuration.secrets.peer_token).write_text("another-token-of-good-length\n")
    async with client.post("/peer/echo", data=b"", headers=rotated) as response:
        assert response.status == 200
    async with client.post("/peer/echo", data=b"", headers=KNOWN) as response:
        assert response.status == 401


LISTENS = {"Accept": "application/jsonl"}


async def test_a_held_connection_is_ended_in_order_after_a_while_so_that_the_token_is_shown_again(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, service: FakeService
) -> None:
    monkeypatch.setattr(telling, "LASTS_S", 0.0)
    service.say.set()
    async with client.post("/peer/count", data=b"", headers={**KNOWN, **LISTENS}) as response:
        assert await response.read() == b"1\n2\n"


async def test_without_the_right_token_nothing_is_told(client: aiohttp.ClientSession, service: FakeService) -> None:
    for headers in (LISTENS, {**LISTENS, "Authorization": f"Bearer {TOKEN}x"}):
        async with client.post("/peer/count", data=b"", headers=headers) as response:
            assert response.status == 401
    assert service.listeners == 0


@pytest.fixture
def one_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be named before what starts the server."""
    monkeypatch.setattr(telling, "TOLD_MAX", 1)


async def test_no_more_than_so_many_are_told_at_once_and_calls_are_answered_beside_them(
    one_listener: None, client: aiohttp.ClientSession
) -> None:
    listens = {**KNOWN, **LISTENS}
    async with client.post("/peer/echo", data=b"one", headers=listens) as first:
        assert await first.content.readline() == b"one\n"
        async with client.post("/peer/echo", data=b"two", headers=listens) as second:
            assert second.status == 503
        async with client.post("/peer/echo", data=b"two", headers=KNOWN) as call:
            assert await call.read() == b"two"
