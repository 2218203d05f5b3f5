"""What a metric query is: SQL, and what each of its columns becomes. The built-in ones and those of users are the same kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from instance_manager.metrics.exposition import Block, Family, Kind, label_set, number

Usage = Literal["LABEL", "COUNTER", "GAUGE", "UNTYPED", "DURATION", "MAPPEDMETRIC", "HISTOGRAM"]
SERVER_LABEL = "server"
_KINDS: dict[str, Kind] = {
    "COUNTER": "counter",
    "GAUGE": "gauge",
    "UNTYPED": "untyped",
    "DURATION": "gauge",
    "MAPPEDMETRIC": "gauge",
    "HISTOGRAM": "histogram",
}


class Row(Protocol):
    """What is needed of a row of asyncpg's, or of a dict."""

    def __getitem__(self, column: str, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the result that is used; others are left out."""

    name: str
    usage: Usage
    help: str = ""
    metric: str | None = None
    """Name of the family where it is not the query's name and the column's."""
    mapping: Mapping[str, float] | None = None
    """MAPPEDMETRIC: a number for each text; anything else is NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricQuery:
    """`name` is the beginning of the families' names, and of the collector that fails when the query does."""

    name: str
    sql: str
    columns: tuple[Column, ...]
    only_primary: bool = False
    minimum_major: int = 0
    below_major: int = 1000
    """Not from this major of Postgres on."""

    def is_for(self, major: int, *, is_primary: bool) -> bool:
        return self.minimum_major <= major < self.below_major and (is_primary or not self.only_primary)

    def families(self) -> tuple[Family, ...]:
        labels = self._labels()
        return tuple(
            Family(_name(self.name, column), _KINDS[column.usage], _help(column), labels)
            for column in self.columns
            if column.usage != "LABEL"
        )

    def _labels(self) -> tuple[str, ...]:
        return (*(column.name for column in self.columns if column.usage == "LABEL"), SERVER_LABEL)

    def read(self, rows: Iterable[Row], server: str) -> list[Block]:
        """The samples of a result. KeyError: a column is not there; ValueError: a value is no number."""
        labels = [column.name for column in self.columns if column.usage == "LABEL"]
        values = [column for column in self.columns if column.usage != "LABEL"]
        blocks = [Block(family) for family in self.families()]
        names = (*labels, SERVER_LABEL)
        # Thousands of samples pass here at each scrape: what is the same for each is looked at once.
        plain, others = [], []
        for column, block in zip(values, blocks, strict=True):
            if column.usage in ("MAPPEDMETRIC", "DURATION", "HISTOGRAM"):
                others.append((column, block))
            else:
                plain.append((column.name, block.family.name, block.lines.append))
        for row in rows:
            texts = [_label(row[label]) for label in labels]
            told = label_set(names, (*texts, server))
            for column_name, name, append in plain:
                value = row[column_name]
                append(f"{name}{told} {value if type(value) is int else number(value)}\n")
            for column, block in others:
                if column.usage == "HISTOGRAM":
                    block.lines.extend(_histogram(block.family.name, column.name, row, (*names,), (*texts, server)))
                else:
                    block.lines.append(f"{block.family.name}{told} {_value(column, row[column.name])}\n")
        return blocks


def _name(prefix: str, column: Column) -> str:
    name = column.metric or f"{prefix}_{column.name}"
    return f"{name}_milliseconds" if column.usage == "DURATION" else name


def _help(column: Column) -> str:
    return column.help or f"Column {column.name} of a query."


def _label(value: object) -> str:
    return "" if value is None else str(value)


def _value(column: Column, value: object) -> str:
    if column.usage == "MAPPEDMETRIC":
        return number((column.mapping or {}).get(str(value)))
    if column.usage == "DURATION" and isinstance(value, str):
        return number(milliseconds(value))
    return number(value)


def _histogram(name: str, column: str, row: Row, names: Sequence[str], values: Sequence[str]) -> Iterable[str]:
    """postgres_exporter's way: arrays of bounds and cumulated counts, with `_bucket`, `_sum` and `_count` beside them."""
    for bound, count in zip(row[column], row[f"{column}_bucket"], strict=True):
        le = number(float(bound)).removesuffix(".0")
        yield f"{name}_bucket{label_set((*names, 'le'), (*values, le))} {number(count)}\n"
    yield f"{name}_bucket{label_set((*names, 'le'), (*values, '+Inf'))} {number(row[f'{column}_count'])}\n"
    yield f"{name}_sum{label_set(names, values)} {number(row[f'{column}_sum'])}\n"
    yield f"{name}_count{label_set(names, values)} {number(row[f'{column}_count'])}\n"


_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "min": 60_000.0, "h": 3_600_000.0, "d": 86_400_000.0}


def milliseconds(text: str) -> float:
    """A duration as Postgres shows it (`200ms`, `5min`). ValueError."""
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(digits) :]
    if unit not in _UNITS_MS:
        raise ValueError(f"no duration: {text!r}")
    return float(digits) * _UNITS_MS[unit]
