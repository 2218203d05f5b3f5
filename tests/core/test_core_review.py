"""What a review of the core found missing once, each with the sequence of events that it would have cost something in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_builders import (
    A,
    B,
    C,
    P,
    answers,
    candidate,
    end,
    holder,
    ids,
    observation,
    peer,
    record,
    released_record,
    request,
    volume,
    voter,
)

from instance_manager.core.decide import decide
from instance_manager.core.election import StandBack, Won, judge_promises, taken_from_release
from instance_manager.core.lease import entitled_by_time, given_back, reaffirmed, record_damage, repair
from instance_manager.core.observation import Observation
from instance_manager.core.quorum import ALONE, NOBODY, SetSynchronous, Settled, SynchronousSet, next_step, wanted_set
from instance_manager.core.record import ClusterRecord
from instance_manager.core.timing import Timings
from instance_manager.core.types import Epoch, MemberName, Timeline
from instance_manager.core.voting import ExtensionRequest, judge_extension, judge_vote


def with_record(seen: Observation, found: ClusterRecord | None) -> Observation:
    return replace(seen, lease=replace(seen.lease, record=found))


def with_peer(seen: Observation, name: str, **changes: object) -> Observation:
    return replace(seen, peers={**seen.peers, MemberName(name): peer(name, **changes)})


def silent_primary(seen: Observation) -> Observation:
    gone = with_peer(seen, "p", answers=False, silent_for_s=99.0)
    return replace(gone, postgres=replace(gone.postgres, receiving=False, silent_for_s=float("inf")))


# Safety.


def test_r3_a_former_holder_that_saw_a_later_record_does_not_repair_with_its_own() -> None:
    """p alone (q 0) at 5; the operator fails over to a at 6; p reads that; the Lease is deleted; p is faster."""
    own = volume(P, was_primary=True, last_record=record(voters=frozenset(), quorum=0), recorded_epoch=Epoch(6))
    assert isinstance(repair(own, holder(P), {}), str)


def test_r3_an_asynchronous_holder_does_not_repair_by_itself_because_time_may_have_elected_another() -> None:
    """p frozen at 5; a takes over by time at 6; the Lease is deleted; p wakes and writes itself into a new one."""
    own = volume(P, was_primary=True, last_record=record(mode="asynchronous", voters=frozenset(), quorum=0))
    assert isinstance(repair(own, holder(P), {}), str)


def test_r4_asynchronous_an_empty_holder_without_a_stamp_is_not_taken_before_the_duration() -> None:
    """kubectl clears the holder by hand: p is writable by its permit for up to 8 s more."""
    found = record(mode="asynchronous", voters=frozenset(), quorum=0, holder=None)
    assert (
        entitled_by_time(
            found,
            unchanged_for_s=0.1,
            agent_age_s=100.0,
            proven_dead=False,
            own_end=end(200),
            maximum_lag_bytes=0,
            clock_rate_error=0.005,
        )
        is not None
    )


def test_r13_a_holder_that_has_let_clients_in_never_gives_back() -> None:
    """p acknowledged alone (q 0); restoring the N and q of before lets a member without these commits be elected."""
    with pytest.raises(ValueError, match="opened"):
        given_back(record(voters=frozenset(), quorum=0, opened=True), record())


def test_r13_reaffirming_does_not_forget_that_clients_were_let_in() -> None:
    """Else a holder that restarts, fails to open and gives back restores an N and q from before its commits."""
    assert reaffirmed(record(opened=True), holder=holder(P), highest_epoch=Epoch(5)).opened


def test_r11_asynchronous_a_member_bound_by_an_extension_does_not_take_over_by_time() -> None:
    seen = with_record(silent_primary(observation("a")), record(mode="asynchronous", quorum=0, voters=ids("a b")))
    seen = replace(
        seen,
        lease=replace(seen.lease, unchanged_for_s=11.0),
        volume=replace(seen.volume, extension_until_s=1005.0, extension_epoch=Epoch(5)),
        suspected_for_s=9.0,
    )
    assert decide(seen).act == "wait"


def test_r11_a_member_bound_by_an_extension_does_not_take_a_release() -> None:
    outcome = taken_from_release(
        released_record(),
        member=A,
        holder=holder(A),
        end=end(200),
        volume=volume(A, extension_until_s=1e9, extension_epoch=Epoch(5)),
        released_for_s=0.0,
        takeover_timeout_s=3.0,
        wanted_k=1,
        now_s=1000.0,
    )
    assert isinstance(outcome, StandBack)


def test_r11_a_reboot_does_not_free_a_voter_from_an_extension_before_its_duration_has_passed() -> None:
    """The node reboots within 2 s (or the pod moves with its volume): BOOTTIME starts anew, and it promises at once."""
    bound = volume(B, extension_until_s=5000.0, extension_epoch=Epoch(5), boot_id="boot-1")
    assert not judge_vote(request(), voter(volume=bound, boot_id="boot-2", now_s=3.0), final=True).granted


def test_r7_a_voter_extends_nothing_while_q_is_zero() -> None:
    asked = ExtensionRequest(cluster_uid="uid-1", holder=P, epoch=Epoch(5), duration_s=10.0)
    assert not judge_extension(asked, voter(record=record(quorum=0))).granted


def test_r3_a_lease_restored_within_the_same_epoch_is_damaged_for_the_holder_that_wrote_another_n_and_q() -> None:
    """p wrote ({a}, 1); a backup of the same epoch says ({b}, 1): b, that lacks commits, is electable."""
    own = volume(P, was_primary=True, last_record=record(voters=ids("a")))
    assert record_damage(record(voters=ids("b")), own, cluster_uid="uid-1", data_known=True) is not None


def test_section_4_a_half_rewound_directory_is_never_started_by_its_holder() -> None:
    seen = observation("p")
    seen = replace(
        seen,
        postgres=replace(seen.postgres, running=False, mode=None),
        directory=replace(seen.directory, half_rewound=True),
        yielding_for_s=1.0,
    )
    assert decide(seen).act != "resume"


# A cluster that stands still.


def test_r12_a_primary_reaffirms_for_a_member_that_promised_later_and_is_no_voter_any_more() -> None:
    """p pauses for 4 s; a and b promise 6; p wakes and, with no walreceiver left, lowers q to 0 and N to {}; the takeover
    fails on the grounds. Neither a nor b may follow epoch 5 ever again, and p does not reaffirm: no redundancy for ever."""
    seen = with_record(observation("p"), record(voters=frozenset(), quorum=0))
    seen = with_peer(with_peer(seen, "a", promised_epoch=Epoch(6)), "b", promised_epoch=Epoch(6))
    assert decide(seen).act == "reaffirm"


def test_section_4_who_may_follow_a_holder_can_also_promise_its_epoch() -> None:
    """c promised 6 to b; a took the Lease at 6 too (a release, q 2, or a holder that restarts with q 0). c may follow it, but
    the promise that goes before raises; and a does not reaffirm, because 6 is not later than 6."""
    state = volume(C, promised_epoch=Epoch(6), promised_to=B)
    found = record(epoch=Epoch(6), holder=holder(A), voters=frozenset(), quorum=0)
    assert state.may_follow(found)
    try:
        state.following(found)
    except ValueError as error:
        pytest.fail(f"it may follow, and cannot: {error}")


def test_section_4_a_holder_whose_volume_is_gone_is_suspected_although_its_namesake_answers() -> None:
    """p's volume is lost, p comes back empty and answers: nobody suspects it, and it waits to clone from itself."""
    seen = with_peer(observation("a"), "p", member_id=None, incarnation="p-life-2", has_data=False, writable=False)
    seen = replace(
        seen, postgres=replace(seen.postgres, receiving=False), lease=replace(seen.lease, unchanged_for_s=60)
    )
    assert decide(seen).act == "stand"


