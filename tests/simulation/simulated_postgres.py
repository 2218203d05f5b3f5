"""The port `LocalPostgres` of one simulated instance: its agent's way to the server, the directory and the disk.

What the modules of `instance_manager/postgres/` find out by SQL, /proc and Postgres' programs is read off the model here,
with a latency, by the state at its end. Where those modules hold a rule themselves (position, promote, shutdown_end) this
follows them step by step; `dynamic_settings`, `synchronous` and `voting` run as they are, over `simulated_running`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from simulated_recovery import OUR_RESTORE_COMMAND
from simulated_rejoin import clone, ready_source, rewind
from simulated_running import ASKS_AGAIN_S, Access, Instance, SimulatedRunning
from simulated_server import PostgresServer
from simulated_volume import HOT_STANDBY, DataDirectory
from simulated_wal import end_along

from instance_manager.agent.postgres_port import StartCommand, Upstream
from instance_manager.agent.recovering import NotMade
from instance_manager.agent.server_files import render_set
from instance_manager.config import Configuration
from instance_manager.core.quorum import SynchronousSet
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import MEMBER_ID_PATTERN, Lsn, MemberId, Timeline, TimelineChain, WalEnd
from instance_manager.postgres.archive_commands import Allowed
from instance_manager.postgres.control_data import ClusterState, ControlData, HotStandbySettings
from instance_manager.postgres.deadlines import Deadline
from instance_manager.postgres.directory import DirectoryRefused, DirectoryReport, DirectoryState, RewindMarker
from instance_manager.postgres.histories import ends_as
from instance_manager.postgres.host_based_access import Access as Gate
from instance_manager.postgres.observation import PostgresObservation, Slot, Walreceiver, Walsender
from instance_manager.postgres.promotion import PromotedWrong, PromotionFailed
from instance_manager.postgres.server import DeadlinePassed, ProgramFailed
from instance_manager.postgres.sql import SqlUnavailable
from instance_manager.postgres.wal_dump import PositionUnknown, WalMissing

if TYPE_CHECKING:
    from simulated_time import Process

MAJOR = 15
VERSION_NUMBER = 150018
CONFLICT_PATIENCE_S = 0.1
INITDB_S = (0.2, 1.0)
CONFLICT = "IPC/RecoveryConflictSnapshot"
_PLACE = Path("/simulated/data")


class SimulatedPostgres:
    def __init__(self, instance: Instance, process: Process, reload: Callable[[], Awaitable[None]]) -> None:
        self._access = Access(instance, process)
        self._instance = instance
        self._session: PostgresServer | None = None
        """Whose kept session we have: it outlives a change of the access rules, and a postmaster that stands still."""
        self._running = SimulatedRunning(self._access, reload)

    @property
    def major(self) -> int:
        return MAJOR

    @property
    def running(self) -> SimulatedRunning:
        return self._running

    # The running server.

    async def _kept(self, deadline_s: float, what: str) -> PostgresServer:
        """The kept session, or a new one."""
        server = self._session
        if server is not None and server is self._instance.server and server.process.alive:
            try:
                await self._access.ask(server, deadline_s, what)
            except (SqlUnavailable, DeadlinePassed):
                self._session = None
                raise
            return server
        self._session = None
        self._session = await self._access.connect(deadline_s, what)
        return self._session

    async def observe(self, *, deadline_s: float) -> PostgresObservation:
        return _observation(await self._kept(deadline_s, "observe"))

    def forget(self) -> None:
        self._session = None

    async def answers_new_connection(self, *, deadline_s: float) -> None:
        await self._access.connect(deadline_s, "a new connection")

    async def keep_slots(self, members: Collection[MemberId]) -> None:
        server = await self._kept(5.0, "slots")
        try:
            async with asyncio.timeout(5.0):
                await self._access.write_file()
        except TimeoutError:
            raise DeadlinePassed("slots", 5.0) from None
        slots = server.data.slots
        slots.update(members)
        for name in sorted(slots):
            if name not in members and name not in server.active_slots and MEMBER_ID_PATTERN.fullmatch(name):
                slots.discard(name)

    async def emit_message(self, *, deadline_s: float) -> None:
        deadline = Deadline(deadline_s)
        server = await self._kept(deadline.left_s, "pg_logical_emit_message")
        if server.in_recovery:
            raise SqlUnavailable("recovery is in progress", "25006")
        await self._access.done(
            lambda end: server.write_record("message", end), deadline.left_s, "pg_logical_emit_message"
        )

    async def create_roles(self) -> tuple[str, ...]:
        server = await self._kept(5.0, "create_roles")
        if server.in_recovery:
            raise SqlUnavailable("recovery is in progress", "25006")
        return ()

    async def checkpoint(self, *, deadline_s: float) -> None:
        deadline = Deadline(deadline_s)
        server = await self._access.connect(deadline.left_s, "CHECKPOINT")
        await self._access.done(
            lambda end: server.checkpointer.run(server.checkpoint, end), deadline.left_s, "CHECKPOINT"
        )

    async def position(self, chain: TimelineChain, *, deadline_s: float) -> WalEnd:
        deadline = Deadline(deadline_s)
        try:
            server = await self._access.connect(deadline.left_s, "the replay position")
            await self._access.ask(server, deadline.left_s, "IDENTIFY_SYSTEM")
            if not server.in_recovery:
                raise PositionUnknown("this server is not in recovery")
            start = WalEnd(server.startup.timeline, Lsn(server.startup.advance()))
            _require_claimed(server.data, chain, start.timeline)
            async with asyncio.timeout(deadline.left_s):
                await self._access.read_file()
            end = end_along(server.data.log, start, chain)
            async with asyncio.timeout(deadline.left_s):
                await self._access.fsync()
            log = server.data.log
            log.flushed = max(log.flushed, min(end.lsn, log.written))
        except TimeoutError as error:
            raise PositionUnknown("the end of the log cannot be told: the disk does not answer") from error
        except (DeadlinePassed, SqlUnavailable) as error:
            raise PositionUnknown(f"the end of the log cannot be told: {error}") from error
        return end

    async def promote(
        self, chain: TimelineChain, relay: Callable[[], Awaitable[None]], *, deadline_s: float
    ) -> Timeline:
        """`promotion.promote`, step by step."""
        deadline = Deadline(deadline_s)
        volume = self._access.volume
        triggered = False
        try:
            try:
                server = await self._access.connect(deadline.left_s, "promotion")
                _require_parent_history(server, chain)
                server.startup.resume()
                async with asyncio.timeout(deadline.left_s):
                    await self._access.write_file()
                    server.data.promote_file = True
                    await self._access.write_file()
                    volume.claim = chain.current
                    triggered = True
                    await relay()
                await self._wait_promoted(server, deadline)
                await self._access.ask(server, deadline.left_s, "IDENTIFY_SYSTEM")
                _verify(server, chain)
            except TimeoutError:
                raise PromotionFailed("the supervisor did not answer", triggered=triggered) from None
            except (DeadlinePassed, SqlUnavailable, OSError) as error:
                raise PromotionFailed(str(error), triggered=triggered) from error
        except BaseException:
            if volume.data is not None and volume.data.promote_file:
                volume.claim = None
                volume.data.promote_file = False
            raise
        await self.fill_gaps(chain)
        volume.claim = None
        return chain.current

    async def histories(self) -> tuple[Timeline, ...]:
        data = self._access.volume.data
        return tuple(sorted(each for each, parents in data.histories.items() if parents)) if data is not None else ()

    async def forget_dead_ends(self, chain: TimelineChain) -> None:
        await self._access.write_file()
        data = self._access.volume.data
        if data is not None:
            for timeline in data.histories:
                if not chain.knows(timeline):
                    data.histories[timeline] = ()

    async def fill_gaps(self, chain: TimelineChain) -> None:
        """`promotion.fill_gap` for each switch."""
        await self._access.write_file()
        data = self._access.volume.data
        if data is not None:
            for switch in chain.switches:
                for number in range(switch.parent + 1, switch.timeline):
                    data.histories.setdefault(Timeline(number), ())

    async def _wait_promoted(self, server: PostgresServer, deadline: Deadline) -> None:
        loop = asyncio.get_running_loop()
        ends_conflicts_s = loop.time() + CONFLICT_PATIENCE_S
        while not server.read_write:
            if deadline.passed:
                raise PromotionFailed(f"still in recovery after {deadline.whole_s:g} s", triggered=True)
            if loop.time() >= ends_conflicts_s and server.in_recovery:
                server.startup.child.run(server.startup.end_busy)
            await asyncio.sleep(ASKS_AGAIN_S)
            await self._access.ask(server, deadline.left_s, "pg_is_in_recovery")

    # Files.

    async def inspect(self) -> DirectoryReport:
        await self._access.read_file()
        return self.inspect_at_start()

    def inspect_at_start(self) -> DirectoryReport:
        volume = self._access.volume
        data = volume.data
        marker = RewindMarker(volume.rewind_attempts, "simulated") if volume.rewind_attempts else None
        if volume.foreign:
            state, reason = DirectoryState.FOREIGN, "it has files but no PG_VERSION"
        elif data is None:
            state, reason = DirectoryState.MISSING, "there is nothing"
        elif marker is not None:
            state, reason = DirectoryState.HALF_REWOUND, f"rewind {marker.attempts} was not finished"
        else:
            state, reason = DirectoryState.INITIALISED, "it is a directory of Postgres"
        return DirectoryReport(
            state=state,
            major=MAJOR if data is not None else None,
            reason=reason,
            has_standby_signal=data is not None and data.standby_signal,
            marker=marker,
            leftovers=tuple(_PLACE.with_name(f"data.clone-{each:08x}") for each in range(volume.leftovers)),
            set_aside=tuple(_PLACE.with_name(f"data.set-aside-{each}") for each in range(len(volume.set_aside))),
        )

    async def control_data(self) -> ControlData:
        try:
            async with asyncio.timeout(10.0):
                await self._access.read_file()
        except TimeoutError:
            raise DeadlinePassed("pg_controldata", 10.0) from None
        data = self._access.volume.data
        if data is None:
            raise ProgramFailed(["pg_controldata"], 1, "could not open directory")
        return data.control()

    async def allow_archive(self, what: Allowed | None, *, deadline_s: float) -> None:
        """There is no archive in this world but a restore_command of somebody else's (P9)."""

    async def ask_to_archive_again(self, since: Lsn | None, *, deadline_s: float) -> None:
        """Nor anybody who would be asked."""

    async def nothing_is_restored(self, postmaster_pid: int, *, deadline_s: float) -> None:
        """Nor anything that could be on its way from it."""

    async def write_files(
        self, synchronous: SynchronousSet, access: Gate, *, standby: bool, upstream: Upstream | None = None
    ) -> None:
        await self._access.write_file()
        data = self._access.data()
        settings = {
            "synchronous_standby_names": render_set(synchronous),
            "primary_conninfo": "",
            "primary_slot_name": "",
            "restore_command": OUR_RESTORE_COMMAND,
        }
        if upstream is not None:
            settings["primary_conninfo"] = self.primary_settings(upstream)
            settings["primary_slot_name"] = upstream.member_id
        data.settings = settings
        data.access = access

    async def write_access(self, access: Gate) -> None:
        await self._access.write_file()
        self._access.data().access = access

    async def written_access(self) -> Gate | None:
        await self._access.read_file()
        data = self._access.volume.data
        return data.access if data is not None else None

    async def set_standby_signal(self, standby: bool) -> None:
        await self._access.write_file()
        self._access.data().standby_signal = standby

    async def prepare_start(self) -> StartCommand:
        await self._access.write_file()
        self._clear_claim()
        report = self.inspect_at_start()
        if report.state is not DirectoryState.INITIALISED:
            raise DirectoryRefused(f"the data directory is {report.state.value}: {report.reason}")
        if self._access.data().settings is None:
            raise DirectoryRefused("the data directory's configuration is not ours yet")
        return StartCommand(("/postgres", "-D", str(_PLACE)), {})

    def _clear_claim(self) -> None:
        """`promotion.clear_claim`: empty histories above the newest real one go too."""
        volume = self._access.volume
        volume.claim = None
        if volume.data is not None:
            histories = volume.data.histories
            newest = max((timeline for timeline, history in histories.items() if history), default=Timeline(1))
            for timeline in [each for each, history in histories.items() if not history and each > newest]:
                del histories[timeline]

    def primary_settings(self, upstream: Upstream) -> str:
        return f"host={upstream.host} port={upstream.port} application_name={upstream.member_id}"

    async def replace_static(self, configuration: Configuration) -> tuple[str, ...]:
        await self._access.write_file()
        return ()

    def wanted_hot_standby(self) -> HotStandbySettings:
        return HOT_STANDBY

    # Stopped directories.

    async def initialise(self, on_progress: Callable[[str], None]) -> None:
        volume = self._access.volume
        if volume.data is not None or volume.foreign:
            raise DirectoryRefused("the place is taken")
        await asyncio.sleep(volume.cluster.draw(INITDB_S))
        await self._access.write_file()
        volume.data = DataDirectory.initdb(volume.cluster.world.random.getrandbits(62))

    async def end_of_stopped(self, control: ControlData, chain: TimelineChain) -> WalEnd:
        await self._access.read_file()
        log = self._access.data().log
        redo = WalEnd(control.timeline, control.redo_lsn)
        end = redo if redo.lsn >= log.end else end_along(log, redo, chain)
        needed = max(control.minimum_recovery_end_lsn, Lsn(control.checkpoint_lsn + 1))
        if end.lsn < needed:
            raise WalMissing(end, WalEnd(max(control.timeline, control.minimum_recovery_end_timeline), needed))
        return end

    async def shutdown_end(self, control: ControlData, chain: TimelineChain) -> WalEnd | str:
        if control.state is not ClusterState.SHUT_DOWN:
            return f"pg_control says {control.state.value!r}, not 'shut down'"
        if control.timeline != chain.current:
            return f"shut down on timeline {control.timeline}, but {chain.current} is the claimed one"
        await self._access.read_file()
        before = WalEnd(control.timeline, control.checkpoint_lsn)
        end = end_along(self._access.data().log, before, chain)
        return end if end.lsn > control.checkpoint_lsn else f"no record at the checkpoint {before} of pg_control"

    async def require_source(self, host: str, port: int, system_identifier: int, timeline: Timeline) -> None:
        await ready_source(self._access, host, port, system_identifier, timeline)

    async def clone(self, host: str, port: int, system_identifier: int, on_progress: Callable[[str], None]) -> None:
        await clone(self._access, host, port, system_identifier, on_progress)

    async def make_from_archive(
        self, host: str, port: int, record: ClusterRecord, on_progress: Callable[[str], None]
    ) -> str:
        raise NotMade("there is no archive in this world", is_choice=True)

    async def rewind(self, host: str, port: int, timeline: Timeline) -> str:
        return (await rewind(self._access, host, port, timeline)).value

    async def set_aside(self) -> str:
        await self._access.write_file()
        volume = self._access.volume
        if volume.data is None or volume.foreign:
            raise DirectoryRefused("there is nothing to set aside")
        volume.cluster.on_destroying(volume, "setting aside")
        volume.set_aside = [volume.data]
        volume.torn = False
        volume.data = None
        return "data.set-aside-1"


