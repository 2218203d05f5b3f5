"""Rest: only where everything is seen to be well, and one thing that is not is enough to end it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from core_builders import C, P, ids, observation, peer, record, released_record

from instance_manager.core.decide import decide, suspicion
from instance_manager.core.observation import Observation
from instance_manager.core.record import ClusterRecord, SwitchoverRequest
from instance_manager.core.rest import is_at_rest
from instance_manager.core.types import Epoch, MemberName


def rests(o: Observation, *, settled: bool = True) -> bool:
    return is_at_rest(o, decide(o), suspects=suspicion(o), settled=settled)


@pytest.mark.parametrize("me", ["p", "a", "b"])
def test_a_cluster_in_which_all_is_well_is_at_rest(me: str) -> None:
    assert rests(observation(me))


def test_a_single_instance_is_at_rest_too() -> None:
    o = observation("p", peers={})
    assert rests(with_record(o, record(voters=frozenset(), quorum=0)))


def test_an_asynchronous_cluster_is_at_rest_when_every_member_is_recorded() -> None:
    for me in ("p", "a"):
        assert rests(with_record(observation(me), record(mode="asynchronous", quorum=0)))


def with_record(o: Observation, found: ClusterRecord | None) -> Observation:
    return replace(o, lease=replace(o.lease, record=found))


def lease(o: Observation, **changes: Any) -> Observation:
    return replace(o, lease=replace(o.lease, **changes))


def postgres(o: Observation, **changes: Any) -> Observation:
    return replace(o, postgres=replace(o.postgres, **changes))


def with_peer(name: str, **changes: Any) -> Callable[[Observation], Observation]:
    return lambda o: replace(o, peers={**o.peers, MemberName(name): peer(name, **changes)})


ANYBODY: dict[str, Callable[[Observation], Observation]] = {
    "the Lease is not known": lambda o: with_record(o, None),
    "the Lease has no holder": lambda o: with_record(o, released_record()),
    "the cluster has no data yet": lambda o: with_record(o, record(system_identifier=None)),
    "it never opened": lambda o: with_record(o, record(opened=False)),
    "a switchover was asked for": lambda o: with_record(
        o, record(switchover=SwitchoverRequest(request_id="1", epoch=Epoch(5), target=None))
    ),
    "somebody is fenced": lambda o: with_record(o, record(fenced=frozenset({MemberName("b")}))),
    "it is paused": lambda o: with_record(o, record(paused=True)),
    "a voter is missing": lambda o: with_record(o, record(voters=ids("a"))),
    "a voter is nobody's": lambda o: with_record(o, record(voters=ids("a b c"))),
    "the Lease is damaged": lambda o: lease(o, damage="of another cluster"),
    "the Lease was read long ago": lambda o: lease(o, read_age_s=4.5),
    "the Lease is not renewed": lambda o: lease(o, unchanged_for_s=5.5),
    "a later epoch was promised": lambda o: replace(o, volume=replace(o.volume, promised_epoch=Epoch(6))),
    "shutdown was asked for": lambda o: replace(o, terminating=True),
    "it was fenced": lambda o: replace(o, was_fenced=True),
    "it is not healthy": lambda o: replace(o, unhealthy="no write has come back"),
    "it asks to be replaced": lambda o: replace(o, yielding_for_s=0.1),
    "Postgres does not answer": lambda o: postgres(o, answers=False),
    "a peer refuses": with_peer("b", answers=False, refused=True),
    "a peer is silent": with_peer("b", answers=False, silent_for_s=2.0),
    "a peer leaves": with_peer("b", terminating=True),
    "a peer is fenced": with_peer("b", fenced=True),
    "a peer asks to be replaced": with_peer("b", yielding="a full disk"),
    "a peer suspects": with_peer("b", suspects="p is silent"),
    "a peer's Postgres starts": with_peer("b", postgres="starting"),
    "a peer has another epoch": with_peer("b", record_epoch=Epoch(4)),
    "a peer promised": with_peer("b", promised_epoch=Epoch(6)),
    "a peer is another directory": with_peer("b", member_id=C),
}


@pytest.mark.parametrize("me", ["p", "a"])
@pytest.mark.parametrize("what", ANYBODY)
def test_nobody_rests_while(what: str, me: str) -> None:
    assert not rests(ANYBODY[what](observation(me)))


STANDBY: dict[str, Callable[[Observation], Observation]] = {
    "it receives nothing": lambda o: postgres(o, receiving=False, silent_for_s=float("inf")),
    "its walreceiver hears nothing": lambda o: postgres(o, silent_for_s=3.0),
    "it follows nobody": lambda o: postgres(o, following=None),
    "it follows an earlier epoch": lambda o: postgres(o, following=(P, Epoch(4))),
    "the primary is silent": with_peer("p", answers=False, silent_for_s=2.0),
}


@pytest.mark.parametrize("what", STANDBY)
def test_no_standby_rests_while(what: str) -> None:
    assert not rests(STANDBY[what](observation("a")))


PRIMARY: dict[str, Callable[[Observation], Observation]] = {
    "a write's outcome is unknown": lambda o: lease(o, unknown_write=True),
    "its permit is getting old": lambda o: replace(o, permit_left_s=2.9),
    "the Lease is another life's": lambda o: replace(o, incarnation="p-life-2"),
    "its Postgres has ended": lambda o: postgres(o, running=False, answers=False, mode=None),
}


@pytest.mark.parametrize("what", PRIMARY)
def test_no_primary_rests_while(what: str) -> None:
    assert not rests(PRIMARY[what](observation("p")))


def test_no_primary_rests_while_its_quorum_is_to_be_changed() -> None:
    assert not rests(observation("p"), settled=False)


def test_a_standby_rests_although_it_never_wrote() -> None:
    assert rests(lease(observation("a"), unknown_write=True))


def test_what_a_quorum_is_to_be_is_not_a_standbys_business() -> None:
    assert rests(observation("a"), settled=False)


def test_nobody_rests_who_suspects_whatever_the_reason() -> None:
    o = observation("a")
    assert not is_at_rest(o, decide(o), suspects="a reason that is thought of later", settled=True)
