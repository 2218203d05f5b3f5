# ruff: noqa: ASYNC240
"""The peers' client against real sockets that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from http_harness import FakeService

from instance_manager.config import Configuration
from instance_manager.config_sections import MemberSection
from instance_manager.http.peers import PeerClient
from instance_manager.ports import PeerRefused, PeerRejected, PeerSilent

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def peer_that(behaviour: Behaviour, port: int) -> AsyncIterator[None]:
    tasks: set[asyncio.Task[None]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await behaviour(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(run, "127.0.0.1", port)
    try:
        yield
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def peers(configuration: Configuration) -> AsyncIterator[PeerClient]:
    async with PeerClient(configuration.members, configuration.secrets.peer_token) as client:
        yield client


async def test_a_peer_is_asked_and_answers_over_one_kept_connection(service: FakeService, peers: PeerClient) -> None:
    assert await peers.call("demo-1", "echo", b"one", deadline_s=2) == b"one"
    before = time.monotonic()
    for _ in range(20):
        assert await peers.call("demo-1", "echo", b"two", deadline_s=2) == b"two"
    assert time.monotonic() - before < 1
    assert peers._session is not None
    assert peers._session.connector is not None
    assert len(peers._session.connector._conns) == 1


async def test_where_nobody_listens_the_call_is_refused_at_once(peers: PeerClient) -> None:
    before = time.monotonic()
    with pytest.raises(PeerRefused):
        await peers.call("demo-2", "echo", b"", deadline_s=5)
    assert time.monotonic() - before < 0.5


async def test_a_peer_whose_agent_died_on_a_kept_connection_is_refused(
    peers: PeerClient, configuration: Configuration
) -> None:
    async def answer_and_die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.readuntil(b"\r\n\r\n")
        listening.close()
        await listening.wait_closed()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer_and_die(reader, writer)
        writer.transport.abort()

    listening = await asyncio.start_server(run, "127.0.0.1", configuration.members[1].http_port)
    assert await peers.call("demo-2", "echo", b"", deadline_s=2) == b"ok"
    with pytest.raises(PeerRefused, match="broke"):
        await peers.call("demo-2", "echo", b"", deadline_s=2)


async def test_a_peer_that_accepts_and_never_answers_is_silent(peers: PeerClient, configuration: Configuration) -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with peer_that(never, configuration.members[1].http_port):
        before = time.monotonic()
        with pytest.raises(PeerSilent):
            await peers.call("demo-2", "echo", b"", deadline_s=0.3)
        assert 0.25 < time.monotonic() - before < 0.6


async def test_a_frozen_peer_whose_kernel_still_accepts_is_silent(
    peers: PeerClient, configuration: Configuration
) -> None:
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", configuration.members[1].http_port))
        frozen.listen(1)
        for _ in range(4):  # then the backlog is full, and even the connection takes for ever
            with pytest.raises(PeerSilent):
                await peers.call("demo-2", "echo", b"", deadline_s=0.2)


async def test_a_peer_that_answers_a_byte_a_second_is_silent_by_the_deadline(
    peers: PeerClient, configuration: Configuration
) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)

    async with peer_that(drip, configuration.members[1].http_port):
        before = time.monotonic()
        with pytest.raises(PeerSilent):
            await peers.call("demo-2", "echo", b"", deadline_s=0.5)
        assert time.monotonic() - before < 0.8


@pytest.mark.parametrize("head", [b"Content-Length: 67108864", b"Connection: close"])
async def test_an_endless_answer_is_not_held_in_memory(
    peers: PeerClient, configuration: Configuration, head: bytes
) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
        for _ in range(64):
            writer.write(b"x" * 1024 * 1024)
            await writer.drain()
            sent += 1

    async with peer_that(flood, configuration.members[1].http_port):
        with pytest.raises(PeerRejected, match="longer than"):
            await peers.call("demo-2", "echo", b"", deadline_s=5)
        assert sent < 32


async def test_a_connection_that_breaks_is_silence_while_somebody_listens(
    peers: PeerClient, configuration: Configuration
) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with peer_that(hang_up, configuration.members[1].http_port):
        with pytest.raises(PeerSilent):
            await peers.call("demo-2", "echo", b"", deadline_s=2)


async def test_what_is_no_http_is_silence(peers: PeerClient, configuration: Configuration) -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp ready\r\n\r\n")
        await writer.drain()

    async with peer_that(nonsense, configuration.members[1].http_port):
        with pytest.raises(PeerSilent):
            await peers.call("demo-2", "echo", b"", deadline_s=2)


async def test_a_redirect_is_not_followed(peers: PeerClient, configuration: Configuration) -> None:
    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with peer_that(redirect, configuration.members[1].http_port):
        with pytest.raises(PeerRejected) as told:
            await peers.call("demo-2", "echo", b"", deadline_s=2)
        assert told.value.status == 307


@pytest.mark.parametrize(("call", "status"), [("unheard-of", 404), ("refuse", 400), ("break", 500)])
async def test_a_rejected_call_tells_status_and_reason(
    service: FakeService, peers: PeerClient, call: str, status: int
) -> None:
    with pytest.raises(PeerRejected) as told:
        await peers.call("demo-1", call, b"{}", deadline_s=2)
    assert told.value.status == status
    assert "error" in str(told.value)


async def test_a_wrong_token_is_rejected_and_read_again(service: FakeService, configuration: Configuration) -> None:
    path = Path(configuration.secrets.peer_token)
    right = path.read_text()
    path.write_text("wrong-wrong-wrong-wrong")
    async with PeerClient(configuration.members, path) as client:
        path.write_text(right)
        with pytest.raises(PeerRejected) as told:
            await client.call("demo-1", "echo", b"", deadline_s=2)
        assert told.value.status == 401
        assert await client.call("demo-1", "echo", b"x", deadline_s=2) == b"x"


async def test_an_unreachable_peer_is_silent(configuration: Configuration) -> None:
    nowhere = MemberSection(name="far", host="224.0.0.1", postgres_port=1, http_port=1)
    async with PeerClient([nowhere], configuration.secrets.peer_token) as client:
        with pytest.raises(PeerSilent):
            await client.call("far", "echo", b"", deadline_s=0.3)


async def test_a_cancelled_call_leaves_no_connection_that_could_mix_up_answers(
    service: FakeService, peers: PeerClient
) -> None:
    task = asyncio.create_task(peers.call("demo-1", "hang", b"", deadline_s=5))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await peers.call("demo-1", "echo", b"mine", deadline_s=2) == b"mine"


# A held connection, on which a peer goes on telling.


async def told(peers: PeerClient, name: str, call: str, body: bytes = b"", silence_s: float = 2) -> list[bytes]:
    return [line.rstrip(b"\n") async for line in peers.listen(name, call, body, silence_s=silence_s)]


async def test_a_listener_hears_each_piece_when_it_is_told_and_the_end_in_order(
    service: FakeService, peers: PeerClient
) -> None:
    async with contextlib.aclosing(peers.listen("demo-1", "count", b"", silence_s=5)) as pieces:
        assert await anext(pieces) == b"1\n"
        for expected in (b"2\n", b"3\n"):
            service.say.set()
            before = time.monotonic()
            assert await anext(pieces) == expected
            assert time.monotonic() - before < 1
        service.say.set()
        with pytest.raises(StopAsyncIteration):
            await anext(pieces)
    assert service.listeners == 0


async def test_who_is_told_nothing_calls_it_silence_after_its_own_time(service: FakeService, peers: PeerClient) -> None:
    before = time.monotonic()
    with pytest.raises(PeerSilent):
        await told(peers, "demo-1", "echo", b"one", silence_s=0.3)
    assert 0.3 <= time.monotonic() - before < 1.5


@pytest.mark.parametrize("held_s", [0.0, 0.5], ids=["soon", "after more than its silence"])
async def test_section_4_who_listens_to_a_peer_that_dies_hears_at_once_that_nobody_is_there(
    configuration: Configuration, peers: PeerClient, held_s: float
) -> None:
    async def begin_and_wait(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\none\n\r\n")
        await writer.drain()
        await asyncio.Event().wait()

    async with contextlib.AsyncExitStack() as dying:
        await dying.enter_async_context(peer_that(begin_and_wait, configuration.members[1].http_port))
        async with contextlib.aclosing(peers.listen("demo-2", "watch", b"", silence_s=0.3)) as pieces:
            assert await anext(pieces) == b"one\n"
            # What the listener does meanwhile is not the peer's silence.
            await asyncio.sleep(held_s)
            await dying.aclose()
            before = time.monotonic()
            with pytest.raises(PeerRefused):
                await anext(pieces)
            assert time.monotonic() - before < 1


async def test_an_answer_that_breaks_off_is_no_end_in_order(service: FakeService, peers: PeerClient) -> None:
    with pytest.raises(PeerSilent):
        await told(peers, "demo-1", "break")


@pytest.mark.parametrize(("call", "status"), [("refuse", 400), ("no_such_call", 404)])
async def test_a_peer_that_will_not_tell_says_so(
    service: FakeService, peers: PeerClient, call: str, status: int
) -> None:
    with pytest.raises(PeerRejected) as caught:
        await told(peers, "demo-1", call)
    assert caught.value.status == status


async def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    configuration: Configuration, peers: PeerClient
) -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()

    async with peer_that(endless, configuration.members[1].http_port):
        with pytest.raises(PeerSilent):
            await told(peers, "demo-2", "watch", silence_s=5)


async def test_a_peer_that_has_left_is_told_nothing_more(service: FakeService, peers: PeerClient) -> None:
    async with contextlib.aclosing(peers.listen("demo-1", "count", b"", silence_s=5)) as pieces:
        await anext(pieces)
        assert service.listeners == 1
    async with asyncio.timeout(5):
        while service.listeners:
            service.say.set()
            await asyncio.sleep(0.01)
