"""Control by Patroni's names: the same verbs, the same callers, a code and a line of text."""

from __future__ import annotations

import struct
from typing import Any

import aiohttp
import pytest
from http_harness import FakeService

from instance_manager.config import Configuration
from instance_manager.http.control_routes import VERBS


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        ("/switchover", {"leader": "demo-1"}, ("switchover", {})),
        ("/switchover", {"leader": "demo-1", "candidate": "demo-2"}, ("switchover", {"to": "demo-2"})),
        ("/failover", {"allow_data_loss": True}, ("failover", {"allow_data_loss": True})),
        ("/restart", {}, ("restart", {"name": "demo-1"})),
        ("/restart", None, ("restart", {"name": "demo-1"})),
        ("/reload", {}, ("reload", {})),
        ("/reinitialize", {}, ("reinit", {"name": "demo-1"})),
        ("/fence", {"name": "demo-2"}, ("fence", {"name": "demo-2"})),
        ("/unfence", {"name": "demo-2"}, ("unfence", {"name": "demo-2"})),
        ("/pause", {}, ("pause", {})),
        ("/resume", {}, ("resume", {})),
    ],
)
async def test_a_name_of_patroni_is_a_verb_of_ours(
    service: FakeService,
    control: aiohttp.ClientSession,
    path: str,
    body: dict[str, Any] | None,
    asked: tuple[str, dict[str, Any]],
) -> None:
    async with control.post(path, json=body) if body is not None else control.post(path) as response:
        assert (response.status, await response.text()) == (200, f"{asked[0]} ended")
    assert service.asked == [asked]


@pytest.mark.parametrize(
    ("path", "body", "code", "text"),
    [
        ("/switchover", {}, 400, "from a specific leader"),
        ("/switchover", {"leader": "demo-2"}, 412, "demo-1 is the primary"),
        ("/switchover", {"leader": "demo-1", "candidate": "demo-1"}, 400, "are the same"),
        ("/switchover", {"leader": "demo-1", "scheduled_at": "2030-01-01T00:00+00"}, 400, "does not take scheduled_at"),
        ("/failover", {"candidate": "demo-2"}, 412, "POST /switchover"),
        ("/failover", {}, 412, "may lose data"),
        ("/restart", {"role": "primary"}, 400, "does not take role"),
        ("/reload", [1], 400, "Expected `object`"),
        ("/fence", {"name": "broken"}, 503, "fence ended"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_reason(
    service: FakeService, control: aiohttp.ClientSession, path: str, body: Any, code: int, text: str
) -> None:
    async with control.post(path, json=body) as response:
        assert response.status == code
        assert text in await response.text()
    assert service.asked == ([("fence", {"name": "broken"})] if code == 503 else [])


@pytest.mark.parametrize("path", sorted(VERBS))
async def test_another_user_is_refused_by_every_name(
    service: FakeService, configuration: Configuration, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(struct, "unpack", lambda form, data: (1, 65534, 65534))
    connector = aiohttp.UnixConnector(str(configuration.control_socket))
    async with aiohttp.ClientSession(connector=connector) as session, session.post(f"http://c{path}") as response:
        assert response.status == 403
    assert service.asked == []


async def test_a_body_that_is_too_long_is_refused(service: FakeService, control: aiohttp.ClientSession) -> None:
    async with control.post("/switchover", data=b" " * 70_000) as response:
        assert response.status == 413
    assert service.asked == []


async def test_the_control_socket_describes_itself(control: aiohttp.ClientSession) -> None:
    async with control.get("/openapi.json") as response:
        told = await response.json()
    assert set(told["paths"]) == {"/control/{verb}", *VERBS, "/openapi.json"}
    assert all("security" in told["paths"][path]["post"] for path in VERBS)
