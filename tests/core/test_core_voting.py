"""What a voter promises, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from core_builders import A, B, C, P, ids, record, request, volume, voter

from instance_manager.core.types import Epoch
from instance_manager.core.voting import ExtensionRequest, VolumeState, VoterView, judge_extension, judge_vote


def extension(**changes: Any) -> ExtensionRequest:
    return ExtensionRequest(**{"cluster_uid": "uid-1", "holder": P, "epoch": Epoch(5), "duration_s": 10.0, **changes})


def test_a_voter_that_suspects_the_primary_promises_a_later_epoch() -> None:
    assert judge_vote(request(), voter(), final=False).granted
    assert judge_vote(request(), voter(), final=True).granted


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    ("case", "view", "asked", "reason"),
    [
        ("section 4: no suspicion of its own", {"suspects": None}, {}, "do not suspect"),
        ("r3: the Lease is damaged", {"damaged": True}, {}, "R3"),
        ("r3: there is no Lease", {"record": None}, {}, "R3"),
        ("r14: another cluster", {}, {"cluster_uid": "uid-2"}, "another cluster"),
        ("r7: it is not a voter", {"volume": volume(C)}, {}, "not among the voters"),
        ("r6: its directory is new", {"volume": volume(B, member_id=None)}, {}, "not among the voters"),
        ("r7: the candidate is not a voter", {}, {"candidate": C}, "candidate is not among"),
        ("r7: q is 0", {"record": record(quorum=0)}, {}, "q is 0"),
        ("it serves itself", {"serving": True}, {}, "writable"),
        ("it is fenced", {"fenced": True}, {}, "fenced"),
        ("r12: it has not read the Lease", {"record_read_age_s": 4.1}, {}, "R12"),
        ("the candidate stands on an old record", {}, {"record_epoch": Epoch(4)}, "stands on epoch 4"),
        ("the epoch is not later", {}, {"epoch": Epoch(5)}, "not after"),
        ("r11: it is bound by an extension", {"volume": volume(B, extension_until_s=1000.1)}, {}, "R11"),
        ("r11: a takeover of its own is open", {"takeover_open": True}, {}, "R11"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_a_voter_refuses_when(case: str, view: dict[str, Any], asked: dict[str, Any], reason: str, final: bool) -> None:
    verdict = judge_vote(request(**asked), voter(**view), final=final)
    assert not verdict.granted, case
    assert reason in verdict.reason


def test_r11_an_extension_binds_until_its_end_and_not_longer() -> None:
    assert judge_vote(request(), voter(volume=volume(B, extension_until_s=1000.0)), final=True).granted


def test_section_4_an_epoch_is_promised_to_one_candidate_only_and_never_an_earlier_one() -> None:
    promised_c = volume(B, promised_epoch=Epoch(6), promised_to=C)
    promised_a = volume(B, promised_epoch=Epoch(6), promised_to=A)
    promised_7 = volume(B, promised_epoch=Epoch(7), promised_to=A)
    assert not judge_vote(request(), voter(volume=promised_c), final=True).granted
    assert not judge_vote(request(), voter(volume=promised_7), final=True).granted
    assert judge_vote(request(), voter(volume=promised_a), final=True).granted, "asked again after a lost answer"
    for earlier in (promised_c, promised_7):
        with pytest.raises(ValueError, match="promised epoch"):
            earlier.promising(Epoch(6), A)


def test_r12_a_pre_vote_is_answered_whatever_epoch_was_promised_to_a_dead_candidate() -> None:
    assert judge_vote(request(), voter(volume=volume(B, promised_epoch=Epoch(9), promised_to=C)), final=False).granted


def test_a_better_voter_that_is_told_to_stand_may_promise_itself_without_suspicion() -> None:
    own = voter(volume=volume(A), suspects=None, takeover_open=True)
    assert judge_vote(request(candidate=A), own, final=True).granted


def test_section_4_who_has_promised_follows_no_primary_of_a_lower_epoch() -> None:
    promised = volume(B).promising(Epoch(6), A)
    assert not promised.may_follow(record(epoch=Epoch(5)))
    assert promised.may_follow(record(epoch=Epoch(6)))
    assert not promised.may_follow(record(epoch=Epoch(6), holder=None))


def test_r3_a_volume_remembers_the_highest_epoch_recorded_and_promised() -> None:
    state = volume(B).promising(Epoch(9), A)
    assert (state.highest_epoch, state.recorded_epoch) == (9, 5)
    later = state.saw_record(record(epoch=Epoch(7)))
    assert (later.highest_epoch, later.recorded_epoch) == (9, 7)
    assert later.saw_record(record(epoch=Epoch(6))) == later


def test_r11_a_voter_that_promised_nothing_later_extends() -> None:
    assert judge_extension(extension(), voter()).granted


@pytest.mark.parametrize(
    ("case", "view", "asked"),
    [
        ("it promised a later epoch", {"volume": volume(B, promised_epoch=Epoch(6), promised_to=A)}, {}),
        ("a takeover of its own is open", {"takeover_open": True}, {}),
        ("it knows a later record", {"record": record(epoch=Epoch(6))}, {}),
        ("it knows another holder", {}, {"holder": C}),
        ("it knows that nobody holds the Lease", {"record": record(holder=None)}, {}),
        ("it is not a voter", {"record": record(voters=ids("a"))}, {}),
        ("another cluster", {}, {"cluster_uid": "uid-2"}),
        ("the Lease is damaged", {"damaged": True}, {}),
        ("it never read the Lease", {"record": None}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_r11_an_extension_is_refused_when(case: str, view: dict[str, Any], asked: dict[str, Any]) -> None:
    assert not judge_extension(extension(**asked), voter(**view)).granted, case


def test_p6_what_a_volume_must_not_forget_is_no_part_of_the_data_directory() -> None:
    """Promise, highest epoch and identity are one value that the shell stores beside the data directory."""
    assert {"promised_epoch", "promised_to", "highest_epoch", "recorded_epoch", "member_id", "last_record"} <= set(
        type(volume()).__slots__
    )
    assert isinstance(voter(), VoterView)


def test_r3_the_first_epochs_record_is_remembered_with_its_history() -> None:
    begun = record(epoch=Epoch(1), chain=None, system_identifier=None)
    state = VolumeState().saw_record(begun)
    assert state.saw_record(record(epoch=Epoch(1))).remembered() == record(epoch=Epoch(1))
