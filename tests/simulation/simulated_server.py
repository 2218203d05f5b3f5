"""One life of a Postgres server: the postmaster and all its children, from start to exit, on a volume and a host.

Stands for postmaster.c, checkpointer.c and the ends of a recovery. The other processes are in `simulated_backends`,
`simulated_syncrep`, `simulated_walsender`, `simulated_walreceiver` and `simulated_recovery`. Nothing here is a task: plain callbacks on the host's
clock, so that an idle server costs nearly nothing.

Left out: autovacuum, archiver, walwriter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from simulated_backends import Backends, Ready
from simulated_recovery import OUR_RESTORE_COMMAND, Startup
from simulated_sessions import Child
from simulated_streaming import Connection, StartRequest
from simulated_syncrep import SyncConfig, parse_names
from simulated_time import Host, Process
from simulated_volume import DataDirectory, DataVolume, PostgresBehaviour, PostgresCluster, rows_of
from simulated_wal import entries_before, line_of, newest_timeline, start_of, timeline_at
from simulated_walreceiver import WalReceiver
from simulated_walsender import WalSender

from instance_manager.core.types import Timeline
from instance_manager.postgres.control_data import ClusterState
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.running import BLOCK_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DataVolume", "PostgresBehaviour", "PostgresCluster", "PostgresServer"]

ORPHANS_LIVE_S = (0.001, 3.0)
AMID_LOOP = 0.5
"""That a walsender that is stopped has just looked at SIGHUP, and reads replies next."""
Part = Literal["server", "postmaster", "checkpointer", "startup", "walreceiver", "walsender", "backend"]


class PostgresServer(Backends):
    """Starts at once. `on_exit` is told "stopped" after a clean end, "failed", "crashed" or "killed"."""

    def __init__(self, cluster: PostgresCluster, host: Host, volume: DataVolume) -> None:
        super().__init__(cluster)
        self.host = host
        self.volume = volume
        self.process = Process(host, f"{host.name}/postgres")
        self.pid = cluster.new_pid()
        self.postmaster = Child(self.process, self.pid)
        self.checkpointer = Child(self.process, cluster.new_pid())
        self.started_text = f"{cluster.world.now_s:.6f} {self.pid}"
        """Start of the postmaster, its identity."""
        self.started_s = cluster.world.now_s
        self.loaded: Mapping[str, str] = {}
        """The settings as the postmaster has loaded them: what every process that it forks begins with."""
        self.loaded_access = Access.CLOSED
        self.in_recovery = False
        self.ready = False
        """Takes connections."""
        self.stopping = False
        self.timeline = Timeline(1)
        """Of a primary; of a standby: the one that is received or was last replayed."""
        self.receive_lsn: int | None = None
        """`pg_last_wal_receive_lsn()`: None, then a segment's start, then what was flushed (P3)."""
        self._received_timeline: Timeline | None = None
        self.active_slots: dict[str, WalSender] = {}
        self.walreceiver: WalReceiver | None = None
        self._paused: list[tuple[Part, Child]] = []
        self._exit_callbacks: list[Callable[[str], object]] = []
        self._checkpointer_hup = False
        self._may_stop = False
        """Of a standby: nothing but its walreceiver is left."""
        self._shutdown_written = False
        self._exited = False
        self._startup: Startup | None = None
        self.process.call_soon(self._begin)

    # What others ask.

    @property
    def data(self) -> DataDirectory:
        data = self.volume.data
        assert data is not None, "the data directory was taken away under a running server"
        return data

    @property
    def settings(self) -> Mapping[str, str]:
        """What the file says now: each child reads it by itself when it looks at SIGHUP."""
        return self.data.settings or {}

    @property
    def startup(self) -> Startup:
        assert self._startup is not None, "a server that is no standby"
        return self._startup

    @property
    def server(self) -> PostgresServer:
        return self

    @property
    def any_process_left(self) -> bool:
        return not self._exited

    @property
    def has_restore_command(self) -> bool:
        return self.loaded.get("restore_command") == OUR_RESTORE_COMMAND

    @property
    def read_write(self) -> bool:
        return self.ready and not self.in_recovery

    @property
    def can_commit(self) -> bool:
        """Could a client's commit be acknowledged here now or later, by this life of the server?"""
        return self.read_write and not self.stopping and self.process.alive

    @property
    def streams_from(self) -> str | None:
        """Host of the server that it receives from now."""
        receiver = self.walreceiver
        return receiver.host if receiver is not None and receiver.status == "streaming" else None

    def wanted_list(self) -> SyncConfig:
        return parse_names(self.settings["synchronous_standby_names"])

    def sendable_end(self) -> int:
        """Up to where a walsender may send: what is flushed here."""
        return self.data.log.flushed

    def on_exit(self, callback: Callable[[str], object]) -> None:
        self._exit_callbacks.append(callback)

    # Starting.

    def _begin(self) -> None:
        volume, cluster = self.volume, self.cluster
        data = volume.data
        if data is None or volume.foreign or data.settings is None:
            self._exit("failed")
            return
        self.loaded = dict(data.settings)
        self.loaded_access = data.access
        cluster.servers[self.host.name] = self
        self.process.on_exit.append(self._leave)
        if cluster.chance(cluster.behaviour.startup_race, "checkpointer began after the first commits could come"):
            self.checkpointer.later(cluster.draw(cluster.behaviour.startup_race_s), self._checkpointer_begins)
        else:
            self._checkpointer_begins()
        self.in_recovery = data.standby_signal
        self.process.call_later(cluster.draw(cluster.behaviour.recovery_s), self._after_disk, self._recover)

    def _leave(self) -> None:
        if self.cluster.servers.get(self.host.name) is self:
            del self.cluster.servers[self.host.name]

    def _checkpointer_begins(self) -> None:
        self.syncrep.set_defined(parse_names(self.loaded["synchronous_standby_names"]).k > 0)

    def _after_disk(self, then: Ready) -> None:
        self.volume.flush(self.process, then)

    def _recover(self) -> None:
        """StartupXLOG up to where a standby begins to follow, or a primary's crash recovery ends."""
        data = self.data
        log = data.log
        log.drop_torn_tail()
        if self.volume.torn:
            self.cluster.count("started a half-rewound directory")
            log.cut(start_of(1))
            data.checkpoint = data.redo = start_of(0)
            data.timeline, data.minimum_recovery = Timeline(1), None
        # SyncDataDirectory: what an earlier life wrote is on the disk now.
        log.flushed = log.written = log.end
        minimum = data.minimum_recovery
        target = max(data.timeline, minimum[0] if minimum is not None else Timeline(0))
        if self.in_recovery:
            target = newest_timeline(data.histories, target)
        line = line_of(data.histories, target)
        needed = max(minimum[1] if minimum is not None else 0, data.checkpoint + 1)
        if timeline_at(line, data.checkpoint) != data.timeline or (
            minimum is not None and timeline_at(line, minimum[1] - 1) != minimum[0]
        ):
            self.cluster.count("requested timeline is not a child of this server's history")
            self._exit("failed")
            return
        needed = start_of(entries_before(needed - 1) + 1)
        if self.in_recovery:
            self._recover_as_standby(target, needed)
        elif log.end < needed:
            self.cluster.count("WAL ends before the end of recovery")
            self._exit("failed")
        else:
            self._recover_as_primary(target)

    def _recover_as_standby(self, target: Timeline, needed: int) -> None:
        data = self.data
        self._startup = Startup(self)
        replayed = min(max(needed, data.redo), data.log.end)
        self.rows = rows_of(data.log.entries[: entries_before(replayed)])
        data.state = ClusterState.IN_ARCHIVE_RECOVERY
        self.timeline = target
        self._startup.begin(replayed, needed, target)

    def _recover_as_primary(self, target: Timeline) -> None:
        """After a crash everything that is in the log becomes visible, acknowledged or not (P8)."""
        data = self.data
        clean = data.state is ClusterState.SHUT_DOWN
        log = data.log
        if log.entries[-1].timeline != target:
            # pg_control did not know yet of the timeline that the log goes on with: crash recovery follows none.
            self.cluster.count("crash recovery ended where the log left pg_control's timeline")
            along = line_of(data.histories, target)
            log.cut(
                next(
                    start_of(n)
                    for n, each in enumerate(log.entries)
                    if timeline_at(along, start_of(n)) != each.timeline
                )
            )
        self.timeline = target
        self.rows = rows_of(log.entries)
        data.minimum_recovery = None
        if clean:
            self._open_read_write()
            return
        self.write_record("checkpoint", self._recovered)

    def _recovered(self) -> None:
        self.data.note_checkpoint(entries_before(self.data.log.flushed) - 1)
        self._open_read_write()

    def _open_read_write(self) -> None:
        self.data.state = ClusterState.IN_PRODUCTION
        self.in_recovery = False
        self.ready = True
        self.cluster.on_started(self)
        self.cluster.on_read_write(self, self.timeline)

    def consistent(self) -> None:
        """A hot standby takes connections."""
        self.ready = True
        self.cluster.on_started(self)

    def become_primary(self, timeline: Timeline) -> None:
        """The end of recovery is logged; then writes are allowed. A standby's list is that of its checkpointer already."""
        self.timeline = timeline
        self.data.standby_signal = False
        self.write_record("end of recovery", self._promoted)

    def _promoted(self) -> None:
        self.startup.child.end()
        self.receive_lsn = None
        self._after_disk(self._promotion_noted)

    def _promotion_noted(self) -> None:
        # CreateEndOfRecoveryRecord: so crash recovery finds the new timeline before its first checkpoint.
        self.data.minimum_recovery = (self.timeline, self.data.log.flushed)
        self._open_read_write()
        self.checkpointer.later(self.cluster.world.random.uniform(0.05, 3.0), self.checkpoint)

    # Signals.

    def signal(self, name: str) -> None:
        """To the postmaster: HUP, INT, QUIT, USR1, TERM, KILL."""
        if name == "KILL":
            self.kill_all()
        elif self.process.alive:
            self.postmaster.run(self._signalled, name)

    def _signalled(self, name: str) -> None:
        cluster = self.cluster
        if name == "HUP":
            self.postmaster.later(cluster.draw(cluster.behaviour.reload_s), self._reload)
        elif name == "USR1":
            if self._startup is not None and self.in_recovery and self.data.promote_file:
                self._startup.child.run(self._startup.promote)
        elif name == "QUIT":
            self.crash("immediate shutdown")
        elif name in ("INT", "TERM") and not self.stopping:
            self._fast_shutdown()

    def _reload(self) -> None:
        """The postmaster loads the files, then signals each child that exists."""
        data = self.data
        self.loaded = dict(data.settings or {})
        self.loaded_access = data.access
        for sender in tuple(self.senders):
            sender.child.run(sender.sighup)
        if self._startup is not None and self.in_recovery:
            self._startup.child.run(self._startup.sighup)
        self._checkpointer_hup = True
        behaviour = self.cluster.behaviour
        delay_s = self.cluster.draw(behaviour.look_s)
        if self.cluster.chance(behaviour.checkpointer_late, "checkpointer looked late"):
            delay_s = self.cluster.draw(behaviour.checkpointer_late_s)
        self.checkpointer.later(delay_s, self._checkpointer_looks)

    def _checkpointer_looks(self) -> None:
        if self._checkpointer_hup:
            self._checkpointer_hup = False
            self.syncrep.set_defined(self.wanted_list().k > 0)

    def checkpoint(self, then: Ready | None = None) -> None:
        """CHECKPOINT: on a primary a record that pg_control then names, with its timeline (P11)."""
        if self.in_recovery or self.stopping:
            if then is not None:
                then()
            return

        def done() -> None:
            self.data.note_checkpoint(index)
            self.data.minimum_recovery = None
            if then is not None:
                then()

        index = entries_before(self.write_record("checkpoint", done)) - 1

    # Replication.

    def start_request(self, receiver: WalReceiver, timeline: Timeline, start: int) -> StartRequest:
        data = self.data
        return StartRequest(
            data.system_identifier, timeline, start, receiver.slot, receiver.name, frozenset(data.histories)
        )

    def fork_walreceiver(self, conninfo: str, slot: str, timeline: Timeline, start: int) -> None:
        """The startup process asks; the postmaster forks, when it can."""
        self.requested(timeline, start)
        self.postmaster.run(self._fork_walreceiver, conninfo, slot, timeline, start)

    def _fork_walreceiver(self, conninfo: str, slot: str, timeline: Timeline, start: int) -> None:
        if self.walreceiver is not None or self.stopping or not self.in_recovery:
            return
        options = parse_conninfo(conninfo)
        receiver = WalReceiver(self, options["host"], options["application_name"], slot)
        self.walreceiver = receiver
        delay_s = receiver.titled_at_s - self.cluster.world.now_s
        if self.loaded.get("dynamic_library_path", "").split(":")[0].endswith(BLOCK_DIRECTORY):
            # It inherits the path by which libpqwalreceiver is an empty file.
            self.cluster.count("walreceiver could not be loaded")
            receiver.child.later(delay_s * 1.5, receiver.end, "file too short")
            return
        receiver.child.later(delay_s, receiver.connect, self.start_request(receiver, timeline, start))

    def requested(self, timeline: Timeline, start: int) -> None:
        """RequestXLogStreaming: on another timeline than before, `flushedUpto` begins anew at a segment's start (P3)."""
        if self.receive_lsn is None or timeline != self._received_timeline:
            self.receive_lsn = start
        self._received_timeline = timeline

    def received(self, flushed: int) -> None:
        self.receive_lsn = max(self.receive_lsn or 0, flushed)
        if self.in_recovery:
            self.startup.arrived(flushed)
        self._wake_senders()

    def receiver_ended(self, receiver: WalReceiver, reason: str) -> None:
        if self.walreceiver is receiver:
            self.walreceiver = None
        if self._exited:
            return
        if self.stopping:
            self._stop_standby()
        elif self.in_recovery:
            self.startup.child.run(self.startup.receiver_ended)

    def accept_replication(self, connection: Connection, request: StartRequest) -> None:
        if not self.ready or self.stopping:
            connection.to_receiver("refused", "not accepting connections")
            return
        sender = WalSender(self, connection, request)
        connection.sender = sender
        self.senders.append(sender)
        sender.child.later(self.cluster.draw(self.cluster.behaviour.fork_s), sender.start, request)

    def sender_ended(self, sender: WalSender) -> None:
        self.senders.remove(sender)
        if sender.slot is not None and self.active_slots.get(sender.slot) is sender:
            del self.active_slots[sender.slot]
        self.sender_drained()

    # The end.

    def _fast_shutdown(self) -> None:
        cluster = self.cluster
        self.stopping = True
        for session in tuple(self.sessions):
            self.terminate_session(session)
        for commit in [each for each in self._open if each.waiting]:
            self.syncrep.cancel(commit)
            self._finish_now(commit, "unknown")
        if self.in_recovery and self.walreceiver is not None:
            self.walreceiver.terminate()
        if cluster.chance(cluster.behaviour.hanging_stop, "fast shutdown hangs"):
            # One backend does not end; all others have been told.
            return
        self.process.call_later(cluster.draw(cluster.behaviour.stop_s), self._stop_children)

    def _stop_children(self) -> None:
        if self.cluster.chance(self.cluster.behaviour.dying_stop, "fast shutdown ended as a crash"):
            self.crash("while shutting down")
        elif not self.ready or self.in_recovery:
            self._may_stop = True
            self._stop_standby()
        else:
            for sender in tuple(self.senders):
                sender.child.run(sender.stop)
            self.checkpointer.run(self.write_record, "shutdown", self._shutdown_flushed)

    def _stop_standby(self) -> None:
        if not self._may_stop or self.walreceiver is not None:
            return
        if self._startup is not None and self._startup.consistent:
            self._startup.advance()
            self.data.state = ClusterState.SHUT_DOWN_IN_RECOVERY
        for sender in tuple(self.senders):
            sender.end("the server stops")
        self._exit("stopped")

    def _shutdown_flushed(self) -> None:
        data = self.data
        data.note_checkpoint(entries_before(data.log.flushed) - 1)
        data.state = ClusterState.SHUT_DOWN
        self._shutdown_written = True
        self.sender_drained()

    def sender_drained(self) -> None:
        """A shutdown waits for each connected walsender's standby; one whose connection died is not waited for (P12)."""
        if not self._shutdown_written or self._exited:
            return
        if all(sender.drained for sender in self.senders):
            self._exit("stopped")

    def crash(self, reason: str) -> None:
        """One process died badly, and `restart_after_crash` is off: everything ends."""
        self.cluster.world.trace.add(self.host.name, "Postgres crashes: %s", reason)
        self._exit("crashed")

    def crash_backend(self) -> None:
        """One backend is killed, or hits a segmentation fault; a postmaster that stands still notices later."""
        self.postmaster.run(self.crash, "a backend crashed")

    def kill_postmaster(self) -> None:
        """SIGKILL to it alone. Waits for standbys are cut; a busy backend was seen to commit for 3 s more."""
        self.postmaster.end()
        for commit in [each for each in self._open if each.waiting]:
            self.syncrep.cancel(commit)
            self._finish_now(commit, "unknown")
        self.process.call_later(self.cluster.draw(ORPHANS_LIVE_S), self.crash, "the postmaster was killed")

    def kill_all(self) -> None:
        """SIGKILL to every process at once."""
        self._exit("killed")

    # Faults.

    def pause(self, part: Part = "server") -> None:
        """SIGSTOP to every process, or to one: of several backends or walsenders any."""
        if part == "server":
            self.process.pause()
            return
        child = self._child(part)
        if child is not None:
            child.pause()
            self._paused.append((part, child))

    def resume(self, part: Part = "server") -> None:
        """SIGCONT to what was paused under this name."""
        if part == "server":
            self.process.resume()
        for each, child in self._paused:
            if each == part:
                child.resume()
        self._paused = [(each, child) for each, child in self._paused if each != part]

    def _child(self, part: Part) -> Child | None:
        chance = self.cluster.world.random
        if part == "postmaster":
            return self.postmaster
        if part == "checkpointer":
            return self.checkpointer
        if part == "startup":
            return self._startup.child if self._startup is not None and self.in_recovery else None
        if part == "walreceiver":
            return self.walreceiver.child if self.walreceiver is not None else None
        if part == "walsender":
            if not self.senders:
                return None
            sender = chance.choice(self.senders)
            sender.stand_still(amid_loop=chance.random() < AMID_LOOP)
            return sender.child
        return chance.choice(self.sessions).child if self.sessions else None

    def _exit(self, how: str) -> None:
        if self._exited:
            return
        self._exited = True
        if how in ("crashed", "killed"):
            self._leave_log_as_it_is()
        self._leave()
        senders, receiver = tuple(self.senders), self.walreceiver
        self.process.kill()
        self.ready = False
        for sender in senders:
            sender.end(how)
        if receiver is not None:
            receiver.end(how)
        for commit in tuple(self._open):
            if not commit.done:
                commit.done = True
                commit.on_result("unknown", commit.entry)
        self._open.clear()
        for callback in self._exit_callbacks:
            callback(how)

    def _leave_log_as_it_is(self) -> None:
        """What was not handed to the kernel yet is gone, perhaps amid a record."""
        data = self.volume.data
        if data is None or data.log.written >= data.log.end:
            return
        log = data.log
        keep = log.written
        if self.cluster.chance(self.cluster.behaviour.torn_tail, "half a record left by a crash"):
            keep = min(log.end, keep + self.cluster.world.random.randrange(1, 100))
        log.cut(keep)
        log.written = log.end


def parse_conninfo(conninfo: str) -> dict[str, str]:
    return dict(option.split("=", 1) for option in conninfo.split())
