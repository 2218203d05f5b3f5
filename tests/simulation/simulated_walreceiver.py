"""walreceiver.c: one process on the receiving side.

What it says first is its *replay* position, as written and flushed (P4, P10). Ended by SIGTERM it flushes what it has
written, and says nothing more (P2).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from simulated_sessions import Child
from simulated_streaming import CHANNEL, SIGNAL_S, Connection, StartRequest, arrive, restart_sender
from simulated_wal import Entry, History, entries_before

from instance_manager.core.types import Timeline

if TYPE_CHECKING:
    from simulated_server import PostgresServer

WAL_RECEIVER_TIMEOUT_S = 3.0
STATUS_INTERVAL_S = 1.0
PING_AFTER_S = 0.99
CONNECT_TIMEOUT_S = 3.0


class WalReceiver:
    """One walreceiver process of `server`, from its fork on."""

    __slots__ = (
        "_connection",
        "_first",
        "_flush",
        "_flushing",
        "_last_status_s",
        "_terminating",
        "child",
        "host",
        "last_message_s",
        "messages",
        "name",
        "received_timeline",
        "server",
        "slot",
        "status",
        "titled_at_s",
    )

    def __init__(self, server: PostgresServer, host: str, name: str, slot: str) -> None:
        self.server = server
        self.child = Child(server.process, server.cluster.new_pid())
        self.host = host
        self.name = name
        self.slot = slot
        self.status = "starting"
        self.received_timeline: Timeline | None = None
        self.last_message_s = float("-inf")
        self.messages = 0
        self.titled_at_s = server.cluster.world.now_s + server.cluster.draw(server.cluster.behaviour.fork_s)
        """Until then /proc shows the postmaster's command line."""
        self._connection: Connection | None = None
        self._first = True
        self._flushing = False
        self._flush = 0
        self._last_status_s = 0.0
        self._terminating = False

    def connect(self, request: StartRequest) -> None:
        cluster = self.server.cluster
        own, network = self.server.host.name, cluster.network
        self._connection = Connection(
            self, network.stream(own, self.host, CHANNEL), network.stream(self.host, own, CHANNEL)
        )
        self._connection.to_server(arrive, cluster, self.host, self._connection, request)
        self.child.later(CONNECT_TIMEOUT_S, self._connected_or_end)

    def _connected_or_end(self) -> None:
        if self.status == "starting":
            self.end("connect timeout")

    # Messages of the walsender.

    def refused(self, reason: str) -> None:
        self.end(reason)

    def started(self, request: StartRequest, histories: dict[Timeline, History], _: Timeline) -> None:
        self._heard()
        server = self.server
        server.data.histories.update(histories)
        if self.status == "starting":
            self._last_status_s = server.host.monotonic_s()
            self.child.later(STATUS_INTERVAL_S, self._tick)
        self.status = "streaming"
        self.received_timeline = request.timeline
        if server.in_recovery:
            server.timeline = request.timeline
        self._first = True

    def data(self, first: int, entries: tuple[Entry, ...], end: int) -> None:
        """XLogWalRcvProcessMsg: write, and flush what was written."""
        self._heard()
        server = self.server
        if self._first:
            self._first = False
            # LogstreamResult begins at GetXLogReplayRecPtr.
            self._flush = server.startup.advance()
            if entries_before(end) < entries_before(self._flush):
                server.cluster.count("first reply claims more than was sent")
            self._reply(wants_reply=False)
        if server.volume.full:
            server.cluster.count("PANIC: no space left for received WAL")
            server.crash("walreceiver: no space left on device")
            return
        log = server.data.log
        before = log.end
        log.receive(first, entries, end)
        if log.end > before and not self._flushing:
            self._start_flush()
        elif log.end == before:
            # All of it was there already.
            server.receive_lsn = max(server.receive_lsn or 0, min(end, log.flushed))
            if self._flush < end <= log.flushed:
                self._flush = end
                self._reply(wants_reply=False)

    def keepalive(self, wants_reply: bool) -> None:
        self._heard()
        if wants_reply:
            self._reply(wants_reply=False)

    def timeline_ended(self) -> None:
        """It waits for what the startup process asks next."""
        self._heard()
        self.status = "waiting"
        self.server.startup.timeline_ended()

    def restart(self, request: StartRequest) -> None:
        """WALRCV_RESTARTING: the same process, the same connection."""
        self.status = "restarting"
        connection = self._connection
        assert connection is not None
        connection.to_server(restart_sender, connection, request)

    def _heard(self) -> None:
        self.last_message_s = self.server.host.monotonic_s()
        self.messages += 1

    # Flushing and replying.

    def _start_flush(self) -> None:
        self._flushing = True
        server = self.server
        server.volume.flush(server.process, partial(self.child.run, self._flushed, server.data.log.written))

    def _flushed(self, written: int) -> None:
        self._flushing = False
        server = self.server
        log = server.data.log
        # The end may have been cut meanwhile: half a record, replaced by the whole one.
        log.flushed = max(log.flushed, min(written, log.end))
        self._flush = max(self._flush, log.flushed)
        server.received(log.flushed)
        self._reply(wants_reply=False)
        if self._terminating:
            self._flush_and_end()
        elif log.written > log.flushed:
            self._start_flush()

    def _reply(self, *, wants_reply: bool) -> None:
        if self._connection is not None:
            server = self.server
            self._last_status_s = server.host.monotonic_s()
            self._connection.to_sender(server.data.log.written, self._flush, server.startup.replayed, wants_reply)

    def _tick(self) -> None:
        """The status once a second, a ping when the primary is silent, and the end when it stays so."""
        now_s = self.server.host.monotonic_s()
        silent_s = now_s - self.last_message_s
        if silent_s >= WAL_RECEIVER_TIMEOUT_S:
            self.server.cluster.count("walreceiver ended by its timeout")
            self.end("timeout")
            return
        if not self._first:
            self.server.startup.advance()
            self._reply(wants_reply=silent_s >= PING_AFTER_S)
        elif silent_s >= PING_AFTER_S:
            # Nothing came yet, and so nothing is known to be flushed by this process.
            self._flush = self.server.startup.advance()
            self._reply(wants_reply=True)
        self.child.later(min(STATUS_INTERVAL_S, WAL_RECEIVER_TIMEOUT_S - silent_s + 0.001), self._tick)

    # The end.

    def terminate(self) -> None:
        """SIGTERM. A flush under way ends and is replied to; what was written is flushed, and nothing more is said."""
        self.child.later(self.server.cluster.draw(SIGNAL_S), self._terminated)

    def _terminated(self) -> None:
        if self._terminating:
            return
        self._terminating = True
        if not self._flushing:
            self._flush_and_end()

    def _flush_and_end(self) -> None:
        server = self.server
        if server.data.log.written > server.data.log.flushed:
            server.volume.flush(server.process, partial(self.child.run, self._last_flush))
        else:
            self.end("terminated")

    def _last_flush(self) -> None:
        log = self.server.data.log
        log.flushed = log.written
        self.server.received(log.flushed)
        self.end("terminated")

    def end(self, reason: str) -> None:
        if not self.child.alive:
            return
        self.child.end()
        if self._connection is not None:
            self._connection.receiver_ended()
        self.server.receiver_ended(self, reason)
