"""The words of the protocol: members, positions, the order of logs, the chain of claimed timelines, the record."""

from __future__ import annotations

import pytest
from core_builders import CHAIN, A, C, end, ids, record, released_record

from instance_manager.core.record import Holder, initial_record, initialised, renewed
from instance_manager.core.types import (
    Epoch,
    Lsn,
    MemberId,
    MemberName,
    Timeline,
    TimelineChain,
    TimelineSwitch,
    WalEnd,
    format_lsn,
    make_member_id,
    member_name_of,
    parse_lsn,
)


def test_p7_every_data_directory_has_an_id_of_its_own_from_which_its_instance_is_known() -> None:
    first, second = make_member_id(MemberName("node-1"), "0123abcd"), make_member_id(MemberName("node-1"), "0123abce")
    assert first != second
    assert member_name_of(first) == member_name_of(second) == "node-1"
    assert len(make_member_id(MemberName("n" * 53), "0123abcd")) <= 63, "a slot's and application's name in Postgres"


@pytest.mark.parametrize("name", ["", "-a", "A", "a_b", "a" * 54, "a-", "1a", "a;b"])
def test_a_name_that_postgres_cannot_use_for_a_slot_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="member name"):
        make_member_id(MemberName(name), "0123abcd")


@pytest.mark.parametrize("text", ["", "0", "/", "1/", "1/2/3", "g/0", "123456789/0", "1/2\n"])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a WAL position"):
        parse_lsn(text)


def test_positions_are_read_and_written_as_postgres_does() -> None:
    assert parse_lsn("16/B374D848") == 0x16B374D848
    assert format_lsn(0x16B374D848) == "16/B374D848"


def test_p4_p11_a_log_on_a_later_timeline_is_ahead_whatever_the_positions_are() -> None:
    assert end(10, timeline=3) > end(999, timeline=2) > end(998, timeline=2)


@pytest.mark.parametrize(
    ("lsn", "timeline", "contained"),
    [(100, 1, True), (101, 1, False), (500, 2, True), (500, 3, False)],
    ids=["up to the fork", "past the fork", "on the current timeline", "on a timeline that nobody claimed"],
)
def test_p4_a_log_belongs_to_the_history_only_on_claimed_timelines_up_to_each_fork(
    lsn: int, timeline: int, contained: bool
) -> None:
    assert CHAIN.contains(end(lsn, timeline)) is contained


def test_p4_a_history_file_must_agree_with_the_recorded_switches() -> None:
    assert CHAIN.matches(())
    assert CHAIN.matches(((Timeline(1), Lsn(100)),))
    assert not CHAIN.matches(((Timeline(1), Lsn(101)),)), "the same number, forked elsewhere: another log"
    assert not CHAIN.matches(((Timeline(1), Lsn(100)), (Timeline(2), Lsn(200)))), "goes on where nobody claimed"


def test_r2_a_claimed_timeline_number_is_never_claimed_again() -> None:
    with pytest.raises(ValueError, match="claimed before"):
        CHAIN.forked(TimelineSwitch(Timeline(2), Timeline(1), Lsn(90), Epoch(6)))


def test_r2_a_claim_that_nobody_took_up_falls_out_of_the_history() -> None:
    again = CHAIN.forked(TimelineSwitch(Timeline(3), Timeline(1), Lsn(90), Epoch(6)))
    assert again == TimelineChain(Timeline(1), (TimelineSwitch(Timeline(3), Timeline(1), Lsn(90), Epoch(6)),))
    assert not again.contains(end(95, timeline=2))


def test_p4_a_takeover_from_a_timeline_that_was_never_accepted_is_refused() -> None:
    with pytest.raises(KeyError):
        CHAIN.forked(TimelineSwitch(Timeline(9), Timeline(7), Lsn(90), Epoch(6)))


def test_r7_with_q_zero_no_number_of_promises_elects() -> None:
    assert record(quorum=0).promises_needed is None
    assert record(voters=frozenset(), quorum=0).promises_needed is None