def test_section_4_a_holder_without_a_data_directory_does_not_resume() -> None:
    """Only `data/` was destroyed: the id on the volume still says that it holds the Lease."""
    seen = observation("p", incarnation="p-life-2")
    seen = replace(
        seen,
        postgres=replace(seen.postgres, running=False, mode=None),
        directory=replace(seen.directory, exists=False, was_primary=False),
    )
    assert decide(seen).act != "resume"


def test_section_4_a_member_that_has_just_started_does_not_call_the_primary_silent() -> None:
    """Two instances: N = {a}, one promise elects. a restarts, has asked nobody yet, and takes over from a healthy primary."""
    seen = with_record(observation("a", agent_age_s=0.2), record(voters=ids("a")))
    seen = replace(
        seen,
        peers={MemberName("p"): replace(peer("p"), state=None, answers=False, silent_for_s=float("inf"))},
        postgres=replace(seen.postgres, receiving=False, silent_for_s=float("inf")),
    )
    assert decide(seen).act != "stand"


def test_r13_a_voter_ahead_of_a_winner_that_gave_back_can_still_be_elected() -> None:
    """q 2 of {a, b}: a wins alone at 150 while b, cut off, holds 160; a cannot open and gives back; b is the best, but its
    log is past the fork that nobody took up: it wants to be rewound, may not (a voter), and stands never."""
    won = judge_promises(record(quorum=2), candidate(A, 150), holder(A), Epoch(6), answers(a=150), wanted_k=2)
    assert isinstance(won, Won)
    back = given_back(won.record, record(quorum=2))
    seen = with_record(observation("b"), back)
    seen = replace(seen, postgres=replace(seen.postgres, end=end(160)), suspected_for_s=9.0)
    assert decide(seen).act == "stand"


