"""What an instance does next: a pure function of what it observed.

`decide` holds the order of the questions; each answer carries its reason. It is total: for every observation there is
exactly one decision, and an observation that is missing or old never leads to a start, a promotion or a wipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from instance_manager.core.election import Candidate, place
from instance_manager.core.lease import entitled_by_time
from instance_manager.core.observation import Observation
from instance_manager.core.record import ClusterRecord

Act = Literal[
    "wait",
    "create_record",
    "initialise",
    "start_standby",
    "resume",
    "rejoin",
    "follow",
    "stand",
    "promote",
    "take_release",
    "take_by_time",
    "kill",
    "stop",
    "hand_over",
    "switch_over",
    "reaffirm",
    "repair",
    "give_back",
    "serve",
    "fence",
    "leave",
]
"""Verbs of a decision, each one method of the agent."""


@dataclass(frozen=True, slots=True)
class Decision:
    act: Act
    reason: str


STOPS_WITHIN = 8
"""Times `stop_timeout_s`: by then whoever asked for the longest stop would have killed it."""


def suspicion(o: Observation) -> str | None:
    """Why this member suspects the primary; None if it does not. Wrong suspicion costs availability, never data."""
    record = o.lease.record
    if record is None or o.lease.damage is not None:
        return None
    if record.holder is None:
        if record.release is not None and o.released_for_s < 2 * o.timings.takeover_timeout_s:
            return None
        return "the Lease has no holder"
    if record.holder.member_id == o.volume.member_id:
        return None
    peer = o.holder_peer
    if peer is None:
        return (
            None
            if o.lease.unchanged_for_s < record.lease_duration_s
            else "the holder is no member known here, and does not renew"
        )
    state = peer.state
    if peer.answers and state is not None:
        if state.member_id != record.holder.member_id:
            return f"{state.name} answers with another data directory than the holder's: that one is gone"
        if state.yielding is not None:
            return f"{state.name} asks to be replaced: {state.yielding}"
        if state.incarnation != record.holder.incarnation and (state.terminating or state.fenced):
            return f"{state.name} came back and does not serve"
        if o.lease.unchanged_for_s >= record.lease_duration_s and state.permit_left_s <= 0 and not o.postgres.receiving:
            return f"{state.name} answers, but has not renewed the Lease for {o.lease.unchanged_for_s:.1f} s"
        return None
    if o.agent_age_s < o.timings.suspect_after_s:
        # It has hardly asked anybody yet.
        return None
    receiving = o.postgres.receiving and o.postgres.silent_for_s < o.timings.suspect_after_s
    if peer.refused and not o.postgres.receiving:
        return f"{record.holder.name} refuses connections and sends nothing"
    if peer.silent_for_s >= o.timings.suspect_after_s and not receiving:
        return f"{record.holder.name} has been silent for {peer.silent_for_s:.1f} s and sends nothing"
    if o.lease.unchanged_for_s >= record.lease_duration_s:
        return f"{record.holder.name} does not answer and has not renewed the Lease for {o.lease.unchanged_for_s:.1f} s"
    return None


def decide(o: Observation) -> Decision:
    """The next step of this instance."""
    lease, record = o.lease, o.lease.record
    if o.terminating and not o.holds_lease:
        return Decision("leave", "shutdown was asked for, and this instance does not hold the Lease")
    if not lease.read:
        return _without_record(o, "the Lease has not been read yet")
    if o.postgres.stopping_for_s >= STOPS_WITHIN * o.timings.stop_timeout_s:
        return Decision(
            "kill", f"Postgres has been shutting down for {o.postgres.stopping_for_s:.0f} s and does not end"
        )
    if lease.damage is not None:
        writable = o.postgres.running and o.postgres.mode == "read_write"
        if o.volume.last_record is not None and o.volume.was_primary and (not writable or o.permit_left_s > 0):
            # Serving goes on by the permit meanwhile.
            return Decision("repair", lease.damage)
        if o.holds_lease and writable and o.permit_left_s > 0:
            return Decision("serve", f"{lease.damage}; serving until the permit ends")
        return _without_record(o, lease.damage)
    if record is None:
        return _found_cluster(o)
    if o.holds_lease:
        return _as_holder(o, record)
    if o.postgres.running and o.postgres.mode == "read_write":
        if o.held_before:
            return Decision("kill", "Postgres is writable under an earlier life of the supervisor")
        return Decision(
            "kill",
            f"the Lease is {record.holder.name + chr(39) + 's' if record.holder else 'free'}, and Postgres is writable here",
        )
    if o.name in record.fenced:
        return Decision("fence", "the record fences this instance")
    if record.system_identifier is None:
        return _uninitialised(o, record)
    if o.held_before and (o.directory.half_rewound or not o.directory.exists):
        return Decision("wait", "this instance holds the Lease, and its data directory cannot be started")
    if o.held_before:
        return Decision("resume", "this directory holds the Lease under an earlier life of its supervisor")
    return _as_standby(o, record)


def _without_record(o: Observation, why: str) -> Decision:
    """No sound record: what runs as a standby may go on; nothing is started read-write, promoted or wiped."""
    if o.postgres.running and o.postgres.mode == "read_write" and o.permit_left_s <= 0:
        return Decision("kill", f"{why}, and there is no permit")
    if o.was_fenced:
        return Decision("wait", f"{why}; the last record that was read fenced this instance")
    if o.volume.initialising:
        return Decision("wait", f"{why}; whether what initdb made here became the cluster only the Lease tells")
    if not o.postgres.running and o.directory.exists and not o.directory.half_rewound and not o.directory.was_primary:
        return Decision("start_standby", f"{why}; a standby may serve reads")
    return Decision("wait", why)


def _found_cluster(o: Observation) -> Decision:
    if o.directory.exists:
        return Decision("wait", "there is data but no Lease (R3)")
    for name, peer in sorted(o.peers.items()):
        if not peer.answers or peer.state is None:
            return Decision("wait", f"a new cluster is made only when every instance answers; {name} does not yet")
        if peer.state.has_data:
            return Decision("wait", f"{name} has data: the Lease is missing, not the cluster (R3)")
    if any(name < o.name for name in o.peers) and o.agent_age_s < 2 * o.timings.suspect_after_s:
        return Decision("wait", "the first instance by name makes the cluster")
    return Decision("create_record", "no Lease, and no instance has data: a new cluster")


def _uninitialised(o: Observation, record: ClusterRecord) -> Decision:
    # What an initdb of its own left behind is no reason to wait: no record ever named it, so nobody wrote into it.
    if o.directory.exists and not o.volume.initialising:
        return Decision(
            "wait", "the cluster is being initialised elsewhere, but there is data here: move it away by hand"
        )
    if o.lease.unchanged_for_s >= record.lease_duration_s and o.agent_age_s >= record.lease_duration_s:
        return Decision("create_record", "whoever began to initialise the cluster stopped before there was any data")
    return Decision("wait", "the cluster is being initialised")


def _as_holder(o: Observation, record: ClusterRecord) -> Decision:
    if record.system_identifier is None:
        return Decision("initialise", "this instance created the Lease")
    running = o.postgres.running and o.postgres.mode == "read_write"
    if running and o.permit_left_s <= 0:
        return Decision("stop", "the permit's soft deadline has passed without a renewal")
    if running and o.unhealthy is not None and not o.terminating:
        return Decision("kill", f"no proof of health: {o.unhealthy}")
    if not running and o.unopened_for_s is not None and o.unopened_for_s >= o.timings.promote_timeout_s:
        return Decision(
            "give_back", f"the Lease was taken {o.unopened_for_s:.0f} s ago, and this instance did not open"
        )
    if o.terminating:
        if not o.postgres.running and (o.yielding_for_s or 0.0) >= o.timings.handover_timeout_s:
            return Decision("leave", "shutdown was asked for, and nobody took over")
        return _given_up(o) or Decision("hand_over", "shutdown was asked for")
    if o.name in record.fenced:
        return _given_up(o) or Decision("hand_over", "the record fences this instance")
    if o.postgres.running and o.postgres.mode == "standby":
        end = o.postgres.end
        if record.chain is not None and end is not None and end.timeline == record.chain.current:
            # A damaged Lease that it repaired: nothing was claimed that a promotion could take up.
            return Decision(
                "resume", f"the Lease is this instance's, and its log is on timeline {end.timeline} already"
            )
        return Decision("promote", f"the Lease is taken, epoch {record.epoch}")
    if not running:
        return _holder_without_postgres(o, record)
    if record.switchover is not None and record.switchover.epoch == record.epoch:
        return Decision("switch_over", f"switchover to {record.switchover.target or 'the best standby'} was asked for")
    later = [
        peer.state
        for peer in o.peers.values()
        if peer.answers
        and peer.state is not None
        and peer.state.promised_epoch > record.epoch
        and peer.state.member_id not in record.excluded
    ]
    if later and o.reaffirm_again_in_s <= 0:
        highest = max(later, key=lambda state: state.promised_epoch)
        return Decision("reaffirm", f"{highest.name} promised epoch {highest.promised_epoch}, and nobody took it")
    return Decision("serve", "this instance holds the Lease")


def _given_up(o: Observation) -> Decision | None:
    """Nothing is left to be handed over in order: a voter is asked to take over."""
    if o.postgres.running or o.yielding_for_s is None:
        return None
    return Decision("wait", "Postgres has ended, and this instance asks to be replaced")


def _holder_without_postgres(o: Observation, record: ClusterRecord) -> Decision:
    """The holder's Postgres ended: a voter takes over at once if it can, else restart in place (behind a later epoch)."""
    if o.directory.half_rewound or not o.directory.exists:
        # Nobody may start it; `yielding` makes the others elect.
        return Decision("wait", "this instance holds the Lease, and its data directory cannot be started")
    if o.yielding_for_s is None:
        return Decision("resume", "this instance holds the Lease and Postgres does not run")
    able = [
        name
        for name, peer in sorted(o.peers.items())
        if peer.answers
        and peer.state is not None
        and peer.state.member_id in record.voters
        and not peer.state.terminating
    ]
    needed = record.promises_needed
    if (
        not record.paused
        and needed is not None
        and len(able) >= needed
        and o.yielding_for_s < o.timings.handover_timeout_s
    ):
        return Decision("wait", f"Postgres ended; {', '.join(able)} can elect a new primary")
    if o.unhealthy is not None:
        return Decision("wait", f"Postgres ended, and it is not started here: {o.unhealthy}")
    return Decision("resume", "Postgres ended, and nobody took over")


