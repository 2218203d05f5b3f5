"""The simulated network: every fault that it promises really happens, and is counted."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator

import pytest
from simulated_listening import HTTP
from simulated_network import Network, SimulatedPeers
from simulated_time import Host, Process, World

from instance_manager.http.ports import MalformedCall, UnknownCall
from instance_manager.http.server import PEER_REQUESTS_MAX
from instance_manager.ports import PeerCaller, PeerRefused, PeerRejected, PeerSilent, PeerUnreachable

DEADLINE_S = 2.0


class Pair:
    """Two hosts with one process each; b answers what `answer` says."""

    def __init__(self, seed: int = 1) -> None:
        self.world = World(seed)
        self.network = Network(self.world, self.world.random)
        self.a, self.b = (Process(Host(self.world, name), name) for name in "ab")
        self.peers: PeerCaller = SimulatedPeers(self.network, self.a)
        self.outcomes: list[tuple[float, object]] = []
        self.served: list[str] = []

    def listen(self, answer: Callable[[str, bytes], Awaitable[bytes]] | None = None) -> None:
        self.network.listen(self.b.host, self.b, answer or self.echo)

    async def echo(self, call: str, body: bytes) -> bytes:
        assert asyncio.get_running_loop() is self.b.loop
        self.served.append(call)
        return body

    def call(self, call: str = "watch", body: bytes = b"{}", deadline_s: float = DEADLINE_S) -> asyncio.Task[None]:
        async def ask() -> None:
            began_s = self.world.now_s
            outcome: object
            try:
                outcome = await self.peers.call("b", call, body, deadline_s=deadline_s)
            except PeerUnreachable as error:
                outcome = error
            self.outcomes.append((self.world.now_s - began_s, outcome))

        return self.a.spawn(ask())

    def only(self) -> tuple[float, object]:
        assert len(self.outcomes) == 1
        return self.outcomes[0]

    @property
    def counters(self) -> dict[str, int]:
        return self.world.counters


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    pair.network.faults.slow = 0.0
    yield pair
    pair.world.close()


# Messages and streams.


def test_messages_overtake_one_another_and_streams_do_not(pair: Pair) -> None:
    messages: list[int] = []
    pieces: list[int] = []
    stream = pair.network.stream("a", "b", "replication")
    for number in range(100):
        pair.network.message("a", "b", HTTP, lambda number=number: messages.append(number))  # type: ignore[misc]
        stream.send(lambda number=number: pieces.append(number))  # type: ignore[misc]
    pair.world.run(1.0)
    assert sorted(messages) == pieces == list(range(100))
    assert messages != pieces


def test_a_message_takes_a_few_milliseconds_and_sometimes_much_longer(pair: Pair) -> None:
    arrivals: list[float] = []
    pair.network.faults.slow = 0.05
    for _ in range(1000):
        pair.network.message("a", "b", HTTP, lambda: arrivals.append(pair.world.now_s))
    pair.world.run(1.0)
    assert min(arrivals) < 0.0002
    assert 0.1 < max(arrivals) <= 0.3
    assert sum(arrival <= 0.002 for arrival in arrivals) > 900
    assert pair.counters["network: message much slower than usual"] > 20


def test_a_lost_message_is_told_to_who_asked(pair: Pair) -> None:
    pair.network.faults.loss = 0.3
    seen: list[str] = []
    for _ in range(100):
        pair.network.message("a", "b", HTTP, lambda: seen.append("came"), lost=lambda: seen.append("lost"))
    pair.world.run(1.0)
    assert len(seen) == 100
    assert seen.count("lost") == pair.counters["network: message lost"] > 10


def test_a_block_has_one_direction_and_one_channel(pair: Pair) -> None:
    pair.network.block("a", "b", HTTP)
    came: list[str] = []
    for source, target, channel in (("a", "b", HTTP), ("b", "a", HTTP), ("a", "b", "replication")):
        pair.network.message(source, target, channel, lambda text=f"{source}{target} {channel}": came.append(text))  # type: ignore[misc]
    pair.world.run(1.0)
    assert sorted(came) == ["ab replication", "ba http"]
    assert pair.counters["network: message into a partition"] == 1
    pair.network.unblock("a", "b", HTTP)
    pair.network.message("a", "b", HTTP, lambda: came.append("through"))
    pair.world.run(2.0)
    assert came[-1] == "through"


def test_a_slow_link_adds_to_every_latency_until_the_heal(pair: Pair) -> None:
    arrivals: list[float] = []
    pair.network.slow("a", "b", HTTP, 0.5)
    pair.network.message("a", "b", HTTP, lambda: arrivals.append(pair.world.now_s))
    pair.world.run(1.0)
    pair.network.heal()
    pair.network.message("a", "b", HTTP, lambda: arrivals.append(pair.world.now_s))
    pair.world.run(2.0)
    assert 0.5 < arrivals[0] < 0.503
    assert 1.0 < arrivals[1] < 1.003


def test_a_blocked_stream_delivers_in_order_after_the_heal(pair: Pair) -> None:
    came: list[tuple[int, float]] = []
    stream = pair.network.stream("a", "b", "replication")

    def send(number: int) -> None:
        stream.send(lambda: came.append((number, pair.world.now_s)))

    send(1)
    pair.world.call_later(1.0, pair.network.block, "a", "b", "replication")
    pair.world.call_later(2.0, send, 2)
    pair.world.call_later(3.0, send, 3)
    pair.world.call_later(4.0, pair.network.unblock, "a", "b", HTTP)
    pair.world.call_later(10.0, pair.network.heal)
    pair.world.call_later(10.1, send, 4)
    pair.world.run(20.0)
    assert [number for number, _ in came] == [1, 2, 3, 4]
    assert all(10.2 <= now_s <= 12.1 for _, now_s in came[1:])
    assert pair.counters["network: stream stalled by a partition"] == 1


def test_a_stream_to_a_machine_that_was_off_goes_on_when_it_is_back(pair: Pair) -> None:
    came: list[float] = []
    pair.network.power_off("b")
    pair.network.stream("a", "b", "replication").send(lambda: came.append(pair.world.now_s))
    pair.world.call_later(5.0, pair.network.power_on, "b")
    pair.world.run(10.0)
    assert len(came) == 1
    assert came[0] > 5.0


def test_a_loss_holds_up_a_stream_and_loses_nothing(pair: Pair) -> None:
    pair.network.faults.loss = 0.2
    came: list[int] = []
    stream = pair.network.stream("a", "b", "replication")
    for number in range(50):
        pair.world.call_later(0.01 * number, stream.send, lambda number=number: came.append(number))
    pair.world.run(0.2)
    assert len(came) < 19
    pair.world.run(10.0)
    assert came == list(range(50))
    assert pair.counters["network: piece of a stream retransmitted"] > 2


@pytest.mark.parametrize("blocked", [True, False])
def test_a_closed_stream_drops_what_is_in_flight(pair: Pair, blocked: bool) -> None:
    stream = pair.network.stream("a", "b", "replication")
    if blocked:
        pair.network.block("a", "b", "replication")
    stream.send(pytest.fail)
    if blocked:
        pair.world.run(1.0)
    stream.close()
    stream.send(pytest.fail)
    pair.network.heal()
    pair.world.run(10.0)


# Peer calls.


def test_a_call_is_served_in_the_target_and_answered(pair: Pair) -> None:
    pair.listen()
    pair.call(body=b"question")
    pair.world.run(1.0)
    took_s, outcome = pair.only()
    assert outcome == b"question"
    assert 0.0002 < took_s < 0.01


def test_nobody_listens_on_a_host_that_is_up(pair: Pair) -> None:
    pair.call()
    pair.world.run(1.0)
    took_s, outcome = pair.only()
    assert isinstance(outcome, PeerRefused)
    assert took_s < 0.01
    assert pair.counters["peers: connection refused"] == 1


@pytest.mark.parametrize("direction", [("a", "b"), ("b", "a")])
def test_a_blocked_way_there_or_back_is_silence_until_the_deadline_of_the_callers_clock(
    pair: Pair, direction: tuple[str, str]
) -> None:
    pair.a.host.rate = 2.0
    pair.listen()
    pair.network.block(*direction, HTTP)
    pair.call(deadline_s=2.0)
    pair.world.run(5.0)
    took_s, outcome = pair.only()
    assert isinstance(outcome, PeerSilent)
    assert took_s == pytest.approx(1.0, abs=0.001)
    assert pair.served == ([] if direction == ("a", "b") else ["watch"])
    assert pair.counters["peers: no answer in time"] == 1


def test_a_machine_that_is_off_does_not_even_refuse(pair: Pair) -> None:
    pair.listen()
    pair.network.power_off("b")
    pair.b.kill()
    pair.call()
    pair.world.run(5.0)
    assert isinstance(pair.only()[1], PeerSilent)
    pair.network.power_on("b")
    pair.call()
    pair.world.run(10.0)
    assert isinstance(pair.outcomes[1][1], PeerRefused)


def test_a_paused_target_answers_when_it_is_resumed(pair: Pair) -> None:
    pair.listen()
    pair.b.pause()
    pair.call()
    pair.call(deadline_s=0.5)
    pair.world.call_later(1.0, pair.b.resume)
    pair.world.run(5.0)
    assert isinstance(pair.outcomes[0][1], PeerSilent)
    took_s, outcome = pair.outcomes[1]
    assert outcome == b"{}"
    assert 1.0 < took_s < 1.01


def test_a_suspended_machine_refuses_nothing(pair: Pair) -> None:
    pair.b.host.suspend(3.0)
    pair.call()
    pair.world.run(10.0)
    assert isinstance(pair.only()[1], PeerSilent)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_target_that_dies_breaks_the_connection(pair: Pair, restarted: bool) -> None:
    """As the real client: it asks whether anybody listens now."""

    async def never(call: str, body: bytes) -> bytes:
        await asyncio.sleep(100.0)
        raise AssertionError

    def die() -> None:
        pair.b.kill()
        if restarted:
            pair.b = Process(pair.b.host, "b")
            pair.listen()

    pair.listen(never)
    pair.call()
    pair.world.call_later(1.0, die)
    pair.world.run(5.0)
    took_s, outcome = pair.only()
    assert isinstance(outcome, PeerSilent if restarted else PeerRefused)
    assert 1.0 < took_s < 1.01
    assert pair.counters["peers: connection broke"] == 1


def test_a_target_that_dies_paused_breaks_the_connection_too(pair: Pair) -> None:
    pair.listen()
    pair.b.pause()
    pair.call()
    pair.world.call_later(1.0, pair.b.kill)
    pair.world.run(5.0)
    assert isinstance(pair.only()[1], PeerRefused)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UnknownCall("vote"), 404, "vote"),
        (MalformedCall("no vote"), 400, "no vote"),
        (TimeoutError(), 504, "no answer within 2 s"),
        (KeyError("bug"), 500, "KeyError: 'bug'"),
    ],
)
def test_an_error_of_the_handler_is_a_rejection(pair: Pair, error: Exception, status: int, text: str) -> None:
    async def fail(call: str, body: bytes) -> bytes:
        raise error

    pair.listen(fail)
    pair.call()
    pair.world.run(1.0)
    outcome = pair.only()[1]
    assert isinstance(outcome, PeerRejected)
    assert (outcome.status, str(outcome)) == (status, f'rejected with {status}: {{"error":"{text}"}}\n')
    assert pair.counters[f"peers: rejected with {status}"] == 1


def test_a_handler_works_no_longer_than_its_caller_waits(pair: Pair) -> None:
    async def forever(call: str, body: bytes) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    pair.network.faults.cancelled_handler = 0.0
    pair.listen(forever)
    pair.call(deadline_s=1.0)
    pair.world.run(3.0)
    assert pair.b.loop.live_tasks() == []
    assert isinstance(pair.only()[1], PeerUnreachable)


def test_too_many_calls_at_once_are_rejected(pair: Pair) -> None:
    async def forever(call: str, body: bytes) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    pair.listen(forever)
    for _ in range(PEER_REQUESTS_MAX + 3):
        pair.call()
    pair.world.run(1.0)
    assert [outcome.status for _, outcome in pair.outcomes if isinstance(outcome, PeerRejected)] == [503, 503, 503]


def test_a_cancelled_caller_ends_the_handler_or_not(pair: Pair) -> None:
    ended: list[str] = []

    async def work(call: str, body: bytes) -> bytes:
        try:
            await asyncio.sleep(1.0)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        ended.append("to its end")
        return b""

    pair.listen(work)
    for _ in range(40):
        pair.world.call_later(0.5, pair.call().cancel)
    pair.world.run(3.0)
    assert pair.outcomes == []
    assert ended.count("cancelled") == pair.counters["peers: handler cancelled with its caller"] > 5
    assert ended.count("to its end") == pair.counters["peers: handler goes on without its caller"] > 5


def test_a_killed_caller_may_end_the_handler_as_well(pair: Pair) -> None:
    cancelled: list[float] = []

    async def work(call: str, body: bytes) -> bytes:
        try:
            await asyncio.sleep(1.0)
        except asyncio.CancelledError:
            cancelled.append(pair.world.now_s)
            raise
        return b""

    pair.network.faults.cancelled_handler = 1.0
    pair.listen(work)
    pair.call()
    pair.world.call_later(0.5, pair.a.kill)
    pair.world.run(3.0)
    assert len(cancelled) == 1
    assert pair.outcomes == []


def test_a_duplicated_request_runs_the_handler_twice_and_is_answered_once(pair: Pair) -> None:
    pair.network.faults.duplicated_request = 1.0
    pair.listen()
    pair.call()
    pair.world.run(1.0)
    assert pair.served == ["watch", "watch"]
    assert pair.only()[1] == b"{}"
    assert pair.counters["peers: request delivered twice"] == 1


def test_nothing_is_kept_of_calls_that_are_over(pair: Pair) -> None:
    bodies: list[weakref.ref[object]] = []

    class Body(bytearray):
        """Can be referred to weakly."""

    async def forever(call: str, body: bytes) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def ask() -> None:
        body = Body(b"{}")
        bodies.append(weakref.ref(body))
        with pytest.raises(PeerUnreachable):
            await pair.peers.call("b", "watch", body, deadline_s=0.5)  # type: ignore[arg-type]

    pair.listen(forever)
    tasks = [pair.a.spawn(ask()) for _ in range(50)]
    for task in tasks[:25]:
        pair.world.call_later(0.2, task.cancel)
    del task, tasks
    pair.world.call_later(0.2, pair.call)
    pair.world.call_later(0.3, pair.a.pause)
    pair.world.call_later(3.0, pair.a.resume)
    pair.world.run(10.0)
    assert pair.a.loop.live_tasks() == pair.b.loop.live_tasks() == []
    gc.collect()
    assert len(bodies) == 50
    assert [reference for reference in bodies if reference() is not None] == []
