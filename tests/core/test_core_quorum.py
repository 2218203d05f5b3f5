"""The quorum's steps one by one; tests/exhaustive walks all their interleavings."""

from __future__ import annotations

import pytest
from core_builders import A, B, ids

from instance_manager.core.quorum import (
    ALONE,
    NOBODY,
    QuorumStep,
    RecordBehindBarrier,
    RecordVoters,
    SetSynchronous,
    Settled,
    StandbyHealth,
    SynchronousSet,
    invariant_holds,
    next_step,
    synchronous_for,
    wanted_set,
)
from instance_manager.core.types import MemberId


def any_of(k: int, members: str) -> SynchronousSet:
    return SynchronousSet(k, ids(members))


def step(voters: str, q: int, runs: SynchronousSet, wanted: SynchronousSet, confirmed: bool = True) -> QuorumStep:
    return next_step(voters=ids(voters), quorum=q, synchronous=runs, confirmed=confirmed, wanted=wanted)


def test_section_4_a_voter_is_added_in_the_record_before_postgres_counts_it() -> None:
    first = step("a", 1, any_of(1, "a"), any_of(1, "a b"))
    assert isinstance(first, RecordVoters)
    assert (first.voters, first.quorum) == (ids("a b"), 1)
    assert isinstance(step("a b", 1, any_of(1, "a"), any_of(1, "a b")), SetSynchronous)


def test_section_4_a_voter_is_dropped_from_postgres_then_behind_the_barrier_from_the_record() -> None:
    assert isinstance(step("a b", 1, any_of(1, "a b"), any_of(1, "a")), SetSynchronous)
    last = step("a b", 1, any_of(1, "a"), any_of(1, "a"))
    assert isinstance(last, RecordBehindBarrier)
    assert (last.synchronous, last.voters, last.quorum) == (any_of(1, "a"), ids("a"), 1)


def test_section_4_q_is_lowered_in_the_record_before_commits_stop_waiting() -> None:
    first = step("a", 1, any_of(1, "a"), ALONE)
    assert isinstance(first, RecordVoters)
    assert first.quorum == 0
    assert isinstance(step("", 0, any_of(1, "a"), ALONE), SetSynchronous)
    partly = step("a b", 2, any_of(2, "a b"), any_of(1, "a b"))
    assert isinstance(partly, RecordVoters)
    assert partly.quorum == 1


def test_section_4_q_is_raised_only_behind_the_barrier() -> None:
    assert isinstance(step("", 0, ALONE, any_of(1, "a")), RecordVoters)
    assert isinstance(step("a", 0, ALONE, any_of(1, "a")), SetSynchronous)
    last = step("a", 0, any_of(1, "a"), any_of(1, "a"))
    assert isinstance(last, RecordBehindBarrier)
    assert last.quorum == 1


def test_p5_nothing_is_recorded_while_a_process_may_run_on_an_older_view() -> None:
    for voters, q in (("a", 0), ("a b", 1)):
        assert isinstance(step(voters, q, any_of(1, "a"), any_of(1, "a"), confirmed=False), SetSynchronous)


def test_when_everything_is_as_wanted_nothing_is_done() -> None:
    assert isinstance(step("a b", 1, any_of(1, "a b"), any_of(1, "a b")), Settled)
    assert isinstance(step("", 0, ALONE, ALONE), Settled)


def test_section_4_the_invariant_counts_only_the_members_of_s_that_are_voters() -> None:
    assert invariant_holds(ids("a b"), 1, any_of(1, "a b"))
    assert not invariant_holds(ids("a"), 1, any_of(1, "a b"))
    assert invariant_holds(ids("a"), 1, any_of(2, "a b"))
    assert not invariant_holds(ids("a"), 1, ALONE)
    assert invariant_holds(ids("a"), 0, ALONE)


def test_p1_the_list_of_a_standby_acknowledges_nothing_so_a_promotion_starts_with_all_commits_waiting() -> None:
    assert NOBODY.never_acknowledges
    assert not NOBODY.acknowledges_alone
    assert ALONE.acknowledges_alone
    assert invariant_holds(ids("a b"), 2, NOBODY)


