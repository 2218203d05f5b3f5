"""The network of the simulation: datagrams, ordered streams, and the calls between agents on top of them.

Modelled: latency and reordering, loss, asymmetric partitions of each kind of traffic, slow links, duplicated requests,
refused and broken connections, machines that are off, answers that come after everybody has gone. Not modelled: bandwidth,
name resolution, authentication, and a connect timeout of its own: whoever meets silence meets it until the deadline.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn

from simulated_listening import HTTP, ConnectionBroken, HeldConnection, rejected
from simulated_time import Host, Process, Timer, World

from instance_manager.http.peers import CONNECT_TIMEOUT_S
from instance_manager.http.ports import MalformedCall, UnknownCall
from instance_manager.http.server import PEER_DEADLINE_MAX_S, PEER_REQUESTS_MAX
from instance_manager.ports import PeerRefused, PeerRejected, PeerSilent

Answer = Callable[[str, bytes], Awaitable[bytes]]
"""A process' `answer_peer(call, body)`."""
Tell = Callable[[str, bytes], AsyncGenerator[bytes, None]]
"""A process' `tell_peer(call, body)`."""

STORE = "store"
"""The name of the coordination store among the hosts, and of its channel."""


@dataclass(slots=True)
class NetworkFaults:
    """What may happen to every message; probabilities from 0 to 1."""

    latency_min_s: float = 0.0001
    latency_max_s: float = 0.002
    slow: float = 0.001
    """That a message takes up to `slow_max_s` instead."""
    slow_max_s: float = 0.3
    loss: float = 0.0
    """That a message never comes; of a stream, that it comes by retransmission."""
    retransmission_min_s: float = 0.2
    """Linux' lower bound of the retransmission timeout."""
    retransmission_max_s: float = 2.0
    duplicated_request: float = 0.0
    """That the handler of a peer call runs twice."""
    cancelled_handler: float = 0.5
    """That a handler is cancelled when its caller has gone. Ours goes on today; a proxy between may do otherwise."""
    broken_connection: float = 0.0
    """That a held connection breaks, for no reason that either end knows, when something is sent on it."""
    frozen_connection: float = 0.0
    """That nothing comes through a held connection from then on, and nobody is told: something between forgot it."""
    ended_connection: float = 0.0
    """That a held connection is ended in order, as its server does after a while."""


Link = tuple[str, str, str]
"""Source, target, channel."""