@pytest.mark.parametrize(
    ("voters", "quorum", "needed"), [("a", 1, 1), ("a b", 1, 2), ("a b", 2, 1), ("a b c", 1, 3), ("a b c", 2, 2)]
)
def test_section_4_an_election_needs_all_voters_but_q_minus_one(voters: str, quorum: int, needed: int) -> None:
    assert record(voters=ids(voters), quorum=quorum).promises_needed == needed


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": Epoch(6)},
        {"holder": Holder(member_id=A, incarnation="x")},
        {"holder": None},
        {"voters": ids("a")},
        {"quorum": 2},
        {"mode": "asynchronous"},
        {"configuration_counter": 1},
        {"cluster_uid": "other"},
        {"release": released_record().release},
    ],
    ids=str,
)
def test_r12_a_takeover_is_not_repeated_on_a_record_in_which_what_it_stood_on_has_changed(
    change: dict[str, object],
) -> None:
    assert record(**change).grounds() != record().grounds()


def test_r12_a_renewal_alone_does_not_change_what_a_takeover_stands_on() -> None:
    after = renewed(record(), position=end(300), write_id="w", wall_time="t")
    assert after != record()
    assert after.grounds() == record().grounds()


@pytest.mark.parametrize(
    "change",
    [
        {"quorum": 3},
        {"quorum": -1},
        {"voters": ids("p a")},
        {"epoch": Epoch(0)},
        {"highest_timeline": Timeline(1)},
        {"release": released_record().release},
        {"system_identifier": None},
        {"chain": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_r3_a_record_that_nobody_writes_is_seen_as_such(change: dict[str, object]) -> None:
    assert record().problems() == ()
    assert record(**change).problems() != ()


def test_section_3_a_cluster_with_data_is_never_initialised_again() -> None:
    first = initial_record(
        cluster_name="demo",
        cluster_uid="u",
        mode="synchronous",
        lease_duration_s=10,
        holder=Holder(member_id=C, incarnation="x"),
    )
    assert first.quorum == 0
    assert not first.voters
    once = initialised(first, system_identifier="7", timeline=Timeline(1), position=Lsn(1))
    assert once.problems() == ()
    with pytest.raises(ValueError, match="initialised already"):
        initialised(once, system_identifier="8", timeline=Timeline(1), position=Lsn(1))


def test_r9_a_namesake_in_a_later_life_is_another_holder() -> None:
    assert Holder(member_id=A, incarnation="1") != Holder(member_id=A, incarnation="2")
    assert Holder(member_id=MemberId("node_1_0123abcd"), incarnation="1").name == "node-1"


def test_p4_a_timeline_on_which_nothing_was_written_makes_no_other_history() -> None:
    chain = TimelineChain(Timeline(1), (TimelineSwitch(Timeline(3), Timeline(1), Lsn(100), Epoch(6)),))
    assert chain.matches(((Timeline(1), Lsn(100)),))
    assert chain.matches(((Timeline(1), Lsn(100)), (Timeline(2), Lsn(100)))), "2 was fetched, and nothing written on it"
    assert not chain.matches(((Timeline(1), Lsn(100)), (Timeline(2), Lsn(101))))
    assert not chain.matches(((Timeline(1), Lsn(99)),))


def test_r15_a_log_agrees_with_the_history_up_to_where_the_history_left_it() -> None:
    first, second = (
        TimelineSwitch(Timeline(2), Timeline(1), Lsn(100), Epoch(3)),
        TimelineSwitch(Timeline(3), Timeline(2), Lsn(200), Epoch(4)),
    )
    chain = TimelineChain(Timeline(1), (first, second))
    assert chain.agreed(WalEnd(Timeline(3), Lsn(500))) == WalEnd(Timeline(3), Lsn(500))
    assert chain.agreed(WalEnd(Timeline(2), Lsn(250))) == WalEnd(Timeline(2), Lsn(200))
    assert chain.agreed(WalEnd(Timeline(1), Lsn(90))) == WalEnd(Timeline(1), Lsn(90))
