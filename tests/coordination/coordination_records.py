"""A cluster's first record, and one in which every field says something."""

from __future__ import annotations

from instance_manager.core.record import ClusterRecord, Holder, Release, SwitchoverRequest, initial_record
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

HOLDER = Holder(member_id=MemberId("demo_1_0123abcd"), incarnation="8f1e2d3c4b5a6978")
FIRST = initial_record(
    cluster_name="demo", cluster_uid="uid-1", mode="synchronous", lease_duration_s=10.0, holder=HOLDER
)
EVERYTHING = ClusterRecord(
    cluster_name="demo",
    cluster_uid="4e016cebc430b597",
    mode="asynchronous",
    lease_duration_s=2.5,
    epoch=Epoch(7),
    holder=None,
    system_identifier="7412345678901234567",
    voters=frozenset({MemberId("demo_2_89abcdef"), MemberId("demo_3_01234567")}),
    quorum=1,
    chain=TimelineChain(
        Timeline(1),
        (
            TimelineSwitch(Timeline(2), Timeline(1), Lsn(0x5000060), Epoch(3)),
            TimelineSwitch(Timeline(5), Timeline(2), Lsn(0x1_6000110), Epoch(6)),
        ),
    ),
    highest_timeline=Timeline(6),
    opened=True,
    position=WalEnd(Timeline(5), Lsn(0x1_7000028)),
    release=Release(
        releaser=MemberId("demo_1_0123abcd"),
        epoch=Epoch(7),
        end=WalEnd(Timeline(5), Lsn(0x1_7000028)),
        target=MemberId("demo_2_89abcdef"),
    ),
    switchover=SwitchoverRequest(request_id="00ff00ff00ff00ff", epoch=Epoch(7), target=MemberName("demo-2")),
    fenced=frozenset({MemberName("demo-3")}),
    paused=True,
    excluded=frozenset({MemberId("demo_1_ffffffff")}),
    retired=frozenset({MemberId("demo_4_00000000")}),
    configuration_counter=4,
    write_id="0011223344556677",
    renewals=123,
    renewed_at="2026-11-21T13:05:00.000000Z",
    acquired_at="2026-11-21T13:04:00.123456Z",
)