def test_p8_a_primary_opens_with_a_list_no_weaker_than_the_record() -> None:
    for voters, q in (("a", 1), ("a b", 1), ("a b c", 2)):
        assert invariant_holds(ids(voters), q, synchronous_for(ids(voters), q, ids("a b c d")))


def test_r13_a_winner_without_voters_opens_with_any_one_of_all_members() -> None:
    assert synchronous_for(frozenset(), 0, ids("a b")) == any_of(1, "a b")
    assert synchronous_for(frozenset(), 0, frozenset()) == ALONE


def health(**changes: object) -> StandbyHealth:
    values: dict[str, object] = {
        "streaming": True,
        "lost_for_s": 0.0,
        "streaming_for_s": 60.0,
        "stable_needed_s": 1.0,
        "eligible": True,
    }
    return StandbyHealth(**{**values, **changes})  # type: ignore[arg-type]


def lost(seconds: float) -> StandbyHealth:
    return health(streaming=False, lost_for_s=seconds, streaming_for_s=0.0)


def wanted(
    standbys: dict[MemberId, StandbyHealth],
    *,
    voters: str = "a b",
    runs: SynchronousSet | None = None,
    k: int = 1,
    required: bool = False,
    alone_for_s: float = 600.0,
) -> SynchronousSet:
    return wanted_set(
        standbys=standbys,
        voters=ids(voters),
        synchronous=any_of(1, voters) if runs is None else runs,
        wanted_k=k,
        required=required,
        relax_after_s=2.0,
        alone_for_s=alone_for_s,
    )


def test_section_4_a_lost_voter_is_dropped_only_after_relax_after() -> None:
    assert wanted({A: health(), B: lost(1.9)}) == any_of(1, "a b")
    assert wanted({A: health(), B: lost(2.0)}) == any_of(1, "a")


def test_section_4_preferred_goes_on_alone_after_relax_after_and_not_before() -> None:
    assert wanted({A: lost(1.9), B: lost(9.0)}) == any_of(1, "a")
    assert wanted({A: lost(2.0), B: lost(9.0)}) == ALONE


def test_section_4_required_never_goes_on_alone() -> None:
    runs = any_of(1, "a b")
    goal = wanted({A: lost(99.0), B: lost(99.0)}, runs=runs, required=True)
    assert isinstance(step("a b", 1, runs, goal), Settled)


def test_section_4_with_fewer_standbys_than_wanted_those_that_are_left_must_hold_a_commit() -> None:
    assert wanted({A: health(), B: lost(9.0)}, runs=any_of(2, "a b"), k=2) == any_of(1, "a")


def test_r12_a_flapping_standby_is_not_added_before_its_stable_time_has_passed() -> None:
    flapping = health(streaming_for_s=3.9, stable_needed_s=4.0)
    assert wanted({A: health(), B: flapping}, voters="a") == any_of(1, "a")
    assert wanted({A: health(), B: health(streaming_for_s=4.0, stable_needed_s=4.0)}, voters="a") == any_of(1, "a b")


@pytest.mark.parametrize("k", [1, 2])
def test_r6_r14_a_fenced_leaving_retired_or_doubtful_member_is_not_counted(k: int) -> None:
    assert wanted({A: health(), B: health(eligible=False)}, k=k) == any_of(1, "a")


def test_r13_a_winner_waits_relax_after_for_its_first_standby_before_it_goes_on_alone() -> None:
    opening = any_of(1, "a b")
    assert wanted({}, voters="", runs=opening, alone_for_s=1.9) == NOBODY
    assert wanted({}, voters="", runs=opening, alone_for_s=2.0) == ALONE


def test_r6_r16_whoever_a_winner_opens_with_is_no_voter_before_it_streams() -> None:
    opening = any_of(1, "a b")
    waiting = wanted({}, voters="", runs=opening, alone_for_s=0.1)
    assert isinstance(step("", 0, opening, waiting), Settled)
    joined = wanted({A: health(stable_needed_s=0.0)}, voters="", runs=opening, alone_for_s=0.2)
    first = step("", 0, opening, joined)
    assert isinstance(first, RecordVoters)
    assert (first.voters, first.quorum) == (ids("a"), 0)


def test_section_4_asynchronous_wants_nobody() -> None:
    assert wanted({A: health(), B: health()}, k=0) == ALONE
