"""Streaming replication: what is between a walreceiver and a walsender.

Everything is by position, nothing by content: so a standby follows across a collision of timelines (P4).

Left out: bandwidth, TLS and passwords, `hot_standby_feedback`, logical replication, temporary slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from simulated_volume import PostgresCluster, ReplicationStream

from instance_manager.core.types import Timeline

if TYPE_CHECKING:
    from simulated_walreceiver import WalReceiver
    from simulated_walsender import WalSender

CHANNEL = "replication"
SIGNAL_S = (0.0005, 0.01)
"""From SIGTERM to a process' looking at it."""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """START_REPLICATION, and what IDENTIFY_SYSTEM and TIMELINE_HISTORY would have asked before it."""

    system_identifier: int
    timeline: Timeline
    start: int
    slot: str
    name: str
    histories: frozenset[Timeline]
    """Those that the standby has already."""


class Connection:
    """Both directions of one TCP connection, and who is at its ends. Each end learns by itself that the other is gone."""

    __slots__ = ("_down", "_up", "receiver", "sender", "standby_is_gone")

    def __init__(self, receiver: WalReceiver, up: ReplicationStream, down: ReplicationStream) -> None:
        self.receiver: WalReceiver | None = receiver
        self.sender: WalSender | None = None
        self.standby_is_gone = False
        """The primary's machine has been told; a postmaster that stood still finds it so when it accepts."""
        self._up = up
        self._down = down

    def to_server(self, callback: Callable[..., object], *args: Any) -> None:
        self._up.send(partial(callback, *args))

    def to_sender(self, *reply: Any) -> None:
        self._up.send(partial(self._arrive_at_sender, reply))

    def to_receiver(self, name: str, *args: Any) -> None:
        self._down.send(partial(self._arrive_at_receiver, name, args))

    def _arrive_at_sender(self, reply: tuple[int, int, int, bool]) -> None:
        if self.sender is not None:
            self.sender.reply_arrived(reply)

    def _arrive_at_receiver(self, name: str, args: tuple[Any, ...]) -> None:
        receiver = self.receiver
        if receiver is not None:
            receiver.child.run(getattr(receiver, name), *args)

    def receiver_ended(self) -> None:
        """The kernel of its machine closes the connection; what was sent before still arrives before that."""
        self.receiver = None
        self._up.send(self._sender_learns)

    def sender_ended(self) -> None:
        self.sender = None
        self._down.send(self._receiver_learns)

    def _sender_learns(self) -> None:
        self.standby_is_gone = True
        if self.sender is not None:
            self.sender.child.run(self.sender.end, "the standby closed the connection")
        self.close_if_over()

    def _receiver_learns(self) -> None:
        if self.receiver is not None:
            self.receiver.child.run(self.receiver.end, "the primary closed the connection")
        self.close_if_over()

    def close_if_over(self) -> None:
        if self.sender is None and self.receiver is None:
            self._up.close()
            self._down.close()


def arrive(cluster: PostgresCluster, host: str, connection: Connection, request: StartRequest) -> None:
    """A connection request reaches the host: whatever server lives there takes it, or nobody."""
    server = cluster.servers.get(host)
    if server is None or not server.postmaster.alive:
        connection.to_receiver("refused", "connection refused")
    else:
        server.postmaster.run(server.accept_replication, connection, request)


def restart_sender(connection: Connection, request: StartRequest) -> None:
    sender = connection.sender
    if sender is not None:
        sender.child.run(sender.restart, request)
