"""`failover --allow-data-loss`: the only verb that may lose acknowledged writes, and it loses no more than it must (R15).

It is also the only way on when the Lease is gone or damaged and its last holder cannot repair it (R3): then it begins
from the latest record that anybody remembers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.agent.lease_keeper import WriteRefused
from instance_manager.agent.peering import EndAnswer, EndRequest
from instance_manager.core.election import Candidate, taken_over
from instance_manager.core.observation import PeerState
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import (
    Epoch,
    MemberId,
    MemberName,
    Timeline,
    TimelineChain,
    WalEnd,
    format_lsn,
    member_name_of,
)
from instance_manager.ports import Conflict

WAIT_POLL_S = 0.1
ASK_DEADLINE_S = 3.0
REPLACES = 3
"""Tries to replace a damaged Lease while whoever holds it goes on to renew it."""


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
            if state.end is not None and record.chain is not None and not record.chain.contains(state.end):
                lag += ", PAST the cluster's history: what the last primary wrote there is given up if it is chosen"
            if state.member_id in record.excluded:
                lag += ", GIVEN UP before: chosen only if nobody else can be"
            where = (
                f"timeline {state.end.timeline}, end {format_lsn(state.end.lsn)}{lag}" if state.end else "no known end"
            )
            lines.append(f"{state.name}: reachable, {where}")
        lines += [f"{member_name_of(member)} ({member}): LOST; what only it holds is given up" for member in self.lost]
        lines += [f"refused: {refusal}" for refusal in self.refusals]
        lines.append(f"new primary: {self.best.name}" if self.best is not None else "nobody can become primary")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Ground:
    """What the verb stands on: the Lease, or the last that anybody who answers remembers of it (R3)."""

    record: ClusterRecord
    damage: str | None
    highest_epoch: Epoch


async def stand_on(context: Context) -> Ground:
    """OperationFailed: nobody remembers a record of this cluster. CoordinationError: the store does not answer."""
    c = context
    await c.keeper.read()
    damage = c.keeper.view().damage
    if damage is None and c.keeper.record is not None:
        return Ground(c.record, None, Epoch(max(c.record.epoch, c.volume.state.highest_epoch)))
    # An instance that never had data does not miss a Lease that is gone; others may.
    damage = damage or "there is no Lease"
    uid = c.cluster_uid
    answers = await c.peers.ask_all(
        c.peers.names, "end", EndRequest(cluster_uid=uid or ""), EndAnswer, deadline_s=ASK_DEADLINE_S
    )
    remembered = [c.volume.state.remembered(), *(answer.record for answer in answers.values())]
    known = [record for record in remembered if record is not None and uid in (None, record.cluster_uid)]
    if len({each.cluster_uid for each in known}) > 1:
        raise OperationFailed(f"{damage}, and the instances remember different clusters; run it where there is data")
    if not known:
        raise OperationFailed(f"{damage}, and no instance that answers remembers a record of this cluster")
    record = max(known, key=lambda each: (each.epoch, each.renewals))
    seen = [c.volume.state.highest_epoch, *(answer.highest_epoch for answer in answers.values())]
    return Ground(record, damage, Epoch(max(record.epoch, *seen)))


async def survey(context: Context, own: PeerState, ground: Ground) -> Survey:
    """Of everybody who answers, with the ends of stopped directories too: what is on a disk need not be lost."""
    c, record = context, ground.record
    answers = await c.peers.ask_all(
        c.peers.names, "end", EndRequest(cluster_uid=record.cluster_uid), EndAnswer, deadline_s=ASK_DEADLINE_S
    )
    ends = {name: answer.end for name, answer in answers.items()}
    if record.chain is not None:
        ends[own.name] = await c.database.proven_end(record.chain)
    states = [own, *(peer.state for peer in c.peers.views().values() if peer.answers and peer.state is not None)]
    states = [replace(state, end=ends.get(state.name) or state.end) for state in states]
    reachable_ids = {state.member_id for state in states}
    concerned = set(record.voters) | ({record.holder.member_id} if record.holder is not None else set())
    lost = tuple(sorted(member for member in concerned if member not in reachable_ids))
    refusals = [f"{state.name} is writable" for state in states if state.writable]
    bound_s = {name: answer.extended_for_s for name, answer in answers.items()}
    bound_s[own.name] = c.volume.state.extension_until_s - c.clock.now_s()
    refusals += [
        f"{name} has promised the primary not to elect another, for {left_s:.0f} s more (R11)"
        for name, left_s in sorted(bound_s.items())
        if left_s > 0
    ]
    if ground.damage is None:
        refusals += [
            f"{state.name} is a reachable voter and does not suspect the primary"
            for state in states
            if state.member_id in record.voters and state.suspects is None and record.holder is not None
        ]
    chain = record.chain
    able = [
        state
        for state in states
        if state.member_id is not None
        and state.end is not None
        and chain is not None
        and chain.knows(state.end.timeline)
        and state.postgres in ("running", "stopped")
        and (not state.fenced or ground.damage is not None)
    ]
    best = max(able, key=lambda state: _worth(state, record), default=None)
    return Survey(tuple(states), lost, best, tuple(refusals))


def _worth(state: PeerState, record: ClusterRecord) -> tuple[object, ...]:
    """First how much of the accepted history a log holds; what it holds past that is better than nothing at all.

    One that was given up before comes last of all, but before nobody.
    """
    member_id, end, chain = state.member_id, state.end, record.chain
    assert member_id is not None  # noqa: S101 - only those are compared
    assert end is not None  # noqa: S101
    assert chain is not None  # noqa: S101
    return (
        member_id not in record.excluded,
        chain.agreed(end),
        chain.contains(end),
        Candidate(member_id=member_id, end=end, priority=state.priority).rank(),
    )


async def lossy_failover(context: Context, own: PeerState, *, preview: bool) -> tuple[bool, str]:
    """Carry it out on the best reachable instance; this one if it is the best, else say where to run it."""
    c = context
    ground = await stand_on(c)
    found = await survey(c, own, ground)
    text = found.describe(ground.record)
    if ground.damage is not None:
        text = f"{ground.damage}; the last record that is remembered is of epoch {ground.record.epoch}\n{text}"
    if preview:
        return found.best is not None and not found.refusals, text
    if found.refusals:
        return False, f"refused: {'; '.join(found.refusals)}"
    if found.best is None:
        return False, f"nobody can become primary\n{text}"
    if found.best.name != c.configuration.name:
        answer = await c.peers.ask(
            MemberName(found.best.name),
            "lossy_failover",
            None,
            str,
            deadline_s=ground.record.lease_duration_s + 15,
        )
        return True, answer
    return True, await _take_with_loss(c, ground, found)


async def lossy_failover_as_best(context: Context, own: PeerState) -> str:
    """Asked by another instance, to which this one seems the best."""
    ground = await stand_on(context)
    found = await survey(context, own, ground)
    if found.refusals:
        raise OperationFailed("; ".join(found.refusals))
    if found.best is None or found.best.name != context.configuration.name:
        raise OperationFailed("this instance is not the best")
    return await _take_with_loss(context, ground, found)


async def _take_with_loss(context: Context, ground: Ground, found: Survey) -> str:
    """Wait one lease duration over the very same record unless death is proven, write conditionally, let `decide` promote."""
    c, record = context, ground.record
    holder = c.holder
    if holder is None or record.chain is None:
        raise OperationFailed("this instance has no data")
    if c.clock.now_s() < c.volume.state.extension_until_s:
        raise OperationFailed("this member has promised the primary not to take over while the store is away (R11)")
    c.takeover_open = True
    try:
        return await _wait_and_take(c, ground, found, holder, record.chain)
    finally:
        c.takeover_open = False


async def _wait_and_take(c: Context, ground: Ground, found: Survey, holder: Holder, chain: TimelineChain) -> str:
    record = ground.record
    began_s = c.clock.now_s()
    dead = record.holder is None or await c.coordination.is_proven_dead(record.holder, deadline_s=1.0)
    while not dead and c.clock.now_s() - began_s < record.lease_duration_s:
        await c.clock.sleep(WAIT_POLL_S)
        _require_unchanged(c, ground)
    epoch = Epoch(max(ground.highest_epoch, c.volume.state.highest_epoch) + 1)
    end: WalEnd | None
    async with c.voting:
        # A promise to itself: else the loop would follow the old primary again before the Lease is written.
        await c.volume.save(lambda state: state.promising(epoch, holder.member_id))
        if c.database.running:
            end = await c.database.stop_following(chain, deadline_s=c.configuration.timings.promise_timeout_s)
        else:
            end = await c.database.proven_end(chain)
    if end is None or not chain.knows(end.timeline):
        raise OperationFailed(f"this log ends at {end}, which is not in the cluster's history")
    if ground.damage is not None:
        # Each epoch that was seen and is not remembered may have claimed a timeline: none of those is used again (R2).
        claimed = Timeline(record.highest_timeline + ground.highest_epoch - record.epoch)
        record = replace(record, highest_timeline=claimed)
    taken = taken_over(record, holder=holder, epoch=epoch, end=end, voters=frozenset(), quorum=0)
    # Of a Lease that is gone nobody could be unfenced first.
    taken = replace(
        taken, excluded=taken.excluded | frozenset(found.lost), fenced=taken.fenced - {c.configuration.name}
    )

    def change(current: ClusterRecord) -> ClusterRecord:
        if current.write_id != record.write_id:
            raise WriteRefused("the primary renewed the Lease meanwhile: it lives")
        return taken

    # Nothing that another takeover found is given back instead of this one.
    await c.volume.save(lambda state: state.opening())
    if ground.damage is None:
        await c.keeper.write(change, grounds=record.grounds())
    else:
        await _replace_damaged(c, ground, taken)
    lost = ", ".join(member_name_of(member) for member in found.lost) or "nobody"
    c.journal.note("failover with loss", f"epoch {epoch}; given up: {lost}")
    return f"{c.configuration.name} took the Lease at epoch {epoch}; given up: {lost}"


async def _replace_damaged(c: Context, ground: Ground, taken: ClusterRecord) -> None:
    """A holder renews a damaged Lease as well, and this may be the holder: what it replaces is judged anew each time."""
    for left in reversed(range(REPLACES)):
        await c.keeper.read()
        _require_unchanged(c, ground)
        try:
            await c.keeper.repair(taken, c.keeper.damaged_version)
        except Conflict:
            if not left:
                raise
        else:
            return


def _require_unchanged(c: Context, ground: Ground) -> None:
    if ground.damage is not None:
        if c.keeper.view().damage is None:
            raise OperationFailed("the Lease was repaired meanwhile")
        return
    record = ground.record
    if c.record.grounds() != record.grounds() or c.record.renewals != record.renewals:
        raise OperationFailed("the primary renewed the Lease meanwhile: it lives")