def test_a_release_is_taken_in_a_paused_cluster_that_released() -> None:
    """A primary that is shut down or switched over while paused releases to a target, and the target does not take it."""
    seen = with_record(observation("a"), replace(released_record(), paused=True))
    assert decide(seen).act == "take_release"


def test_r5_one_promise_without_a_position_does_not_spoil_enough_good_ones() -> None:
    outcome = judge_promises(
        record(voters=ids("a b c"), quorum=2),
        candidate(),
        holder(A),
        Epoch(6),
        answers(a=200, b=200, c=None),
        wanted_k=1,
    )
    assert isinstance(outcome, Won)


# Smaller.


def test_the_quorum_never_proposes_a_record_that_counts_as_damaged() -> None:
    """A primary that still runs NOBODY, in its first seconds: `wanted_set` says keep, and q 1 of no voters is proposed."""
    kept = wanted_set(
        standbys={}, voters=ids("a"), synchronous=NOBODY, wanted_k=1, required=False, relax_after_s=2, alone_for_s=1
    )
    step = next_step(voters=ids("a"), quorum=1, synchronous=NOBODY, confirmed=True, wanted=kept)
    assert isinstance(step, Settled | SetSynchronous) or step.quorum <= len(step.voters)


def test_section_4_required_does_not_stay_alone_when_it_was_set_while_alone() -> None:
    """Durability changes from preferred to required while the primary runs alone: commits go on with one copy."""
    kept = wanted_set(
        standbys={}, voters=frozenset(), synchronous=ALONE, wanted_k=1, required=True, relax_after_s=2, alone_for_s=99
    )
    assert not kept.acknowledges_alone
    assert isinstance(kept, SynchronousSet)


def test_timings_that_are_no_numbers_are_refused() -> None:
    assert Timings(lease_duration_s=float("nan")).problems() != ()
    assert Timings(lease_duration_s=float("inf")).problems() != ()


def test_a_takeover_from_a_log_outside_the_history_stands_back_instead_of_raising() -> None:
    me = candidate(C, timeline=7)
    votes = {C: replace(answers(c=200)[C], end=me.end)}
    outcome = judge_promises(
        record(voters=ids("c"), highest_timeline=Timeline(9)), me, holder(C), Epoch(6), votes, wanted_k=1
    )
    assert isinstance(outcome, StandBack)
