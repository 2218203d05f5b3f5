"""A held connection of the simulation, on which one agent goes on telling another: what `http.telling` and `http.peers` are.

Modelled: pieces in order, late, held up by a partition, retransmitted; a connection that breaks, or that something between
has forgotten, so that nothing comes and nobody is told; one that is ended in order; either end's process that dies, stands
still or comes back. The side that tells notices that the other has left when it next sends, as over a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING

from simulated_time import Process

from instance_manager.codec import to_json
from instance_manager.http.peers import ERROR_TEXT_MAX
from instance_manager.http.ports import MalformedCall, UnknownCall
from instance_manager.ports import PeerRejected

if TYPE_CHECKING:
    from simulated_network import Listener, Network, Stream

HTTP = "http"
Told = bytes | Exception | None
"""A piece; how the connection failed; or its end, in order."""


class ConnectionBroken(Exception):
    """The other side's process has ended, or the network broke the connection."""


def rejected(status: int, text: str) -> PeerRejected:
    body = to_json({"error": text}) + b"\n"
    return PeerRejected(status, body[:ERROR_TEXT_MAX].decode("utf-8", "replace"))


class HeldConnection:
    """One question and all that is told to it."""

    __slots__ = (
        "_arrived",
        "_back",
        "_caller",
        "_frozen",
        "_left",
        "_network",
        "_there",
        "_told",
        "body",
        "call",
        "target",
    )

    def __init__(self, network: Network, caller: Process, target: str, call: str, body: bytes) -> None:
        self._network = network
        self._caller = caller
        self.target = target
        self.call = call
        self.body = body
        self._there: Stream = network.stream(caller.host.name, target, HTTP)
        self._back: Stream = network.stream(target, caller.host.name, HTTP)
        self._told: deque[Told] = deque()
        self._arrived = asyncio.Event()
        self._left = False
        """As the target's machine knows it."""
        self._frozen = False

    # The caller's side.

    def open(self) -> None:
        self._network.message(self._caller.host.name, self.target, HTTP, self._arrive)

    async def next(self) -> Told:
        """The next that came; the caller owns the deadline."""
        while not self._told:
            self._arrived.clear()
            await self._arrived.wait()
        return self._told.popleft()

    def abandon(self) -> None:
        """The caller has gone, and its kernel says so."""
        self._back.close()
        self._there.send(self._note_left)

    def _take(self, told: Told) -> None:
        self._told.append(told)
        self._arrived.set()

    # The target's side.

    def answer_with(self, outcome: Told) -> None:
        """Whatever the target's machine sends back, past what is on its way."""
        self._network.message(self.target, self._caller.host.name, HTTP, lambda: self._take(outcome))

    def _arrive(self) -> None:
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
            listener.hold(self)

    def _note_left(self) -> None:
        self._left = True

    def begin_to_serve(self, listener: Listener) -> None:
        """In the target's process."""
        listener.process.loop.create_task(self._serve(listener), name=f"telling {self.call}")

    async def _serve(self, listener: Listener) -> None:
        network = self._network
        try:
            if listener.tell is None:
                raise UnknownCall(self.call)
            async with contextlib.aclosing(listener.tell(self.call, self.body)) as pieces:
                async for piece in pieces:
                    if self._left or not self._send(piece):
                        return
        except UnknownCall as error:
            self.answer_with(rejected(404, str(error) or f"no such call: {self.call}"))
        except MalformedCall as error:
            self.answer_with(rejected(400, str(error)))
        except Exception as error:
            network.world.counters["peers: handler failed"] += 1
            network.world.trace.add(listener.process.name, "peer call %s failed: %r", self.call, error)
            network.on_handler_error(listener.process, self.call, error)
            self.answer_with(ConnectionBroken())
        finally:
            listener.let_go(self)

    def _send(self, piece: bytes) -> bool:
        """False: nothing more can be sent."""
        network, faults = self._network, self._network.faults
        if network.happens(faults.broken_connection, "peers: held connection broken"):
            self.answer_with(ConnectionBroken())
            return False
        if self._frozen or network.happens(faults.frozen_connection, "peers: held connection forgotten"):
            self._frozen = True
            return True
        self._back.send(lambda: self._take(piece))
        if network.happens(faults.ended_connection, "peers: held connection ended in order"):
            self._back.send(lambda: self._take(None))
            return False
        return True
