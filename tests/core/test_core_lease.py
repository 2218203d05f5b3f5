"""The Lease: permits, damage and its repair, reaffirming, releasing, modes, and the asynchronous takeover by time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from core_builders import CHAIN, A, B, P, end, holder, ids, record, released_record, volume

from instance_manager.core.lease import (
    entitled_by_time,
    given_back,
    helps_to_give_back,
    judge_restart,
    may_reaffirm,
    permit_of_renewal,
    reaffirmed,
    record_damage,
    released,
    repair,
    resumed,
    with_fenced,
    with_mode,
    with_paused,
    with_switchover,
)
from instance_manager.core.record import ClusterRecord
from instance_manager.core.timing import Timings
from instance_manager.core.types import Epoch, Lsn, MemberName, Timeline, TimelineChain, TimelineSwitch, WalEnd
from instance_manager.core.voting import VolumeState


def test_section_3_a_permit_counts_from_the_time_the_renewal_was_sent() -> None:
    permit = permit_of_renewal(Epoch(5), 1000.0, Timings())
    assert (permit.epoch, permit.soft_s, permit.hard_s) == (5, 1006.0, 1008.0)


def damage(found: ClusterRecord | None, *, state: VolumeState | None = None, data_known: bool = True) -> str | None:
    return record_damage(found, state or volume(), cluster_uid="uid-1", data_known=data_known)


def test_r3_a_missing_foreign_older_or_contradictory_lease_is_damaged() -> None:
    assert damage(record()) is None
    assert "gone" in (damage(None) or "")
    assert "another cluster" in (damage(record(cluster_uid="uid-2")) or "")
    assert "restored or edited" in (damage(record(epoch=Epoch(4))) or "")
    assert "contradicts" in (damage(record(quorum=3)) or "")


def test_section_3_a_missing_lease_is_the_beginning_only_where_there_is_no_data() -> None:
    assert damage(None, data_known=False) is None


def test_r3_an_epoch_that_was_only_promised_does_not_make_the_lease_look_damaged() -> None:
    assert damage(record(), state=volume(highest_epoch=Epoch(9), promised_epoch=Epoch(9))) is None


def last_holder(**changes: Any) -> VolumeState:
    return volume(P, **{"was_primary": True, "last_record": record(), **changes})


def test_r3_the_last_holder_repairs_with_an_epoch_above_all_seen_once_q_voters_confirm() -> None:
    repaired = repair(last_holder(highest_epoch=Epoch(7)), holder(P), {A: Epoch(5), B: None})
    assert isinstance(repaired, ClusterRecord)
    assert (repaired.epoch, repaired.holder, repaired.voters, repaired.quorum) == (8, holder(P), ids("a b"), 1)


@pytest.mark.parametrize(
    ("case", "state", "confirmations"),
    [
        ("nobody confirms", last_holder(), {}),
        ("no voter answers", last_holder(), {A: None, B: None}),
        ("those that answer promised later", last_holder(), {A: Epoch(6), B: Epoch(6)}),
        ("fewer than q confirm", last_holder(last_record=record(quorum=2)), {A: Epoch(5), B: Epoch(6)}),
        ("who confirms is no voter", last_holder(last_record=record(voters=ids("a"))), {B: Epoch(5)}),
        ("it promised a later epoch itself", last_holder(promised_epoch=Epoch(6)), {A: Epoch(5), B: Epoch(5)}),
        ("it wrote no record", last_holder(last_record=None), {A: Epoch(5), B: Epoch(5)}),
        ("it had released", last_holder(last_record=released_record()), {A: Epoch(5), B: Epoch(5)}),
        ("it was not the holder", last_holder(last_record=record(holder=holder(A))), {A: Epoch(5), B: Epoch(5)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_r3_a_lease_is_not_repaired_when(case: str, state: VolumeState, confirmations: dict[Any, Any]) -> None:
    assert isinstance(repair(state, holder(P), confirmations), str), case


def test_r3_a_holder_with_q_zero_repairs_by_itself() -> None:
    assert isinstance(
        repair(last_holder(last_record=record(voters=frozenset(), quorum=0)), holder(P), {}), ClusterRecord
    )


def test_section_4_a_restarted_holder_writes_an_epoch_above_all_promised_and_keeps_its_timeline() -> None:
    after = reaffirmed(record(), holder=holder(P), highest_epoch=Epoch(9))
    assert (after.epoch, after.holder) == (10, holder(P))
    assert (after.chain, after.voters, after.quorum) == (record().chain, record().voters, record().quorum)
    assert reaffirmed(record(), holder=holder(P), highest_epoch=Epoch(1)).epoch == 6
    with pytest.raises(ValueError, match="only the holder"):
        reaffirmed(record(), holder=holder(A), highest_epoch=Epoch(9))


def resumes(found: ClusterRecord, at: WalEnd, *, begun: bool = True, along: bool = False) -> ClusterRecord:
    """`found`, whose holder starts again on a log that ends `at`; it has seen epoch 9."""
    return resumed(found, holder=holder(P), highest_epoch=Epoch(9), end=at, claim_begun=begun, writable_along=along)


def switch(timeline: int, parent: int, lsn: int, epoch: int) -> TimelineSwitch:
    return TimelineSwitch(Timeline(timeline), Timeline(parent), Lsn(lsn), Epoch(epoch))


@pytest.mark.parametrize(
    ("case", "at", "begun", "along"),
    [
        ("the claim was taken up, and a read-write start goes along it", end(200), True, True),
        ("the promotion had not begun: it is repeated under its number", end(100, 1), False, False),
        ("the promotion had not begun, and less of the parent is there", end(90, 1), False, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_p4_a_holder_that_starts_again_keeps_its_claim_when(case: str, at: WalEnd, begun: bool, along: bool) -> None:
    after = resumes(record(), at, begun=begun, along=along)
    assert after == reaffirmed(record(), holder=holder(P), highest_epoch=Epoch(9)), case
    assert (after.epoch, after.chain, after.highest_timeline) == (10, CHAIN, 2)


def test_p4_a_claim_whose_history_is_there_and_whose_first_record_is_not_falls_out_of_the_chain() -> None:
    """Postgres takes no number twice: the promotion can only be repeated under the next."""
    # pg_control cannot be ahead of the log. If it says so all the same, nothing rests on it.
    for along in (False, True):
        after = resumes(record(), end(100, 1), along=along)
        assert after.chain == TimelineChain(Timeline(1), (switch(3, 1, 100, 10),))
        assert not after.chain.knows(Timeline(2))
        assert (after.epoch, after.highest_timeline) == (10, 3)
        assert after.problems() == ()


def test_p4_p11_a_claim_that_the_log_is_on_and_pg_control_is_not_stays_and_is_gone_on_from_under_the_next() -> None:
    after = resumes(record(), end(130), along=False)
    assert after.chain == TimelineChain(Timeline(1), (*CHAIN.switches, switch(3, 2, 130, 10)))
    assert after.chain.contains(end(130))
    assert (after.epoch, after.highest_timeline) == (10, 3)


def test_p4_a_claim_of_a_promotion_that_was_cut_off_forks_where_the_log_ends() -> None:
    after = resumes(record(), end(90, 1))
    assert after.chain == TimelineChain(Timeline(1), (switch(3, 1, 90, 10),))


def test_p4_r2_a_promotion_that_was_cut_off_is_claimed_above_every_number_ever_claimed() -> None:
    """Another claimed 7 and gave it back: it is in no chain, and its history may be on some disk."""
    for at in (end(100, 1), end(130)):
        after = resumes(record(highest_timeline=Timeline(7)), at)
        assert after.chain is not None
        assert (after.chain.current, after.highest_timeline) == (8, 8)


def test_p4_cut_off_twice_a_promotion_leaves_one_claim_in_the_chain() -> None:
    once = resumes(record(), end(100, 1))
    twice = resumes(once, end(100, 1))
    assert twice.chain == TimelineChain(Timeline(1), (switch(4, 1, 100, 11),))
    on_it = resumes(once, end(100, 3))
    assert on_it.chain is not None
    assert [each.timeline for each in on_it.chain.switches] == [3, 4]


def test_p4_a_holder_on_the_first_timeline_has_no_claim_to_repeat() -> None:
    first = record(chain=TimelineChain(Timeline(1)), highest_timeline=Timeline(1))
    after = resumes(first, end(200, 1), begun=False, along=True)
    assert (after.chain, after.highest_timeline, after.epoch) == (first.chain, 1, 10)


def test_section_4_only_the_holders_directory_resumes() -> None:
    for begun in (False, True):
        with pytest.raises(ValueError, match="only the holder"):
            resumes(record(holder=holder(A)), end(200), begun=begun)


def test_r12_a_primary_reaffirms_only_if_q_voters_would_follow() -> None:
    assert may_reaffirm(record(), ids("a"))
    assert not may_reaffirm(record(), ids("c"))
    assert not may_reaffirm(record(quorum=2), ids("a"))


def test_r16_a_restarted_holder_behind_a_voter_does_not_serve() -> None:
    assert "ahead" in (judge_restart(record(), end(200), {A: end(201), B: end(100)}) or "")


def test_r16_a_restarted_holder_asks_as_many_voters_as_an_election_needs() -> None:
    assert judge_restart(record(), end(200), {A: end(200), B: end(100)}) is None
    assert "1 of 2" in (judge_restart(record(), end(200), {A: end(200), B: None}) or "")
    assert judge_restart(record(quorum=2), end(200), {A: end(200)}) is None
    assert judge_restart(record(voters=ids("a")), end(200), {B: end(200)}) is not None, "only voters count"
    assert judge_restart(record(quorum=0), end(200), {}) is None, "nobody else holds what it acknowledged"


def test_r16_a_q_of_0_that_the_holder_has_not_noted_is_not_the_one_that_commits_waited_by() -> None:
    """Its note comes before Postgres is told, so without it Postgres still waits."""
    recorded = record(voters=frozenset(), quorum=0, renewals=9)
    lowering = volume(last_record=record(), intended_record=recorded)
    assert lowering.unrelaxed(recorded) == replace(recorded, voters=record().voters, quorum=1)
    assert lowering.unrelaxed(record()) is None, "the write never came there"
    assert volume(last_record=recorded).unrelaxed(recorded) is None, "it was noted"
    assert lowering.unrelaxed(replace(recorded, epoch=Epoch(6))) is None, "another takeover's"
    assert lowering.unrelaxed(replace(recorded, mode="asynchronous")) is None, "R8"


def test_r4_a_release_is_a_stamp_with_epoch_and_end_of_the_log() -> None:
    after = released(record(), end=end(300), holding=ids("a"), target=A)
    assert after.holder is None
    assert after.release is not None
    assert (after.release.releaser, after.release.epoch, after.release.end, after.release.target) == (P, 5, end(300), A)
    assert after.problems() == ()


def test_r13_a_release_carries_as_voters_those_that_hold_the_shutdown_checkpoint() -> None:
    assert released(record(), end=end(300), holding=ids("a"), target=A).voters == ids("a")
    alone = released(record(), end=end(300), holding=frozenset(), target=None)
    assert (alone.voters, alone.quorum) == (frozenset(), 0)


def test_p12_the_lease_is_not_released_to_a_target_that_was_not_seen_to_hold_the_end() -> None:
    with pytest.raises(ValueError, match="was not seen"):
        released(record(), end=end(300), holding=ids("b"), target=A)


def test_r13_a_winner_that_never_opened_gives_back_the_n_and_q_that_it_found() -> None:
    after = given_back(record(holder=holder(A), voters=frozenset(), quorum=0, opened=False), record())
    assert (after.holder, after.release, after.voters, after.quorum) == (None, None, ids("a b"), 1)
    own = given_back(record(holder=holder(A), voters=ids("b"), quorum=1, opened=False), record())
    assert (own.voters, own.quorum) == (ids("b"), 1)


@pytest.mark.parametrize(
    ("own", "found", "helps"),
    [
        ({"voters": ids("b"), "quorum": 1}, {}, True),
        ({"voters": ids(""), "quorum": 0}, {}, True),
        ({"voters": ids(""), "quorum": 0}, {"voters": ids(""), "quorum": 0}, False),
        ({"voters": ids("b"), "quorum": 1, "paused": True}, {}, False),
        ({"mode": "asynchronous", "quorum": 0}, {"mode": "asynchronous", "voters": ids("a b"), "quorum": 0}, True),
        ({"mode": "asynchronous", "quorum": 0}, {"mode": "asynchronous", "voters": ids("a"), "quorum": 0}, False),
    ],
    ids=["its own voters", "those it found", "nobody can be elected", "paused", "by time", "by time, and it is alone"],
)
def test_r13_the_lease_is_given_back_only_where_another_can_take_it(
    own: dict[str, Any], found: dict[str, Any], helps: bool
) -> None:
    assert helps_to_give_back(record(holder=holder(A), opened=False, **own), record(**found), A) is helps


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_r8_every_change_of_the_mode_goes_through_q_zero(mode: Any) -> None:
    after = with_mode(record(), mode)
    assert (after.mode, after.quorum) == (mode, 0)


def test_r12_what_users_change_makes_a_takeover_under_way_begin_again() -> None:
    for after in (
        with_paused(record(), True),
        with_fenced(record(), MemberName("a"), True),
        with_switchover(record(), request_id="r", target=None),
    ):
        assert after.grounds() != record().grounds()


def test_r4_a_switchover_request_carries_an_id_and_the_epoch() -> None:
    request = with_switchover(record(), request_id="r", target=MemberName("a")).switchover
    assert request is not None
    assert (request.request_id, request.epoch) == ("r", 5)


def by_time(found: ClusterRecord | None = None, **changes: Any) -> str | None:
    facts: dict[str, Any] = {
        "unchanged_for_s": 10.1,
        "agent_age_s": 100.0,
        "proven_dead": False,
        "own_end": end(200),
        "maximum_lag_bytes": 50,
        "clock_rate_error": 0.005,
        **changes,
    }
    return entitled_by_time(found or record(mode="asynchronous", quorum=0), **facts)


def test_asynchronous_a_member_takes_over_after_it_saw_the_very_same_record_for_the_recorded_duration() -> None:
    assert by_time() is None
    assert by_time(unchanged_for_s=10.04) is not None, "the duration is stretched by the clock's rate error"
    longer = record(mode="asynchronous", quorum=0, lease_duration_s=30.0)
    assert by_time(longer) is not None, "the duration comes from the record"


def test_r10_a_new_agent_takes_nothing_by_time_for_one_lease_duration() -> None:
    assert by_time(agent_age_s=9.9) is not None


def test_asynchronous_proven_death_needs_no_waiting() -> None:
    assert by_time(unchanged_for_s=0.0, agent_age_s=0.0, proven_dead=True) is None


def test_asynchronous_a_member_too_far_behind_does_not_take_over_by_itself() -> None:
    assert by_time(own_end=end(150)) is None
    assert by_time(own_end=end(149)) is not None
    assert by_time(own_end=end(999, timeline=1)) is not None


def test_time_never_elects_in_a_synchronous_cluster() -> None:
    assert by_time(record()) is not None
    assert by_time(record(), proven_dead=True) is not None


def test_r16_in_the_same_boot_a_voter_that_never_answers_again_does_not_keep_the_holder_from_going_on() -> None:
    assert judge_restart(record(), end(200), {A: end(200), B: None}, same_boot=True) is None
    assert "ahead" in (judge_restart(record(), end(200), {A: end(201)}, same_boot=True) or ""), (
        "one that is ahead still does"
    )
