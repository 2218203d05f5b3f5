"""Rules of the Lease: what a renewal grants, when a record is damaged, who may write what of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from instance_manager.core.record import ClusterRecord, Holder, Mode, Release, SwitchoverRequest
from instance_manager.core.timing import Timings
from instance_manager.core.types import Epoch, MemberId, MemberName, Timeline, TimelineSwitch, WalEnd, format_lsn
from instance_manager.core.voting import VolumeState


@dataclass(frozen=True, slots=True)
class Permit:
    """Until when this instance may write, on its own CLOCK_BOOTTIME, seconds."""

    epoch: Epoch
    soft_s: float
    hard_s: float


def permit_of_renewal(epoch: Epoch, sent_s: float, timings: Timings) -> Permit:
    """A permit counts from the time the renewal was *sent*: others may count from when it was applied, not answered."""
    return Permit(epoch, sent_s + timings.soft_s, sent_s + timings.hard_s)


def record_damage(
    record: ClusterRecord | None, volume: VolumeState, *, cluster_uid: str, data_known: bool
) -> str | None:
    """Why nobody may take, release, raise or lower by this record (R3); None if it is sound."""
    if record is None:
        if not data_known:
            return None
        return "the Lease is gone, although this cluster has data"
    problems = record.problems()
    if problems:
        return f"the Lease contradicts itself: {'; '.join(problems)}"
    if record.cluster_uid != cluster_uid:
        return f"the Lease belongs to another cluster ({record.cluster_uid})"
    if volume.contradicts(record):
        return (
            f"the Lease is at epoch {record.epoch} with other voters than this holder wrote: it was restored or edited"
        )
    if record.epoch < volume.recorded_epoch:
        return f"the Lease is at epoch {record.epoch}, but was at {volume.recorded_epoch} before: it was restored or edited"
    return None


def repair(
    volume: VolumeState,
    holder: Holder,
    confirmations: Mapping[MemberId, Epoch | None],
    *,
    permitted: bool = False,
) -> ClusterRecord | str:
    """R3: the last holder writes a damaged Lease anew, or says why it may not.

    `confirmations`: per voter of the last written record the highest epoch that it promised, asked just now; None
    without an answer. `permitted`: its permit of that epoch still runs, by which an asynchronous cluster knows that
    nobody was elected by time.
    """
    last = volume.last_record
    if last is None or last.holder is None or last.holder.member_id != holder.member_id:
        return "this instance was not the last holder that it knows of"
    known = [each for each in (last, volume.intended_record) if each is not None]
    if any(each.holder is None for each in known):
        return "this instance was about to release the Lease: somebody may have taken it"
    if volume.recorded_epoch > last.epoch:
        return f"this instance wrote epoch {last.epoch}, and has seen {volume.recorded_epoch} of another holder since"
    if last.mode == "asynchronous" and not permitted:
        return "in an asynchronous cluster another may have been elected by time: only an operator can tell"
    if volume.promised_epoch > last.epoch:
        return f"this instance promised epoch {volume.promised_epoch} later than it wrote {last.epoch}"
    for each in known:
        # What was intended may be what is recorded; what is acted on is always `last`.
        confirmed = [
            voter for voter in each.voters if (epoch := confirmations.get(voter)) is not None and epoch <= last.epoch
        ]
        if len(confirmed) < each.quorum:
            return f"{len(confirmed)} of {each.quorum} voters confirm that nobody was elected since"
    highest = max([last.epoch, volume.highest_epoch, *(epoch for epoch in confirmations.values() if epoch is not None)])
    uid = volume.cluster_uid or last.cluster_uid
    return replace(last, cluster_uid=uid, holder=holder, epoch=Epoch(highest + 1), release=None, switchover=None)


def reaffirmed(record: ClusterRecord, *, holder: Holder, highest_epoch: Epoch) -> ClusterRecord:
    """The holder writes itself a later epoch: after a voter promised one, or after its own restart. Not a failover.

    The timeline stays: it is the same log. Voters follow the later epoch.
    """
    if record.holder is None or record.holder.member_id != holder.member_id:
        raise ValueError("only the holder reaffirms itself")
    return replace(record, holder=holder, epoch=Epoch(max(record.epoch, highest_epoch) + 1), release=None)


def resumed(
    record: ClusterRecord, *, holder: Holder, highest_epoch: Epoch, end: WalEnd, claim_begun: bool, writable_along: bool
) -> ClusterRecord:
    """The holder starts again on a log that ends at `end`: reaffirmed, and with a promotion that was cut off claimed anew.

    `claim_begun`: the claimed timeline's history is on the disk. Postgres takes no number twice for which it finds one
    (P4), so the cut-off promotion can only be repeated under the next. `writable_along`: a read-write start would
    go along the claimed timeline. pg_control learns of it after the log does: before that Postgres would silently go on with the parent's.
    """
    again = reaffirmed(record, holder=holder, highest_epoch=highest_epoch)
    if record.chain is None or not claim_begun or (writable_along and end.timeline == record.chain.current):
        return again
    claim = Timeline(record.highest_timeline + 1)
    switch = TimelineSwitch(claim, end.timeline, end.lsn, again.epoch)
    return replace(again, chain=record.chain.forked(switch), highest_timeline=claim)


def may_reaffirm(record: ClusterRecord, would_follow: frozenset[MemberId]) -> bool:
    """R12: only if q voters answer that they would follow; else an election is better."""
    return len(would_follow & record.voters) >= record.quorum


def judge_restart(
    record: ClusterRecord, own_end: WalEnd, ends: Mapping[MemberId, WalEnd | None], *, same_boot: bool = False
) -> str | None:
    """R16: why a restarted holder must not serve; None if it may.

    Its disk may have lost what it acknowledged. It asks |N| - q + 1 voters: one of them holds every acknowledged commit.
    `same_boot`: its kernel has run without a break since it last wrote, so that what it flushed is there, and a voter
    that never answers again (its disk is lost) does not keep the cluster from going on. One that is ahead still does.
    """
    needed = record.promises_needed
    if needed is None:
        return None
    answered = {voter: end for voter, end in ends.items() if voter in record.voters and end is not None}
    for voter, end in sorted(answered.items()):
        if end > own_end:
            return f"{voter} is ahead: {end} against {own_end}; it should be elected"
    if len(answered) < needed and not same_boot:
        return f"{len(answered)} of {needed} voters told the end of their log"
    return None


def released(
    record: ClusterRecord, *, end: WalEnd, holding: frozenset[MemberId], target: MemberId | None
) -> ClusterRecord:
    """A planned release: the holder steps back, naming who may take over without an election (R4, R13).

    `holding`: the members seen to hold the shutdown checkpoint; they are the voters of the record from now on.
    """
    if record.holder is None:
        raise ValueError("nobody holds the Lease")
    if target is not None and target not in holding:
        raise ValueError(f"{target} was not seen to hold the end of the log")
    stamp = Release(releaser=record.holder.member_id, epoch=record.epoch, end=end, target=target)
    quorum = min(1, len(holding)) if record.mode == "synchronous" else 0
    return replace(record, holder=None, release=stamp, voters=holding, quorum=quorum, switchover=None, position=end)


def given_back(record: ClusterRecord, found: ClusterRecord, *, promoted: bool = False) -> ClusterRecord:
    """R13: a winner that never opened steps back so that another can be elected, with the N and q that it found if its
    own record lets nobody be.

    `promoted`: its claim was taken up, so that others may have followed it there: then it stays in the chain, and they
    stay comparable. Else the chain is as it was found; the claimed number is never used again either way.
    ValueError: it has let clients in.
    """
    if record.opened:
        raise ValueError("clients were let in: it was opened, and cannot be given back")
    if not promoted:
        record = replace(record, chain=found.chain)
    if record.quorum > 0:
        return replace(record, holder=None, release=None)
    return replace(record, holder=None, release=None, voters=found.voters, quorum=found.quorum)


def helps_to_give_back(record: ClusterRecord, found: ClusterRecord, member: MemberId) -> bool:
    """R13: could another take what this member gives back? Else the Lease would be nobody's for ever, and it goes on trying.

    Nor while the cluster is paused, when nobody stands.
    """
    if record.paused:
        return False
    if record.mode == "asynchronous":
        return bool(found.voters - {member})
    return record.quorum > 0 or found.quorum > 0


def with_voters(record: ClusterRecord, voters: frozenset[MemberId], quorum: int) -> ClusterRecord:
    return replace(record, voters=voters, quorum=quorum)


def with_mode(record: ClusterRecord, mode: Mode) -> ClusterRecord:
    """R8: every change of the mode goes through q = 0."""
    return replace(record, mode=mode, quorum=0)


def with_switchover(record: ClusterRecord, *, request_id: str, target: MemberName | None) -> ClusterRecord:
    request = SwitchoverRequest(request_id=request_id, epoch=record.epoch, target=target)
    return replace(record, switchover=request, configuration_counter=record.configuration_counter + 1)


def without_switchover(record: ClusterRecord) -> ClusterRecord:
    return replace(record, switchover=None)


def with_paused(record: ClusterRecord, paused: bool) -> ClusterRecord:
    return replace(record, paused=paused, configuration_counter=record.configuration_counter + 1)


def with_fenced(record: ClusterRecord, name: MemberName, fenced: bool) -> ClusterRecord:
    names = record.fenced | {name} if fenced else record.fenced - {name}
    return replace(record, fenced=names, configuration_counter=record.configuration_counter + 1)


def entitled_by_time(
    record: ClusterRecord,
    *,
    unchanged_for_s: float,
    agent_age_s: float,
    proven_dead: bool,
    own_end: WalEnd,
    maximum_lag_bytes: int,
    clock_rate_error: float,
) -> str | None:
    """Asynchronous clusters: why this member may not take over yet; None if it may.

    The duration comes from the record and is measured on this machine's own clock, over the very same record; the
    holder's clock is never compared. After its own start an agent takes nothing by time for one duration (R10).
    """
    if record.mode != "asynchronous":
        return "the cluster is synchronous: only promises elect"
    wait_s = record.lease_duration_s * (1 + clock_rate_error)
    if not (record.holder is not None and proven_dead):
        # An empty holder means nothing by itself (R4): its last permit may still run.
        if unchanged_for_s < wait_s:
            return f"the Lease was renewed {unchanged_for_s:.1f} s ago; it lasts {wait_s:.1f} s"
        if agent_age_s < wait_s:
            return f"this agent has watched for {agent_age_s:.1f} s only"
    if record.position is not None:
        if own_end.timeline < record.position.timeline:
            return f"this log is on timeline {own_end.timeline}, the last primary's on {record.position.timeline}"
        lag = max(0, record.position.lsn - own_end.lsn)
        if lag > maximum_lag_bytes:
            return (
                f"{lag} bytes behind the last known position {format_lsn(record.position.lsn)}, "
                f"more than maximum_lag_on_failover_bytes {maximum_lag_bytes}"
            )
    return None


def initial_first_write(found: ClusterRecord, first: ClusterRecord) -> ClusterRecord:
    """Begin again with a cluster whose first holder ended before there was any data."""
    if found.system_identifier is not None:
        raise ValueError("the cluster has data: it is never initialised again")
    return replace(first, epoch=Epoch(found.epoch + 1), configuration_counter=found.configuration_counter)
