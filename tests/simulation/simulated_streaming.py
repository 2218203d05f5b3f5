"""Streaming replication: the connection, walsender.c and walreceiver.c.

Everything is by position, nothing by content. What a walreceiver says first is its *replay* position, as written and
flushed (P4, P10). A walsender looks at SIGHUP at the top of its loop, before it reads replies; one that was amid its loop
reads them once more by its older list (P5).

Left out: bandwidth, TLS and passwords, `hot_standby_feedback`, logical replication, temporary slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from simulated_sessions import Child
from simulated_syncrep import parse_names
from simulated_volume import PostgresCluster, ReplicationStream
from simulated_wal import ENTRY_BYTES, LOG_BEGINS, Entry, History, entries_before, left_at, line_of, start_of

from instance_manager.core.types import Timeline, format_lsn

if TYPE_CHECKING:
    from simulated_server import PostgresServer

CHANNEL = "replication"
WAL_SENDER_TIMEOUT_S = 5.0
WAL_RECEIVER_TIMEOUT_S = 3.0
STATUS_INTERVAL_S = 1.0
PING_AFTER_S = 0.99
CONNECT_TIMEOUT_S = 3.0
CHUNK_ENTRIES = 1000
CHUNK_PAUSE_S = 0.002
REST_OF_RECORD_S = (0.001, 0.05)
SIGNAL_S = (0.0005, 0.01)


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

    __slots__ = ("_down", "_up", "receiver", "sender")

    def __init__(self, receiver: WalReceiver, up: ReplicationStream, down: ReplicationStream) -> None:
        self.receiver: WalReceiver | None = receiver
        self.sender: WalSender | None = None
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


class WalSender:
    """One walsender process of `server`."""

    __slots__ = (
        "_busy",
        "_connection",
        "_hup_pending",
        "_inbox",
        "_last_reply_s",
        "_pinged",
        "_sending",
        "_told_end",
        "_valid_upto",
        "child",
        "config",
        "flush",
        "name",
        "priority",
        "replay",
        "replies",
        "sent",
        "server",
        "slot",
        "started",
        "state",
        "timeline",
        "write",
    )

    def __init__(self, server: PostgresServer, connection: Connection, request: StartRequest) -> None:
        self.server = server
        self.child = Child(server.process, server.cluster.new_pid())
        self.started = f"{server.cluster.world.now_s:.6f} {self.child.pid}"
        self.name = request.name.lower()
        self.slot = request.slot or None
        self.timeline = request.timeline
        self.config = parse_names(server.loaded["synchronous_standby_names"])
        self.priority = self.config.priority_of(self.name)
        self.state = "startup"
        self.sent = 0
        self.write: int | None = None
        self.flush: int | None = None
        self.replay: int | None = None
        self.replies = 0
        self._connection = connection
        self._valid_upto: int | None = None
        """Where the server's history left the timeline that is sent; None: it is the server's own."""
        self._told_end = False
        self._sending = False
        self._hup_pending = False
        self._busy = False
        self._inbox: list[tuple[int, int, int, bool]] = []
        self._last_reply_s = server.host.monotonic_s()
        self._pinged = False

    # Starting.

    def start(self, request: StartRequest) -> None:
        """StartReplication, after the checks of libpqrcv_identify_system and WalRcvFetchTimeLineHistoryFiles."""
        server = self.server
        refusal, histories = self._check(request)
        if refusal is not None:
            server.cluster.count(f"replication refused: {refusal}")
            self._connection.to_receiver("refused", refusal)
            self.end(refusal)
            return
        if self.slot is not None:
            server.active_slots[self.slot] = self
        self.begin_at(request, histories)
        self.child.later(WAL_SENDER_TIMEOUT_S / 2, self._watch)

    def _check(self, request: StartRequest) -> tuple[str | None, dict[Timeline, History]]:
        server = self.server
        if server.data.system_identifier != request.system_identifier:
            return "another system identifier", {}
        if self.slot is not None and self.slot not in server.data.slots:
            return "the slot does not exist", {}
        if self.slot is not None and self.slot in server.active_slots:
            return "the slot is active", {}
        return self._check_timeline(request)

    def _check_timeline(self, request: StartRequest) -> tuple[str | None, dict[Timeline, History]]:
        server = self.server
        current = server.timeline
        if current < request.timeline:
            return "the primary's timeline is behind", {}
        histories: dict[Timeline, History] = {}
        for number in range(request.timeline, current + 1):
            timeline = Timeline(number)
            if timeline == 1 or timeline in request.histories:
                continue
            if timeline not in server.data.histories:
                return "a history file is missing", {}
            histories[timeline] = server.data.histories[timeline]
        if request.timeline != current:
            try:
                switch = left_at(line_of(server.data.histories, current), request.timeline)
            except KeyError:
                return "the timeline is not in this server's history", histories
            if switch is not None and switch < request.start:
                return "the timeline was left before the starting point", histories
            self._valid_upto = switch
        elif request.start > server.sendable_end():
            return "the starting point is ahead of the flush position", histories
        return None, histories

    def begin_at(self, request: StartRequest, histories: dict[Timeline, History]) -> None:
        self.timeline = request.timeline
        self.sent = request.start
        self.state = "catchup"
        self._connection.to_receiver("started", request, histories, self.server.timeline)
        self.send()

    def restart(self, request: StartRequest) -> None:
        """START_REPLICATION once more on the same connection, after the end of a timeline."""
        self._told_end = False
        self._valid_upto = None
        refusal, histories = self._check_timeline(request)
        if refusal is not None:
            self._connection.to_receiver("refused", refusal)
            self.end(refusal)
            return
        self.begin_at(request, histories)

    # The loop: SIGHUP first, then replies, then sending.

    def sighup(self) -> None:
        self._hup_pending = True
        cluster = self.server.cluster
        behaviour = cluster.behaviour
        if not self._busy and cluster.chance(behaviour.walsender_late, "walsender was amid its loop at SIGHUP"):
            self._busy = True
            self.child.later(cluster.draw(behaviour.walsender_late_s), self._loop_ends)
        else:
            self.child.later(cluster.draw(behaviour.look_s), self._turn)

    def _loop_ends(self) -> None:
        self._busy = False
        inbox, self._inbox = self._inbox, []
        for reply in inbox:
            self._process(reply)
        self.send()
        self._look()

    def _turn(self) -> None:
        if not self._busy and self.child.alive:
            self._look()
            self.send()

    def _look(self) -> None:
        """ProcessConfigFile and SyncRepInitConfig; the file is read as it is now."""
        if not self._hup_pending:
            return
        self._hup_pending = False
        self.config = parse_names(self.server.settings["synchronous_standby_names"])
        self.priority = self.config.priority_of(self.name)

    def reply_arrived(self, reply: tuple[int, int, int, bool]) -> None:
        self.child.run(self._read, reply)

    def _read(self, reply: tuple[int, int, int, bool]) -> None:
        if self._busy:
            self._inbox.append(reply)
            return
        self._look()
        self._process(reply)

    def _process(self, reply: tuple[int, int, int, bool]) -> None:
        """ProcessStandbyReplyMessage."""
        self.write, self.flush, self.replay, wants_reply = reply
        self.replies += 1
        self._last_reply_s = self.server.host.monotonic_s()
        self._pinged = False
        if wants_reply:
            self._connection.to_receiver("keepalive", False)
        if not self.server.in_recovery:
            self.server.syncrep.release_by(self, self.server.wanted_list())
        if self.state == "stopping":
            self.server.sender_drained()

    # Sending.

    def wake(self) -> None:
        if self._busy:
            return
        self.child.run(self._turn)

    def send(self) -> None:
        """XLogSendPhysical, until everything is sent."""
        if self.state == "startup" or self._told_end or self._sending or not self.child.alive:
            return
        server = self.server
        if self._valid_upto is None and self.timeline != server.timeline:
            # A cascading walsender finds that its server has been promoted.
            self._valid_upto = left_at(line_of(server.data.histories, server.timeline), self.timeline)
        end = server.sendable_end() if self._valid_upto is None else self._valid_upto
        if end > self.sent:
            self._send_upto(end)
        if self.sent < end:
            return
        if self.state == "catchup":
            self.state = "streaming"
        if self._valid_upto is not None:
            self._told_end = True
            self._connection.to_receiver("timeline_ended")

    def _send_upto(self, end: int) -> None:
        server = self.server
        first = entries_before(self.sent)
        stop = min(end, start_of(first + CHUNK_ENTRIES))
        rest_s = CHUNK_PAUSE_S
        behaviour = server.cluster.behaviour
        if (
            stop == end
            and self._valid_upto is None
            and server.cluster.chance(behaviour.torn_send, "half a record sent")
        ):
            stop -= server.cluster.world.random.randrange(1, ENTRY_BYTES)
            rest_s = server.cluster.draw(REST_OF_RECORD_S)
        if stop > self.sent:
            last = math.ceil((stop - LOG_BEGINS) / ENTRY_BYTES)
            self._connection.to_receiver("data", first, tuple(server.data.log.entries[first:last]), stop)
            self.sent = stop
        if stop < end:
            self._sending = True
            self.child.later(rest_s, self._send_rest)

    def _send_rest(self) -> None:
        self._sending = False
        self.wake()

    # The end.

    def _watch(self) -> None:
        """WalSndCheckTimeOut and WalSndKeepaliveIfNecessary."""
        silent_s = self.server.host.monotonic_s() - self._last_reply_s
        if silent_s >= WAL_SENDER_TIMEOUT_S:
            self.server.cluster.count("walsender ended by its timeout")
            self.end("timeout")
            return
        half_s = WAL_SENDER_TIMEOUT_S / 2
        if silent_s >= half_s and not self._pinged:
            self._pinged = True
            self._connection.to_receiver("keepalive", True)
        self.child.later((WAL_SENDER_TIMEOUT_S if silent_s >= half_s else half_s) - silent_s + 0.001, self._watch)

    def stop(self) -> None:
        """PROCSIG_WALSND_INIT_STOPPING."""
        self.state = "stopping"
        self.send()

    @property
    def drained(self) -> bool:
        """WalSndDone: everything is sent, and the standby has confirmed it."""
        return self._told_end or (
            self.sent >= self.server.sendable_end() and self.flush is not None and self.flush >= self.sent
        )

    def terminate(self) -> None:
        """SIGTERM: a busy one sees it at the top of its loop."""
        self.child.later(self.server.cluster.draw(SIGNAL_S), self._terminated)

    def _terminated(self) -> None:
        if self._busy:
            self.child.later(0.02, self._terminated)
        else:
            self.end("terminated")

    def end(self, reason: str) -> None:
        if not self.child.alive:
            return
        self.child.end()
        self.server.sender_ended(self)
        self._connection.sender_ended()


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
        connection.to_server(_restart_sender, connection, request)

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


def arrive(cluster: PostgresCluster, host: str, connection: Connection, request: StartRequest) -> None:
    """A connection request reaches the host: whatever server lives there takes it, or nobody."""
    server = cluster.servers.get(host)
    if server is None:
        connection.to_receiver("refused", "connection refused")
    else:
        server.postmaster.run(server.accept_replication, connection, request)


def _restart_sender(connection: Connection, request: StartRequest) -> None:
    sender = connection.sender
    if sender is not None:
        sender.child.run(sender.restart, request)


def describe(request: StartRequest) -> str:
    return f"{request.name} from {request.timeline}:{format_lsn(request.start)}"
