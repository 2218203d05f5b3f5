"""walsender.c: one process on the sending side.

It looks at SIGHUP at the top of its loop, before it reads replies; one that was amid its loop reads them once more by its
older list (P5). On a standby it sends on what that has received, and releases nobody.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from simulated_sessions import Child
from simulated_streaming import SIGNAL_S, Connection, StartRequest
from simulated_syncrep import parse_names
from simulated_wal import ENTRY_BYTES, LOG_BEGINS, History, entries_before, left_at, line_of, start_of

from instance_manager.core.types import Timeline

if TYPE_CHECKING:
    from simulated_server import PostgresServer

WAL_SENDER_TIMEOUT_S = 5.0
CHUNK_ENTRIES = 1000
CHUNK_PAUSE_S = 0.002
REST_OF_RECORD_S = (0.001, 0.05)


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
        if self._connection.standby_is_gone:
            self.end("the standby closed the connection")

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

    def stand_still(self, *, amid_loop: bool) -> None:
        """It is about to be stopped. Amid its loop it reads, once it goes on, all that came by the list that it has."""
        if amid_loop and not self._busy:
            self._busy = True
            self.child.on_resume.append(self._loop_ends)

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
            try:
                self._valid_upto = left_at(line_of(server.data.histories, server.timeline), self.timeline)
            except KeyError:
                self.end("the timeline is not in this server's history")
                return
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
