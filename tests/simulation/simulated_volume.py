"""What survives Postgres' processes: the data directory with its log, and the disk under it with its faults.

Not modelled: the pages of tables. Rows are the commits of the log as far as it was replayed, so a directory is as good as its
log, its histories and its pg_control.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from simulated_time import Process, World
from simulated_wal import LOG_BEGINS, SEGMENT_BYTES, Entry, History, Log, entries_before, start_of

from instance_manager.core.types import Lsn, Timeline
from instance_manager.postgres.control_data import ClusterState, ControlData, HotStandbySettings
from instance_manager.postgres.host_based_access import Access

if TYPE_CHECKING:
    from simulated_server import PostgresServer

Span = tuple[float, float]
"""Seconds, from and to."""

HOT_STANDBY = HotStandbySettings(100, 8, 10, 0, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresBehaviour:
    """How nasty Postgres is in one run. Chances from 0 to 1; times are drawn evenly."""

    flush_s: Span = (0.0005, 0.003)
    replay_s: Span = (0.0, 0.01)
    """From received to replayed, when nothing holds it up."""
    fork_s: Span = (0.001, 0.004)
    reload_s: Span = (0.0005, 0.01)
    """From SIGHUP to the postmaster's having loaded the files."""
    look_s: Span = (0.0002, 0.005)
    """Until a child that is not busy looks at SIGHUP."""
    checkpointer_late: float = 0.0
    """That the checkpointer is amid a checkpoint and looks late (P1)."""
    checkpointer_late_s: Span = (0.3, 8.0)
    walsender_late: float = 0.0
    """That a walsender is amid its loop, and reads replies once more by what it has (P5)."""
    walsender_late_s: Span = (0.01, 1.5)
    startup_busy: float = 0.0
    """That a piece of WAL meets a query that conflicts, so that replay stands still (P2)."""
    startup_busy_s: Span = (0.2, 6.0)
    startup_asks_first: float = 0.5
    """That the startup process, free again, asks for a walreceiver before it looks at SIGHUP (P2)."""
    torn_send: float = 0.02
    """That what is sent ends amid a record, and the rest comes a little later."""
    torn_tail: float = 0.5
    """That the end of the processes leaves half a record (P11)."""
    hanging_stop: float = 0.0
    """That a fast shutdown does not end."""
    dying_stop: float = 0.0
    """That a fast shutdown leaves the data directory as a crash does."""
    startup_race: float = 0.0
    """That commits right after a start wait for nobody until the checkpointer has begun (P8, older minors)."""
    startup_race_s: Span = (0.01, 0.5)
    recovery_s: Span = (0.05, 0.4)
    promotion_s: Span = (0.01, 0.1)
    stop_s: Span = (0.02, 0.2)
    call_s: Span = (0.001, 0.006)
    """Of one question of the agent."""
    slow_call: float = 0.01
    slow_call_s: Span = (0.006, 0.05)
    copy_s: Span = (0.3, 3.0)
    """Clone and rewind."""
    copy_fails: float = 0.0
    full_panics: float = 0.5
    """A full disk: PANIC, or the statement fails."""


HARSH = PostgresBehaviour(
    checkpointer_late=0.3,
    walsender_late=0.3,
    startup_busy=0.02,
    torn_send=0.1,
    hanging_stop=0.1,
    dying_stop=0.05,
    slow_call=0.03,
    copy_fails=0.1,
)


class ReplicationStream(Protocol):
    def send(self, deliver: Callable[[], object]) -> None: ...

    def close(self) -> None: ...


class ReplicationNetwork(Protocol):
    """What is needed of `simulated_network.Network`."""

    def stream(self, source: str, target: str, channel: str) -> ReplicationStream: ...

    def is_blocked(self, source: str, target: str, channel: str) -> bool: ...


def _nothing(*_: object) -> None:
    return None


@dataclass(slots=True, eq=False)
class PostgresCluster:
    """All servers by the names of their hosts, and who is told of what they do."""

    world: World
    network: ReplicationNetwork
    behaviour: PostgresBehaviour = field(default_factory=PostgresBehaviour)
    servers: dict[str, PostgresServer] = field(default_factory=dict)
    archive: Log | None = None
    """What a restore_command other than ours would find (P9)."""
    on_acknowledged: Callable[[PostgresServer, Entry], object] = _nothing
    """A client's commit ended by release, and nothing but a failure on the way can keep it from the client now."""
    on_read_write: Callable[[PostgresServer, Timeline], object] = _nothing
    on_started: Callable[[PostgresServer], object] = _nothing
    on_destroying: Callable[[DataVolume, str], object] = _nothing
    """A rewind or a set-aside of this volume's directory begins (R6)."""
    _next_pid: int = 100

    def new_pid(self) -> int:
        self._next_pid += 1
        return self._next_pid

    def chance(self, probability: float, what: str) -> bool:
        """Draw, and count what happened."""
        if probability <= 0 or self.world.random.random() >= probability:
            return False
        self.count(what)
        return True

    def count(self, what: str) -> None:
        self.world.counters[f"postgres: {what}"] += 1

    def draw(self, span: Span) -> float:
        return span[0] + (span[1] - span[0]) * self.world.random.random()


DirectoryPlace = Literal["missing", "initialised", "foreign"]


