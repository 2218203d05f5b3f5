"""A Grafana dashboard read from its JSON: its sections and panels, and what their queries give.

What Grafana does between a dashboard and Prometheus is done here as it does it: variables are filled in from
`label_values`, legends by their template, numbers by their unit. Only what our dashboard uses is known; anything else
is an UnknownPart, so that no picture shows less than the dashboard says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

ALL = "$__all"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_LABEL_VALUES = re.compile(r"label_values\((.*),\s*(\w+)\)")
_LABEL = re.compile(r"\{\{\s*(.+?)\s*\}\}")


class UnknownPart(Exception):
    """The dashboard uses something that is not drawn here; the text says what."""


class Source(Protocol):
    def ask(self, expr: str) -> list[dict[str, Any]]: ...

    def ask_range(self, expr: str, *, start_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]: ...

    def label_values(self, selector: str, label: str) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Window:
    """What the dashboard shows, in Unix time, and how closely it is asked for."""

    start_s: float
    end_s: float
    step_s: float
    scrape_s: float

    @property
    def rate_interval_s(self) -> float:
        """Grafana's `$__rate_interval`: four scrapes, or a step and one scrape where steps are longer."""
        return max(4 * self.scrape_s, self.step_s + self.scrape_s)


@dataclass(frozen=True, slots=True)
class Series:
    """`values` by the steps of the window; NaN where there is no sample, or none that can be drawn."""

    legend: str
    values: tuple[float, ...]
    is_infinite: bool = False
    """Its last sample is +Inf or -Inf, which Grafana draws as nothing."""

    @property
    def last(self) -> float | None:
        """Grafana's `lastNotNull`."""
        return next((value for value in reversed(self.values) if not math.isnan(value)), None)


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    kind: str
    unit: str
    description: str
    x: int
    y: int
    width: int
    height: int
    """In the grid's units, 24 columns; `y` counts from the section's top."""
    targets: tuple[Mapping[str, Any], ...]
    thresholds: tuple[tuple[float, str], ...]
    """From which value on which colour; in ascending order."""
    mappings: Mapping[float, tuple[str, str]]
    """The text and the colour of single values."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A panel with what its queries gave."""

    panel: Panel
    series: tuple[Series, ...]
    empty: tuple[str, ...]
    """The queries, filled in, that gave nothing."""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    panels: tuple[Panel, ...]


KINDS = ("timeseries", "stat", "state-timeline")
# Grafana's, for a panel that names none.
_DEFAULT_THRESHOLDS = [{"value": None, "color": "green"}, {"value": 80, "color": "red"}]


def sections(dashboard: Mapping[str, Any]) -> tuple[Section, ...]:
    """Each row with the panels that follow it."""
    found: list[tuple[str, int, list[Panel]]] = []
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        if panel["type"] == "row":
            found.append((panel["title"], place["y"] + place["h"], []))
            continue
        _, top, panels = found[-1]
        panels.append(_panel(panel, top))
    return tuple(Section(title, tuple(panels)) for title, _, panels in found)


def _panel(panel: Mapping[str, Any], top: int) -> Panel:
    where = f"panel {panel['title']!r}"
    defaults = panel["fieldConfig"]["defaults"]
    if panel["type"] not in KINDS:
        raise UnknownPart(f"{where}: the type {panel['type']}")
    if panel["fieldConfig"]["overrides"]:
        raise UnknownPart(f"{where}: overrides")
    if defaults["unit"] not in UNITS:
        raise UnknownPart(f"{where}: the unit {defaults['unit']}")
    if panel["type"] == "stat" and panel["options"]["reduceOptions"]["calcs"] != ["lastNotNull"]:
        raise UnknownPart(f"{where}: the reduction {panel['options']['reduceOptions']['calcs']}")
    mappings: dict[float, tuple[str, str]] = {}
    for mapping in defaults.get("mappings", []):
        if mapping["type"] != "value":
            raise UnknownPart(f"{where}: mappings by {mapping['type']}")
        mappings |= {float(value): (to["text"], to["color"]) for value, to in mapping["options"].items()}
    steps = defaults.get("thresholds", {}).get("steps", _DEFAULT_THRESHOLDS)
    place = panel["gridPos"]
    return Panel(
        title=panel["title"],
        kind=panel["type"],
        unit=defaults["unit"],
        description=panel["description"],
        x=place["x"],
        y=place["y"] - top,
        width=place["w"],
        height=place["h"],
        targets=tuple(panel["targets"]),
        thresholds=tuple((-math.inf if step["value"] is None else step["value"], step["color"]) for step in steps),
        mappings=mappings,
    )


# --- variables ---


