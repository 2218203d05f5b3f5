"""A healthy small cluster as the starting point of a test: `p` is primary at epoch 5, `a` and `b` are its voters, q is 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from instance_manager.core.election import Candidate, VoteAnswer
from instance_manager.core.observation import DirectoryView, LeaseView, Observation, PeerState, PeerView, PostgresView
from instance_manager.core.record import ClusterRecord, Holder, Release
from instance_manager.core.timing import Timings
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
from instance_manager.core.voting import VolumeState, VoteRequest, VoterView

P, A, B, C = (MemberId(f"{name}_00000000") for name in "pabc")
HOLDER = Holder(member_id=P, incarnation="p-life-1")
CHAIN = TimelineChain(Timeline(1), (TimelineSwitch(Timeline(2), Timeline(1), Lsn(100), Epoch(4)),))
"""Timeline 2 was forked from 1 at 100."""


def ids(text: str) -> frozenset[MemberId]:
    """`a b` -> the ids of a and b."""
    return frozenset(MemberId(f"{name}_00000000") for name in text.replace(",", " ").split())


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
        voters=ids("a b"),
        quorum=1,
        chain=CHAIN,
        highest_timeline=Timeline(2),
        opened=True,
        position=end(200),
    )
    return replace(base, **changes)


def released_record(target: MemberId | None = A, **changes: Any) -> ClusterRecord:
    stamp = Release(releaser=P, epoch=Epoch(5), end=end(200), target=target)
    return record(holder=None, release=stamp, **changes)


def volume(member: MemberId = A, **changes: Any) -> VolumeState:
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


def request(**changes: Any) -> VoteRequest:
    base = VoteRequest(cluster_uid="uid-1", candidate=A, epoch=Epoch(6), record_epoch=Epoch(5), end=end(200))
    return replace(base, **changes)


def voter(**changes: Any) -> VoterView:
    """`b`, that suspects the primary and has nothing against the candidate `a`."""
    base = VoterView(
        now_s=1000.0,
        volume=volume(B),
        boot_id="boot-1",
        record=record(),
        record_read_age_s=0.5,
        renew_interval_s=2.0,
        suspects="p refuses connections",
        fenced=False,
        damaged=False,
        takeover_open=False,
        serving=False,
    )
    return replace(base, **changes)


def answer(member: MemberId, lsn: int | None = 200, **changes: Any) -> VoteAnswer:
    base = VoteAnswer(
        voter=member,
        granted=True,
        reason="",
        highest_epoch=Epoch(5),
        end=None if lsn is None else end(lsn),
    )
    return replace(base, **changes)


def answers(**lsns: int | None) -> dict[MemberId, VoteAnswer]:
    """Granted answers: `answers(a=200, b=190)`."""
    found = [answer(MemberId(f"{name}_00000000"), lsn) for name, lsn in lsns.items()]
    return {MemberId(str(one.voter)): one for one in found}


def candidate(member: MemberId = A, lsn: int = 200, priority: int = 0, timeline: int = 2) -> Candidate:
    return Candidate(member_id=member, end=end(lsn, timeline), priority=priority)


def holder(member: MemberId, incarnation: str = "life-2") -> Holder:
    return Holder(member_id=member, incarnation=incarnation)


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


def peer(name: str, **changes: Any) -> PeerView:
    """A peer that answers; `answers`, `refused` and `silent_for_s` change the view, everything else its state."""
    view = {key: changes.pop(key) for key in ("answers", "refused", "silent_for_s") if key in changes}
    base = PeerView(state=peer_state(name, **changes), answers=True, refused=False, silent_for_s=0.1)
    return replace(base, **view)


def observation(me: str = "a", **changes: Any) -> Observation:
    """What `me` sees while all is well."""
    primary = me == "p"
    peers: Mapping[MemberName, PeerView] = {MemberName(name): peer(name) for name in "pab" if name != me}
    base = Observation(
        now_s=1000.0,
        agent_age_s=1000.0,
        name=MemberName(me),
        incarnation=f"{me}-life-1",
        priority=0,
        lease=LeaseView(
            record=record(), read=True, read_age_s=0.5, unchanged_for_s=0.5, damage=None, unknown_write=False
        ),
        volume=volume(MemberId(f"{me}_00000000"), was_primary=primary),
        directory=DirectoryView(exists=True, was_primary=primary, half_rewound=False),
        postgres=PostgresView(
            running=True,
            mode="read_write" if primary else "standby",
            answers=True,
            in_recovery=not primary,
            end=end(200),
            receiving=not primary,
            silent_for_s=float("inf") if primary else 0.1,
            following=None if primary else (P, Epoch(5)),
        ),
        peers=peers,
        timings=Timings(),
        maximum_lag_bytes=1000,
        terminating=False,
        was_fenced=False,
        unhealthy=None,
        permit_left_s=5.0 if primary else 0.0,
        suspected_for_s=0.0,
        proven_dead=False,
        released_for_s=0.0,
        yielding_for_s=None,
        stand_again_in_s=0.0,
        reaffirm_again_in_s=0.0,
    )
    return replace(base, **changes)