class Network:
    """Between hosts, by their names. Set `faults` and block links at any time."""

    def __init__(self, world: World, random: random.Random) -> None:
        self.world = world
        self.random = random
        self.faults = NetworkFaults()
        self.listeners: dict[str, Listener] = {}
        self.on_handler_error: Callable[[Process, str, Exception], None] = lambda process, call, error: None
        """A peer call failed with an error that is no answer: 500."""
        self._blocked: dict[Link, None] = {}
        self._slow: dict[Link, float] = {}
        self._off: dict[str, None] = {}
        self._stalled: list[Stream] = []

    # Faults of links and machines.

    def block(self, source: str, target: str, channel: str) -> None:
        """Nothing sent from now on comes through, in this direction; what is on its way still does."""
        self._blocked[source, target, channel] = None

    def unblock(self, source: str, target: str, channel: str) -> None:
        self._blocked.pop((source, target, channel), None)
        self._retransmit()

    def slow(self, source: str, target: str, channel: str, added_s: float) -> None:
        """Add to the latency of one direction; 0 takes it back."""
        self._slow[source, target, channel] = added_s

    def heal(self) -> None:
        """No blocked and no slow links any more; `faults` and machines that are off stay."""
        self._blocked.clear()
        self._slow.clear()
        self._retransmit()

    def power_off(self, host: str) -> None:
        """The machine answers nothing, not even by refusing; its processes are for the caller to kill, after this."""
        self._off[host] = None

    def power_on(self, host: str) -> None:
        self._off.pop(host, None)
        self._retransmit()

    def is_blocked(self, source: str, target: str, channel: str) -> bool:
        if self._blocked and (source, target, channel) in self._blocked:
            return True
        return bool(self._off) and (source in self._off or target in self._off)

    def _retransmit(self) -> None:
        stalled, self._stalled = self._stalled, []
        for stream in stalled:
            stream.retransmit()

    # Traffic.

    def latency_s(self, source: str, target: str, channel: str) -> float:
        """Drawn anew for each message."""
        faults = self.faults
        latency_s = self.random.uniform(faults.latency_min_s, faults.latency_max_s)
        if self.happens(faults.slow, "network: message much slower than usual"):
            latency_s = self.random.uniform(latency_s, faults.slow_max_s)
        if self._slow:
            latency_s += self._slow.get((source, target, channel), 0.0)
        return latency_s

    def retransmission_s(self) -> float:
        return self.random.uniform(self.faults.retransmission_min_s, self.faults.retransmission_max_s)

    def happens(self, probability: float, what: str) -> bool:
        """Draw, and count what happened."""
        if probability <= 0 or self.random.random() >= probability:
            return False
        self.world.counters[what] += 1
        return True

    def message(
        self,
        source: str,
        target: str,
        channel: str,
        deliver: Callable[[], object],
        *,
        lost: Callable[[], object] | None = None,
    ) -> None:
        """One datagram: `deliver` runs as the world after a latency, or `lost`, where given, when it cannot come any more."""
        latency_s = self.latency_s(source, target, channel)
        blocked = self.is_blocked(source, target, channel)
        if blocked:
            self.world.counters["network: message into a partition"] += 1
        if blocked or self.happens(self.faults.loss, "network: message lost"):
            if lost is not None:
                self.world.call_later(latency_s, lost)
            return
        self.world.call_later(latency_s, deliver)

    def stream(self, source: str, target: str, channel: str) -> Stream:
        return Stream(self, source, target, channel)

    def stall(self, stream: Stream) -> None:
        """Until something is unblocked."""
        self._stalled.append(stream)

    def forget(self, stream: Stream) -> None:
        if stream in self._stalled:
            self._stalled.remove(stream)

    def listen(self, host: Host, process: Process, answer: Answer, tell: Tell | None = None) -> Listener:
        """From now on `process` answers the peer calls to `host`, until it dies or closes the listener."""
        listener = Listener(self, host.name, process, answer, tell)
        self.listeners[host.name] = listener
        return listener

    def host(self, name: str) -> Host | None:
        return next((host for host in self.world.hosts if host.name == name), None)


class Stream:
    """One direction of a TCP connection: in order, each piece once, or not at all after `close`.

    A partition or a loss holds up all that comes after. It never breaks by itself: a timeout is the user's business.
    """

    __slots__ = ("_channel", "_in_flight", "_network", "_source", "_stalled", "_target", "_timer", "closed")

    def __init__(self, network: Network, source: str, target: str, channel: str) -> None:
        self._network = network
        self._source, self._target, self._channel = source, target, channel
        self._in_flight: deque[tuple[float, Callable[[], object]]] = deque()
        self._timer: Timer | None = None
        self._stalled = False
        self.closed = False

    def send(self, deliver: Callable[[], object]) -> None:
        """`deliver` runs as the world, after everything sent before it."""
        if self.closed:
            return
        network = self._network
        delay_s = network.latency_s(self._source, self._target, self._channel)
        if network.happens(network.faults.loss, "network: piece of a stream retransmitted"):
            delay_s += network.retransmission_s()
        self._in_flight.append((network.world.now_s + delay_s, deliver))
        if self._timer is None and not self._stalled:
            self._await_first()

    def close(self) -> None:
        """What is in flight never comes."""
        self.closed = True
        self._in_flight.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._stalled:
            self._network.forget(self)

    def retransmit(self) -> None:
        """Something was unblocked: the next retransmission finds out whether it was this way."""
        if not self.closed:
            self._timer = self._network.world.call_later(self._network.retransmission_s(), self._deliver_due)

    def _await_first(self) -> None:
        world = self._network.world
        self._timer = world.call_later(self._in_flight[0][0] - world.now_s, self._deliver_due)

    def _deliver_due(self) -> None:
        self._timer = None
        network = self._network
        if network.is_blocked(self._source, self._target, self._channel):
            if not self._stalled:
                network.world.counters["network: stream stalled by a partition"] += 1
            self._stalled = True
            network.stall(self)
            return
        self._stalled = False
        now_s = network.world.now_s
        while self._in_flight and self._in_flight[0][0] <= now_s:
            self._in_flight.popleft()[1]()
        if self._in_flight and self._timer is None:
            self._await_first()