def substituted(text: str, values: Mapping[str, str]) -> str:
    """With its `$name` and `${name}` filled in. UnknownPart: one has no value."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in values:
            raise UnknownPart(f"the variable {name} of {text}")
        return values[name]

    return _VARIABLE.sub(value, text)


def variables(dashboard: Mapping[str, Any], source: Source, window: Window) -> dict[str, str]:
    """As Grafana chooses them when nobody does: "All" where the dashboard says so, else the first value by the alphabet.

    UnknownPart: a variable is of another kind, or has no value.
    """
    chosen = {"__rate_interval": f"{window.rate_interval_s:g}s"}
    for variable in dashboard["templating"]["list"]:
        name = variable["name"]
        if variable["type"] == "datasource":
            continue
        wanted = _LABEL_VALUES.fullmatch(variable["query"]["query"]) if variable["type"] == "query" else None
        if wanted is None:
            raise UnknownPart(f"the variable {name}: {variable['query']}")
        found = sorted(source.label_values(substituted(wanted[1], chosen), wanted[2]))
        if not found:
            raise UnknownPart(f"the variable {name} has no value: {substituted(variable['query']['query'], chosen)}")
        is_all = variable.get("current", {}).get("value") == ALL
        chosen[name] = variable["allValue"] if is_all else found[0]
    return chosen


# --- queries ---


def filled(panel: Panel, source: Source, window: Window, values: Mapping[str, str]) -> Filled:
    """What all the queries of the panel give."""
    series: list[Series] = []
    empty = []
    for target in panel.targets:
        expr = substituted(target["expr"], values)
        if target.get("instant", False):
            found = [{**each, "values": [each["value"]]} for each in source.ask(expr)]
            count, start_s = 1, None
        else:
            found = source.ask_range(expr, start_s=window.start_s, end_s=window.end_s, step_s=window.step_s)
            count, start_s = 1 + int((window.end_s - window.start_s) / window.step_s), window.start_s
        if not found:
            empty.append(expr)
        for each in found:
            line = [math.nan] * count
            for at_s, value in each["values"]:
                index = 0 if start_s is None else round((float(at_s) - start_s) / window.step_s)
                line[index] = float(value)
            last = next((value for value in reversed(line) if not math.isnan(value)), math.nan)
            drawable = tuple(value if math.isfinite(value) else math.nan for value in line)
            legend = legend_of(target["legendFormat"], each["metric"], expr)
            series.append(Series(legend, drawable, math.isinf(last)))
    return Filled(panel, tuple(series), tuple(empty))


def empty_queries(panels: Sequence[Filled], may_be_empty: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Queries without data, in words: those that should have some, and those that need not or whose values cannot be drawn.

    `may_be_empty`: parts of queries, and why they may give nothing.
    """
    wrong: list[str] = []
    fine: list[str] = []
    for each in panels:
        for expr in each.empty:
            reason = next((why for part, why in may_be_empty.items() if part in expr), None)
            (wrong if reason is None else fine).append(f"{each.panel.title}: {reason or 'no data'}: {expr}")
        if each.series and all(series.last is None for series in each.series):
            fine.append(f"{each.panel.title}: every value is infinite")
    return wrong, fine


def legend_of(template: str, labels: Mapping[str, str], expr: str) -> str:
    """By the template: a label that the series has not is nothing. Without one, the series as Prometheus writes it."""
    if template:
        return _LABEL.sub(lambda found: labels.get(found[1], ""), template)
    rest = ", ".join(f'{name}="{value}"' for name, value in sorted(labels.items()) if name != "__name__")
    name = labels.get("__name__", "")
    return f"{name}{{{rest}}}" if rest else name or expr


# --- numbers ---

_THOUSANDS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_SI_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0.0, "B"))
_IEC_BYTES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (0.0, "B"))
_WEEK_S, _DAY_S = 7 * 86400.0, 86400.0
_TIMES = (
    *((365 * _DAY_S, "years"), (_WEEK_S, "weeks"), (_DAY_S, "days"), (3600.0, "hours"), (60.0, "mins"), (1.0, "s")),
    *((1e-3, "ms"), (1e-6, "µs"), (0.0, "ns")),
)

UNITS = ("short", "s", "bytes", "Bps", "ops", "percentunit")


def formatted(value: float, unit: str) -> str:
    """A number as the unit says: `1.5 KiB`, `20 ms`, `99.5%`. Grafana's identifiers of units; UnknownPart: another."""
    if unit == "short":
        return _scaled(value, _THOUSANDS, "")
    if unit == "ops":
        return _scaled(value, _THOUSANDS, " ops/s")
    if unit == "percentunit":
        return f"{_digits(100 * value)}%"
    if unit == "bytes":
        return _with_unit(value, _IEC_BYTES)
    if unit == "Bps":
        return _with_unit(value, _SI_BYTES) + "/s"
    if unit == "s":
        return _with_unit(value, _TIMES) if value else "0 s"
    raise UnknownPart(f"the unit {unit}")


def _scaled(value: float, scale: Sequence[tuple[float, str]], suffix: str) -> str:
    least, letter = next(((least, letter) for least, letter in scale if abs(value) >= least), (1.0, ""))
    return f"{_digits(value / least)}{' ' + letter if letter else ''}{suffix}"


def _with_unit(value: float, scale: Sequence[tuple[float, str]]) -> str:
    least, name = next((least, name) for least, name in scale if abs(value) >= least)
    return f"{_digits(value / (least or (1e-9 if name == 'ns' else 1.0)))} {name}"


def _digits(value: float) -> str:
    """Two decimals at most, one from 100 on; none of them zeros at the end."""
    text = f"{value:.{1 if abs(value) >= 100 else 2}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def ticks(low: float, high: float, unit: str, *, count: int = 5) -> list[float]:
    """Round values of the unit from `low` or below to `high` or above, about `count` of them; a single value is shown from 0 on."""
    if high <= low:
        low, high = min(0.0, low), max(0.0, high) or (0.0 if low else 1.0)
    least = (high - low) / count
    step = next(step for step in _steps(unit, least) if step >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _steps(unit: str, least: float) -> Iterator[float]:
    if unit == "bytes":
        yield from (2.0**power for power in range(64))
    if unit == "s" and least >= 1:
        yield from (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, _DAY_S, 2 * _DAY_S)
    power = math.floor(math.log10(least))
    yield from (factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5))


def colour_of(value: float, thresholds: Sequence[tuple[float, str]]) -> str:
    """The name of the last threshold's colour that the value reaches."""
    reached = [colour for least, colour in thresholds if value >= least]
    return reached[-1] if reached else "text"
