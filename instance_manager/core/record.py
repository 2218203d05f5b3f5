"""The record of the cluster: what the Lease holds, and the only thing that all instances agree on.

It is a register with conditional writes (DESIGN.md section 3): holder and memory change in one write. On Kubernetes the
holder is `holderIdentity`, the epoch `leaseTransitions`, and the rest annotations; on one machine it is a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from instance_manager.core.types import (
    Epoch,
    Lsn,
    MemberId,
    MemberName,
    Timeline,
    TimelineChain,
    WalEnd,
    member_name_of,
)

Mode = Literal["synchronous", "asynchronous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who may write: one supervisor's life over one data directory. A namesake after it is another holder (R6, R9)."""

    member_id: MemberId
    incarnation: str
    """Random id of the supervisor's life, written as its termination message on Kubernetes."""

    @property
    def name(self) -> MemberName:
        return member_name_of(self.member_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """The stamp of a planned release (R4): without it an empty holder means nothing.

    It may be taken without promises only by a member whose log ends with this very shutdown checkpoint.
    """

    releaser: MemberId
    epoch: Epoch
    end: WalEnd
    """End of the shutdown checkpoint's record, the last that the releaser wrote."""
    target: MemberId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchoverRequest:
    """A user's wish, bound to the epoch in which it was made, so that a stale one does nothing (R4)."""

    request_id: str
    epoch: Epoch
    target: MemberName | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """One state of the register. Immutable; every change is a new one, written on the exact version it stood on."""

    cluster_name: str
    cluster_uid: str
    mode: Mode
    lease_duration_s: float
    epoch: Epoch = Epoch(0)
    holder: Holder | None = None
    system_identifier: str | None = None
    """Of the Postgres cluster; once known nobody initialises again."""
    voters: frozenset[MemberId] = frozenset()
    """N: the standbys whose promises elect. The holder is never among them."""
    quorum: int = 0
    """q: with |N| - q + 1 promises of N a member is elected; 0: nobody can be elected."""
    chain: TimelineChain | None = None
    highest_timeline: Timeline = Timeline(0)
    """The highest number ever claimed, taken up or not; the next claim is one more (R2, P4)."""
    opened: bool = False
    """Has the holder let clients in since it took the Lease?"""
    position: WalEnd | None = None
    """Last write position that the holder told, for candidates of an asynchronous cluster and for users."""
    release: Release | None = None
    switchover: SwitchoverRequest | None = None
    fenced: frozenset[MemberName] = frozenset()
    paused: bool = False
    excluded: frozenset[MemberId] = frozenset()
    """Directories given up by `failover --allow-data-loss`: set aside when they return, never rewound (R15)."""
    retired: frozenset[MemberId] = frozenset()
    configuration_counter: int = 0
    """Counts the changes that users made; a takeover is repeated on a newer version only while it is the same (R12)."""
    write_id: str = ""
    """Random id of the write that made this state, by which a writer knows its own after an unknown outcome."""
    renewals: int = 0
    """Counts the holder's renewals in this epoch, so that an observer sees a living holder by the change alone."""
    renewed_at: str = ""
    """Wall-clock time of the last renewal, RFC 3339, for people only: nothing is decided by it."""
    acquired_at: str = ""
    """Wall-clock time of the takeover, for people only."""

    @property
    def promises_needed(self) -> int | None:
        """Promises of N that elect: every acknowledged commit is on q of N, so at least one of these has it.

        None while q = 0: then no commit needs to be on any member of N and nobody can be elected, whatever N is (R7).
        """
        return len(self.voters) - self.quorum + 1 if self.quorum > 0 else None

    def needs_vote_of(self, member_id: MemberId | None) -> bool:
        """Is this directory one whose log an election may rest on? Then it is neither wiped nor rewound (R6).

        While q is 0 none does (R7), and in an asynchronous cluster N only names who may take over by time.
        """
        return self.mode == "synchronous" and self.quorum > 0 and member_id in self.voters

    def grounds(self) -> tuple[object, ...]:
        """What a takeover stood on: it may be repeated on a newer version only while these are the same (R12)."""
        return (
            self.cluster_uid,
            self.epoch,
            self.holder,
            self.voters,
            self.quorum,
            self.mode,
            self.release,
            self.configuration_counter,
        )

    def without_renewals(self) -> ClusterRecord:
        """All but what each heartbeat of the holder changes."""
        return replace(self, renewals=0, position=None, write_id="", renewed_at="")

    def problems(self) -> tuple[str, ...]:
        """What makes this record one that nobody wrote (R3); empty when it is sound."""
        found = []
        if self.quorum < 0 or self.quorum > len(self.voters):
            found.append(f"q {self.quorum} does not fit {len(self.voters)} voters")
        if self.holder is not None and self.holder.member_id in self.voters:
            found.append("the holder is among the voters")
        if self.epoch < 0 or (self.epoch == 0 and self.holder is not None):
            found.append(f"epoch {self.epoch} with a holder")
        if self.chain is not None and self.highest_timeline < self.chain.current:
            found.append("the highest timeline is below the chain's")
        if self.release is not None and self.holder is not None:
            found.append("a release and a holder")
        if (self.chain is None) != (self.system_identifier is None):
            found.append("the system identifier and the timelines must be known together")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record and the version under which the store holds it; the version is opaque and compared for equality only."""

    record: ClusterRecord
    version: str


def renewed(record: ClusterRecord, *, position: WalEnd | None, write_id: str, wall_time: str) -> ClusterRecord:
    """The holder's heartbeat."""
    return replace(
        record,
        renewals=record.renewals + 1,
        position=position or record.position,
        write_id=write_id,
        renewed_at=wall_time,
    )


def initial_record(
    *, cluster_name: str, cluster_uid: str, mode: Mode, lease_duration_s: float, holder: Holder
) -> ClusterRecord:
    """The first record of a new cluster: its holder may initialise the data directory."""
    return ClusterRecord(
        cluster_name=cluster_name,
        cluster_uid=cluster_uid,
        mode=mode,
        lease_duration_s=lease_duration_s,
        epoch=Epoch(1),
        holder=holder,
    )


def initialised(record: ClusterRecord, *, system_identifier: str, timeline: Timeline, position: Lsn) -> ClusterRecord:
    """The record once the data directory exists: from now on the cluster is never initialised again by itself."""
    if record.system_identifier is not None:
        raise ValueError("the cluster is initialised already")
    return replace(
        record,
        system_identifier=system_identifier,
        chain=TimelineChain(timeline),
        highest_timeline=timeline,
        position=WalEnd(timeline, position),
    )
