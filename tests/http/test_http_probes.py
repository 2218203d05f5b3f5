"""Each read route, over real HTTP, from a snapshot."""

from __future__ import annotations

from dataclasses import replace

import aiohttp
import pytest
from http_harness import FakeService, now_s, primary_probes, standby_probes

from instance_manager.http.probes import MalformedSize, parse_size_bytes
from instance_manager.status import Probes

ROUTES = ["/livez", "/readyz", "/startupz", "/primary", "/replica", "/read-only", "/lag", "/status"]
STOPPED = replace(
    primary_probes(),
    role="stopped",
    started=False,
    ready=False,
    accepts_writes=False,
    accepts_reads=False,
    reasons=("Postgres is stopped: fenced",),
)


@pytest.mark.parametrize(
    ("snapshot", "codes"),
    [
        (primary_probes(), "200 200 200 200 503 200 200 200"),
        (standby_probes(), "200 200 200 503 200 200 200 200"),
        (STOPPED, "200 503 503 503 503 503 200 200"),
        (replace(primary_probes(), alive=False), "503 200 200 200 503 200 200 200"),
        (replace(primary_probes(), accepts_writes=False, ready=False), "200 503 200 503 503 200 200 200"),
        (replace(standby_probes(), ready=False), "200 503 200 503 503 200 200 200"),
        (replace(standby_probes(), role="cloning", accepts_reads=False), "200 200 200 503 503 503 200 200"),
    ],
    ids=["primary", "standby", "stopped", "hung agent", "primary closed", "standby not streaming", "cloning"],
)
async def test_each_route_answers_for_each_state_to_get_head_and_options(
    service: FakeService, client: aiohttp.ClientSession, snapshot: Probes, codes: str
) -> None:
    service.snapshot = replace(snapshot, taken_s=now_s())
    for route, code in zip(ROUTES, codes.split(), strict=True):
        for method in ("GET", "HEAD", "OPTIONS"):
            async with client.request(method, route) as response:
                text = await response.text()
                assert (route, method, response.status) == (route, method, int(code))
                assert (text != "") == (method == "GET")
                assert response.headers["Cache-Control"] == "no-store"


async def test_a_refusal_says_why(service: FakeService, client: aiohttp.ClientSession) -> None:
    service.snapshot = replace(STOPPED, taken_s=now_s())
    async with client.get("/readyz") as response:
        answer = await response.json()
    assert answer == {"ok": False, "role": "stopped", "timeline": 2, "reasons": ["Postgres is stopped: fenced"]}


async def test_an_old_snapshot_lets_nobody_in(service: FakeService, client: aiohttp.ClientSession) -> None:
    service.snapshot = replace(primary_probes(), taken_s=now_s() - 30)
    for route, code in [("/primary", 503), ("/read-only", 503), ("/readyz", 503), ("/livez", 200)]:
        async with client.get(route) as response:
            assert (route, response.status) == (route, code)
    async with client.get("/primary") as response:
        assert "30 s old" in await response.text()


@pytest.mark.parametrize(
    ("route", "code"),
    [
        ("/replica?lag=16MB", 200),
        ("/replica?lag=1MB", 503),
        ("/replica?lag=2000000", 200),
        ("/replica?lag=1999999", 503),
        ("/replica?lag=", 400),
        ("/replica?lag=16XB", 400),
        ("/replica?lag=-1", 400),
        ("/read-only?lag=1MB", 503),
        ("/read-only?lag=1GiB", 200),
        ("/lag?max=1MB", 503),
        ("/lag?max=16MB", 200),
        ("/lag?max=much", 400),
    ],
)
async def test_a_maximum_lag_is_held(
    service: FakeService, client: aiohttp.ClientSession, route: str, code: int
) -> None:
    service.snapshot = standby_probes()
    async with client.get(route) as response:
        assert response.status == code


async def test_a_standby_whose_lag_is_unknown_is_not_within_any(
    service: FakeService, client: aiohttp.ClientSession
) -> None:
    service.snapshot = replace(standby_probes(), lag_bytes=None, replay_lag_bytes=None)
    async with client.get("/replica?lag=1TB") as response:
        assert response.status == 503
        assert "not known" in await response.text()
    async with client.get("/replica") as response:
        assert response.status == 200


async def test_the_lag_is_told_in_bytes(service: FakeService, client: aiohttp.ClientSession) -> None:
    service.snapshot = standby_probes()
    async with client.get("/lag") as response:
        answer = await response.json()
    assert (answer["lag_bytes"], answer["replay_lag_bytes"]) == (1000, 2_000_000)


async def test_status_is_everything_as_json(client: aiohttp.ClientSession) -> None:
    async with client.get("/status") as response:
        answer = await response.json()
    assert answer["primary"] == "demo-1"
    assert answer["synchronous_standby_names"] == 'ANY 1 ("demo_2_01234567")'
    assert answer["instances"] == []


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("17", 17), ("16MB", 16 << 20), ("1GiB", 1 << 30), ("2kB", 2048), ("3 ", 3)]
)
def test_sizes_are_read_as_postgres_reads_them(text: str, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1.5MB", "1 MB MB", "1e3", "٣", "9" * 16, "16mb"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(MalformedSize, match="16MB"):
        parse_size_bytes(text)
