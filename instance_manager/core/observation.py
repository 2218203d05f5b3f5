"""What one instance knows when it decides: each view as the part that keeps it last told, and all of them together.

Every view is immutable and replaced whole. What is missing or old is said so here; what follows from it is `decide`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from instance_manager.core.archive_state import ArchiveState
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.timing import Timings
from instance_manager.core.types import Epoch, MemberId, MemberName, WalEnd
from instance_manager.core.voting import VolumeState


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseView:
    """What the lease task last knew; immutable, replaced whole (patroni#3718)."""

    record: ClusterRecord | None
    read: bool
    """Was the store ever read by this agent?"""
    read_age_s: float
    """Since the last successful answer's request was sent."""
    unchanged_for_s: float
    """How long the very same record was seen, over successful reads only (R12)."""
    damage: str | None
    unknown_write: bool
    """A write of ours has an unknown outcome: no quorum step is taken on a read of it (R1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresView:
    """The local server, as the supervisor and SQL tell it."""

    running: bool
    mode: Literal["standby", "read_write"] | None
    """What the supervisor started it as, or promoted it to."""
    answers: bool
    """SQL answered within its deadline at the last look."""
    in_recovery: bool | None
    end: WalEnd | None
    """Standby: the end of what it received; primary: flushed. An estimate: a promise proves it anew."""
    receiving: bool
    """A walreceiver streams."""
    silent_for_s: float
    """Since the walreceiver last heard from the primary; infinite without one."""
    following: tuple[MemberId, Epoch] | None
    """Whom the agent last told it to follow, and under which epoch."""
    system_identifier: str | None = None
    """None: it has not answered yet."""
    stopping_for_s: float = 0.0
    """Since it was first seen to shut down; whoever told it to may be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """What a peer's agent says of itself; the answer to the `state` call."""

    name: MemberName
    member_id: MemberId | None
    incarnation: str
    role: str
    has_data: bool
    record_epoch: Epoch
    promised_epoch: Epoch
    highest_epoch: Epoch
    end: WalEnd | None
    priority: int
    writable: bool
    """Postgres runs read-write."""
    yielding: str | None
    """A holder that cannot serve and asks to be replaced; the reason."""
    suspects: str | None
    receiving: bool
    terminating: bool
    fenced: bool
    permit_left_s: float
    """A holder: until its own soft deadline; 0 for others."""
    postgres: str
    disk_full: bool = False
    lag_bytes: int | None = None
    replay_lag_bytes: int | None = None
    operation: str | None = None
    problem: str | None = None
    opened: bool = False
    synchronous: str | None = None
    archive: ArchiveState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """One peer as this instance sees it."""

    state: PeerState | None
    """Its last answer, however old."""
    answers: bool
    """The last call was answered."""
    refused: bool
    """The last call was refused: nobody listens there."""
    silent_for_s: float
    """Since its last answer; infinite without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryView:
    exists: bool
    was_primary: bool
    half_rewound: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    now_s: float
    """CLOCK_BOOTTIME of this machine."""
    agent_age_s: float
    name: MemberName
    incarnation: str
    priority: int
    lease: LeaseView
    volume: VolumeState
    directory: DirectoryView
    postgres: PostgresView
    peers: Mapping[MemberName, PeerView]
    timings: Timings
    maximum_lag_bytes: int
    terminating: bool
    was_fenced: bool
    """The record fenced this instance when it was last readable."""
    unhealthy: str | None
    """Why the proof of local health is missing; None while it is fresh."""
    permit_left_s: float
    """Until the soft deadline; negative when it has passed; 0 without a permit."""
    suspected_for_s: float
    """How long `suspicion` has given a reason without interruption."""
    proven_dead: bool
    """The holder's death is proven (R9)."""
    released_for_s: float
    """How long this release stamp has been seen."""
    yielding_for_s: float | None
    """How long this holder has asked to be replaced."""
    stand_again_in_s: float
    """Back-off after a lost election (R12)."""
    reaffirm_again_in_s: float
    unopened_for_s: float | None = None
    """How long ago this agent took the Lease that it holds, while nobody was let in and another could take it (R13)."""

    @property
    def holds_lease(self) -> bool:
        """This very supervisor's life over this very directory is the holder."""
        record, member_id = self.lease.record, self.volume.member_id
        return (
            record is not None
            and member_id is not None
            and record.holder == Holder(member_id=member_id, incarnation=self.incarnation)
        )

    @property
    def held_before(self) -> bool:
        """The holder is this directory under an earlier life of its supervisor."""
        record = self.lease.record
        return record is not None and record.holder is not None and record.holder.member_id == self.volume.member_id

    @property
    def holder_peer(self) -> PeerView | None:
        record = self.lease.record
        if record is None or record.holder is None:
            return None
        return self.peers.get(record.holder.name)
