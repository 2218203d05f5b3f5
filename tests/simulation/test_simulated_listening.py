"""The simulation's held connections: every fault that they promise really happens, and fails as the real ones do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator

import pytest
from simulated_listening import HTTP
from simulated_network import Network, SimulatedPeers
from simulated_time import Host, Process, World

from instance_manager.http.ports import MalformedCall
from instance_manager.ports import PeerRefused, PeerRejected, PeerSilent, PeerUnreachable

Tell = Callable[[str, bytes], AsyncGenerator[bytes, None]]
SILENCE_S = 2.0


class Listening:
    """`a` listens to `b`, which tells a number each second."""

    def __init__(self) -> None:
        self.world = World(1)
        self.network = Network(self.world, self.world.random)
        self.a, self.b = (Process(Host(self.world, name), name) for name in "ab")
        self.peers = SimulatedPeers(self.network, self.a)
        self.heard: list[tuple[float, object]] = []
        """When, and what: pieces, then an error or None for the end in order."""
        self.telling = 0

    def serve(self, tell: Tell | None = None) -> None:
        self.network.listen(self.b.host, self.b, self.answer, tell or self.count)

    async def answer(self, call: str, body: bytes) -> bytes:
        return body

    async def count(self, call: str, body: bytes) -> AsyncGenerator[bytes, None]:
        self.telling += 1
        try:
            number = 0
            while True:
                yield str(number := number + 1).encode()
                await asyncio.sleep(1)
        finally:
            self.telling -= 1

    def listen(self) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                pieces = self.peers.listen("b", "watch", b"", silence_s=SILENCE_S)
                async with contextlib.aclosing(pieces):
                    async for piece in pieces:
                        self.heard.append((self.world.now_s, piece))
                self.heard.append((self.world.now_s, None))
            except PeerUnreachable as error:
                self.heard.append((self.world.now_s, error))

        return self.a.spawn(run())

    def words(self) -> list[object]:
        return [what for _, what in self.heard]


@pytest.fixture
def at() -> Iterator[Listening]:
    listening = Listening()
    yield listening
    listening.world.close()


def test_pieces_come_in_order_as_they_are_told(at: Listening) -> None:
    at.network.faults.slow = at.network.faults.loss = 0.3
    at.serve()
    at.listen()
    at.world.run(20.0)
    assert at.words()[:15] == [str(number).encode() for number in range(1, 16)]


def test_nobody_listens_there(at: Listening) -> None:
    at.listen()
    at.world.run(1.0)
    assert isinstance(at.heard[0][1], PeerRefused)
    assert at.heard[0][0] < 0.1


def test_the_end_of_the_other_process_is_heard_at_once(at: Listening) -> None:
    at.serve()
    at.listen()
    at.world.run(3.5)
    at.b.kill()
    at.world.run(4.0)
    assert isinstance(at.words()[-1], PeerRefused)
    assert at.heard[-1][0] < 3.6


@pytest.mark.parametrize("direction", [("a", "b"), ("b", "a")])
def test_a_partition_is_silence_where_it_keeps_pieces_back(at: Listening, direction: tuple[str, str]) -> None:
    at.serve()
    at.listen()
    at.world.run(3.5)
    at.network.block(*direction, HTTP)
    at.world.run(10.0)
    if direction == ("a", "b"):
        assert len(at.words()) >= 9, "only what is told has to come through"
    else:
        assert isinstance(at.words()[-1], PeerSilent)
        assert at.heard[-1][0] == pytest.approx(at.heard[-2][0] + SILENCE_S, abs=0.01)


def test_a_process_that_stands_still_tells_nothing(at: Listening) -> None:
    at.serve()
    at.listen()
    at.world.run(3.5)
    at.b.pause()
    at.world.run(10.0)
    assert isinstance(at.words()[-1], PeerSilent)


def test_a_forgotten_connection_is_silent_while_a_new_one_is_served(at: Listening) -> None:
    at.serve()
    at.network.faults.frozen_connection = 1.0
    at.listen()
    at.world.run(1.0)
    at.network.faults.frozen_connection = 0.0
    at.world.run(3.0)
    assert [type(what) for what in at.words()] == [PeerSilent]
    at.listen()
    at.world.run(5.0)
    assert at.words()[1] == b"1"


def test_a_broken_connection_is_silence_at_once_when_somebody_listens(at: Listening) -> None:
    at.serve()
    at.listen()
    at.world.run(0.5)
    at.network.faults.broken_connection = 1.0
    at.world.run(2.0)
    assert isinstance(at.words()[-1], PeerSilent)
    assert at.heard[-1][0] < 1.1
    assert at.world.counters["peers: held connection broken"] == 1


def test_an_end_in_order_is_no_error(at: Listening) -> None:
    at.network.faults.ended_connection = 1.0
    at.serve()
    at.listen()
    at.world.run(1.0)
    assert at.words() == [b"1", None]
    assert at.telling == 0


def test_who_will_not_tell_says_so(at: Listening) -> None:
    async def refuse(call: str, body: bytes) -> AsyncGenerator[bytes, None]:
        raise MalformedCall("no")
        yield b""

    at.serve(refuse)
    at.listen()
    at.world.run(1.0)
    error = at.words()[0]
    assert isinstance(error, PeerRejected)
    assert error.status == 400


def test_a_defect_of_who_tells_is_reported_and_breaks_the_connection(at: Listening) -> None:
    async def fail(call: str, body: bytes) -> AsyncGenerator[bytes, None]:
        yield b"1"
        raise ZeroDivisionError

    failed: list[Exception] = []
    at.network.on_handler_error = lambda process, call, error: failed.append(error)
    at.serve(fail)
    at.listen()
    at.world.run(1.0)
    assert isinstance(at.words()[-1], PeerSilent)
    assert [type(error) for error in failed] == [ZeroDivisionError]


def test_who_tells_notices_when_it_next_sends_that_the_other_has_left(at: Listening) -> None:
    at.serve()
    listener = at.listen()
    at.world.run(1.5)
    assert at.telling == 1
    listener.cancel()
    at.world.run(1.9)
    assert at.telling == 1
    at.world.run(2.5)
    assert at.telling == 0