def _require_claimed(data: DataDirectory, chain: TimelineChain, timeline: Timeline) -> None:
    """`voting._require_claimed` (P4)."""
    if timeline not in {chain.first, *(switch.timeline for switch in chain.switches)}:
        raise PositionUnknown(f"timeline {timeline} was never claimed")
    if timeline == chain.first:
        return
    history = data.histories.get(timeline)
    if not history:
        raise PositionUnknown(f"the history of timeline {timeline} is missing")
    if not chain.matches(tuple(each for each in history if each[0] >= chain.first)):
        raise PositionUnknown(f"timeline {timeline} has another history than the recorded one: {history}")


def _require_parent_history(server: PostgresServer, chain: TimelineChain) -> None:
    if not server.in_recovery:
        raise PromotionFailed("not in recovery", triggered=False)
    wanted = tuple((each.parent, each.switch_lsn) for each in chain.switches[:-1])
    history = server.data.histories.get(chain.switches[-1].parent, ())
    if wanted and not ends_as(history, wanted):
        raise PromotionFailed(f"the parent's history is {history}, not {wanted}", triggered=False)


def _verify(server: PostgresServer, chain: TimelineChain) -> None:
    if server.timeline != chain.current:
        raise PromotedWrong(chain.current, server.timeline, "the claim was not taken")
    wanted = tuple((each.parent, each.switch_lsn) for each in chain.switches)
    history = server.data.histories.get(server.timeline, ())
    if not ends_as(history, wanted):
        raise PromotedWrong(chain.current, server.timeline, f"its history is {history}")


