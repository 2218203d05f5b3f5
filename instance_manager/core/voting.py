"""The voter's side: what a member may promise, to whom, and what it persists before it does.

A promise of epoch e to a candidate says: I have stopped receiving, this is the end of my log, and I follow no primary
of an epoch below e. It is persisted on the volume, outside the data directory (P6), before anything is done by it (R3);
following a primary of epoch e is itself a promise of e.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Epoch, MemberId, WalEnd


@dataclass(frozen=True, slots=True)
class TookOver:
    """A write by which this member took the Lease, or may have: what R13 gives back if it cannot open."""

    found: ClusterRecord
    """The record that it stood on."""
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeState:
    """What one volume must never forget. Lost with the volume, which is then another voter."""

    cluster_uid: str | None = None
    member_id: MemberId | None = None
    """Id of the data directory on this volume; None while there is none (R6)."""
    volume_id: str = ""
    """What the id is bound to: a copy of the state on another volume is not this member (R6)."""
    highest_epoch: Epoch = Epoch(0)
    """The highest seen in a record or a promise: the next election starts above it (R12)."""
    recorded_epoch: Epoch = Epoch(0)
    """The highest seen in a record; a record below it is damaged (R3)."""
    known_record: ClusterRecord | None = None
    """As it was first seen in that epoch: what a user's verb begins from when the Lease is gone (R3)."""
    promised_epoch: Epoch = Epoch(0)
    promised_to: MemberId | None = None
    was_primary: bool = False
    """The data directory last ran read-write: it starts as a standby unless the Lease is held."""
    initialising: bool = False
    """An initdb of this instance is under way, or ended without its becoming the cluster."""
    wrote_in_boot: str = ""
    """The boot of the machine in which it last became writable (R16)."""
    last_record: ClusterRecord | None = None
    """A primary's last written record: with it a damaged Lease is repaired (R3)."""
    intended_record: ClusterRecord | None = None
    """What it was about to write after that; whether it did is not known until it is `last_record`."""
    took: TookOver | None = None
    """The last takeover, until clients are about to be let in: an agent that restarts in between gives it back as well."""
    starts: int = 0
    extension_epoch: Epoch = Epoch(0)
    extension_until_s: float = 0.0
    """CLOCK_BOOTTIME until which this voter promised not to promise (the store is away), of the boot `boot_id`."""
    boot_id: str = ""

    def seen(self, epoch: Epoch) -> VolumeState:
        return self if epoch <= self.highest_epoch else replace(self, highest_epoch=epoch)

    def saw_record(self, record: ClusterRecord) -> VolumeState:
        """To be persisted before anything is done by that record (R3)."""
        begun = self.known_record
        if begun is not None and begun.chain is None and record.chain is not None and record.epoch == begun.epoch:
            # The first epoch's, which begins before there is any data.
            return replace(self, known_record=record)
        if record.epoch <= self.recorded_epoch:
            return self
        return replace(self.seen(record.epoch), recorded_epoch=record.epoch, known_record=record)

    def promising(self, epoch: Epoch, candidate: MemberId) -> VolumeState:
        """The state once promised; ValueError if an earlier promise forbids it."""
        if epoch < self.promised_epoch or (epoch == self.promised_epoch and candidate != self.promised_to):
            raise ValueError(f"promised epoch {self.promised_epoch} to {self.promised_to}")
        return replace(self.seen(epoch), promised_epoch=epoch, promised_to=candidate)

    def taking(self, found: ClusterRecord, epoch: Epoch) -> VolumeState:
        """Before the Lease is taken under `epoch`: an epoch is never acted on before it is remembered (R3)."""
        return replace(self.seen(epoch), took=TookOver(found, epoch))

    def opening(self) -> VolumeState:
        """Before clients are let in: what is acknowledged from then on no earlier N and q would elect (R13)."""
        return replace(self, took=None)

    def following(self, record: ClusterRecord) -> VolumeState:
        """The state of a follower of the record's holder; ValueError if a promise forbids it.

        Whoever was promised the same epoch cannot take it any more: the record has it.
        """
        if record.holder is None or not self.may_follow(record):
            raise ValueError(f"promised epoch {self.promised_epoch} to {self.promised_to}")
        return replace(self.saw_record(record), promised_epoch=record.epoch, promised_to=record.holder.member_id)

    def writing(self, last: ClusterRecord, intended: ClusterRecord | None) -> VolumeState:
        """A holder's state before a change of voters is written, and (without `intended`) after it is known to be."""
        if self.last_record is not None and last.epoch < self.last_record.epoch:
            raise ValueError(f"epoch {self.last_record.epoch} was written since, not {last.epoch}")
        return replace(self.saw_record(last), last_record=last, intended_record=intended)

    def remembered(self) -> ClusterRecord | None:
        """The latest record that this volume knows of."""
        known = [each for each in (self.known_record, self.last_record) if each is not None]
        return max(known, key=lambda record: (record.epoch, record.renewals), default=None)

    def remembers(self, record: ClusterRecord) -> bool:
        """Is what the holder last wrote, by its own memory, this record's epoch, voters, q and mode?"""
        own = self.last_record
        return own is not None and (own.epoch, own.voters, own.quorum, own.mode) == (
            record.epoch,
            record.voters,
            record.quorum,
            record.mode,
        )

    def contradicts(self, record: ClusterRecord) -> bool:
        """Has this holder written other voters in this very epoch? Then the record was restored or edited (R3)."""
        own = self.last_record
        if own is None or own.holder is None or record.holder is None:
            return False
        if record.epoch != own.epoch or record.holder.member_id != own.holder.member_id:
            return False
        known = {(each.voters, each.quorum) for each in (own, self.intended_record) if each is not None}
        return (record.voters, record.quorum) not in known

    def unrelaxed(self, record: ClusterRecord) -> ClusterRecord | None:
        """`record` with the N and q by which commits went on to wait, if this holder ended amid lowering q to 0; None otherwise.

        Postgres stops waiting only after the lower q is known to be recorded and is noted here. So what was acknowledged is
        on others, and a restart by the q of 0 would ask none of them (R16).
        """
        own = self.last_record
        if own is None or own.holder is None or record.holder is None or record.quorum > 0:
            return None
        same = (own.epoch, own.mode, own.holder.member_id) == (record.epoch, record.mode, record.holder.member_id)
        return replace(record, voters=own.voters, quorum=own.quorum) if same and own.quorum > 0 else None

    def may_follow(self, record: ClusterRecord) -> bool:
        """A record's holder may be followed unless a later epoch was promised."""
        return record.holder is not None and record.epoch >= self.promised_epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteRequest:
    """A candidate's question. `epoch` is 1 + the highest of the record and every answer (R12)."""

    cluster_uid: str
    candidate: MemberId
    epoch: Epoch
    record_epoch: Epoch
    """Of the record that the candidate stands on."""
    end: WalEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class VoterView:
    """What a voter knows when it is asked; a fact with an age is judged by its age."""

    now_s: float
    volume: VolumeState
    boot_id: str
    record: ClusterRecord | None
    record_read_age_s: float
    """Since the last successful read of the Lease was sent; infinite if there was none."""
    renew_interval_s: float
    suspects: str | None
    """Why this member itself suspects the primary; None if it does not."""
    fenced: bool
    damaged: bool
    takeover_open: bool
    """A takeover of its own is under way."""
    serving: bool
    """It runs read-write or holds the Lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    granted: bool
    reason: str


def judge_vote(request: VoteRequest, voter: VoterView, *, final: bool) -> Verdict:
    """May this voter promise? `final` is the promise itself, else the pre-vote, after which nothing is persisted (R12)."""
    record, volume = voter.record, voter.volume
    refusal = None
    if voter.damaged or record is None:
        refusal = "the Lease is missing, unreadable or damaged (R3)"
    elif request.cluster_uid != record.cluster_uid:
        refusal = f"another cluster: {request.cluster_uid}"
    elif volume.member_id is None or volume.member_id not in record.voters:
        refusal = "I am not among the voters (R7)"
    elif request.candidate not in record.voters:
        refusal = "the candidate is not among the voters (R7)"
    elif record.quorum == 0:
        refusal = "q is 0: nobody can be elected (R7)"
    elif voter.serving:
        refusal = "I hold the Lease or am writable"
    elif voter.fenced:
        refusal = "I am fenced"
    elif voter.record_read_age_s > voter.renew_interval_s:
        refusal = f"I have not read the Lease for {voter.record_read_age_s:.1f} s (R12)"
    elif request.record_epoch != record.epoch:
        refusal = f"the candidate stands on epoch {request.record_epoch}, the Lease is at {record.epoch}"
    elif request.epoch <= record.epoch:
        refusal = f"epoch {request.epoch} is not after the Lease's {record.epoch}"
    elif voter.suspects is None and record.holder is not None and request.candidate != volume.member_id:
        refusal = "I do not suspect the primary"
    elif volume.extension_until_s > 0 and (volume.boot_id != voter.boot_id or voter.now_s < volume.extension_until_s):
        refusal = "I promised the primary not to promise while the store is away (R11)"
    elif (final and request.epoch < volume.promised_epoch) or (
        final and request.epoch == volume.promised_epoch and request.candidate != volume.promised_to
    ):
        refusal = f"I promised epoch {volume.promised_epoch} to {volume.promised_to}"
    elif voter.takeover_open and request.candidate != volume.member_id:
        refusal = "a takeover of my own is under way (R11)"
    if refusal is not None:
        return Verdict(granted=False, reason=refusal)
    return Verdict(granted=True, reason=voter.suspects or "the primary is gone")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionRequest:
    """The primary cannot reach the store and asks a voter not to promise for `duration_s` (DESIGN.md section 4)."""

    cluster_uid: str
    holder: MemberId
    epoch: Epoch
    duration_s: float


def judge_extension(request: ExtensionRequest, voter: VoterView) -> Verdict:
    """R11: only a voter that promised nothing later and has no takeover of its own open may bind itself."""
    record, volume = voter.record, voter.volume
    refusal = None
    if record is None or voter.damaged or request.cluster_uid != record.cluster_uid:
        refusal = "I know no sound record of this cluster"
    elif record.epoch != request.epoch or record.holder is None or record.holder.member_id != request.holder:
        refusal = f"the Lease that I know is at epoch {record.epoch}"
    elif volume.member_id is None or volume.member_id not in record.voters:
        refusal = "I am not among the voters"
    elif not 0 < request.duration_s <= record.lease_duration_s:
        refusal = f"the Lease lasts {record.lease_duration_s:g} s, not {request.duration_s:g}"
    elif record.mode == "synchronous" and record.quorum == 0:
        refusal = "q is 0: nobody can be elected, so nobody can promise not to be (R7)"
    elif volume.promised_epoch > request.epoch:
        refusal = f"I promised epoch {volume.promised_epoch} to {volume.promised_to}"
    elif voter.takeover_open:
        refusal = "a takeover of my own is under way"
    if refusal is not None:
        return Verdict(granted=False, reason=refusal)
    return Verdict(granted=True, reason=f"no promise for {request.duration_s:g} s")
