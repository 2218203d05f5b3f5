"""`failover --allow-data-loss`: the only verb that may lose acknowledged writes, and it loses no more than it must (R15)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.core.decide import PeerState
from instance_manager.core.election import Candidate, taken_over
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Epoch, MemberId, MemberName, format_lsn, member_name_of

WAIT_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Survey:
    """Who is there, who is lost, and who is best."""

    reachable: tuple[PeerState, ...]
    lost: tuple[MemberId, ...]
    best: PeerState | None
    refusals: tuple[str, ...]

    def describe(self, record: ClusterRecord) -> str:
        lines = [f"epoch {record.epoch}, timeline {record.chain.current if record.chain else '?'}"]
        known = record.position
        for state in self.reachable:
            lag = (
                f", {max(0, known.lsn - state.end.lsn)} bytes behind the last known position"
                if known is not None and state.end is not None
                else ""
            )
            where = (
                f"timeline {state.end.timeline}, end {format_lsn(state.end.lsn)}{lag}" if state.end else "no known end"
            )
            lines.append(f"{state.name}: reachable, {where}")
        lines += [f"{member_name_of(member)} ({member}): LOST; what only it holds is given up" for member in self.lost]
        lines += [f"refused: {refusal}" for refusal in self.refusals]
        lines.append(f"new primary: {self.best.name}" if self.best is not None else "nobody can become primary")
        return "\n".join(lines)


def survey(context: Context, own: PeerState) -> Survey:
    record = context.record
    states = [own]
    for peer in context.peers.views().values():
        if peer.answers and peer.state is not None:
            states.append(peer.state)
    reachable_ids = {state.member_id for state in states}
    concerned = set(record.voters) | ({record.holder.member_id} if record.holder is not None else set())
    lost = tuple(sorted(member for member in concerned if member not in reachable_ids))
    refusals = [
        f"{state.name} is a reachable voter and does not suspect the primary"
        for state in states
        if state.member_id in record.voters and state.suspects is None and record.holder is not None
    ]
    refusals += [f"{state.name} is writable" for state in states if state.writable]
    able = [
        state
        for state in states
        if state.member_id is not None
        and state.end is not None
        and record.chain is not None
        and record.chain.contains(state.end)
        and state.postgres == "running"
        and not state.fenced
    ]
    best = max(
        able,
        key=lambda state: Candidate(
            member_id=MemberId(str(state.member_id)),
            end=state.end,  # type: ignore[arg-type]
            priority=state.priority,
        ).rank(),
        default=None,
    )
    return Survey(tuple(states), lost, best, tuple(refusals))


async def lossy_failover(context: Context, own: PeerState, *, preview: bool) -> tuple[bool, str]:
    """Carry it out on the best reachable instance; this one if it is the best, else say where to run it."""
    c = context
    await c.keeper.read()
    record = c.record
    found = survey(c, own)
    text = found.describe(record)
    if preview:
        return found.best is not None and not found.refusals, text
    if found.refusals:
        return False, f"refused: {'; '.join(found.refusals)}"
    if found.best is None:
        return False, f"nobody can become primary\n{text}"
    if found.best.name != c.configuration.name:
        answer = await c.peers.ask(
            MemberName(found.best.name), "lossy_failover", None, str, deadline_s=record.lease_duration_s + 15
        )
        return True, answer
    return True, await take_with_loss(c, record, found)


async def take_with_loss(context: Context, record: ClusterRecord, found: Survey) -> str:
    """Wait one lease duration over the very same record unless death is proven, write conditionally, let `decide` promote."""
    c = context
    holder = c.holder
    if holder is None or record.chain is None:
        raise OperationFailed("this instance has no data")
    began_s = c.clock.now_s()
    dead = record.holder is None or await c.coordination.is_proven_dead(record.holder, deadline_s=1.0)
    while not dead and c.clock.now_s() - began_s < record.lease_duration_s:
        await c.clock.sleep(WAIT_POLL_S)
        if c.record.grounds() != record.grounds() or c.record.renewals != record.renewals:
            raise OperationFailed("the primary renewed the Lease meanwhile: it lives")
    epoch = Epoch(max(record.epoch, c.volume.state.highest_epoch) + 1)
    async with c.voting:
        # A promise to itself: else the loop would follow the old primary again before the Lease is written.
        await c.volume.save(lambda state: state.promising(epoch, holder.member_id))
        end = await c.database.stop_following(record.chain, deadline_s=c.configuration.timings.promise_timeout_s)
    if not record.chain.contains(end):
        raise OperationFailed(f"this log ends at {end}, which is not in the cluster's history")
    taken = taken_over(record, holder=holder, epoch=epoch, end=end, voters=frozenset(), quorum=0)
    excluded = record.excluded | frozenset(found.lost)
    await c.keeper.write(lambda _: replace(taken, excluded=excluded), grounds=record.grounds())
    lost = ", ".join(member_name_of(member) for member in found.lost) or "nobody"
    c.journal.note("failover with loss", f"epoch {epoch}; given up: {lost}")
    return f"{c.configuration.name} took the Lease at epoch {epoch}; given up: {lost}"