class DataDirectory:
    """One directory of Postgres: what is copied by a clone and overwritten by a rewind."""

    __slots__ = (
        "access",
        "checkpoint",
        "histories",
        "log",
        "minimum_recovery",
        "promote_file",
        "redo",
        "settings",
        "slots",
        "standby_signal",
        "state",
        "system_identifier",
        "timeline",
    )

    def __init__(self, system_identifier: int, log: Log) -> None:
        self.system_identifier = system_identifier
        self.log = log
        self.histories: dict[Timeline, History] = {}
        self.state = ClusterState.SHUT_DOWN
        self.checkpoint = self.redo = LOG_BEGINS
        """Start of the last checkpoint's record, and where recovery from it begins."""
        self.timeline = Timeline(1)
        """Of that checkpoint; lags behind the log (P11)."""
        self.minimum_recovery: tuple[Timeline, int] | None = None
        self.standby_signal = False
        self.promote_file = False
        self.settings: dict[str, str] | None = None
        """The file of replication settings; None: it is not there."""
        self.access = Access.CLOSED
        self.slots: set[str] = set()

    @classmethod
    def initdb(cls, system_identifier: int) -> DataDirectory:
        return cls(system_identifier, Log([Entry(Timeline(1), "checkpoint")]))

    def control(self) -> ControlData:
        timeline, minimum = self.minimum_recovery or (Timeline(0), 0)
        return ControlData(
            control_version=1300,
            system_identifier=self.system_identifier,
            state=self.state,
            checkpoint_lsn=Lsn(self.checkpoint),
            redo_lsn=Lsn(self.redo),
            timeline=self.timeline,
            previous_timeline=self.timeline,
            minimum_recovery_end_lsn=Lsn(minimum),
            minimum_recovery_end_timeline=timeline,
            backup_start_lsn=Lsn(0),
            end_of_backup_required=False,
            wal_segment_bytes=SEGMENT_BYTES,
            wal_block_bytes=8192,
            data_checksums=True,
            wal_level="replica",
            wal_log_hints=True,
            hot_standby=HOT_STANDBY,
        )

    def note_checkpoint(self, index: int) -> None:
        """pg_control now names the checkpoint record at `index`."""
        self.checkpoint = self.redo = start_of(index)
        self.timeline = self.log.entries[index].timeline

    def copy_of(self, upto: int) -> DataDirectory:
        """What a base backup or a rewind brings, as of the end of the log at `upto`."""
        copy = DataDirectory(self.system_identifier, self.log.copy(upto))
        copy.histories = dict(self.histories)
        copy.state = ClusterState.IN_PRODUCTION
        copy.checkpoint, copy.redo, copy.timeline = self.checkpoint, self.redo, self.timeline
        copy.standby_signal = True
        return copy


class DataVolume:
    """One disk of one instance. `data` is what lies in the data directory's place; None: nothing."""

    def __init__(self, cluster: PostgresCluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.data: DataDirectory | None = None
        self.foreign = False
        """Something else lies in the place."""
        self.rewind_attempts = 0
        """From the marker outside of the data directory; 0: none is there."""
        self.torn = False
        """The directory is half overwritten by a rewind. Nothing in it says so: Postgres starts on it, without its rows."""
        self.claim: Timeline | None = None
        """File in the state directory, by which restore_command makes a promotion take that number (P4)."""
        self.set_aside: list[DataDirectory] = []
        self.leftovers = 0
        self.full = False
        self._stalled = False
        self._waiting: list[tuple[Process, Callable[[], object]]] = []

    @property
    def random(self) -> random.Random:
        return self.cluster.world.random

    @property
    def stalled(self) -> bool:
        """Nothing comes back from the disk until it ends."""
        return self._stalled

    @stalled.setter
    def stalled(self, stalled: bool) -> None:
        self._stalled = stalled
        if not stalled:
            waiting, self._waiting = self._waiting, []
            for process, done in waiting:
                process.call_soon(done)

    def flush(self, process: Process, done: Callable[[], object]) -> None:
        """An fsync: `done` runs in `process` when it came back, if that lives."""
        process.call_later(self.cluster.draw(self.cluster.behaviour.flush_s), self._flushed, process, done)

    def _flushed(self, process: Process, done: Callable[[], object]) -> None:
        if self._stalled:
            self._waiting.append((process, done))
        else:
            done()

    # Faults.

    def lose_power(self) -> None:
        """After all processes are dead: what was written and not flushed is kept, lost, or kept up to anywhere."""
        data = self.data
        self.stalled = False
        if data is None or data.log.written <= data.log.flushed:
            return
        log = data.log
        keep = self.random.choice((log.flushed, log.written, self.random.randint(log.flushed, log.written)))
        if keep < log.written:
            self.cluster.count("written and not flushed WAL lost with the power")
        log.cut(keep)

    def lose_flushed_tail(self, entries: int) -> None:
        """A disk that lies: the last entries are gone though they were flushed. No rule can make up for it."""
        if self.data is not None:
            keep = max(1, entries_before(self.data.log.end) - entries)
            self.data.log.cut(start_of(keep))
            self.cluster.count("a lying disk lost flushed WAL")


def rows_of(entries: Iterable[Entry]) -> list[object]:
    return [entry.payload for entry in entries if entry.kind == "commit"]
