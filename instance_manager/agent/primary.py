"""The duties of a primary: the quorum, the gate for clients, slots, and who could take over from it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.agent.giving_back import taken_at_s
from instance_manager.agent.peering import EndAnswer, EndRequest
from instance_manager.agent.record_writes import RecordWrites
from instance_manager.agent.standby_watch import StandbyWatch
from instance_manager.core.lease import (
    judge_restart,
    may_reaffirm,
    reaffirmed,
    resumed,
    with_mode,
    with_switchover,
    with_voters,
    without_switchover,
)
from instance_manager.core.quorum import (
    ALONE,
    NOBODY,
    QuorumStep,
    RecordBehindBarrier,
    RecordVoters,
    SetSynchronous,
    Settled,
    SynchronousSet,
    invariant_holds,
    next_step,
    synchronous_for,
    wanted_set,
)
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch, Lsn, MemberId, MemberName, Timeline, member_name_of
from instance_manager.postgres.synchronous import BarrierNotPassed

SWITCHOVER_MAXIMUM_LAG_BYTES = 16 * 1024 * 1024
BARRIER_DEADLINE_S = 5.0
OVERTAKEN_LOOK_S = 0.2
"""How often it is asked, while a barrier is waited for, whether the step that needs it is still the next one."""
GATE_DEADLINE_S = 2.0


class PrimaryDuties:
    def __init__(self, context: Context) -> None:
        self._c = context
        timings = context.configuration.timings
        self.watch = StandbyWatch(stable_s=timings.stable_s, silent_after_s=timings.relax_after_s)
        self.writes = RecordWrites(context)
        self._reaffirm_pause_s = 0.5
        self._mode_changed_s: float | None = None
        self.quorum_state = ""
        self.is_settled = False
        """At the last step nothing of the quorum was to be changed."""
        self._gaps_filled_for: Timeline | None = None

    # Opening.

    async def promote(self) -> None:
        """The Lease is taken and Postgres is a standby here: become exactly the claimed timeline (P4)."""
        c = self._c
        record = c.record
        c.take_role(Role.PROMOTING, f"the Lease is taken, epoch {record.epoch}")
        if record.chain is None or not record.chain.switches:
            raise OperationFailed("the record claims no timeline")
        switch = record.chain.switches[-1]
        await self._remember(record)
        c.synchronous, c.synchronous_confirmed, c.gate_open = NOBODY, False, False
        # Before, so that the others stream at once: commits wait for them.
        await c.database.prepare_slots(self._everybody())
        await c.database.promote(
            chain=record.chain,
            epoch=record.epoch,
            deadline_s=self._promotes_within_s(),
            archived_to=self._archived_to(),
        )
        c.opened_s = c.clock.now_s()
        c.measures.takeover_reached("promotion", c.opened_s)
        c.journal.note("promoted", f"timeline {switch.timeline} from {switch.parent}, epoch {record.epoch}")

    def _archived_to(self) -> Lsn | None:
        """What the primary before this one told of its archive; None: nothing, or it is not known who that was."""
        c = self._c
        took = c.volume.state.took
        before = took.found.holder or took.found.release if took is not None else None
        if before is None or c.archived_to is None:
            return None
        member = before.member_id if isinstance(before, Holder) else before.releaser
        return c.archived_to[1] if c.archived_to[0] == member else None

    def _promotes_within_s(self) -> float:
        """A first promotion ends when the Lease would be given back; a later one, of a holder that cannot, has its own time."""
        c = self._c
        timeout_s = c.configuration.timings.promote_timeout_s
        left_s = taken_at_s(c) + timeout_s - c.clock.now_s() if c.volume.state.took is not None else timeout_s
        return left_s if left_s > 0 else timeout_s

    async def resume(self) -> None:
        """The holder starts again: it asks enough voters that nobody is ahead (R16), writes itself a later epoch, starts."""
        c = self._c
        await c.keeper.read()
        record = c.record
        if record.holder is None or record.holder.member_id != c.volume.state.member_id:
            raise OperationFailed("the Lease is not this directory's any more")
        if (damage := c.keeper.view().damage) is not None:
            raise OperationFailed(damage)
        if c.database.running:
            await c.database.kill()
        facts = await c.database.directory.stopped_facts(record.chain)
        if facts.half_rewound or facts.end is None or record.chain is None:
            raise OperationFailed("the data directory cannot be started as a primary: its log's end is not known")
        chain, record = record.chain, await self.writes.unrelaxed(record)
        ends = await self.ask_ends(record)
        same_boot = c.volume.state.wrote_in_boot == c.boot_id
        why_not = judge_restart(
            record, facts.end, {voter: answer.end for voter, answer in ends.items()}, same_boot=same_boot
        )
        if why_not is not None:
            c.start_yielding(why_not)
            raise OperationFailed(why_not)
        permitted = c.link.permit.epoch if c.link.permit is not None else record.epoch
        highest = max(
            [record.epoch, permitted, c.volume.state.highest_epoch, *(answer.highest_epoch for answer in ends.values())]
        )
        holder = c.holder
        if holder is None:
            raise OperationFailed("this instance is no member")
        c.take_role(Role.PROMOTING, "it still holds the Lease and no voter is ahead")
        grounds = record.grounds()
        # First: whatever becomes of the write, this epoch is never used again (R3).
        await c.volume.save(lambda state: state.seen(Epoch(highest + 1)))
        begun = chain.current in facts.histories
        along = facts.recovers_along == chain.current
        end = facts.end

        def change(current: ClusterRecord) -> ClusterRecord:
            return resumed(
                current, holder=holder, highest_epoch=Epoch(highest), end=end, claim_begun=begun, writable_along=along
            )

        stored = await c.keeper.write(change, grounds=grounds)
        record = stored.record
        c.journal.note("resume", f"epoch {record.epoch}; its log ends at {facts.end}, and no voter is ahead")
        await self._remember(record)
        c.gate_open = False
        if record.chain is not None and facts.end.timeline != record.chain.current:
            # It took the Lease and ended before it took up its claim: promote, from where the claim forks.
            await c.database.start_standby(chain=record.chain)
        else:
            opening = self._opening_set(record)
            # Before: it may start although nobody answered, and what was confirmed was so of the server before it.
            c.synchronous, c.synchronous_confirmed = opening, False
            await c.database.start_primary(record.epoch, opening)
            c.opened_s = c.clock.now_s()
        c.stop_yielding()

    async def _remember(self, record: ClusterRecord) -> None:
        """On the volume, before this directory becomes writable."""
        c = self._c
        await c.volume.save(
            lambda state: replace(
                state.writing(record, None), was_primary=True, initialising=False, wrote_in_boot=c.boot_id
            )
        )

    def _opening_set(self, record: ClusterRecord) -> SynchronousSet:
        if record.mode == "asynchronous" or c_alone(self._c):
            return ALONE
        return synchronous_for(record.voters, record.quorum, self._everybody())

    def _everybody(self) -> frozenset[MemberId]:
        """S of a winner that opens: all members that are known, besides itself (R13)."""
        found = {
            peer.state.member_id
            for peer in self._c.peers.views().values()
            if peer.state is not None and peer.state.member_id is not None
        }
        return frozenset(found)

    async def ask_ends(self, record: ClusterRecord) -> dict[MemberId, EndAnswer]:
        """The voters' proven ends and promises, asked just now."""
        names = tuple(sorted(member_name_of(voter) for voter in record.voters))
        answers = await self._c.peers.ask_all(
            names, "end", EndRequest(cluster_uid=record.cluster_uid), EndAnswer, deadline_s=3.0
        )
        return {answer.member_id: answer for answer in answers.values() if answer.member_id is not None}

    # Serving.

    async def serve(self) -> None:
        """One step of what a primary does all the time; called again at once while there is something to do."""
        c = self._c
        self.look()
        record = c.record
        view = c.keeper.view()
        if not c.database.answers or view.unknown_write or view.damage is not None:
            # R1: a new agent's first act is a write of its own, before it touches Postgres. R3: nothing is raised or
            # lowered by a damaged record.
            return
        if not c.volume.state.remembers(record):
            # An agent before this one wrote it, and ended before it could note so: nothing is done by what a repair of
            # the Lease would not know (R3).
            await c.volume.save(lambda state: state.writing(record, None))
        await c.database.prepare_slots(self._everybody())
        if record.chain is not None and self._gaps_filled_for != record.chain.current:
            await c.database.fill_gaps(record.chain)
            self._gaps_filled_for = record.chain.current
        if not c.gate_open and not c.synchronous_confirmed:
            await self._set_synchronous_for_opening(record)
        if not c.gate_open:
            try:
                await self._open_gate(record)
            except BarrierNotPassed as error:
                # Its voters may be away: then the quorum changes first, like that of any primary.
                c.journal.note("not open yet", str(error))
        if record.switchover is not None and record.switchover.epoch != record.epoch:
            await self.writes.write(record, without_switchover)
        elif record.switchover is None and await self._leave_to_a_member(record):
            return
        await self._quorum_step(record)

    async def _leave_to_a_member(self, record: ClusterRecord) -> bool:
        """Scaled down to fewer instances than this one's ordinal: one that stays takes over before this pod is removed (R14)."""
        c = self._c
        if c.configuration.is_member or record.paused or not c.gate_open or self.best_target(record, None) is None:
            return False
        request_id = f"{c.chance.getrandbits(64):016x}"
        await self.writes.write(record, lambda current: with_switchover(current, request_id=request_id, target=None))
        c.journal.note("scale down", f"{c.configuration.name} is beyond cluster.instances {c.configuration.instances}")
        return True

    async def _set_synchronous_for_opening(self, record: ClusterRecord) -> None:
        c = self._c
        if await c.database.gate_is_open():
            # The agent restarted over a serving primary: what runs stays, if it is not weaker than the record.
            current = await c.database.synchronous_set()
            if current is not None and invariant_holds(record.voters, record.quorum, current):
                c.synchronous, c.gate_open = current, True
                c.opened_s = c.clock.now_s() if c.opened_s is None else c.opened_s
                if record.quorum == 0:
                    # It may have restarted within the wait after a change of the mode (R8).
                    self._mode_changed_s = c.clock.now_s()
                c.take_role(Role.PRIMARY, "the agent restarted over a serving primary")
                return
        opening = self._opening_set(record)
        await c.database.set_synchronous(opening)
        c.synchronous, c.synchronous_confirmed = opening, True

    async def _open_gate(self, record: ClusterRecord) -> None:
        """P8, R13: clients enter once this primary's own record is on k of S, or while q is 0."""
        c = self._c
        if record.quorum > 0 and record.mode == "synchronous":
            if record.chain is None:
                raise OperationFailed("the record knows no timeline")
            await c.database.barrier(record.chain.current, deadline_s=GATE_DEADLINE_S)
        first = record.chain is not None and not record.chain.switches
        if first:
            await c.database.create_roles()
        # Before: nothing is given back any more, whatever a repair of the Lease makes of "never opened" (R13).
        await c.volume.save(lambda state: state.opening())
        # Recorded first: a record that says "never opened" may be given back.
        await self.writes.write(record, lambda current: replace(current, opened=True))
        await c.database.open_gate()
        c.gate_open = True
        c.measures.opened(c.clock.now_s())
        c.take_role(Role.PRIMARY, "clients are let in")
        c.journal.note("open", f"clients enter; {c.synchronous}, q {record.quorum}")
        c.database.checkpoint_soon()
        if not first:
            await c.database.create_roles()

    async def _quorum_step(self, record: ClusterRecord) -> None:
        c = self._c
        self.is_settled = False
        asynchronous = c.configuration.cluster.durability == "asynchronous"
        wanted_mode = "asynchronous" if asynchronous else "synchronous"
        if record.mode != wanted_mode:
            # Before and after: an unknown outcome may be a change too.
            self._mode_changed_s = c.clock.now_s()
            await self.writes.write_voters(record, with_mode(record, "asynchronous" if asynchronous else "synchronous"))
            self._mode_changed_s = c.clock.now_s()
            return
        if asynchronous:
            await self._record_members(record)
        wait_s = record.lease_duration_s
        if self._mode_changed_s is not None and not asynchronous and c.clock.now_s() - self._mode_changed_s < wait_s:
            self.quorum_state = "waiting one lease duration after the change to synchronous (R8)"
            return
        step = self._next_step(record)
        if isinstance(step, Settled):
            self.quorum_state, self.is_settled = step.reason, True
            return
        self.quorum_state = step.reason
        c.journal.note(
            "quorum", step.reason, voters=sorted(record.voters), q=record.quorum, synchronous=str(c.synchronous)
        )
        if isinstance(step, RecordVoters):
            await self._record_voters(record, step.voters, step.quorum)
        elif isinstance(step, SetSynchronous):
            c.synchronous, c.synchronous_confirmed = step.synchronous, False
            await c.database.set_synchronous(step.synchronous)
            c.synchronous_confirmed = True
        elif isinstance(step, RecordBehindBarrier) and await self._passes_barrier_for(step, record):
            await self._record_voters(record, step.voters, step.quorum)
        c.wake.set()

    def _next_step(self, record: ClusterRecord) -> QuorumStep:
        c = self._c
        return next_step(
            voters=frozenset() if c.configuration.cluster.durability == "asynchronous" else record.voters,
            quorum=record.quorum,
            synchronous=c.synchronous,
            confirmed=c.synchronous_confirmed,
            wanted=self._wanted(record),
        )

    async def _passes_barrier_for(self, step: RecordBehindBarrier, record: ClusterRecord) -> bool:
        """False: another step is next by now, as when the standby that is waited for is lost as well. BarrierNotPassed."""
        c = self._c
        if record.chain is None:
            raise OperationFailed("the record knows no timeline")
        barrier = asyncio.create_task(c.database.barrier(record.chain.current, deadline_s=BARRIER_DEADLINE_S))
        try:
            while not barrier.done():
                await asyncio.wait((barrier,), timeout=OVERTAKEN_LOOK_S)
                if not barrier.done() and self._next_step(record) != step:
                    c.journal.note("quorum", "the barrier is given up: another step is next by now")
                    return False
            barrier.result()
        finally:
            barrier.cancel()
            await asyncio.gather(barrier, return_exceptions=True)
        return True

    async def _record_members(self, record: ClusterRecord) -> None:
        """Asynchronous: N names who may take over by time, and whom an extension asks; q stays 0 (R7, R11)."""
        found = self._everybody() - record.excluded - record.retired
        configured = self._c.configuration.is_configured
        members = frozenset(member for member in found if configured(member_name_of(member)))
        if members and members != record.voters:
            await self._record_voters(record, members, 0)

    async def _record_voters(self, record: ClusterRecord, voters: frozenset[MemberId], quorum: int) -> None:
        await self.writes.write_voters(record, with_voters(record, voters, quorum))

    def _wanted(self, record: ClusterRecord) -> SynchronousSet:
        c = self._c
        now_s = c.clock.now_s()
        standbys = {}
        for name, peer in c.peers.views().items():
            state = peer.state
            if state is None or state.member_id is None:
                continue
            eligible = (
                name not in record.fenced
                and c.configuration.is_configured(name)
                and state.member_id not in record.excluded
                and state.member_id not in record.retired
                and not state.terminating
            )
            standbys[state.member_id] = self.watch.health(
                state.member_id, now_s, eligible=eligible, first=not record.voters or record.quorum == 0
            )
        for voter in record.voters:
            if voter not in standbys:
                standbys[voter] = self.watch.health(voter, now_s, eligible=True, first=False)
        return wanted_set(
            standbys=standbys,
            voters=record.voters,
            synchronous=c.synchronous,
            wanted_k=c.wanted_k(),
            required=c.configuration.cluster.durability == "required",
            relax_after_s=c.configuration.timings.relax_after_s,
            alone_for_s=now_s - (c.opened_s if c.opened_s is not None else now_s),
        )

    def look(self) -> None:
        """Often, whatever else is under way: a standby's silence is counted over the times between two looks."""
        if not self._c.database.answers:
            return
        self.watch.look(self._c.database.walsenders(), self._c.clock.now_s())

    async def reaffirm(self, reason: str) -> None:
        """R12: a voter promised a later epoch that nobody took; a later one still makes it follow again."""
        c = self._c
        record = c.record
        c.reaffirm_again_s = c.clock.now_s() + self._reaffirm_pause_s
        self._reaffirm_pause_s = min(8.0, self._reaffirm_pause_s * 2)
        ends = await self.ask_ends(record)
        if not may_reaffirm(record, frozenset(ends)):
            raise OperationFailed(f"{len(ends)} of {record.quorum} voters answer that they would follow")
        # Also of those that are no voters, and would follow nobody else (R12).
        promised = [
            peer.state.promised_epoch
            for peer in c.peers.views().values()
            if peer.answers and peer.state is not None and peer.state.member_id not in record.excluded
        ]
        highest = max([record.epoch, *promised, *(answer.highest_epoch for answer in ends.values())])
        holder = c.holder
        if holder is None:
            raise OperationFailed("this instance is no member")

        def change(current: ClusterRecord) -> ClusterRecord:
            return reaffirmed(current, holder=holder, highest_epoch=Epoch(highest))

        await c.volume.save(lambda state: state.seen(Epoch(highest + 1)))
        stored = await c.keeper.write(change, grounds=record.grounds())
        await c.volume.save(lambda state: state.writing(stored.record, None))
        c.journal.note("reaffirm", f"epoch {stored.record.epoch}: {reason}")
        await c.peers.nudge(c.peers.names)

    def best_target(self, record: ClusterRecord, asked: MemberName | None) -> tuple[MemberName, MemberId] | None:
        """Who may take over in a planned way: streams, is near, answers, and is neither fenced nor leaving."""
        c = self._c
        now_s = c.clock.now_s()
        candidates: list[tuple[bool, int, int, str, MemberId]] = []
        for name, peer in c.peers.views().items():
            state = peer.state
            if not peer.answers or state is None or state.member_id is None or (asked is not None and name != asked):
                continue
            if state.terminating or name in record.fenced or not c.configuration.is_configured(name):
                continue
            health = self.watch.health(state.member_id, now_s, eligible=True, first=True)
            if not health.streaming or (state.lag_bytes or 0) > SWITCHOVER_MAXIMUM_LAG_BYTES:
                continue
            candidates.append(
                (state.member_id in record.voters, state.priority, -(state.lag_bytes or 0), name, state.member_id)
            )
        if not candidates:
            return None
        best = max(candidates, key=lambda candidate: candidate[:3])
        return MemberName(best[3]), best[4]


def c_alone(context: Context) -> bool:
    """A cluster of one instance: q is 0 by configuration (R14)."""
    return context.wanted_k() == 0