class Listener:
    """A process that answers the peer calls to its host."""

    __slots__ = ("_held", "_network", "_open", "answer", "host", "process", "tell")

    def __init__(self, network: Network, host: str, process: Process, answer: Answer, tell: Tell | None) -> None:
        self._network = network
        self._open: dict[Exchange, None] = {}
        self._held: dict[HeldConnection, None] = {}
        self.host = host
        self.process = process
        self.answer = answer
        self.tell = tell
        process.on_exit.append(self._process_ended)

    def close(self) -> None:
        """Calls from now on are refused; those at work go on."""
        if self._network.listeners.get(self.host) is self:
            del self._network.listeners[self.host]

    @property
    def full(self) -> bool:
        return len(self._open) > PEER_REQUESTS_MAX

    def accept(self, exchange: Exchange) -> None:
        """The kernel takes the request, even of a process that stands still."""
        self._open[exchange] = None
        self.process.call_soon(exchange.begin_to_serve, self)

    def hold(self, connection: HeldConnection) -> None:
        """The kernel takes it, even of a process that stands still."""
        self._held[connection] = None
        self.process.call_soon(connection.begin_to_serve, self)

    def let_go(self, connection: HeldConnection) -> None:
        self._held.pop(connection, None)

    def finished(self, exchange: Exchange) -> None:
        self._open.pop(exchange, None)

    def _process_ended(self) -> None:
        self.close()
        broken: list[Exchange | HeldConnection] = [*self._open, *self._held]
        self._open, self._held = {}, {}
        for connection in broken:
            connection.answer_with(ConnectionBroken())


