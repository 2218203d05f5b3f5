"""When an instance is at rest: all is well and nothing is pending, so that looking once a second is often enough.

Rest is a pace and no judgement: whatever happens to a peer, to Postgres or to the Lease wakes the agent, which then looks
again and often. So this is a list of what must be *seen* to be well: what is missing, old or new is no rest.
"""

from __future__ import annotations

from instance_manager.core.decide import Decision
from instance_manager.core.observation import Observation, PeerView
from instance_manager.core.record import ClusterRecord


def is_at_rest(o: Observation, decision: Decision, *, suspects: str | None, settled: bool) -> bool:
    """`settled`: a primary's quorum is as it is wanted; of no meaning for a standby."""
    record = o.lease.record
    if record is None or record.holder is None or record.system_identifier is None or not record.opened:
        return False
    if record.switchover is not None or record.fenced or record.paused:
        return False
    if suspects is not None or o.was_fenced or o.unhealthy is not None or o.yielding_for_s is not None:
        return False
    if not _lease_is_fresh(o, record) or o.volume.promised_epoch > record.epoch or not o.postgres.answers:
        return False
    if not all(_is_well(peer, record) for peer in o.peers.values()):
        return False
    members = {peer.state.member_id for peer in o.peers.values() if peer.state is not None} | {o.volume.member_id}
    if record.voters != members - {record.holder.member_id}:
        # Somebody is to be added or dropped, sooner or later.
        return False
    if o.holds_lease:
        # Who never wrote never learns what became of a write before its time: a standby need not.
        if o.lease.unknown_write:
            return False
        return decision.act == "serve" and settled and o.permit_left_s >= o.timings.soft_s / 2
    receiving = o.postgres.receiving and o.postgres.silent_for_s < o.timings.suspect_after_s
    return decision.act == "wait" and receiving


def _lease_is_fresh(o: Observation, record: ClusterRecord) -> bool:
    lease = o.lease
    if lease.damage is not None or lease.read_age_s > 2 * o.timings.renew_interval_s:
        return False
    return lease.unchanged_for_s < record.lease_duration_s / 2


def _is_well(peer: PeerView, record: ClusterRecord) -> bool:
    state = peer.state
    if not peer.answers or state is None or state.postgres != "running":
        return False
    if state.terminating or state.fenced or state.yielding is not None or state.suspects is not None:
        return False
    return state.record_epoch == record.epoch and state.promised_epoch <= record.epoch
