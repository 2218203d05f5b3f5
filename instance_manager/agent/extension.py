"""The store is away: the permit is extended while enough voters promise not to promise (DESIGN.md section 4, R7, R11)."""

from __future__ import annotations

from instance_manager.agent.context import Context
from instance_manager.core.lease import permit_of_renewal
from instance_manager.core.record import ClusterRecord
from instance_manager.core.roles import Role
from instance_manager.core.types import member_name_of
from instance_manager.core.voting import ExtensionRequest, Verdict


async def keep_extending(context: Context) -> None:
    """Ask again and again while the store does not answer; one good round is as good as a renewal."""
    c = context
    timings = c.configuration.timings
    while True:
        await c.beat.sleep(timings.renew_interval_s / 2)
        record, permit = c.keeper.record, c.link.permit
        if c.keeper.last_error is None or record is None or permit is None or not c.holds_lease:
            continue
        if c.role is not Role.PRIMARY or c.health.unhealthy() is not None:
            continue
        if permit.soft_s - c.clock.now_s() <= timings.soft_s - timings.renew_interval_s:
            await _extend(c, record)


async def _extend(c: Context, record: ClusterRecord) -> None:
    # q voters that do not promise leave too few for any election. By time, each of N could take over: all must agree.
    needed = record.quorum if record.mode == "synchronous" else len(record.voters)
    holder = c.holder
    if needed == 0 or holder is None:
        return
    sent_s = c.clock.now_s()
    request = ExtensionRequest(
        cluster_uid=record.cluster_uid,
        holder=holder.member_id,
        epoch=record.epoch,
        duration_s=record.lease_duration_s,
    )
    timings = c.configuration.timings
    # Whoever answers late, or not at all, may have promised.
    c.extended_until_s = sent_s + timings.request_timeout_s + record.lease_duration_s
    answers = await c.peers.ask_all(c.peers.names, "extend", request, Verdict, deadline_s=timings.request_timeout_s)
    # Of the record's own only: one that was dropped, and has not heard of it yet, binds nobody who could be elected.
    voters = {member_name_of(voter) for voter in record.voters}
    granted = sorted(name for name, verdict in answers.items() if verdict.granted and name in voters)
    if len(granted) >= needed:
        c.link.extend(permit_of_renewal(record.epoch, sent_s, timings))
        c.journal.note("extend", f"the store is away; {', '.join(granted)} promise not to promise")
