"""The inequality of the timings, and the table of roles."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest

from instance_manager.core.roles import TRANSITIONS, Role, diagram
from instance_manager.core.timing import Timings


def test_section_3_the_defaults_are_sound() -> None:
    assert Timings().problems() == ()


@pytest.mark.parametrize(
    "change",
    [
        {"hard_s": 8.5},
        {"kill_budget_s": 1.6},
        {"margin_s": 1.1},
        {"lease_duration_s": 9.4},
        {"clock_rate_error": 0.05},
        {"renew_interval_s": 3.1},
        {"soft_s": 8.0},
        {"request_timeout_s": 2.0},
        {"relax_after_s": 3.0},
        {"clock_rate_error": -0.1},
    ],
    ids=str,
)
def test_section_3_timings_that_break_the_inequality_are_refused(change: dict[str, float]) -> None:
    assert replace(Timings(), **change).problems() != ()


@pytest.mark.parametrize("name", [field.name for field in fields(Timings) if field.name != "clock_rate_error"])
def test_every_time_is_above_zero(name: str) -> None:
    assert any(name in problem for problem in replace(Timings(), **{name: 0.0}).problems())


def test_section_3_the_old_primary_is_dead_before_another_may_take_the_lease_whatever_the_clock_rates() -> None:
    """Worst case in real time: the holder's clock is slow, the candidate's is fast."""
    timings = Timings()
    killed_s = timings.hard_s / (1 - timings.clock_rate_error) + timings.kill_budget_s
    taken_s = timings.lease_duration_s / (1 + timings.clock_rate_error)
    assert killed_s + timings.margin_s <= taken_s


def test_every_role_is_reached_and_none_is_a_trap() -> None:
    assert set(TRANSITIONS) == set(Role)
    for role in Role:
        assert role is Role.STARTING or any(role in targets for targets in TRANSITIONS.values()), role
        assert TRANSITIONS[role], role


def test_section_4_a_former_primary_comes_back_as_a_standby_only_after_it_was_stopped() -> None:
    assert not {Role.STANDBY, Role.CANDIDATE} & set(TRANSITIONS[Role.PRIMARY])
    assert Role.CANDIDATE not in TRANSITIONS[Role.PROMOTING]
    assert "before Postgres was promoted" in TRANSITIONS[Role.PROMOTING][Role.STANDBY]
    assert set(TRANSITIONS[Role.STOPPING]) == {Role.STOPPED, Role.FENCED, Role.STANDBY}
    assert "the standby that it was" in TRANSITIONS[Role.STOPPING][Role.STANDBY]


def test_section_3_a_standby_becomes_primary_only_as_a_candidate_that_took_the_lease() -> None:
    assert Role.PROMOTING not in TRANSITIONS[Role.STANDBY]
    assert [role for role, targets in TRANSITIONS.items() if Role.PRIMARY in targets] == [Role.STARTING, Role.PROMOTING]


def test_the_diagram_has_every_way_of_the_table() -> None:
    lines = diagram().splitlines()
    assert len(lines) == 2 + sum(len(targets) for targets in TRANSITIONS.values())
    assert all(one != other for one, other in pairwise(sorted(lines)))