def _as_standby(o: Observation, record: ClusterRecord) -> Decision:
    if not o.postgres.running:
        if record.holder is None and not o.directory.exists:
            return Decision("wait", "there is no data here and no primary to clone from")
        return Decision("rejoin", "Postgres does not run here")
    if o.postgres.system_identifier not in (None, record.system_identifier):
        return Decision("rejoin", "this directory is of another system than the cluster")
    if o.postgres.end is not None and record.chain is not None and not record.chain.contains(o.postgres.end):
        return Decision("rejoin", f"this log ends at {o.postgres.end}, past the cluster's history")
    if o.volume.member_id in record.excluded and not record.needs_vote_of(o.volume.member_id):
        return Decision("rejoin", "this directory was given up by a failover that allowed data loss (R15)")
    suspects = suspicion(o)
    if record.holder is None and record.release is not None:
        released = record.release
        mine = released.target == o.volume.member_id
        if (
            (mine or o.released_for_s >= o.timings.takeover_timeout_s)
            and o.postgres.end == released.end
            and o.stand_again_in_s <= 0
        ):
            return Decision(
                "take_release",
                "the Lease was released to this instance" if mine else "the target of the release did not take it",
            )
    if suspects is not None:
        standing = _may_stand(o, record, suspects)
        if standing is not None:
            return standing
    if record.holder is None:
        return Decision("wait", suspects or "the Lease was released")
    wanted = (record.holder.member_id, record.epoch)
    if o.postgres.following is not None and o.postgres.following != wanted and o.postgres.in_recovery is None:
        # It takes no connection before it is consistent, and what it lacks comes from somebody else now.
        return Decision(
            "rejoin", f"it has started to follow a former primary and cannot be told of {record.holder.name}"
        )
    if o.postgres.following != wanted:
        if not o.volume.may_follow(record):
            return Decision(
                "wait",
                f"promised epoch {o.volume.promised_epoch}, the Lease is at {record.epoch}: nobody to follow yet",
            )
        return Decision("follow", f"{record.holder.name} holds the Lease at epoch {record.epoch}")
    return Decision("wait", suspects or f"following {record.holder.name} at epoch {record.epoch}")


