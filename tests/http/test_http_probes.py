"""Each read route, over real HTTP, from a snapshot."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import aiohttp
import pytest
from http_harness import FakeService, now_s, primary_probes, standby_probes

from instance_manager.config import Configuration
from instance_manager.http.at_once import probes_at_once
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


KUBELET = b"GET /readyz HTTP/1.1\r\nHost: 10.0.0.7:8008\r\nUser-Agent: kube-probe/1.34\r\nAccept: */*\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("snapshot", [primary_probes(), STOPPED], ids=["yes", "no"])
@pytest.mark.parametrize("path", [b"/readyz", b"/livez", b"/startupz"])
@pytest.mark.parametrize("connection", [b"Connection: close\r\n", b"Connection: keep-alive\r\n", b""])
async def test_what_is_answered_at_once_is_what_the_route_answers(
    service: FakeService, configuration: Configuration, snapshot: Probes, path: bytes, connection: bytes
) -> None:
    service.snapshot = replace(snapshot, taken_s=now_s())
    request = KUBELET.replace(b"/readyz", path).replace(b"Connection: close\r\n", connection)
    assert probes_at_once(service)(request) is not None
    longer = request.replace(b"Accept", b"X-Other: 1\r\nAccept")
    assert probes_at_once(service)(longer) is None
    answers = [await _whole_answer(configuration.me.http_port, sent) for sent in (request, longer)]
    at_once, by_route = (re.sub(rb"Date: [^\r]+ GMT\r\n", b"", answer, count=1) for answer in answers)
    assert at_once == by_route


async def test_what_a_kubelet_asks_is_answered_before_aiohttp_knows_of_it() -> None:
    answer = probes_at_once(FakeService(snapshot=replace(primary_probes(), taken_s=now_s())))(KUBELET)
    assert answer is not None
    assert answer.response.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "request_bytes",
    [
        KUBELET[:-1],
        KUBELET + b"x",
        KUBELET + KUBELET,
        KUBELET.replace(b"GET", b"POST"),
        KUBELET.replace(b"1.1", b"1.0"),
        KUBELET.replace(b"/readyz", b"/readyz?a=b"),
        KUBELET.replace(b"/readyz", b"/status"),
        KUBELET.replace(b"/readyz", b"//readyz"),
        KUBELET.replace(b"Host: 10.0.0.7:8008\r\n", b""),
        KUBELET.replace(b"Host:", b"Host: a\r\nHost:"),
        KUBELET.replace(b"Accept: */*", b"Content-Length: 5"),
        KUBELET.replace(b"Accept: */*", b"Transfer-Encoding: chunked"),
        KUBELET.replace(b"Accept: */*", b"Connection: keep-alive"),
        KUBELET.replace(b"close", b"upgrade"),
        KUBELET.replace(b"Accept: */*", b"Accept : */*"),
        KUBELET.replace(b"Accept: */*", b"Accept: a\r\n b"),
        KUBELET.replace(b"*/*", b"\x00"),
        KUBELET.replace(b"*/*", b"\n"),
        KUBELET.replace(b"*/*", b"*" * 1024),
        KUBELET.replace(b"\r\n", b"\n"),
    ],
)
async def test_a_request_of_any_other_form_is_left_to_aiohttp(request_bytes: bytes) -> None:
    assert request_bytes != KUBELET
    assert probes_at_once(FakeService())(request_bytes) is None


async def _whole_answer(port: int, request: bytes) -> bytes:
    """To the end of its body, which need not be the connection's."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(5):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            assert length is not None
            return head + await reader.readexactly(int(length[1]))
    finally:
        writer.close()
