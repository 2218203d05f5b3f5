"""The local Postgres, as the duties of the agent use it: one view kept fresh, and verbs with deadlines.

What Postgres really does, and how it is made to do what the protocol needs, is in `instance_manager/postgres/`, behind
the port `LocalPostgres`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from instance_manager.agent.allowing import Allowing
from instance_manager.agent.beat import Beat
from instance_manager.agent.data_directory import DataDirectory
from instance_manager.agent.postgres_port import LocalPostgres, Upstream
from instance_manager.agent.server_files import parse_set
from instance_manager.agent.server_view import ServerView
from instance_manager.agent.slots import Slots
from instance_manager.agent.standby_watch import Walsender
from instance_manager.agent.supervisor_link import SupervisorLink, SupervisorSilent
from instance_manager.config import Configuration
from instance_manager.core.observation import PostgresView
from instance_manager.core.quorum import NOBODY, SynchronousSet
from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, WalEnd
from instance_manager.ports import Clock
from instance_manager.postgres import promotion, voting
from instance_manager.postgres.archive_commands import Allowed
from instance_manager.postgres.configuration import NOBODY_CAN_SATISFY
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.hot_standby import RestartOrder, restart_order
from instance_manager.postgres.observation import PostgresObservation
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.postgres.sql import SqlUnavailable
from instance_manager.postgres.synchronous import SynchronousReplication

log = logging.getLogger("instance_manager.agent.database")

LOOK_DEADLINE_S = 2.0
SHUTTING_DOWN = "the database system is shutting down"
CANNOT_CONNECT_NOW = "57P03"
STRANGER = (MemberId(""), Epoch(0))
"""Somebody is followed, and it is nobody who may be."""
FOLLOW_DEADLINE_S = 5.0
ASK_ARCHIVE_AFTER_S = 2.0
"""A standby that is told to follow and receives nothing for this time may ask the archive for what its primary lacks."""
SYNCHRONOUS_DEADLINE_S = 5.0


class NotAllowed(LocalPostgresError):
    """The server is not in the state for it; the text says which."""


class Database:
    """One server. `run` keeps the view fresh; verbs may be called while it runs."""

    def __init__(
        self,
        configuration: Configuration,
        postgres: LocalPostgres,
        link: SupervisorLink,
        clock: Clock,
        beat: Beat,
        *,
        on_change: Callable[[], None],
    ) -> None:
        self._observe_interval_s = configuration.timings.observe_interval_s
        self._postgres = postgres
        self._link = link
        self._clock = clock
        self._beat = beat
        self.at_rest = False
        """All is well and nothing is pending: fewer looks are enough."""
        self._on_change = on_change
        self._settings = DynamicSettings(postgres.running.settings_file)
        self._synchronous = SynchronousReplication(postgres.running, self._settings)
        self.seen = ServerView(clock)
        self._following: tuple[MemberId, Epoch] | None = None
        self._starts_with: tuple[MemberId, Epoch] | None = None
        """Whom a server follows from its start, however late that comes."""
        self._gate = asyncio.Lock()
        """A reload writes the gate anew as it finds it, and so neither opens nor closes one that was moved meanwhile (P8)."""
        self._slots = Slots(postgres, clock, lambda: self._pid)
        self._stopping_since_s: float | None = None
        self._checkpoint: asyncio.Task[None] | None = None
        self._allowing = Allowing(postgres, may_fetch=lambda: self._following is not None)
        self._promoting = False
        self._may_push = True
        """Not from the moment that archiving is cut off for a stop."""
        self._asked_s = clock.now_s()
        """When this server was last told to follow somebody else than before."""
        self.directory = DataDirectory(postgres)
        self._wake = asyncio.Event()

    # The view.

    @property
    def running(self) -> bool:
        return self._link.postgres is not None

    @property
    def _pid(self) -> int | None:
        return self._link.postgres.pid if self._link.postgres is not None else None

    @property
    def running_read_write(self) -> bool:
        return self._link.postgres is not None and self._link.postgres.mode == "read_write"

    @property
    def answers(self) -> bool:
        return self.running and self.seen.answers

    def start_advances(self) -> bool:
        """Postgres runs and has not answered yet: recovery, or not yet. Bounded by the startup probe's own patience."""
        return self.running and self.seen.last is None

    def view(self) -> PostgresView:
        process, seen = self._link.postgres, self.seen.last
        silent_for_s = float("inf")
        receiving = False
        if process is not None and seen is not None and seen.is_receiving:
            receiving = self.seen.answers
            silent_for_s = self._clock.now_s() - self.seen.message_changed_s
        return PostgresView(
            running=process is not None,
            mode=process.mode if process is not None else None,
            answers=self.answers,
            in_recovery=seen.in_recovery if process is not None and seen is not None else None,
            end=self.seen.end() if process is not None else None,
            receiving=receiving,
            silent_for_s=silent_for_s,
            following=self._following if process is not None else None,
            system_identifier=self.seen.system_identifier() if process is not None else None,
            stopping_for_s=self._clock.now_s() - self._stopping_since_s if self._stopping_since_s is not None else 0.0,
        )

    def not_receiving_for_s(self) -> float:
        """How long a standby that is told to follow has received nothing; 0 for everybody else."""
        if self._following is None or self.seen.last is None:
            return 0.0
        return max(0.0, self._clock.now_s() - self.seen.received_s)

    def walsenders(self) -> tuple[Walsender, ...]:
        if self.seen.last is None or not self.answers:
            return ()
        return tuple(
            Walsender(sender.application_name, sender.state, sender.flush_lsn, sender.reply_time)
            for sender in self.seen.last.walsenders
        )

    @property
    def last_look(self) -> PostgresObservation | None:
        """What the running server told last; None: it does not answer."""
        return self.seen.last if self.answers else None

    async def run(self) -> None:
        """Look again and again; at once when asked to."""
        while True:
            await self._look()
            if self.at_rest:
                # So that nobody judges by a look of the second before.
                self._on_change()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._beat.left_s((2 if self.at_rest else 1) * self._observe_interval_s)):
                    await self._wake.wait()
            self._wake.clear()

    def look_soon(self) -> None:
        self._wake.set()

    async def _look(self) -> None:
        process = self._link.postgres
        before = (self.seen.answers, self.seen.last.is_receiving if self.seen.last else None)
        if process is None:
            self._forget()
        else:
            if process.pid != self.seen.of_pid:
                self._forget()
                self.seen.of_pid = process.pid
                self._following = self._starts_with
                self._asked_s = self._clock.now_s()
            try:
                seen = await self._postgres.observe(deadline_s=LOOK_DEADLINE_S)
                self.seen.take(seen, follows=self._following is not None)
                if self._slots.of_pid != process.pid and process.mode == "standby":
                    await self._slots.drop_old(process.pid)
            except (LocalPostgresError, OSError) as error:
                self.seen.answers = False
                if SHUTTING_DOWN in str(error) and self._stopping_since_s is None:
                    self._stopping_since_s = self._clock.now_s()
        # Looked at anew: it may have been promoted meanwhile, and then it archives. What a slow disk did not take is tried again.
        if not self._promoting and self._link.postgres is not None:
            standby = self._link.postgres.mode == "standby"
            await self._allowing.allow(self._standby_may() if standby else self._primary_may())
        if before != (self.seen.answers, self.seen.last.is_receiving if self.seen.last else None):
            self._on_change()

    def _standby_may(self) -> Allowed | None:
        """A standby asks the archive only where its primary did not help for a while: an election never stands behind it."""
        asked_for_s = self._clock.now_s() - self._asked_s
        return "fetch" if min(asked_for_s, self.not_receiving_for_s()) > ASK_ARCHIVE_AFTER_S else None

    def _primary_may(self) -> Allowed | None:
        return "push" if self._may_push else None

    def _forget(self) -> None:
        if self.seen.last is not None or self.seen.of_pid is not None:
            self._postgres.forget()
        self.seen.forget()
        self._following = None
        self._stopping_since_s = None

    async def answers_new_connection(self, deadline_s: float) -> None:
        """Proof of health: a stopped postmaster still serves old connections. Raises if there is no answer in time."""
        try:
            await self._postgres.answers_new_connection(deadline_s=deadline_s)
        except SqlUnavailable as error:
            # A long recovery is no sign of bad health as long as the postmaster says that it starts (cloudnative-pg#11024).
            if error.sqlstate != CANNOT_CONNECT_NOW or SHUTTING_DOWN in str(error):
                raise

    # Starting and stopping.

    async def start_standby(self, upstream: Upstream | None = None, *, chain: TimelineChain | None = None) -> None:
        """Nobody can satisfy the list, clients may read, and nobody is followed (P1, R5).

        `chain`: the history that this log is known to lie in.

        `upstream`: for a directory that is not consistent without it; its epoch is promised and persisted already.
        """
        if chain is not None:
            await self._postgres.forget_dead_ends(chain)
        await self._allowing.allow(None, server_runs=False)
        await self._postgres.set_standby_signal(True)
        async with self._gate:
            await self._postgres.write_files(NOBODY, Access.OPEN, standby=True, upstream=upstream)
        self._starts_with = (upstream.holder, upstream.epoch) if upstream is not None else None
        await self._start("standby", None)

    async def start_primary(self, epoch: Epoch, opening: SynchronousSet) -> None:
        """Only for the holder of the Lease with a permit; clients are kept out (P8)."""
        async with self._gate:
            await self._postgres.write_files(opening, Access.CLOSED, standby=False)
        await self._postgres.set_standby_signal(False)
        self._may_push = True
        await self._allowing.allow("push")
        self._starts_with = None
        await self._start("read_write", epoch)

    async def _start(self, mode: str, epoch: Epoch | None) -> None:
        command = await self._postgres.prepare_start()
        await self._link.start(mode, epoch, command.argv, command.environment)
        # Look often while it starts: each look is an event somebody waits for.
        for _ in range(100):
            await self._look()
            if self.seen.answers or not self.running:
                break
            await self._clock.sleep(0.05)
        self._on_change()

    async def stop(self, *, deadline_s: float, archive_for_s: float = 0.0) -> bool:
        """Fast shutdown; False: it still runs after the deadline.

        Postgres archives what is left before it ends; after `archive_for_s` that is cut off, and nothing is lost by it: the
        log stays, here and where it was received.
        """
        if not self.running:
            return True
        self._postgres.forget()
        cut_off, asked = None, False
        try:
            if archive_for_s <= 0:
                await self._end_archiving()
            else:
                cut_off = asyncio.create_task(self._end_archiving(archive_for_s))
            with contextlib.suppress(SupervisorSilent):
                # It waits there and is carried out: whoever asked goes on to see the end of it, or to kill.
                await self._link.signal("INT")
            asked = True
            stopped = await self._link.wait_stopped(deadline_s)
        finally:
            # Who was cut off before it asked leaves a server that goes on, and archives.
            self._may_push = self._may_push or not asked
            if cut_off is not None:
                cut_off.cancel()
        if stopped:
            self._forget()
        return stopped

    async def _end_archiving(self, after_s: float = 0.0) -> None:
        if after_s > 0:
            await self._clock.sleep(after_s)
        self._may_push = False
        await self._allowing.allow(None)

    async def kill(self) -> None:
        """Every process, at once; returns when none is left."""
        self._postgres.forget()
        await self._link.kill()
        await self._link.wait_stopped(1.0)
        self._forget()

    # Following and voting.

    async def follow(self, upstream: Upstream) -> None:
        await voting.follow(
            self._postgres.running,
            self._settings,
            self._postgres.primary_settings(upstream),
            upstream.member_id,
            deadline_s=FOLLOW_DEADLINE_S,
        )
        self.seen.proven = None
        if self._following is None or self._following[0] != upstream.holder:
            self._asked_s = self._clock.now_s()
        self._following = (upstream.holder, upstream.epoch)
        # A winner that gave the Lease back has slots that nobody will stream through, and a gate that it closed to promote.
        self._slots.of_pid = None
        if await self._postgres.written_access() is Access.CLOSED:
            await self.open_gate()
        self.look_soon()

    async def adopt(self, upstream: Upstream, *, promised: bool) -> None:
        """Remember whom the server that runs was told to follow, if anybody: `upstream`, or a stranger."""
        settings = await self._settings.file.read()
        told = (settings.get("primary_conninfo", ""), settings.get("primary_slot_name", ""))
        if self._following is not None or not told[0]:
            return
        same = promised and told == (self._postgres.primary_settings(upstream), upstream.member_id)
        self._following = (upstream.holder, upstream.epoch) if same else STRANGER

    async def dead_ends(self, chain: TimelineChain) -> tuple[Timeline, ...]:
        """Timelines that recovery may take for its own, and that are none of the cluster's; see `postgres.promotion`."""
        return tuple(timeline for timeline in await self._postgres.histories() if not chain.knows(timeline))

    async def stop_following(self, chain: TimelineChain, *, deadline_s: float) -> WalEnd:
        """P2, P3: nothing is received any more, proven; the end of the log on this disk."""
        if self._link.postgres is None or self._link.postgres.mode != "standby":
            raise NotAllowed("Postgres does not run as a standby here")
        self._following = self._starts_with = None
        began_s = self._clock.now_s()
        await self._allowing.withhold(self._link.postgres.pid, deadline_s=deadline_s)
        await voting.stop_following(self._postgres.running, self._settings, deadline_s=deadline_s)
        left_s = max(0.1, deadline_s - (self._clock.now_s() - began_s))
        end = await self._postgres.position(chain, deadline_s=left_s)
        self.seen.timeline = max(self.seen.timeline, end.timeline)
        self.seen.proven = end
        self.look_soon()
        return end

    async def proven_end(self, chain: TimelineChain) -> WalEnd | None:
        """The end of the log on this disk; None while it still receives, for then it is only a lower bound."""
        if self._link.postgres is None and self.directory.is_startable:
            end = (await self.directory.stopped_facts(chain)).end
            return end if self._link.postgres is None else None
        if self._link.postgres is None or self._link.postgres.mode != "standby":
            return None
        await self._look()
        if not self.seen.answers or self.seen.last is None or self.seen.last.walreceiver is not None:
            return None
        if self.seen.proven is not None:
            return self.seen.proven
        # Not remembered: until it is told to stop, a walreceiver may come and go between two looks.
        return await self._postgres.position(chain, deadline_s=1.0)

    async def promote(
        self, *, chain: TimelineChain, epoch: Epoch, deadline_s: float, archived_to: Lsn | None = None
    ) -> None:
        """Become exactly the claimed timeline (P4); stopped again if it became anything else.

        `archived_to`: what the primary before told of its archive; None: nothing is known.
        """
        async with self._gate:
            await self._postgres.write_access(Access.CLOSED)
        await self._settings.change({"synchronous_standby_names": NOBODY_CAN_SATISFY}, deadline_s=deadline_s)
        self._promoting = self._may_push = True
        try:
            # Before: the new timeline's history waits to be archived from the first moment.
            await self._allowing.allow("push")
            await self._allowing.ask_to_archive_again(archived_to)
            self.seen.timeline = await self._postgres.promote(
                chain, lambda: self._link.promote(epoch), deadline_s=deadline_s
            )
        except (promotion.PromotedWrong, promotion.PromotionFailed) as error:
            if isinstance(error, promotion.PromotedWrong) or error.triggered:
                await self.kill()
            raise
        finally:
            self._promoting = False
        await self._look()

    # Serving.

    async def set_synchronous(self, wanted: SynchronousSet) -> None:
        """Tell Postgres, and see that no process of it runs on an older view (P1, P5)."""
        await self._synchronous.apply(wanted, deadline_s=SYNCHRONOUS_DEADLINE_S)
        # A walsender releases waiters when its standby replies, which without new WAL is once a second.
        await self._postgres.emit_message(deadline_s=2.0)

    async def barrier(self, timeline: Timeline, *, deadline_s: float) -> None:
        """k members of the confirmed set have flushed all that the log holds now (P10); BarrierNotPassed."""
        await self._synchronous.barrier(timeline, deadline_s=deadline_s)

    async def synchronous_set(self) -> SynchronousSet | None:
        """What the file tells Postgres now; None if it is not one of ours."""
        names = (await self._settings.file.read()).get("synchronous_standby_names")
        return parse_set(names) if names is not None else None

    async def open_gate(self) -> None:
        async with self._gate:
            await self._postgres.write_access(Access.OPEN)
        await self._reload()

    async def gate_is_open(self) -> bool:
        return await self._postgres.written_access() is Access.OPEN

    async def prepare_slots(self, members: frozenset[MemberId]) -> None:
        """A slot for each member, none for others."""
        await self._slots.prepare(members)

    async def fill_gaps(self, chain: TimelineChain) -> None:
        """Whoever follows asks for every history; a promotion that was cut off, or a clone, may lack some (P4)."""
        await self._postgres.fill_gaps(chain)

    async def create_roles(self) -> None:
        """Roles and the application's database; idempotent."""
        done = await self._postgres.create_roles()
        if done:
            log.info("created or mended: %s", ", ".join(done))

    async def checkpoint(self, *, deadline_s: float) -> None:
        await self._postgres.checkpoint(deadline_s=deadline_s)

    def checkpoint_soon(self) -> None:
        """After a promotion, for pg_rewind of others; nobody waits for it."""

        async def run() -> None:
            with contextlib.suppress(LocalPostgresError):
                await self.checkpoint(deadline_s=300)

        self._checkpoint = asyncio.create_task(run())

    async def rewind(self, host: str, port: int, timeline: Timeline) -> None:
        async with self._gate:
            await self._postgres.write_files(NOBODY, Access.CLOSED, standby=False)
        await self.directory.rewind(host, port, timeline)

    async def reload_configuration(self, configuration: Configuration) -> tuple[str, ...]:
        """Take over changed parameters and access rules, the gate as it is; returns the names that need a restart."""
        async with self._gate:
            access = await self._postgres.written_access()
            names = await self._postgres.replace_static(configuration)
            if access is not None:
                await self._postgres.write_access(access)
        if self.running:
            await self._reload()
        return names

    async def wake_archiving(self) -> None:
        """A reload ends the minute's pause that Postgres's archiver makes after three failures."""
        if self.running:
            await self._reload()

    def restart_order(self) -> RestartOrder:
        """Who must be restarted first for the configuration to take effect everywhere without stopping replay."""
        if self.seen.last is None:
            return RestartOrder.ANY
        return restart_order(self.seen.last.hot_standby, self._postgres.wanted_hot_standby())

    async def _reload(self) -> None:
        await self._settings.file.reload()
