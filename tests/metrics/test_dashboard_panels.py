"""The dashboard as pictures of it read it: variables, legends, units, thresholds, and what queries give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from dashboard_panels import (
    Panel,
    UnknownPart,
    Window,
    colour_of,
    empty_queries,
    filled,
    formatted,
    legend_of,
    sections,
    substituted,
    ticks,
    variables,
)

DASHBOARD = Path(__file__).parents[2] / "deploy/monitoring/dashboard.json"
WINDOW = Window(start_s=1000.0, end_s=1004.0, step_s=1.0, scrape_s=1.0)


class Answers:
    """A source that gives the same to every query, and remembers what it was asked."""

    def __init__(self, *series: dict[str, Any], labels: tuple[str, ...] = ("b", "a")) -> None:
        self._series = list(series)
        self._labels = list(labels)
        self.asked: list[str] = []

    def ask(self, expr: str) -> list[dict[str, Any]]:
        self.asked.append(f"now: {expr}")
        return self._series

    def ask_range(self, expr: str, *, start_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]:
        self.asked.append(f"{start_s:g} to {end_s:g} by {step_s:g}: {expr}")
        return self._series

    def label_values(self, selector: str, label: str) -> list[str]:
        self.asked.append(f"{label} of {selector}")
        return self._labels


def panel(*targets: dict[str, Any], kind: str = "timeseries") -> Panel:
    made = {
        "type": kind,
        "title": "A panel",
        "description": "",
        "gridPos": {"x": 8, "y": 6, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": "s"}, "overrides": []},
        "targets": list(targets),
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}},
    }
    row = {"type": "row", "title": "A row", "gridPos": {"x": 0, "y": 4, "w": 24, "h": 1}}
    (section,) = sections({"panels": [row, made]})
    (only,) = section.panels
    return only


def test_variables_are_filled_in_with_and_without_braces() -> None:
    values = {"pod": ".*", "pods": "no", "__rate_interval": "4s"}
    assert substituted('rate(a{pod=~"$pod"}[$__rate_interval])', values) == 'rate(a{pod=~".*"}[4s])'
    assert substituted("${pod}x $pods", values) == ".*x no"
    with pytest.raises(UnknownPart, match="cluster"):
        substituted("$cluster", values)


def test_the_interval_of_rates_is_four_scrapes_or_a_step_and_a_scrape() -> None:
    assert WINDOW.rate_interval_s == 4
    assert Window(0, 3600, step_s=60, scrape_s=15).rate_interval_s == 75


def test_variables_of_the_dashboard_are_the_first_values_or_all_of_them() -> None:
    source = Answers()
    chosen = variables(json.loads(DASHBOARD.read_text()), source, WINDOW)
    assert chosen == {"__rate_interval": "4s", "namespace": "a", "cluster": "a", "pod": ".*"}
    assert source.asked == [
        "namespace of instance_manager_build_info",
        'cluster of instance_manager_build_info{namespace="a"}',
        'pod of instance_manager_build_info{namespace="a", cluster="a"}',
    ]
    with pytest.raises(UnknownPart, match="namespace has no value"):
        variables(json.loads(DASHBOARD.read_text()), Answers(labels=()), WINDOW)


@pytest.mark.parametrize(
    ("template", "labels", "legend"),
    [
        ("{{pod}} {{ role }}", {"pod": "pg-0", "role": "primary"}, "pg-0 primary"),
        ("{{pod}} limit", {}, " limit"),
        ("q", {"pod": "pg-0"}, "q"),
        ("", {"__name__": "up", "pod": "pg-0", "job": "j"}, 'up{job="j", pod="pg-0"}'),
        ("", {"__name__": "up"}, "up"),
        ("", {}, "sum(up)"),
    ],
)
def test_legends_are_made_by_their_template(template: str, labels: dict[str, str], legend: str) -> None:
    assert legend_of(template, labels, "sum(up)") == legend


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "short", "0"),
        (3, "short", "3"),
        (-1200, "short", "-1.2 K"),
        (2_500_000, "short", "2.5 M"),
        (150.04, "ops", "150 ops/s"),
        (0.9985, "percentunit", "99.85%"),
        (1, "percentunit", "100%"),
        (0, "bytes", "0 B"),
        (16 * 2**20, "bytes", "16 MiB"),
        (1536, "bytes", "1.5 KiB"),
        (1_500_000, "Bps", "1.5 MB/s"),
        (0, "s", "0 s"),
        (0.00002, "s", "20 µs"),
        (0.0125, "s", "12.5 ms"),
        (5.5, "s", "5.5 s"),
        (90, "s", "1.5 mins"),
        (2 * 86400, "s", "2 days"),
        (30 * 86400, "s", "4.29 weeks"),
    ],
)
def test_numbers_are_written_by_their_unit(value: float, unit: str, text: str) -> None:
    assert formatted(value, unit) == text


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(UnknownPart, match="furlongs"):
        formatted(1, "furlongs")


@pytest.mark.parametrize(
    ("low", "high", "unit", "expected"),
    [
        (0, 1, "short", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.3, 9.1, "short", [0, 2, 4, 6, 8, 10]),
        (0, 0, "short", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (4, 4, "short", [0, 1, 2, 3, 4]),
        (0, 70 * 2**20, "bytes", [n * 2**24 for n in range(6)]),
        (0, 280, "s", [0, 60, 120, 180, 240, 300]),
        (0.001, 0.0042, "s", [0.001, 0.002, 0.003, 0.004, 0.005]),
    ],
)
def test_ticks_are_round_values_of_the_unit_around_all_that_is_shown(
    low: float, high: float, unit: str, expected: list[float]
) -> None:
    assert ticks(low, high, unit) == pytest.approx(expected)


def test_thresholds_colour_from_their_value_on() -> None:
    steps = [(-math.inf, "red"), (1.0, "green"), (2.0, "red")]
    assert [colour_of(value, steps) for value in (0, 1, 1.5, 2)] == ["red", "green", "green", "red"]
    assert panel().thresholds == ((-math.inf, "green"), (80, "red")), "Grafana's own where the panel names none"


def test_samples_lie_on_the_steps_and_what_is_missing_or_infinite_is_not_drawn() -> None:
    source = Answers({"metric": {"pod": "pg-0"}, "values": [[1001, "2"], [1002, "+Inf"], [1004, "3"]]})
    told = filled(panel({"expr": "a[$x]", "legendFormat": "{{pod}}"}), source, WINDOW, {"x": "4s"})
    (series,) = told.series
    assert source.asked == ["1000 to 1004 by 1: a[4s]"]
    assert [None if math.isnan(value) else value for value in series.values] == [None, 2, None, None, 3]
    assert (series.legend, series.last, series.is_infinite, told.empty) == ("pg-0", 3, False, ())


def test_a_query_of_now_has_one_value_and_an_empty_one_is_named() -> None:
    target = {"expr": "max(a)", "legendFormat": "", "instant": True}
    now = Answers({"metric": {}, "value": [1004, "+Inf"]})
    (series,) = filled(panel(target, kind="stat"), now, WINDOW, {}).series
    assert now.asked == ["now: max(a)"]
    assert (series.last, series.is_infinite, series.legend) == (None, True, "max(a)")
    assert filled(panel(target, kind="stat"), Answers(), WINDOW, {}).empty == ("max(a)",)


def test_a_query_without_data_is_wrong_unless_it_may_be_empty() -> None:
    two = panel({"expr": "up", "legendFormat": ""}, {"expr": "failed == 1", "legendFormat": ""})
    told = filled(two, Answers(), WINDOW, {})
    assert empty_queries([told], {}) == (["A panel: no data: up", "A panel: no data: failed == 1"], [])
    assert empty_queries([told], {"failed": "none failed"}) == (
        ["A panel: no data: up"],
        ["A panel: none failed: failed == 1"],
    )
    infinite = filled(two, Answers({"metric": {}, "values": [[1000, "+Inf"]]}), WINDOW, {})
    assert empty_queries([infinite], {}) == ([], ["A panel: every value is infinite"])


def test_every_panel_of_the_dashboard_can_be_read() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    read = [(section.title, each.title) for section in sections(dashboard) for each in section.panels]
    assert [title for _, title in read] == [each["title"] for each in dashboard["panels"] if each["type"] != "row"]
    assert {title for title, _ in read} == {each["title"] for each in dashboard["panels"] if each["type"] == "row"}
    for section in sections(dashboard):
        assert min(each.y for each in section.panels) == 0
        assert all(each.x + each.width <= 24 for each in section.panels)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"type": "gauge"}, "the type gauge"),
        ({"fieldConfig": {"defaults": {"unit": "furlongs"}, "overrides": []}}, "the unit furlongs"),
        ({"fieldConfig": {"defaults": {"unit": "s"}, "overrides": [{}]}}, "overrides"),
    ],
)
def test_what_is_not_drawn_here_is_refused(change: dict[str, Any], what: str) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    dashboard["panels"][1] |= change
    with pytest.raises(UnknownPart, match=what):
        sections(dashboard)
