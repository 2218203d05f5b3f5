"""Who stands, who wins, and what the one write of a takeover says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_builders import A, B, C, P, answer, answers, candidate, end, holder, ids, record, released_record, volume

from instance_manager.core.election import (
    Stand,
    StandBack,
    Won,
    judge_pre_votes,
    judge_promises,
    place,
    taken_from_release,
    taken_over,
)
from instance_manager.core.record import ClusterRecord, SwitchoverRequest
from instance_manager.core.types import Epoch, MemberId, Timeline


def promises(
    wanted_k: int = 1, voters: str = "a b", quorum: int = 1, me: MemberId = A, **lsns: int | None
) -> Won | StandBack:
    own = lsns.get(me[0])
    return judge_promises(
        record(voters=ids(voters), quorum=quorum),
        candidate(me, own if own is not None else 200),
        holder(me),
        Epoch(6),
        answers(**lsns),
        wanted_k=wanted_k,
    )


def won(outcome: Won | StandBack) -> ClusterRecord:
    assert isinstance(outcome, Won), outcome
    assert outcome.record.problems() == ()
    return outcome.record


def stands_back(outcome: Won | Stand | StandBack) -> StandBack:
    assert isinstance(outcome, StandBack), outcome
    return outcome


def test_section_4_the_best_is_by_timeline_then_position_then_priority_then_name() -> None:
    order = [
        candidate(C, lsn=10, timeline=3),
        candidate(C, lsn=300),
        candidate(C, lsn=200, priority=1),
        candidate(A, lsn=200),
        candidate(B, lsn=200),
    ]
    assert [place(one, order) for one in order] == [0, 1, 2, 3, 4]


def test_section_4_with_enough_promises_and_nobody_ahead_the_lease_is_taken() -> None:
    after = won(promises(a=200, b=190))
    assert after.holder == holder(A)
    assert after.epoch == 6


def test_section_4_one_promise_too_few_does_not_elect() -> None:
    assert "1 of 2" in stands_back(promises(a=200)).reason
    assert "2 of 3" in stands_back(promises(voters="a b c", a=200, b=200)).reason
    won(promises(voters="a b c", quorum=2, a=200, b=200))


def test_section_4_a_candidate_with_a_promiser_ahead_names_it() -> None:
    assert stands_back(promises(a=200, b=201)).better == B


def test_r7_only_members_of_n_count_as_promisers_the_candidate_included() -> None:
    stands_back(promises(a=200, c=200))
    stands_back(promises(me=C, voters="a b", c=200, a=200, b=200))


def test_r7_with_q_zero_nobody_is_elected_whatever_the_voters_are() -> None:
    for voters in ("", "a", "a b"):
        stands_back(promises(voters=voters, quorum=0, a=200, b=200))


def test_a_candidate_promises_itself_before_it_counts_others() -> None:
    assert "itself" in stands_back(promises(me=A, b=100)).reason


def test_r5_a_promise_without_a_proven_end_of_log_elects_nobody() -> None:
    stands_back(promises(a=200, b=None))


def test_a_refusal_is_no_promise() -> None:
    votes = {A: answer(A), B: answer(B, granted=False)}
    stands_back(judge_promises(record(), candidate(), holder(A), Epoch(6), votes, wanted_k=1))


def test_section_4_only_promisers_with_an_equal_log_become_the_winners_voters() -> None:
    equal = won(promises(a=200, b=200))
    assert (equal.voters, equal.quorum) == (ids("b"), 1)
    behind = won(promises(a=200, b=199))
    assert (behind.voters, behind.quorum) == (frozenset(), 0)


def test_section_4_the_winners_q_is_no_more_than_its_voters_and_than_wanted() -> None:
    assert won(promises(voters="a b c", quorum=1, wanted_k=1, a=200, b=200, c=200)).quorum == 1
    assert won(promises(voters="a b c", quorum=1, wanted_k=2, a=200, b=200, c=200)).quorum == 2
    assert won(promises(voters="a b c", quorum=1, wanted_k=2, a=200, b=200, c=1)).quorum == 1


def test_r2_a_takeover_claims_one_more_than_every_timeline_ever_claimed_and_records_its_fork() -> None:
    before = record(highest_timeline=Timeline(7))
    after = taken_over(before, holder=holder(A), epoch=Epoch(6), end=end(150), voters=frozenset(), quorum=0)
    assert after.highest_timeline == 8
    assert after.chain is not None
    fork = after.chain.switches[-1]
    assert (fork.timeline, fork.parent, fork.switch_lsn, fork.epoch) == (8, 2, 150, 6)
    assert not after.chain.contains(end(151)), "what the former primary wrote past the fork is no part of the history"


def test_r2_two_winners_in_a_row_never_claim_the_same_timeline() -> None:
    first = taken_over(record(), holder=holder(A), epoch=Epoch(6), end=end(150), voters=ids("b"), quorum=1)
    second = taken_over(first, holder=holder(B), epoch=Epoch(7), end=end(150), voters=frozenset(), quorum=0)
    assert first.highest_timeline == 3
    assert second.highest_timeline == 4
    assert second.chain is not None
    assert not second.chain.contains(end(160, timeline=3))


def test_section_3_the_epoch_only_grows() -> None:
    with pytest.raises(ValueError, match="not after"):
        taken_over(record(), holder=holder(A), epoch=Epoch(5), end=end(150), voters=frozenset(), quorum=0)


def test_section_4_nobody_becomes_a_voter_by_a_takeover_who_was_none() -> None:
    for voters in ("a", "c"):
        with pytest.raises(ValueError, match="new voters"):
            taken_over(record(), holder=holder(A), epoch=Epoch(6), end=end(150), voters=ids(voters), quorum=1)


def test_r4_a_takeover_clears_the_switchover_request_and_the_release() -> None:
    asked = replace(released_record(), switchover=SwitchoverRequest(request_id="r", epoch=Epoch(5), target=None))
    after = taken_over(asked, holder=holder(A), epoch=Epoch(6), end=end(200), voters=ids("b"), quorum=1)
    assert after.switchover is None
    assert after.release is None
    assert not after.opened


def test_r12_the_epoch_asked_for_is_above_the_record_and_every_answer() -> None:
    votes = {A: answer(A), B: answer(B, highest_epoch=Epoch(11))}
    assert judge_pre_votes(record(), volume(A), candidate(), votes) == Stand(Epoch(12))
    own = volume(A, highest_epoch=Epoch(20))
    assert judge_pre_votes(record(), own, candidate(), votes) == Stand(Epoch(21))


def test_r12_a_pre_vote_that_cannot_win_persists_nothing_and_tells_the_better_one() -> None:
    assert stands_back(judge_pre_votes(record(), volume(A), candidate(), answers(a=200, b=201))).better == B
    assert stands_back(judge_pre_votes(record(), volume(A), candidate(), answers(a=200))).better is None
    stands_back(judge_pre_votes(record(), volume(C), candidate(C), answers(a=1, b=1, c=200)))
    stands_back(judge_pre_votes(record(quorum=0), volume(A), candidate(), answers(a=200, b=200)))
    refused = {A: answer(A), B: answer(B, granted=False)}
    stands_back(judge_pre_votes(record(), volume(A), candidate(), refused))


def take(
    found: ClusterRecord, member: MemberId = A, lsn: int = 200, released_for_s: float = 0.0, timeline: int = 2
) -> Won | StandBack:
    return taken_from_release(
        found,
        member=member,
        holder=holder(member),
        end=end(lsn, timeline),
        volume=volume(member, highest_epoch=Epoch(8)),
        released_for_s=released_for_s,
        takeover_timeout_s=3.0,
        wanted_k=1,
        now_s=1000.0,
    )


def test_r4_the_named_target_that_holds_the_checkpoint_takes_a_release_at_once() -> None:
    after = won(take(released_record()))
    assert (after.holder, after.voters, after.quorum) == (holder(A), ids("b"), 1)
    assert after.epoch == 9, "above every epoch that this volume has seen"


def test_r4_another_that_holds_the_checkpoint_or_the_releaser_takes_it_after_takeover_timeout() -> None:
    for member in (B, P):
        stands_back(take(released_record(), member, released_for_s=2.9))
        won(take(released_record(), member, released_for_s=3.0))


@pytest.mark.parametrize(("lsn", "timeline"), [(199, 2), (201, 2), (200, 1)])
def test_r4_a_log_that_does_not_end_with_the_stamped_checkpoint_takes_nothing(lsn: int, timeline: int) -> None:
    stands_back(take(released_record(), lsn=lsn, timeline=timeline, released_for_s=99.0))


def test_r4_an_empty_holder_without_a_stamp_means_nothing() -> None:
    stands_back(take(record(holder=None), released_for_s=99.0))


def test_r4_a_stamp_of_an_earlier_epoch_means_nothing() -> None:
    stands_back(take(released_record(epoch=Epoch(6)), released_for_s=99.0))


def test_r4_a_stamp_beside_a_holder_means_nothing() -> None:
    stands_back(take(replace(released_record(), holder=holder(P))))
