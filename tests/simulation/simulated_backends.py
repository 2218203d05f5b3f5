"""Backends of one server: what a commit, a read and a record of the server's own do (xact.c, xlog.c).

Left out: everything about tables, locks and snapshots; prepared transactions; connection limits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from simulated_sessions import Child, Session
from simulated_syncrep import Commit, Outcome, SyncRep
from simulated_time import Process
from simulated_wal import Entry, Kind

from instance_manager.core.types import Timeline
from instance_manager.postgres.host_based_access import Access

if TYPE_CHECKING:
    from simulated_recovery import Startup
    from simulated_server import PostgresServer
    from simulated_volume import DataDirectory, DataVolume, PostgresCluster
    from simulated_walsender import WalSender

Ready = Callable[[], object]
OnResult = Callable[[Outcome, Entry], object]
OnRead = Callable[[tuple[object, ...], bool, Timeline], object]


class Backends:
    """The part of a server that writes; `PostgresServer` is all of it."""

    cluster: PostgresCluster
    process: Process
    postmaster: Child
    volume: DataVolume
    timeline: Timeline
    in_recovery: bool
    ready: bool
    stopping: bool
    loaded_access: Access

    def __init__(self, cluster: PostgresCluster) -> None:
        self.cluster = cluster
        self.rows: list[object] = []
        """What a query sees."""
        self.senders: list[WalSender] = []
        self.sessions: list[Session] = []
        self.syncrep = SyncRep(cluster, self.senders, self._finish)
        self._flushing = False
        self._to_flush: list[Commit] = []
        self._open: dict[Commit, None] = {}
        """Commits without a result."""

    @property
    def data(self) -> DataDirectory:
        raise NotImplementedError

    @property
    def startup(self) -> Startup:
        raise NotImplementedError

    @property
    def server(self) -> PostgresServer:
        raise NotImplementedError

    def crash(self, reason: str) -> None:
        raise NotImplementedError

    # Writing.

    def write_record(self, kind: Kind, then: Ready | None = None) -> int:
        """A record that no client waits for; `then` when it is flushed here."""
        entry = Entry(self.timeline, kind)

        def done(outcome: Outcome, _: Entry) -> None:
            if then is not None and outcome == "acknowledged":
                then()

        commit = Commit(entry, None, synchronous=False, on_result=done)
        return self._insert(commit)

    def _insert(self, commit: Commit) -> int:
        commit.lsn = self.data.log.append(commit.entry)
        self._open[commit] = None
        self._to_flush.append(commit)
        self._flush_log()
        return commit.lsn

    def _flush_log(self) -> None:
        """XLogFlush: one write and one fsync at a time, for all that came meanwhile."""
        if self._flushing:
            return
        self._flushing = True
        log = self.data.log
        log.written = log.end
        batch, self._to_flush = self._to_flush, []
        self.volume.flush(self.process, partial(self._log_flushed, log.end, batch))

    def _log_flushed(self, upto: int, batch: list[Commit]) -> None:
        self._flushing = False
        self.data.log.flushed = upto
        self._wake_senders()
        for commit in batch:
            if commit.session is not None:
                commit.session.child.run(self._after_flush, commit)
            else:
                self._after_flush(commit)
        if self._to_flush:
            self._flush_log()

    def _after_flush(self, commit: Commit) -> None:
        if not commit.done and not (commit.synchronous and self.syncrep.waits(commit)):
            self._finish(commit, "acknowledged")

    def _finish(self, commit: Commit, outcome: Outcome) -> None:
        """The transaction is visible from now on, however its wait ended (P13)."""
        session = commit.session
        if session is not None and (session.child.paused or not session.child.alive):
            session.child.run(self._finish_now, commit, outcome)
        else:
            self._finish_now(commit, outcome)

    def _finish_now(self, commit: Commit, outcome: Outcome) -> None:
        if commit.done:
            return
        commit.done = True
        self._open.pop(commit, None)
        entry = commit.entry
        if entry.kind == "commit":
            self.rows.append(entry.payload)
            if commit.synchronous and outcome == "acknowledged":
                self.cluster.on_acknowledged(self.server, entry)
        commit.on_result(outcome, entry)

    def _wake_senders(self) -> None:
        for sender in tuple(self.senders):
            sender.wake()

    # Clients.

    def open_session(self) -> Session | None:
        """A connection that stays; None: refused. (Nothing is answered while the postmaster stands still: see `takes_connections`.)"""
        if not self.lets_clients_in() or not self.takes_connections():
            return None
        session = Session(self.server)
        self.sessions.append(session)
        return session

    def takes_connections(self) -> bool:
        return self.postmaster.alive and not self.postmaster.paused and not self.process.held

    def lets_clients_in(self) -> bool:
        """By the access rules that the postmaster has loaded."""
        return self.ready and not self.stopping and self.loaded_access is Access.OPEN

    def commit(
        self, payload: object, *, synchronous: bool, on_result: OnResult, session: Session | None = None
    ) -> Commit:
        """One transaction, in a session or by a new connection; `on_result` is called here, not at the client.

        failed: certainly not done. unknown: the connection broke. cancelled_wait: done here, success with a WARNING.
        """
        commit = Commit(Entry(self.timeline, "commit", payload), session, synchronous=synchronous, on_result=on_result)
        self._open[commit] = None
        if session is not None:
            session.child.run(self._commit, commit)
        else:
            self.postmaster.run(self._commit, commit)
        if not self.process.alive or (session is None and not self.postmaster.alive):
            self._fail(commit)
        return commit

    def _commit(self, commit: Commit) -> None:
        session = commit.session
        may = self.lets_clients_in() if session is None else session.alive and not self.stopping
        if not may or self.in_recovery:
            self._fail(commit)
        elif self.volume.full:
            if self.cluster.chance(self.cluster.behaviour.full_panics, "PANIC: no space left for WAL"):
                self.crash("PANIC: no space left on device")
            else:
                self._fail(commit)
        else:
            if commit.entry.timeline != self.timeline:
                commit.entry = Entry(self.timeline, "commit", commit.entry.payload)
            self._insert(commit)

    def _fail(self, commit: Commit) -> None:
        if not commit.done:
            commit.done = True
            self._open.pop(commit, None)
            commit.on_result("failed", commit.entry)

    def cancel_wait(self, commit: Commit) -> None:
        """A query cancel: the commit that waits for standbys reports success, with a WARNING (P13)."""
        if commit.waiting:
            self.syncrep.cancel(commit)
            self.cluster.count("wait for standbys cancelled")
            self._finish(commit, "cancelled_wait")

    def cancel_waits(self) -> None:
        for commit in [each for each in self._open if each.waiting]:
            self.cancel_wait(commit)

    def terminate_session(self, session: Session) -> None:
        """SIGTERM to a backend: a wait is cut, and the client sees its connection break."""
        for commit in [each for each in self._open if each.session is session]:
            self.syncrep.cancel(commit)
            if commit.lsn:
                self._finish_now(commit, "unknown")
            else:
                self._fail(commit)
        session.child.end()
        if session in self.sessions:
            self.sessions.remove(session)

    def read(self, on_result: OnRead, session: Session | None = None) -> None:
        """The rows that a query sees, whether in recovery, the timeline. No answer: refused, or the server is gone."""
        child = self.postmaster if session is None else session.child
        child.run(self._read, on_result, session)

    def _read(self, on_result: OnRead, session: Session | None) -> None:
        if session is None and not self.lets_clients_in():
            return
        if self.in_recovery:
            self.startup.advance()
        on_result(tuple(self.rows), self.in_recovery, self.timeline)

    def canary(self, on_result: OnResult) -> Commit:
        """A commit of the agent's own that waits like a client's."""
        commit = Commit(Entry(self.timeline, "message"), None, synchronous=True, on_result=on_result)
        self._insert(commit)
        return commit

    def end_canary(self, commit: Commit) -> None:
        self.syncrep.cancel(commit)
        if not commit.done:
            self._finish_now(commit, "unknown")