class Exchange:
    """One request and its answer."""

    __slots__ = ("_caller", "_handlers", "_network", "body", "call", "deadline_s", "outcome", "target")

    def __init__(
        self, network: Network, caller: Process, target: str, call: str, body: bytes, deadline_s: float
    ) -> None:
        self._network = network
        self._caller = caller
        self.target = target
        self.call = call
        self.body = body
        self.deadline_s = deadline_s
        self.outcome: asyncio.Future[bytes | Exception] = caller.loop.create_future()
        self._handlers: list[asyncio.Task[None]] = []

    def send(self) -> None:
        self._to_target(self._arrive)
        if self._network.happens(self._network.faults.duplicated_request, "peers: request delivered twice"):
            self._to_target(self._arrive)

    def answer_with(self, outcome: bytes | Exception) -> None:
        """Whatever the target's machine sends back."""
        self._network.message(self.target, self._caller.host.name, HTTP, lambda: self._finish(outcome))

    def begin_to_serve(self, listener: Listener) -> None:
        """In the target's process."""
        self._handlers.append(listener.process.loop.create_task(self._serve(listener), name=f"peer call {self.call}"))

    def abandon(self) -> None:
        """The caller has gone: a handler at work may notice."""
        if not self.outcome.done():
            self.outcome.cancel()
        if not any(not handler.done() for handler in self._handlers):
            return
        if self._network.happens(self._network.faults.cancelled_handler, "peers: handler cancelled with its caller"):
            self._to_target(self._cancel_handlers)
        else:
            self._network.world.counters["peers: handler goes on without its caller"] += 1

    def _to_target(self, deliver: Callable[[], object]) -> None:
        self._network.message(self._caller.host.name, self.target, HTTP, deliver)

    def _arrive(self) -> None:
        """At the target's machine."""
        network = self._network
        host = network.host(self.target)
        if host is not None and host.suspended:
            # Nobody is there to refuse: the sender tries again.
            network.world.call_later(network.retransmission_s(), self._arrive)
            return
        listener = network.listeners.get(self.target)
        if listener is None:
            self.answer_with(ConnectionRefusedError())
        else:
            listener.accept(self)

    def _cancel_handlers(self) -> None:
        for handler in self._handlers:
            handler.cancel()

    def _finish(self, outcome: bytes | Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    async def _serve(self, listener: Listener) -> None:
        try:
            outcome = await self._outcome_of(listener)
        finally:
            listener.finished(self)
        self.answer_with(outcome)

    async def _outcome_of(self, listener: Listener) -> bytes | Exception:
        """As the handler of peer calls in `http.server`."""
        if listener.full:
            return rejected(503, f"{PEER_REQUESTS_MAX} peer calls are at work already")
        deadline_s = min(self.deadline_s, PEER_DEADLINE_MAX_S)
        try:
            async with asyncio.timeout(deadline_s):
                return await listener.answer(self.call, self.body)
        except UnknownCall as error:
            return rejected(404, str(error) or f"no such call: {self.call}")
        except MalformedCall as error:
            return rejected(400, str(error))
        except TimeoutError:
            return rejected(504, f"no answer within {deadline_s:g} s")
        except Exception as error:
            self._network.world.counters["peers: handler failed"] += 1
            self._network.world.trace.add(listener.process.name, "peer call %s failed: %r", self.call, error)
            self._network.on_handler_error(listener.process, self.call, error)
            return rejected(500, f"{type(error).__name__}: {error}")


class SimulatedPeers:
    """`ports.PeerCaller` of one process; fails as `http.peers.PeerClient` does."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process
        self._open: dict[Exchange | HeldConnection, None] = {}
        process.on_exit.append(self._process_ended)

    async def call(self, name: str, call: str, body: bytes, *, deadline_s: float) -> bytes:
        """The answer of the agent on the host `name`; PeerRefused, PeerSilent or PeerRejected."""
        counters = self._network.world.counters
        try:
            async with asyncio.timeout(deadline_s):
                outcome = await self._exchange(name, call, body, deadline_s)
                if isinstance(outcome, ConnectionBroken):
                    counters["peers: connection broke"] += 1
                    await self._connection_broke(name)
        except TimeoutError as error:
            counters["peers: no answer in time"] += 1
            raise PeerSilent(f"{name}: no answer within {deadline_s:g} s") from error
        return self._good(name, outcome)

    def _good(self, name: str, outcome: bytes | Exception) -> bytes:
        counters = self._network.world.counters
        if isinstance(outcome, ConnectionRefusedError):
            counters["peers: connection refused"] += 1
            raise PeerRefused(f"{name}: refused the connection")
        if isinstance(outcome, PeerRejected):
            counters[f"peers: rejected with {outcome.status}"] += 1
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def listen(self, name: str, call: str, body: bytes, *, silence_s: float) -> AsyncGenerator[bytes, None]:
        """What the agent on the host `name` goes on telling; PeerRefused, PeerSilent or PeerRejected."""
        counters = self._network.world.counters
        connection = HeldConnection(self._network, self._process, name, call, body)
        self._open[connection] = None
        connection.open()
        try:
            while True:
                try:
                    async with asyncio.timeout(silence_s):
                        told = await connection.next()
                except TimeoutError as error:
                    counters["peers: held connection silent"] += 1
                    raise PeerSilent(f"{name}: nothing was told for {silence_s:g} s") from error
                if told is None:
                    return
                if isinstance(told, ConnectionBroken):
                    counters["peers: connection broke"] += 1
                    await self._connection_broke(name)
                yield self._good(name, told)
        finally:
            # Not of a process that has ended: its kernel has closed them all (`_process_ended`).
            if connection in self._open:
                del self._open[connection]
                connection.abandon()

    async def _exchange(self, name: str, call: str, body: bytes, deadline_s: float) -> bytes | Exception:
        exchange = Exchange(self._network, self._process, name, call, body, deadline_s)
        self._open[exchange] = None
        exchange.send()
        try:
            return await exchange.outcome
        finally:
            del self._open[exchange]
            exchange.abandon()

    async def _connection_broke(self, name: str) -> NoReturn:
        """A kept connection breaks when its agent dies: is anybody listening now? (As the real client asks.)"""
        outcome: asyncio.Future[bool] = self._process.loop.create_future()
        here = self._process.host.name

        def come_back(listening: bool) -> None:
            if not outcome.done():
                outcome.set_result(listening)

        def arrive() -> None:
            listening = name in self._network.listeners
            self._network.message(name, here, HTTP, lambda: come_back(listening))

        self._network.message(here, name, HTTP, arrive)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                listening = await outcome
        except TimeoutError:
            listening = True
        if not listening:
            raise PeerRefused(f"{name}: the connection broke, and a new one was refused")
        raise PeerSilent(f"{name}: the connection broke")

    def _process_ended(self) -> None:
        """The kernel closes the connections of the dead."""
        abandoned, self._open = self._open, {}
        for exchange in abandoned:
            exchange.abandon()
