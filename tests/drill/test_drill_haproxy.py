"""When a proxy has followed a new primary, and when it was late."""

from __future__ import annotations

import pytest

from instance_manager.drill.haproxy import Look, late_moves

WITHIN_S = 1.7


def looks(*seen: tuple[float, str | None, tuple[str, ...]]) -> tuple[Look, ...]:
    return tuple(Look(at_s, opened, traffic) for at_s, opened, traffic in seen)


@pytest.mark.parametrize(
    "seen",
    [
        looks((0, "a", ("a",)), (5, "a", ("a",))),
        looks((0, "a", ("a",)), (1, None, ()), (9, "b", ()), (10, "b", ("b",)), (20, "b", ("b",))),
        looks((0, "a", ("a",)), (1, "b", ("a",)), (2, "b", ("a", "b")), (9, "b", ("b",))),
        looks((0, None, ()), (60, None, ())),
        looks((0, "a", ()), (1, None, ()), (30, None, ())),
    ],
    ids=["nothing happens", "in time", "the former one is met as well", "nobody is open", "it closed before"],
)
def test_a_proxy_that_followed_in_time_owes_nothing(seen: tuple[Look, ...]) -> None:
    assert late_moves(seen, within_s=WITHIN_S) == ()


def test_a_proxy_that_followed_late_is_told_once() -> None:
    seen = looks(
        (0, "a", ("a",)), (1, "b", ("a",)), (2, "b", ("a",)), (3, "b", ("a",)), (4, "b", ("a",)), (5, "b", ("b",))
    )
    assert late_moves(seen, within_s=WITHIN_S) == ("HAProxy led writers to a 2.0 s after b had opened",)


def test_each_primary_is_judged() -> None:
    seen = looks((0, "a", ()), (3, "a", ()), (4, "b", ()), (9, "b", ()))
    assert late_moves(seen, within_s=WITHIN_S) == (
        "HAProxy led writers to nobody 3.0 s after a had opened",
        "HAProxy led writers to nobody 5.0 s after b had opened",
    )
