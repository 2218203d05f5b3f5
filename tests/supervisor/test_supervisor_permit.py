"""The write permit's rules, without any process."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instance_manager.supervisor.permit import Permit, PermitRefusedError, WritePermit

HARD_LIMIT_S = 8.0


def permit_of(epoch: int = 5, at_s: float = 100.0) -> WritePermit:
    permit = WritePermit(HARD_LIMIT_S)
    permit.extend(at_s, epoch, at_s + 6, at_s + 8)
    return permit


def test_without_any_permit_nothing_may_become_read_write() -> None:
    permit = WritePermit(HARD_LIMIT_S)
    with pytest.raises(PermitRefusedError, match="no permit"):
        permit.require(100.0, 1)
    assert permit.must_fence(100.0)


def test_a_permit_counts_for_exactly_its_epoch() -> None:
    permit = permit_of(epoch=5)
    permit.require(101.0, 5)
    for other in (4, 6):
        with pytest.raises(PermitRefusedError, match="of epoch 5"):
            permit.require(101.0, other)


def test_past_soft_nothing_becomes_read_write_but_what_is_may_go_on_until_hard() -> None:
    permit = permit_of(at_s=100.0)
    with pytest.raises(PermitRefusedError, match="soft"):
        permit.require(106.0, 5)
    assert not permit.must_fence(107.999)
    assert permit.must_fence(108.0)


def test_an_absurd_deadline_is_capped_at_now_plus_the_limit() -> None:
    permit = WritePermit(HARD_LIMIT_S)
    assert permit.extend(100.0, 1, 1e300, 1e300) == Permit(1, 108.0, 108.0)


def test_a_late_message_with_an_earlier_deadline_takes_nothing_away() -> None:
    permit = permit_of(at_s=100.0)
    assert permit.extend(101.0, 5, 102.0, 103.0) == Permit(5, 106.0, 108.0)


def test_a_later_epoch_replaces_even_a_longer_permit() -> None:
    permit = permit_of(epoch=5, at_s=100.0)
    assert permit.extend(101.0, 6, 102.0, 103.0) == Permit(6, 102.0, 103.0)


def test_an_earlier_epoch_never_comes_back() -> None:
    permit = permit_of(epoch=5, at_s=100.0)
    with pytest.raises(PermitRefusedError, match="is over"):
        permit.extend(200.0, 4, 206.0, 208.0)
    assert permit.current == Permit(5, 106.0, 108.0)


@pytest.mark.parametrize(
    ("soft_s", "hard_s"),
    [(math.nan, 108.0), (106.0, math.nan), (106.0, math.inf), (-math.inf, 108.0), (107.0, 106.0), (99.0, 100.0)],
)
def test_deadlines_that_make_no_sense_are_refused_and_change_nothing(soft_s: float, hard_s: float) -> None:
    permit = permit_of(at_s=99.0)
    before = permit.current
    with pytest.raises(PermitRefusedError):
        permit.extend(100.0, 6, soft_s, hard_s)
    assert permit.current == before


def test_a_revoked_epoch_ends_now_and_is_over_for_ever() -> None:
    permit = permit_of(epoch=5, at_s=100.0)
    permit.revoke(5)
    assert permit.must_fence(100.0)
    for epoch in (4, 5):
        with pytest.raises(PermitRefusedError, match="revoked"):
            permit.extend(101.0, epoch, 106.0, 108.0)
    permit.extend(101.0, 6, 106.0, 108.0)
    assert not permit.must_fence(101.0)


def test_revoking_an_earlier_epoch_leaves_the_present_permit() -> None:
    permit = permit_of(epoch=5, at_s=100.0)
    permit.revoke(4)
    permit.require(101.0, 5)
    permit.revoke(2)
    assert permit.revoked_epoch == 4


def test_a_permit_that_ran_out_can_be_given_again_for_the_same_epoch() -> None:
    permit = permit_of(epoch=5, at_s=100.0)
    assert permit.must_fence(110.0)
    permit.extend(110.0, 5, 116.0, 118.0)
    permit.require(110.0, 5)


@pytest.mark.parametrize("limit_s", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_limits_nothing_is_no_limit(limit_s: float) -> None:
    with pytest.raises(ValueError, match="hard_limit_s"):
        WritePermit(limit_s)


_extend = st.tuples(
    st.just("extend"), st.integers(0, 4), st.floats(allow_nan=True, width=32), st.floats(allow_nan=True, width=32)
)
_near = st.tuples(st.just("near"), st.integers(0, 4), st.floats(-2, 20), st.floats(-2, 20))
_revoke = st.tuples(st.just("revoke"), st.integers(0, 4), st.just(0.0), st.just(0.0))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # two cores, often busy
@given(st.lists(st.tuples(st.floats(0, 5), st.one_of(_extend, _near, _revoke)), max_size=30))
def test_whatever_is_said_the_permit_is_bounded_and_epochs_only_rise(
    history: list[tuple[float, tuple[str, int, float, float]]],
) -> None:
    permit, now_s, highest_epoch, highest_revoked = WritePermit(HARD_LIMIT_S), 1000.0, -1, -1
    for pause_s, (kind, epoch, soft_s, hard_s) in history:
        now_s += pause_s
        before = permit.current
        if kind == "revoke":
            permit.revoke(epoch)
            highest_revoked = max(highest_revoked, epoch)
        else:
            shift_s = now_s if kind == "near" else 0.0
            try:
                permit.extend(now_s, epoch, soft_s + shift_s, hard_s + shift_s)
            except PermitRefusedError:
                assert permit.current == before
        assert permit.revoked_epoch == highest_revoked
        current = permit.current
        if current is None:
            assert permit.must_fence(now_s)
            continue
        assert current.soft_s <= current.hard_s <= now_s + HARD_LIMIT_S
        assert current.epoch > highest_revoked
        assert current.epoch >= highest_epoch
        if before is not None and before.epoch == current.epoch:
            assert current.hard_s >= before.hard_s
            assert current.soft_s >= before.soft_s
        highest_epoch = current.epoch
        assert permit.must_fence(current.hard_s)