def _observation(server: PostgresServer) -> PostgresObservation:
    data = server.data
    standby = server.in_recovery
    receiver = server.walreceiver
    timeline = server.timeline
    if standby:
        received = receiver.received_timeline if receiver is not None else None
        minimum = data.minimum_recovery
        timeline = received or max(data.timeline, minimum[0] if minimum is not None else Timeline(0))
    return PostgresObservation(
        version_number=VERSION_NUMBER,
        in_recovery=standby,
        system_identifier=data.system_identifier,
        timeline=timeline,
        postmaster_start=server.started_text,
        up_for_s=server.cluster.world.now_s - server.started_s,
        insert_lsn=None if standby else Lsn(data.log.end),
        flush_lsn=None if standby else Lsn(data.log.flushed),
        receive_lsn=Lsn(server.receive_lsn) if standby and server.receive_lsn is not None else None,
        replay_lsn=Lsn(server.startup.advance()) if standby else None,
        replay_pause=server.startup.pause_state if standby else None,
        startup_wait=CONFLICT if standby and server.startup.busy else None,
        walreceiver=_receiver(server) if standby else None,
        walsenders=tuple(
            Walsender(
                pid=each.child.pid,
                application_name=each.name,
                state=each.state,
                sync_priority=each.priority if each.flush is not None else 0,
                sync_state="quorum" if each.priority else "async",
                sent_lsn=Lsn(each.sent),
                write_lsn=None if each.write is None else Lsn(each.write),
                flush_lsn=None if each.flush is None else Lsn(each.flush),
                replay_lsn=None if each.replay is None else Lsn(each.replay),
                reply_time=str(each.replies),
                backend_start=each.started,
                slot=each.slot,
            )
            for each in server.senders
        ),
        slots=tuple(
            Slot(
                name=name,
                physical=True,
                temporary=False,
                active_pid=server.active_slots[name].child.pid if name in server.active_slots else None,
                wal_status="reserved",
                restart_lsn=None,
                safe_wal_bytes=None,
            )
            for name in sorted(data.slots)
        ),
        synchronous_standby_names=server.settings["synchronous_standby_names"],
        configuration_errors=(),
        pending_restart=(),
        checkpointer_pid=server.checkpointer.pid,
        hot_standby=HOT_STANDBY,
        checksum_failures=0,
    )


def _receiver(server: PostgresServer) -> Walreceiver | None:
    receiver = server.walreceiver
    if receiver is None:
        return None
    return Walreceiver(
        pid=receiver.child.pid,
        status=receiver.status,
        sender_host=receiver.host,
        sender_port=5432,
        slot=receiver.slot or None,
        received_timeline=receiver.received_timeline,
        silent_for_s=max(0.0, server.host.monotonic_s() - receiver.last_message_s),
        last_message=str(receiver.messages),
    )


__all__ = ["PostgresServer", "SimulatedPostgres"]
