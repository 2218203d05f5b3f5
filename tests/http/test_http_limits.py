"""What clients that are slow, greedy or broken can cost: bounded, and never a crash, a leak or an error of ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import malformed_requests
import pytest
from aiohttp import web
from http_harness import TOKEN, FakeService, make_configuration

from instance_manager.http.at_once import probes_at_once
from instance_manager.http.limits import BODY_BYTES_MAX, LimitedRunner, Limits
from instance_manager.http.server import control_application, public_application
from instance_manager.http.token import PeerToken

REQUESTS = 10_000
WARM_UP = 3_000
GROWTH_BYTES_MAX = 8 * 1024 * 1024
"""After the warm-up: caches fill (0.3 MB for the last 2,500 of 20,000). One that were kept for each request takes 4 KiB at least: 28 MB."""
_STATUS = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Alone:
    """A server in a process of its own."""

    port: int
    pid: int
    errors: Path

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@pytest.fixture
def alone(directory: Path) -> Iterator[Alone]:
    errors = directory / "stderr"
    script = Path(__file__).parent / "served_alone.py"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    try:
        assert process.stdout is not None
        yield Alone(int(process.stdout.readline()), process.pid, errors)
    finally:
        process.communicate(timeout=20)


async def _send(port: int, sent: malformed_requests.Sent, codes: Counter[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in sent.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if sent.is_whole:
            answer = b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while data := await reader.read(65536):
                        answer += data
            codes.update(int(code) for code in _STATUS.findall(answer))
    except ConnectionError:
        codes[0] += 1
    finally:
        writer.transport.abort()


async def _send_many(port: int, chance: random.Random, count: int, codes: Counter[int]) -> None:
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await _send(port, malformed_requests.make(chance), codes)

    await asyncio.gather(*(work() for _ in range(40)))


async def test_ten_thousand_malformed_requests_cause_no_crash_no_leak_and_no_error_of_ours(alone: Alone) -> None:
    chance, codes = random.Random(20261128), Counter[int]()
    descriptors = alone.descriptors()
    await _send_many(alone.port, chance, WARM_UP, codes)
    before = alone.resident_bytes()
    await _send_many(alone.port, chance, REQUESTS - WARM_UP, codes)
    grown = alone.resident_bytes() - before

    assert not [code for code in codes if code >= 500 and code != 503], codes
    assert codes[400] > 500, codes
    assert codes[404] > 50, codes
    assert codes[200] > 500, codes
    assert grown < GROWTH_BYTES_MAX, f"{grown} bytes in {REQUESTS - WARM_UP} requests"
    async with asyncio.timeout(15):
        while alone.descriptors() > descriptors:  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.1)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{alone.port}") as session, session.get("/livez") as response:
        assert response.status == 200
    log = alone.errors.read_text(errors="replace")
    assert "Traceback" not in log
    assert len(log) < 100_000


@contextlib.asynccontextmanager
async def served(directory: Path, limits: Limits, *, control: bool = False) -> AsyncIterator[int]:
    configuration = make_configuration(directory)
    if control:
        application = control_application(FakeService(), limits)
    else:
        application = public_application(FakeService(), PeerToken(configuration.secrets.peer_token), limits)
    runner = LimitedRunner(application, limits, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def _closed_after(reader: asyncio.StreamReader, *, within_s: float) -> float:
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass
    return time.monotonic() - began


async def _none_left(limits: Limits) -> None:
    while limits.connections:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("control", [False, True], ids=["public", "control"])
@pytest.mark.parametrize("begin", [b"", b"GET /live"])
async def test_a_head_that_does_not_come_in_time_ends_the_connection(
    directory: Path, begin: bytes, control: bool
) -> None:
    async with served(directory, Limits(head_within_s=0.5), control=control) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        assert await _closed_after(reader, within_s=10) > 0.4
        writer.close()


async def test_a_head_that_drips_ends_the_connection_as_well(directory: Path) -> None:
    limits = Limits(head_within_s=0.7)
    async with served(directory, limits) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def drip() -> None:
            for byte in b"GET /livez HTTP/1.1\r\nHost: " + b"x" * 500:
                writer.write(bytes((byte,)))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert await _closed_after(reader, within_s=10) > 0.5
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        async with asyncio.timeout(5):
            await _none_left(limits)


async def test_a_second_head_on_a_kept_connection_is_held_to_its_time_too(directory: Path) -> None:
    async with served(directory, Limits(head_within_s=0.4, keepalive_s=0.4)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.write(b"GET /live")
        assert await _closed_after(reader, within_s=10) < 5
        writer.close()


async def test_who_lets_wait_makes_room_for_who_asks(directory: Path) -> None:
    """Idle connections never keep anybody out: the one that has waited longest goes first."""
    limits = Limits(connections_max=20)
    async with served(directory, limits) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session, session.get("/livez") as response:
            assert response.status == 200
        assert limits.connections <= 20
        assert await _closed_after(idle[0][0], within_s=5) < 1
        for _, writer in idle:
            writer.close()


async def test_connections_at_work_are_not_given_up_for_idle_ones(directory: Path) -> None:
    limits = Limits(connections_max=10)
    async with served(directory, limits) as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        headers = {"Authorization": f"Bearer {TOKEN}", "Deadline-Seconds": "2"}
        at_work = asyncio.create_task(session.post("/peer/hang", headers=headers).__aenter__())
        await asyncio.sleep(0.2)
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
        assert (await at_work).status == 504
        for _, writer in idle:
            writer.close()


async def test_more_requests_a_second_than_the_limit_are_refused_until_time_has_passed(directory: Path) -> None:
    limits = Limits(requests_per_s=5, burst=20, is_peer=lambda shown: shown == f"Bearer {TOKEN}")
    async with served(directory, limits) as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        codes = []
        for _ in range(40):
            async with session.get("/livez") as response:
                codes.append(response.status)
                if response.status == 429:
                    assert response.headers["Retry-After"] == "1"
        assert codes[:20] == [200] * 20
        assert codes.count(429) > 5
        # A flood from a shared address silences no peer: it is known by its token, and not by the path.
        async with session.post("/peer/echo", data=b"x", headers={"Authorization": f"Bearer {TOKEN}"}) as response:
            assert (response.status, await response.read()) == (200, b"x")
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}-guessed"}):
            counted = Counter[int]()
            for _ in range(20):
                async with session.post("/peer/echo", data=b"x", headers=headers) as response:
                    counted[response.status] += 1
            assert counted[429] > 5, counted
        async with asyncio.timeout(10):
            while True:
                async with session.get("/livez") as response:
                    if response.status == 200:
                        break
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("control", [False, True], ids=["public", "control"])
async def test_heads_and_bodies_have_a_size(directory: Path, control: bool) -> None:
    async with (
        served(directory, Limits(), control=control) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):
        async with session.get("/openapi.json", headers={"X": "y" * 5000}) as response:
            assert response.status == 400
        async with session.get("/openapi.json", headers={f"X-{number}": "y" for number in range(80)}) as response:
            assert response.status == 400
        async with session.get("/openapi.json?" + "y" * 5000) as response:
            assert response.status == 400
        if not control:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with session.post("/peer/echo", data=b"x" * (BODY_BYTES_MAX + 1), headers=headers) as response:
                assert response.status == 413


async def test_a_client_that_does_not_read_its_answer_is_let_go(directory: Path) -> None:
    limits = Limits(head_within_s=0.3, keepalive_s=0.3)
    async with served(directory, limits) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
        async with asyncio.timeout(10):
            await _none_left(limits)
        writer.transport.abort()


async def test_a_client_that_is_gone_before_it_is_told_to_go_on_costs_no_line_of_the_log(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = PeerToken(make_configuration(directory).secrets.peer_token)
    limits = Limits()
    runner = LimitedRunner(public_application(FakeService(), token, limits), limits, shutdown_timeout=0.1)
    await runner.setup()
    ours, theirs = socket.socketpair()
    with theirs:
        make: Any = runner.server
        transport, protocol = await asyncio.get_running_loop().connect_accepted_socket(make, ours)
        # Both before aiohttp comes to look at the request.
        protocol.data_received(b"POST /peer/echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n")
        transport.abort()
        async with asyncio.timeout(5):
            await _none_left(limits)
    await runner.cleanup()
    assert caplog.text == ""


async def test_no_answer_tells_what_serves(directory: Path) -> None:
    async with served(directory, Limits()) as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        for path in ("/livez", "/", "/nowhere"):
            async with session.get(path) as response:
                assert response.headers["Server"] == "instance-manager"


PROBE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
AT_ONCE = probes_at_once(FakeService())
"""The same limits hold for who is answered before aiohttp knows of it."""


async def _answer(reader: asyncio.StreamReader) -> int:
    status = int((await reader.readuntil(b"\r\n")).split()[1])
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    assert length is not None
    await reader.readexactly(int(length[1]))
    return status


async def test_probes_answered_at_once_are_counted(directory: Path) -> None:
    async with served(directory, Limits(requests_per_s=0.001, burst=20, at_once=AT_ONCE)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        codes = []
        for _ in range(22):
            writer.write(PROBE)
            codes.append(await _answer(reader))
        assert codes == [200] * 20 + [429] * 2
        writer.close()


async def test_a_connection_answered_at_once_is_held_to_its_silence(directory: Path) -> None:
    limits = Limits(keepalive_s=0.3, at_once=AT_ONCE)
    async with served(directory, limits) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PROBE)
        assert await _answer(reader) == 200
        assert await _closed_after(reader, within_s=10) > 0.2
        async with asyncio.timeout(5):
            await _none_left(limits)
        writer.close()


async def test_connections_answered_at_once_make_room_as_all_do(directory: Path) -> None:
    limits = Limits(connections_max=5, at_once=AT_ONCE)
    async with served(directory, limits) as port:
        held = []
        for _ in range(20):
            held.append(await asyncio.open_connection("127.0.0.1", port))
            held[-1][1].write(PROBE)
            assert await _answer(held[-1][0]) == 200
        assert limits.connections <= 5
        assert await _closed_after(held[0][0], within_s=5) < 1
        for _, writer in held:
            writer.close()


async def test_who_asks_at_once_and_takes_no_answer_is_let_go() -> None:
    limits = Limits(requests_per_s=1e6, burst=1e6, at_once=AT_ONCE)
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        guarded = limits.guarded(asyncio.Protocol)
        transport, protocol = await asyncio.get_running_loop().connect_accepted_socket(guarded, ours)
        assert isinstance(protocol, asyncio.Protocol)
        for _ in range(2000):
            if not transport.is_closing():
                protocol.data_received(PROBE)
        assert transport.is_closing()
        async with asyncio.timeout(5):
            await _none_left(limits)


async def test_the_end_of_a_server_ends_connections_answered_at_once(directory: Path) -> None:
    async with served(directory, Limits(at_once=AT_ONCE)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PROBE)
        assert await _answer(reader) == 200
    assert await _closed_after(reader, within_s=5) < 1
    writer.close()


async def test_a_connection_answered_at_once_may_ask_anything_next(directory: Path) -> None:
    async with served(directory, Limits(at_once=AT_ONCE)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request, code in [(PROBE, 200), (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404), (PROBE, 200)]:
            writer.write(request)
            assert await _answer(reader) == code
        writer.close()
