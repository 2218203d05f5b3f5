"""The clients of a simulated cluster: writers that look for the primary, sessions that stay where they are, readers.

What they do is recorded in the drill's own form, and judged by the drill's own checker; the times are true time. A client
knows only what comes to it over the network: a commit whose answer is lost is of unknown outcome.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec
from simulated_server import PostgresServer
from simulated_sessions import Session
from simulated_syncrep import Commit
from simulated_wal import Entry

from instance_manager.core.types import Timeline
from instance_manager.drill.checker import Asynchronous, describe, judge
from instance_manager.drill.history import Outcome, Read, Row, Seen, Write, whole_read

if TYPE_CHECKING:
    from simulated_cluster import SimulatedCluster

HOST = "clients"
CHANNEL = "clients"
PATIENCE_S = 4.0
"""A writer gives up an answer after this time and looks for the primary anew; the sticky one waits longer."""
STICKY_PATIENCE_S = 40.0
READ_EVERY_S = (0.6, 4.0)
LOCAL_SHARE = 0.1
LOCAL_CLIENT = 90
"""Its session has `synchronous_commit = local`: nothing is promised about its rows, and nothing is judged."""
READ_PATIENCE_S = 2.0
JUDGE_WITHIN_S = 30.0

_OUTCOMES = {
    "acknowledged": Outcome.ACKNOWLEDGED,
    "cancelled_wait": Outcome.CANCELLED_WAIT,
    "failed": Outcome.FAILED,
    "unknown": Outcome.UNKNOWN,
}


class HistoryViolation(Exception):
    """What the clients saw contradicts the promise; the text says which operations."""


class Writer:
    """One client that does one thing at a time: append (client, number), by a session that it keeps."""

    def __init__(self, clients: Clients, number: int, *, patience_s: float, pause_s: tuple[float, float]) -> None:
        self._clients = clients
        self._number = number
        self._patience_s = patience_s
        self._pause_s = pause_s
        self._next = 0
        self._session: Session | None = None
        self._server: PostgresServer | None = None
        self._attempt = 0
        """Of the operation that is awaited; an answer to an earlier one comes too late."""
        self._try_at = 0
        self.commit: Commit | None = None

    def start(self) -> None:
        self._clients.later(self._clients.chance.uniform(0, 0.5), self._go)

    def _go(self) -> None:
        if self._clients.stopped:
            return
        self._attempt += 1
        if self._session is None or not self._session.alive:
            self._session = None
            self._connect()
        else:
            self._write()

    def _again(self) -> None:
        self._clients.later(self._clients.chance.uniform(*self._pause_s), self._go)

    # Connecting: one host after the other, until one is no standby.

    def _connect(self) -> None:
        clients = self._clients
        name = clients.names[self._try_at % len(clients.names)]
        self._try_at += 1
        attempt = self._attempt
        clients.to_server(name, lambda: self._arrive(name, attempt))
        clients.later(0.3, self._not_connected, attempt)

    def _not_connected(self, attempt: int) -> None:
        if attempt == self._attempt and self._session is None:
            self._go()

    def _arrive(self, name: str, attempt: int) -> None:
        server = self._clients.server_at(name)
        if server is None or not server.read_write:
            return
        session = server.open_session()
        if session is not None:
            self._clients.to_client(name, lambda: self._connected(server, session, attempt))

    def _connected(self, server: PostgresServer, session: Session, attempt: int) -> None:
        if attempt == self._attempt and self._session is None:
            self._server, self._session = server, session
            self._attempt += 1
            self._write()

    # Writing.

    def _write(self) -> None:
        clients = self._clients
        server, session = self._server, self._session
        assert server is not None
        assert session is not None
        local = self._number >= LOCAL_CLIENT
        number, self._next = self._next, self._next + 1
        attempt, begin_s, name = self._attempt, clients.now_s, server.host.name
        done = _Once()

        def record(outcome: Outcome, timeline: int | None) -> None:
            if done.first():
                if not local:
                    clients.writes.append(Write(self._number, number, name, begin_s, clients.now_s, outcome, timeline))
                self.commit = None
                if outcome is not Outcome.ACKNOWLEDGED:
                    self._session = None
                if attempt == self._attempt:
                    self._again()

        def answered(outcome: str, entry: Entry) -> None:
            if outcome in ("cancelled_wait", "unknown"):
                clients.cut.add((self._number, number))
            clients.to_client(name, lambda: record(_OUTCOMES[outcome], entry.timeline))

        def arrive() -> None:
            self.commit = server.commit(
                (self._number, number), synchronous=not local, on_result=answered, session=session
            )

        clients.to_server(name, arrive)
        clients.later(self._patience_s, record, Outcome.UNKNOWN, None)


class _Once:
    __slots__ = ("_used",)

    def __init__(self) -> None:
        self._used = False

    def first(self) -> bool:
        used, self._used = self._used, True
        return not used


class Clients:
    def __init__(self, cluster: SimulatedCluster, chance: random.Random) -> None:
        self._cluster = cluster
        self.chance = chance
        self.names = cluster.names
        self.writes: list[Write] = []
        self.reads: list[Read] = []
        self.cut: set[Row] = set()
        """Rows whose wait was cut on the server: they are shown, and promised to nobody (P13). When the answer is lost too,
        only the simulation knows."""
        self.stopped = False
        self._writers = [
            Writer(self, 0, patience_s=PATIENCE_S, pause_s=(0.05, 0.6)),
            Writer(self, 1, patience_s=PATIENCE_S, pause_s=(0.05, 1.0)),
            Writer(self, 2, patience_s=STICKY_PATIENCE_S, pause_s=(0.05, 1.0)),
            Writer(self, LOCAL_CLIENT, patience_s=PATIENCE_S, pause_s=(0.5, 3.0)),
        ]

    @property
    def now_s(self) -> float:
        return self._cluster.world.now_s

    def later(self, delay_s: float, callback: object, *args: object) -> None:
        self._cluster.world.call_later(delay_s, callback, *args)  # type: ignore[arg-type]

    def to_server(self, name: str, deliver: object) -> None:
        self._cluster.network.message(HOST, name, CHANNEL, deliver)  # type: ignore[arg-type]

    def to_client(self, name: str, deliver: object) -> None:
        self._cluster.network.message(name, HOST, CHANNEL, deliver)  # type: ignore[arg-type]

    def server_at(self, name: str) -> PostgresServer | None:
        return self._cluster.postgres.servers.get(name)

    def start(self) -> None:
        for writer in self._writers:
            writer.start()
        for name in self.names:
            self.later(self.chance.uniform(*READ_EVERY_S), self._read_sometimes, name)

    def commits(self) -> list[Commit]:
        """Those under way."""
        return [writer.commit for writer in self._writers if writer.commit is not None]

    # Reading.

    def _read_sometimes(self, name: str) -> None:
        if not self.stopped:
            self._read(name)
            self.later(self.chance.uniform(*READ_EVERY_S), self._read_sometimes, name)

    def _read(self, name: str) -> None:
        begin_s = self.now_s

        def result(rows: tuple[object, ...], in_recovery: bool, timeline: Timeline) -> None:
            self.to_client(name, lambda: self._has_read(name, begin_s, rows, in_recovery, timeline))

        def arrive() -> None:
            server = self.server_at(name)
            if server is not None:
                server.read(result)

        self.to_server(name, arrive)

    def _has_read(
        self, name: str, begin_s: float, rows: tuple[object, ...], in_recovery: bool, timeline: Timeline
    ) -> None:
        seen = Seen.STANDBY if in_recovery else Seen.PRIMARY
        rows = tuple(row for row in rows if row[0] < LOCAL_CLIENT)  # type: ignore[index]
        self.reads.append(
            whole_read(name, begin_s, self.now_s, seen, None if in_recovery else timeline, rows)  # type: ignore[arg-type]
        )

    # The end.

    def judge(self) -> None:
        """Let what is under way end, read the primary once more, and judge the whole history."""
        world = self._cluster.world
        self.stopped = True
        ends_s = world.now_s + STICKY_PATIENCE_S + 1
        while any(writer.commit is not None for writer in self._writers) and world.now_s < ends_s:
            world.run(world.now_s + 0.2)
        world.run(world.now_s + PATIENCE_S)
        before = len(self.reads)
        ends_s = world.now_s + JUDGE_WITHIN_S
        while not any(read.seen is Seen.PRIMARY for read in self.reads[before:]):
            if world.now_s >= ends_s:
                raise HistoryViolation("no primary answers a read at the end")
            # A switchover that somebody asked for may yet come in between.
            holder = self._cluster.holder_instance()
            if holder is not None:
                self._read(holder.name)
            world.run(world.now_s + 0.5)
        writes = [self._as_the_server_knows(write) for write in self.writes]
        findings = judge(writes, (), self.reads, asynchronous=self._leave())
        if findings.breaks_the_promise:
            raise HistoryViolation(describe(findings.contradictions))

    def _as_the_server_knows(self, write: Write) -> Write:
        if write.outcome is Outcome.UNKNOWN and (write.client, write.number) in self.cut:
            return msgspec.structs.replace(write, outcome=Outcome.CANCELLED_WAIT)
        return write

    def _leave(self) -> Asynchronous | None:
        """Where losses are allowed, the promise checker has judged each takeover; here only that all else holds."""
        checker = self._cluster.checker
        if checker.given_up == 0 and not checker.was_asynchronous:
            return None
        return Asynchronous(lost_rows_limit=1_000_000, overlap_limit_s=1_000_000.0)
