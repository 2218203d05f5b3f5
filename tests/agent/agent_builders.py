"""A healthy small cluster: `p` is primary at epoch 5, `a` and `b` are its voters, q is 1, timeline 2 was forked at 100."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from instance_manager.core.observation import PeerState
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import (
    Epoch,
    Lsn,
    MemberId,
    MemberName,
    Timeline,
    TimelineChain,
    TimelineSwitch,
    WalEnd,
)
from instance_manager.core.voting import VolumeState

P, A, B = (MemberId(f"{name}_00000000") for name in "pab")
CHAIN = TimelineChain(Timeline(1), (TimelineSwitch(Timeline(2), Timeline(1), Lsn(100), Epoch(4)),))


def holder(member: MemberId, incarnation: str) -> Holder:
    return Holder(member_id=member, incarnation=incarnation)


HOLDER = holder(P, "p-life-1")
OTHER = holder(A, "a-life-1")


def end(lsn: int, timeline: int = 2) -> WalEnd:
    return WalEnd(Timeline(timeline), Lsn(lsn))


def record(**changes: Any) -> ClusterRecord:
    base = ClusterRecord(
        cluster_name="demo",
        cluster_uid="uid-1",
        mode="synchronous",
        lease_duration_s=10.0,
        epoch=Epoch(5),
        holder=HOLDER,
        system_identifier="7001",
        voters=frozenset({A, B}),
        quorum=1,
        chain=CHAIN,
        highest_timeline=Timeline(2),
        opened=True,
        position=end(200),
    )
    return replace(base, **changes)


def held_by_a(**changes: Any) -> ClusterRecord:
    """As `record`, but `a` holds it: for whom it is another's."""
    return record(**{"holder": OTHER, "voters": frozenset({B}), **changes})


def taken_by_a(**changes: Any) -> ClusterRecord:
    """What `a` writes when it takes over at 200: epoch 6, timeline 3, with `b` as its voter."""
    switch = TimelineSwitch(Timeline(3), Timeline(2), Lsn(200), Epoch(6))
    base = record(
        epoch=Epoch(6),
        holder=OTHER,
        voters=frozenset({B}),
        chain=CHAIN.forked(switch),
        highest_timeline=Timeline(3),
    )
    return replace(base, **changes)


def volume(member: MemberId | None = P, **changes: Any) -> VolumeState:
    base = VolumeState(
        cluster_uid="uid-1",
        member_id=member,
        volume_id="v",
        highest_epoch=Epoch(5),
        recorded_epoch=Epoch(5),
        promised_epoch=Epoch(5),
        promised_to=P,
        boot_id="boot-1",
    )
    return replace(base, **changes)


def peer_state(name: str, **changes: Any) -> PeerState:
    base = PeerState(
        name=MemberName(name),
        member_id=MemberId(f"{name}_00000000"),
        incarnation=f"{name}-life-1",
        role="primary" if name == "p" else "standby",
        has_data=True,
        record_epoch=Epoch(5),
        promised_epoch=Epoch(5),
        highest_epoch=Epoch(5),
        end=end(200),
        priority=0,
        writable=name == "p",
        yielding=None,
        suspects=None,
        receiving=name != "p",
        terminating=False,
        fenced=False,
        permit_left_s=5.0 if name == "p" else 0.0,
        postgres="running",
    )
    return replace(base, **changes)