def _may_stand(o: Observation, record: ClusterRecord, suspects: str) -> Decision | None:
    if record.paused:
        return Decision("wait", f"{suspects}; but the cluster is paused")
    if o.postgres.end is None:
        return Decision("wait", f"{suspects}; but the end of this log is not known")
    if o.unhealthy is not None:
        return Decision("wait", f"{suspects}; but this instance is not fit to be primary: {o.unhealthy}")
    if o.now_s < o.volume.extension_until_s:
        return Decision("wait", f"{suspects}; but this member promised not to take over while the store is away (R11)")
    if record.mode == "asynchronous":
        if o.volume.member_id not in record.voters:
            return (
                Decision("wait", f"{suspects}; but this member is not in the record (R11)")
                if record.holder is None
                else None
            )
        no = entitled_by_time(
            record,
            unchanged_for_s=o.lease.unchanged_for_s,
            agent_age_s=o.agent_age_s,
            proven_dead=o.proven_dead,
            own_end=o.postgres.end,
            maximum_lag_bytes=o.maximum_lag_bytes,
            clock_rate_error=o.timings.clock_rate_error,
        )
        if no is not None:
            return Decision("wait", f"{suspects}; but {no}") if o.postgres.following is not None else None
        if _turn(o) > o.suspected_for_s:
            return Decision("wait", f"{suspects}; others are ahead")
        return Decision("take_by_time", suspects)
    if o.volume.member_id not in record.voters or record.quorum == 0:
        return None
    if o.stand_again_in_s > 0:
        return Decision("wait", f"{suspects}; standing again in {o.stand_again_in_s:.1f} s")
    turn_s = _turn(o)
    if o.suspected_for_s < turn_s:
        return Decision("wait", f"{suspects}; better ones go first for {turn_s - o.suspected_for_s:.1f} s")
    return Decision("stand", suspects)


TURN_S = 0.7
"""How long one place in the ranking waits for the one before it: longer than an election takes when all is well."""


def _turn(o: Observation) -> float:
    """The others wait in proportion to their rank; only peers that answer are waited for."""
    if o.postgres.end is None or o.volume.member_id is None or o.lease.record is None:
        return 0.0
    me = Candidate(member_id=o.volume.member_id, end=o.postgres.end, priority=o.priority)
    others = [
        Candidate(member_id=peer.state.member_id, end=peer.state.end, priority=peer.state.priority)
        for peer in o.peers.values()
        if peer.answers
        and peer.state is not None
        and peer.state.member_id is not None
        and peer.state.end is not None
        and not peer.state.fenced
        and not peer.state.terminating
        and (peer.state.member_id in o.lease.record.voters or o.lease.record.mode == "asynchronous")
    ]
    return TURN_S * place(me, others)
