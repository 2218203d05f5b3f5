"""The loop of an instance: observe, decide, act.

It wakes when something changes (the Lease, a peer, Postgres, the supervisor) and otherwise a few times a second. One
operation runs at a time; a decision to stop writing ends any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from instance_manager.agent import stopping
from instance_manager.agent.archiving import Archiving
from instance_manager.agent.context import Context, OperationFailed
from instance_manager.agent.control import Control
from instance_manager.agent.details import details_of
from instance_manager.agent.elections import Elections
from instance_manager.agent.extension import keep_extending
from instance_manager.agent.giving_back import give_back
from instance_manager.agent.giving_up import GivingUp
from instance_manager.agent.lease_keeper import RenewalFacts, WriteRefused
from instance_manager.agent.membership import Membership
from instance_manager.agent.observing import Observing
from instance_manager.agent.operator_failover import lossy_failover
from instance_manager.agent.own_verbs import reinitialise, restart_postgres
from instance_manager.agent.peer_service import PeerService
from instance_manager.agent.peering import HEARTBEAT_S
from instance_manager.agent.primary import PrimaryDuties
from instance_manager.agent.proof_of_death import look_for_death
from instance_manager.agent.rejoining import Rejoining
from instance_manager.agent.repairing import repair_lease
from instance_manager.agent.reporting import Reporting
from instance_manager.agent.supervisor_link import SupervisorError
from instance_manager.agent.volume import VolumeUnusable
from instance_manager.core.decide import Decision, decide
from instance_manager.core.observation import Observation
from instance_manager.core.rest import is_at_rest
from instance_manager.core.roles import Role
from instance_manager.http.details import Details
from instance_manager.http.ports import ControlProgress, ControlResult
from instance_manager.ports import CoordinationError, PeerUnreachable
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.status import ClusterStatus, Probes

log = logging.getLogger("instance_manager.agent")

TICK_S = 0.2
REST_S = 1.5
"""Where all is well, nothing is pending and nothing happens (`core.rest`), each look at Postgres wakes the loop, once a second;
a look that does not come back for longer than this is not waited for."""
PAUSE_S = 1.5
"""The loop was not scheduled for this time: ages of other things are not theirs."""
LAST_WORDS_S = 0.5
RETRY_S = 0.5
"""A failed operation is not tried again before this time."""
AGAIN_S = 0.1
"""Nor is one that succeeded, before this time."""
ENDS_ANY = frozenset({"kill", "stop", "leave"})
"""Decisions that end whatever else is under way."""
TAKEOVERS = frozenset({"stand", "take_release", "take_by_time"})
TAKEOVER_KINDS = {"stand": "election", "take_release": "handover", "take_by_time": "time"}
"""As metrics name them."""
TO_THE_END = frozenset(
    {
        "promote",
        "initialise",
        "rejoin",
        "resume",
        "switch_over",
        "hand_over",
        "kill",
        "stop",
        "fence",
        "repair",
        "reaffirm",
        "give_back",
    }
)
"""Operations that only those may end."""
TOUCHES_DIRECTORY = frozenset({"initialise", "start_standby", "resume", "rejoin"})
"""Operations on a directory in which no server may start meanwhile."""
WITH_POSTGRES = frozenset({Role.STANDBY, Role.CANDIDATE, Role.PRIMARY, Role.PROMOTING, Role.STOPPING})

EXPECTED_ERRORS = (
    OperationFailed,
    WriteRefused,
    LocalPostgresError,
    CoordinationError,
    SupervisorError,
    VolumeUnusable,
    PeerUnreachable,
    OSError,
    TimeoutError,
    ValueError,
    KeyError,
)


class Agent:
    """One instance. `run` ends only when the instance has left, or by an error that the supervisor mends by a restart."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.membership = Membership(context)
        self.observing = Observing(context)
        self.elections = Elections(context)
        self.primary = PrimaryDuties(context)
        self.giving_up = GivingUp(context, self.primary)
        self.rejoining = Rejoining(context)
        self.archiving = Archiving(context)
        self.reporting = Reporting(context, self.archiving.state)
        self.control_verbs = Control(
            context,
            self.reporting,
            restart_postgres=lambda: restart_postgres(context),
            reload=self.reload,
            reinitialise=lambda: reinitialise(context),
            lossy_failover=lambda preview: lossy_failover(context, self.reporting.own_state(), preview=preview),
        )
        self.peer_service = PeerService(self)
        self._operation: asyncio.Task[None] | None = None
        self._operation_act = ""
        self._reloads: set[asyncio.Task[str]] = set()
        self._not_before_s: dict[str, float] = {}
        self._left = asyncio.Event()
        self._last_tick_s = context.clock.now_s()
        self._was_running = False
        self._adopted = False
        self._announced: tuple[object, ...] = ()
        self.reload_configuration: Callable[[], Awaitable[str]] | None = None
        self.exposition: Callable[[], Awaitable[bytes]] | None = None
        """One scrape of this instance's metrics."""

    # The instance, as HTTP sees it.

    def probes(self) -> Probes:
        return self.reporting.probes()

    def status(self) -> ClusterStatus:
        return self.reporting.status()

    def details(self) -> Details:
        return details_of(self.context, self.reporting.postgres_word())

    async def metrics(self) -> bytes:
        return await self.exposition() if self.exposition is not None else b""

    async def answer_peer(self, call: str, body: bytes) -> bytes:
        return await self.peer_service.answer(call, body)

    def tell_peer(self, call: str, body: bytes) -> AsyncGenerator[bytes, None]:
        return self.peer_service.tell(call, body)

    def control(self, verb: str, arguments: dict[str, object]) -> AsyncIterator[ControlProgress | ControlResult]:
        return self.control_verbs.carry_out(verb, arguments)

    # The loop.

    async def run(self) -> None:
        c = self.context
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(c.link.run()),
                tasks.create_task(c.keeper.run()),
                tasks.create_task(c.peers.run()),
                tasks.create_task(c.publication.run()),
                tasks.create_task(c.database.run()),
                tasks.create_task(c.health.run()),
                tasks.create_task(self._tick()),
                tasks.create_task(look_for_death(c)),
                tasks.create_task(keep_extending(c)),
                tasks.create_task(self.archiving.run()),
            ]
            await self._loop()
            await c.publication.finish(deadline_s=LAST_WORDS_S)
            await c.link.goodbye()
            for task in background:
                task.cancel()

    async def _tick(self) -> None:
        """Tell the supervisor, which kills an agent after 3 s of silence, and peers that this loop lives; notice when it was not
        scheduled."""
        c = self.context
        while True:
            self._notice_pause()
            c.link.tick()
            c.announce()
            due_s = c.clock.now_s() + c.beat.left_s(HEARTBEAT_S)
            await c.beat.sleep(HEARTBEAT_S)
            c.measures.loop_lag.observe(max(0.0, c.clock.now_s() - due_s))

    def _notice_pause(self) -> None:
        """Before anything is judged by its age: a pause of this process is not the disk's, Postgres's or the peers'."""
        c = self.context
        now_s = c.clock.now_s()
        if now_s - self._last_tick_s > PAUSE_S:
            log.warning("this process was not scheduled for %.1f s", now_s - self._last_tick_s)
            c.health.was_paused()
            c.peers.was_paused()
        self._last_tick_s = self.reporting.loop_ticked_s = now_s

    async def _loop(self) -> None:
        c = self.context
        await c.link.greeted()
        while not self._left.is_set():
            c.wake.clear()
            self._notice_pause()
            self._follow_events()
            self.membership.follow()
            self.membership.notice_lost_data()
            c.publish_role()
            self.archiving.look()
            if not self._adopted:
                await self._adopt()
            observation = self.observing.observe()
            decision = decide(observation)
            await self._act(decision)
            if (urgent := self.reporting.urgent()) != self._announced:
                self._announced = urgent
                c.announce()
            self._rest(observation, decision)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(c.beat.left_s(REST_S) if c.database.at_rest else TICK_S):
                    await c.wake.wait()

    def _rest(self, observation: Observation, decision: Decision) -> None:
        """Set the pace. Rest ends with a look at Postgres: what ended it is perhaps to be seen there too."""
        c = self.context
        operating = self._operation is not None and self._operation_act != "serve"
        rests = (
            not operating
            and c.health.is_fresh
            and (not c.holds_lease or self.primary.watch.all_are_heard)
            and is_at_rest(observation, decision, suspects=c.suspects, settled=self.primary.is_settled)
        )
        if c.database.at_rest and not rests:
            c.database.look_soon()
        c.database.at_rest = rests

    async def _adopt(self) -> None:
        """An agent that restarted over a running standby: whom that follows, its settings tell."""
        c = self.context
        record = c.keeper.record
        standby = c.link.postgres is not None and c.link.postgres.mode == "standby"
        if not standby or (record is not None and record.holder is not None):
            self._adopted = True
        if standby and record is not None and record.holder is not None:
            with contextlib.suppress(*EXPECTED_ERRORS):
                await self.rejoining.adopt(record)

    def _follow_events(self) -> None:
        """What happened to Postgres since the last look."""
        c = self.context
        running = c.link.postgres is not None
        if self._was_running and not running:
            exit_ = c.link.last_exit
            how = f"{exit_.reason}, {exit_.description}" if exit_ is not None else "unknown"
            log.warning("Postgres has ended (%s)", how)
            if exit_ is not None and exit_.reason == "fenced":
                c.measures.self_fences.add("hard_deadline")
            c.gate_open = False
            if c.holds_lease and not c.link.expected_exit:
                c.start_yielding(f"Postgres ended by itself ({how})")
            if c.role in WITH_POSTGRES:
                c.take_role(Role.STOPPED, f"Postgres has ended ({how})")
        elif (
            not running
            and c.role in (*WITH_POSTGRES, Role.INITIALISING)
            and (self._operation is None or self._operation.done())
        ):
            c.take_role(Role.STOPPED, "Postgres does not run")
        self._was_running = running
        standby = c.link.postgres is not None and c.link.postgres.mode == "standby"
        record = c.keeper.record
        if c.role is Role.FENCED and record is not None and c.configuration.name not in record.fenced:
            c.take_role(Role.STOPPED, "unfenced")
        idle = self._operation is None or self._operation.done()
        if standby and c.role in (Role.STARTING, Role.STOPPED, Role.STOPPING) and idle:
            c.take_role(Role.STANDBY, "Postgres runs as a standby")
        if c.database.running_read_write and c.role is Role.STOPPED and idle:
            c.take_role(Role.PROMOTING, "Postgres has started after all")
        holds = record is not None and record.holder is not None and record.holder.member_id == c.volume.state.member_id
        if not holds:
            c.stop_yielding()
        elif record is not None and record.system_identifier is not None and not c.database.directory.is_startable:
            c.start_yielding("its data directory cannot be started")
        if c.database.running_read_write:
            self.primary.look()
        c.health.expect_sql(c.database.running_read_write)
        if c.link.reload_asked:
            c.link.reload_asked = False
            task = asyncio.create_task(self.reload())
            # The loop itself keeps no task.
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)
            task.add_done_callback(_log_outcome)

    # Acting.

    async def _act(self, decision: Decision) -> None:
        c = self.context
        act = decision.act
        if self._operation is not None and self._operation.done():
            ended, self._operation = self._operation, None
            if not ended.cancelled():
                # What nobody expected ends this agent: the supervisor starts another, and does not spin.
                ended.result()
        if self._operation is not None:
            if act == self._operation_act:
                return
            if act == "promote" and self._operation_act in TAKEOVERS:
                # It has just taken the Lease, and goes on to promote by itself.
                return
            if act == "leave" and self._operation_act == "hand_over" and not c.database.running:
                # The Lease is released, and who takes it is told yet. A server that runs is left at once.
                return
            if self._operation_act in TO_THE_END and act not in ENDS_ANY:
                return
            if act == "wait" and self._operation_act != "serve":
                return
            await self._end_operation()
        c.journal.decided(act, decision.reason)
        c.measures.decided(act)
        if act == "wait":
            return
        if c.clock.now_s() < self._not_before_s.get(act, 0.0):
            return
        if act in TOUCHES_DIRECTORY and c.link.may_start_yet:
            c.journal.note("wait", "a start was given up, and the supervisor has not answered it: it may happen yet")
            return
        self._operation_act = act
        self._operation = asyncio.create_task(self._operate(decision), name=act)

    async def _end_operation(self) -> None:
        if self._operation is not None:
            self._operation.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._operation
            self._operation = None
            self.context.operation = None

    async def _operate(self, decision: Decision) -> None:
        c = self.context
        try:
            await getattr(self, f"_{decision.act}")(decision.reason)
        except EXPECTED_ERRORS as error:
            c.journal.note(f"{decision.act} failed", f"{error}" or type(error).__name__)
            self._not_before_s[decision.act] = c.clock.now_s() + RETRY_S
        else:
            if decision.act not in ENDS_ANY and decision.act != "serve":
                # One that changed nothing is not done again without a breath.
                self._not_before_s[decision.act] = c.clock.now_s() + AGAIN_S
        finally:
            c.operation = None
            if decision.act != "serve":
                c.wake.set()

    async def _create_record(self, _: str) -> None:
        await self.rejoining.create_record(f"{self.context.chance.getrandbits(32):08x}")

    async def _initialise(self, _: str) -> None:
        await self.rejoining.initialise()

    async def _start_standby(self, reason: str) -> None:
        await self.rejoining.start_standby(reason)

    async def _resume(self, _: str) -> None:
        await self.primary.resume()

    async def _rejoin(self, reason: str) -> None:
        await self.rejoining.rejoin(reason)

    async def _follow(self, _: str) -> None:
        c = self.context
        await self.rejoining.follow()
        if c.role is not Role.STANDBY:
            c.take_role(Role.STANDBY, "follows the primary")

    async def _stand(self, reason: str) -> None:
        await self._take_over(self.elections.stand, reason)

    async def _take_release(self, reason: str) -> None:
        await self._take_over(self.elections.take_release, reason)

    async def _take_by_time(self, reason: str) -> None:
        await self._take_over(self.elections.take_by_time, reason)

    async def _take_over(self, take: Callable[[str], Awaitable[None]], reason: str) -> None:
        c = self.context
        if c.role in (Role.STOPPED, Role.STOPPING, Role.PROMOTING):
            c.take_role(Role.STANDBY, "Postgres runs as a standby")
        c.take_role(Role.CANDIDATE, reason)
        c.measures.takeover_begins(
            TAKEOVER_KINDS[self._operation_act], c.clock.now_s(), self.observing.suspected_since_s
        )
        try:
            await take(reason)
        finally:
            if not c.holds_lease and c.role is Role.CANDIDATE:
                c.take_role(Role.STANDBY, "did not take the Lease")
        if c.holds_lease:
            c.measures.takeover_reached("election", c.clock.now_s())
            await self._promote(reason)

    async def _promote(self, _: str) -> None:
        c = self.context
        self._operation_act = "promote"
        if c.role is Role.STANDBY:
            c.take_role(Role.CANDIDATE, "the write of which nothing was known had taken the Lease")
        # The others follow at once: commits of this primary wait for them.
        nudge = asyncio.create_task(c.peers.nudge(c.peers.names))
        try:
            await self.primary.promote()
        finally:
            await nudge

    async def _give_back(self, reason: str) -> None:
        await give_back(self.context, self.primary.writes.settled, reason)

    async def _serve(self, _: str) -> None:
        await self.primary.serve()

    async def _switch_over(self, _: str) -> None:
        await self.giving_up.switch_over()

    async def _hand_over(self, reason: str) -> None:
        await self.giving_up.hand_over(reason)

    async def _reaffirm(self, reason: str) -> None:
        await self.primary.reaffirm(reason)

    async def _kill(self, reason: str) -> None:
        await stopping.kill(self.context, reason)

    async def _stop(self, reason: str) -> None:
        await stopping.stop(self.context, reason)

    async def _fence(self, reason: str) -> None:
        await stopping.fence(self.context, reason)
        await self.context.clock.sleep(RETRY_S)

    async def _leave(self, reason: str) -> None:
        await stopping.stop_to_leave(self.context, reason)
        self._left.set()

    async def _repair(self, reason: str) -> None:
        await repair_lease(self.context, self.primary.ask_ends, reason)

    async def reload(self) -> str:
        if self.reload_configuration is None:
            return "nothing to reload"
        return await self.reload_configuration()

    def renewal_facts(self) -> RenewalFacts:
        """What cannot be started is not held on to: without voters, and where the Lease is damaged, only its end lets another
        take it (R3)."""
        c = self.context
        refusal = c.health.unhealthy()
        record = c.keeper.record
        known = record is not None and record.system_identifier is not None
        if refusal is None and known and not c.database.running:
            if not c.database.directory.is_startable:
                refusal = "its data directory cannot be started"
            elif (damage := c.keeper.view().damage) is not None:
                refusal = f"Postgres does not run, and is not started by a Lease that is damaged: {damage}"
        running = c.link.postgres is not None and c.link.postgres.mode == "read_write"
        position = c.database.view().end if running else None
        return RenewalFacts(holder=c.holder, refusal=refusal, position=position, opened=c.gate_open)


def _log_outcome(task: asyncio.Future[str]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.warning("reload failed: %s", task.exception())
