"""What duties count, and how it is written."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from metrics_servers import Scrape

from instance_manager.metrics.exposition import Block, Family, Histogram, number
from instance_manager.metrics.measures import Measures


def test_a_decision_counts_when_it_changes() -> None:
    measures = Measures()
    for act in ("wait", "wait", "serve", "serve", "wait"):
        measures.decided(act)
    assert measures.decisions.value("wait") == 2
    assert measures.decisions.value("serve") == 1


def test_the_phases_of_a_takeover_add_up_to_the_time_without_a_primary() -> None:
    measures = Measures()
    measures.takeover_begins("election", 13.0, 10.0)
    measures.takeover_reached("election", 13.5)
    measures.takeover_reached("promotion", 14.5)
    measures.opened(15.0)
    seen = Scrape(measures.blocks())
    phases = {"suspicion": 3.0, "election": 0.5, "promotion": 1.0, "opening": 0.5}
    for phase, seconds in phases.items():
        assert seen.value("instance_manager_failover_phase_seconds_sum", phase=phase) == seconds
    assert seen.value("instance_manager_failovers_total", kind="election") == 1


def test_a_takeover_that_is_given_up_and_an_opening_without_one_are_not_measured() -> None:
    measures = Measures()
    measures.opened(1.0)
    measures.takeover_begins("election", 2.0, None)
    measures.opened(3.0)
    measures.takeover_begins("election", 4.0, None)
    measures.takeover_reached("promotion", 5.0)
    measures.opened(6.0)
    assert measures.takeovers.value("election") == 0


def test_a_rejoin_is_counted_by_how_it_ended() -> None:
    measures = Measures()
    with measures.rejoining("rewind"):
        pass
    with pytest.raises(OSError, match="full"), measures.rejoining("clone"):
        raise OSError("full")
    assert measures.rejoins.value("rewind", "success") == 1
    assert measures.rejoins.value("clone", "failed") == 1


def test_only_renewals_that_succeeded_have_a_duration() -> None:
    measures = Measures()
    measures.renewed("success", 0.02)
    measures.renewed("unknown", 1.5)
    assert measures.renewal_seconds.count() == 1
    assert measures.renewals.value("unknown") == 1


def test_a_histogram_counts_below_each_bound() -> None:
    histogram = Histogram("h", "help", (0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(seconds)
    seen = Scrape([histogram.block()])
    assert seen.value("h_bucket", le="0.1") == 2
    assert seen.value("h_bucket", le="1.0") == 3
    assert seen.value("h_bucket", le="+Inf") == 4
    assert seen.value("h_count") == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "NaN"),
        (True, "1"),
        (7, "7"),
        (0.5, "0.5"),
        (math.inf, "+Inf"),
        (Decimal("1.5"), "1.5"),
        ("2", "2.0"),
        (datetime(2026, 1, 1, tzinfo=UTC), "1767225600.0"),
    ],
)
def test_values_as_postgres_gives_them(value: object, text: str) -> None:
    assert number(value) == text


def test_what_is_no_number_and_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        number("many")
    with pytest.raises(ValueError, match="no number"):
        number([1])
    with pytest.raises(ValueError, match="zip"):
        Block(Family("f", "gauge", "help", ("a", "b"))).add(1, "only one")


def test_what_may_happen_for_the_first_time_is_told_as_never_before_it_does() -> None:
    """Prometheus's `increase` does not see the first step of a series that begins at 1: the alert of a first fence would not fire."""
    told = {line for block in Measures().blocks() for line in block.lines}
    for series in (
        'self_fences_total{reason="soft_deadline"}',
        'self_fences_total{reason="hard_deadline"}',
        'failovers_total{kind="election"}',
        'rejoins_total{kind="rewind",result="failed"}',
        'decisions_total{decision="promote"}',
    ):
        assert f"instance_manager_{series} 0\n" in told
