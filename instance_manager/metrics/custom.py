"""Custom queries, from YAML files in the two familiar forms: postgres_exporter's `queries.yaml` and CloudNativePG's.

```yaml
orders:                              # beginning of the families' names
  query: SELECT state, count(*) AS total FROM shop.orders GROUP BY 1
  master: true                       # or primary: true; on the primary only
  cache_seconds: 30                  # not asked again before
  timeout: 500ms                     # or timeout_seconds; default 1 s, 10 s at most
  target_databases: [app, "shop_*"]  # default: postgres
  predicate_query: SELECT to_regclass('shop.orders') IS NOT NULL
  runonserver: ">=15.0.0"
  search_path: [shop]                # behind pg_catalog; ours
  metrics:
    - state: {usage: LABEL, description: State of the order}
    - total: {usage: GAUGE, description: Number of orders}
```

They run as the monitoring role in a read-only transaction that is rolled back, each on its own: a bad one is one failed
collector.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from instance_manager.metrics import catalogue
from instance_manager.metrics.exposition import Block, Family
from instance_manager.metrics.queries import SERVER_LABEL, Column, MetricQuery, Row, Usage, milliseconds

DEFAULT_TIMEOUT_S = 1.0
MAXIMUM_TIMEOUT_S = 10.0
MAXIMUM_FILE_BYTES = 1024 * 1024
DEFAULT_DATABASE = "postgres"

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,199}")
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_VERSION = re.compile(r"\s*(>=|<=|>|<|=|==)?\s*([0-9]+)(?:\.[0-9]+){0,2}\s*")
_KEYS = frozenset(
    {
        "query",
        "metrics",
        "master",
        "primary",
        "cache_seconds",
        "timeout",
        "timeout_seconds",
        "target_databases",
        "predicate_query",
        "runonserver",
        "name",
        "search_path",
    }
)
_BUILT_IN_QUERIES = (*catalogue.EACH_SCRAPE, *catalogue.NOW_AND_THEN, *catalogue.EACH_DATABASE)
BUILT_IN = {family.name: family for query in _BUILT_IN_QUERIES for family in query.families()}
"""Families that are there anyway; a custom query that brings the very same (the exporter's example does) adds only its others."""
_BUILT_IN_COLLECTORS = frozenset(query.name for query in _BUILT_IN_QUERIES)
_LABELS_OF_OURS = frozenset((SERVER_LABEL, "le"))
"""Prometheus refuses a whole scrape in which one sample has a label twice."""
_RESERVED = re.compile(r"(instance_manager|process|pg_settings|pg_exporter|pg_scrape_collector)_.*|pg_up|up")
"""Other families of ours, and Prometheus's own: two of one name are no scrape at all."""


class QueriesUnusable(Exception):
    """A file of custom queries, or one query in it, cannot be used; the text says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomQuery:
    query: MetricQuery
    databases: tuple[str, ...] = (DEFAULT_DATABASE,)
    """Names, or patterns with `*` and `?`."""
    predicate: str | None = None
    """Asked first; the query runs when its only value is true. No row: it does not."""
    cache_s: float = 0.0
    timeout_s: float = DEFAULT_TIMEOUT_S
    schemas: tuple[str, ...] = ()

    def databases_of(self, existing: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in existing if any(fnmatch.fnmatchcase(name, each) for each in self.databases))

    def read(self, rows: Iterable[Row], server: str, database: str) -> list[Block]:
        """As `MetricQuery.read`. ValueError also for two rows with the same labels: Prometheus would refuse the whole scrape.

        Where several databases may answer and the query does not say which it is, a label `datname` does.
        """
        query = self.query
        if self._needs_database:
            query = replace(query, columns=(Column(name="datname", usage="LABEL"), *query.columns))
            rows = [_WithDatabase(row, database) for row in rows]
        blocks = query.read(rows, server)
        for block in blocks:
            if len({line.rpartition(" ")[0] for line in block.lines}) != len(block.lines):
                raise ValueError(f"two rows have the same labels in {block.family.name}")
        return blocks

    @property
    def collector(self) -> str:
        """Its name among the collectors: never one of a built-in query, whose results it would replace."""
        return f"{self.query.name}_custom" if self.query.name in _BUILT_IN_COLLECTORS else self.query.name

    @property
    def _needs_database(self) -> bool:
        is_one = len(self.databases) == 1 and re.search(r"[*?\[]", self.databases[0]) is None
        return not is_one and all(column.name != "datname" for column in self.query.columns)


@dataclass(frozen=True, slots=True)
class _WithDatabase:
    row: Row
    database: str

    def __getitem__(self, column: str, /) -> Any:
        return self.database if column == "datname" else self.row[column]


def load_queries(path: Path) -> tuple[CustomQuery, ...]:
    """QueriesUnusable: with everything that is wrong in the file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_FILE_BYTES + 1)
    except OSError as error:
        raise QueriesUnusable(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAXIMUM_FILE_BYTES:
        raise QueriesUnusable(f"{path}: is larger than {MAXIMUM_FILE_BYTES} bytes")
    return parse_queries(content.decode("utf-8", "replace"), str(path))


def parse_queries(text: str, where: str) -> tuple[CustomQuery, ...]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise QueriesUnusable(f"{where}: is not YAML: {error}") from error
    if raw is None:
        return ()
    if not isinstance(raw, dict):
        raise QueriesUnusable(f"{where}: must be a mapping from a name to a query")
    found, problems = [], []
    for name, section in raw.items():
        try:
            if (query := _query(name, section)) is not None:
                found.append(query)
        except ValueError as error:
            problems.append(f"{where}: {name}: {error}")
    problems += [f"{where}: {name}: is there twice" for name in _twice(found)]
    if problems:
        raise QueriesUnusable("\n".join(problems))
    return tuple(found)


def load_all(paths: Iterable[Path]) -> tuple[CustomQuery, ...]:
    """The queries of several files. QueriesUnusable: of any of them, or a family that two queries would make."""
    found = [query for path in paths for query in load_queries(path)]
    if twice := _twice(found):
        raise QueriesUnusable(f"metrics.queries: {twice[0]}: is in more than one query")
    return tuple(found)


def _twice(found: Sequence[CustomQuery]) -> list[str]:
    """Names of families of more than one query. One name for several ranges of versions is as it should be."""
    seen: dict[str, CustomQuery] = {}
    twice = []
    for custom in found:
        for family in custom.query.families():
            other = seen.setdefault(family.name, custom)
            apart = other.query.below_major <= custom.query.minimum_major or (
                custom.query.below_major <= other.query.minimum_major
            )
            if other is not custom and not apart:
                twice.append(family.name)
    return twice


def _query(key: object, section: object) -> CustomQuery | None:
    """None: all that it brings is built in."""
    if not isinstance(section, dict):
        raise ValueError("must be a mapping with `query` and `metrics`")  # noqa: TRY004 - shown to users
    if unknown := sorted(str(each) for each in section.keys() - _KEYS):
        raise ValueError(f"unknown key `{unknown[0]}`; there are {', '.join(sorted(_KEYS))}")
    name = section.get("name", key)
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} cannot begin a metric's name")
    sql = _text(section, "query")
    if sql is None:
        raise ValueError("query: is missing")
    columns = _columns(section.get("metrics"))
    low, below = _majors(section.get("runonserver"))
    query = MetricQuery(
        name=name,
        sql=sql,
        columns=columns,
        only_primary=_flag(section, "master") or _flag(section, "primary"),
        minimum_major=low,
        below_major=below,
    )
    values = [column for column in columns if column.usage != "LABEL"]
    built_in = {column.name for column, family in zip(values, query.families(), strict=True) if _is_built_in(family)}
    if len(built_in) == len(values):
        return None
    return CustomQuery(
        query=replace(query, columns=tuple(column for column in columns if column.name not in built_in)),
        databases=_texts(section, "target_databases") or (DEFAULT_DATABASE,),
        predicate=_text(section, "predicate_query"),
        cache_s=_seconds(section, "cache_seconds", 0.0, 86_400.0),
        timeout_s=_timeout(section),
        schemas=_schemas(section),
    )


def _is_built_in(family: Family) -> bool:
    """True: it is the very same. ValueError: another family has that name already."""
    names = [family.name]
    if family.kind == "histogram":
        names += [f"{family.name}_{each}" for each in ("bucket", "sum", "count")]
    for name in names:
        if _RESERVED.fullmatch(name) is not None:
            raise ValueError(
                f"{name} is, or may be, a family of the instance manager's own: give the query another `name`"
            )
        built_in = BUILT_IN.get(name)
        if built_in is not None and (built_in.kind, set(built_in.labels)) != (family.kind, set(family.labels)):
            labels = ", ".join(label for label in built_in.labels if label != SERVER_LABEL) or "none"
            raise ValueError(
                f"{name} is built in, as a {built_in.kind} with the labels {labels}: give the query another `name`, or the "
                "column another in the query (AS)"
            )
    return family.name in BUILT_IN


def _columns(metrics: object) -> tuple[Column, ...]:
    if not isinstance(metrics, list) or not metrics:
        raise ValueError("metrics: must be a list, an entry for each column")
    found: list[Column] = []
    for entry in metrics:
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError("metrics: each entry is one column with its `usage` and `description`")
        [(name, told)] = entry.items()
        if not isinstance(name, str) or _NAME.fullmatch(name) is None or not isinstance(told, dict):
            raise ValueError(f"metrics: {name!r} is no name of a column with its `usage`")
        usage = _usage(name, told.get("usage"))
        if usage is None:
            continue
        if usage == "LABEL" and (name in _LABELS_OF_OURS or name.startswith("__")):
            raise ValueError(f"metrics: {name}: is a label already; give the column another name in the query (AS)")
        if any(column.name == name for column in found):
            raise ValueError(f"metrics: {name}: is there twice")
        mapping = told.get("metric_mapping")
        if usage == "MAPPEDMETRIC" and not isinstance(mapping, dict):
            raise ValueError(f"metrics: {name}: MAPPEDMETRIC needs metric_mapping")
        found.append(
            Column(
                name=name,
                usage=usage,
                help=" ".join(str(told.get("description", "")).split()),
                mapping={str(k): float(v) for k, v in mapping.items()} if isinstance(mapping, dict) else None,
            )
        )
    if not any(column.usage != "LABEL" for column in found):
        raise ValueError("metrics: there are only labels")
    return tuple(found)


def _usage(name: str, told: object) -> Usage | None:
    """None: the column is left out."""
    word = str(told or "").upper()
    if word == "DISCARD":
        return None
    for usage in get_args(Usage):
        if word == usage:
            return cast(Usage, usage)
    raise ValueError(f"metrics: {name}: usage {word!r} is none of {', '.join((*get_args(Usage), 'DISCARD'))}")


def _text(section: Mapping[str, Any], key: str) -> str | None:
    value = section.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"{key}: must be a text")
    # One statement: Postgres refuses more in a prepared one, and a final semicolon is only custom.
    return value.strip().rstrip(";")


def _texts(section: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = section.get(key, [])
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{key}: must be a list of texts")
    return tuple(value)


def _schemas(section: Mapping[str, Any]) -> tuple[str, ...]:
    schemas = _texts(section, "search_path")
    for schema in schemas:
        if _SCHEMA.fullmatch(schema) is None:
            raise ValueError(f"search_path: {schema!r} is no plain name of a schema")
    return schemas


def _flag(section: Mapping[str, Any], key: str) -> bool:
    value = section.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key}: must be true or false")  # noqa: TRY004 - shown to users
    return value


def _seconds(section: Mapping[str, Any], key: str, default: float, most: float) -> float:
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{key}: must be a number of seconds up to {most:g}")
    return float(value)


def _timeout(section: Mapping[str, Any]) -> float:
    if "timeout" in section:
        try:
            timeout_s = milliseconds(str(section["timeout"])) / 1000
        except ValueError:
            raise ValueError("timeout: must be a duration such as 500ms or 2s") from None
    else:
        timeout_s = _seconds(section, "timeout_seconds", DEFAULT_TIMEOUT_S, MAXIMUM_TIMEOUT_S)
    if not 0 < timeout_s <= MAXIMUM_TIMEOUT_S:
        raise ValueError(f"timeout: must be above 0 and at most {MAXIMUM_TIMEOUT_S:g} s")
    return timeout_s


def _majors(condition: object) -> tuple[int, int]:
    """`>=15.0.0 <17.0.0`: from and below which major; minors are not told apart."""
    low, below = 0, 1000
    if condition is None:
        return low, below
    parts = re.split(r"\s*,\s*|\s+(?=[<>=])", str(condition).strip())
    for part in parts:
        match = _VERSION.fullmatch(part)
        if match is None:
            raise ValueError(f"runonserver: {condition!r} is no range such as '>=15.0.0'")
        sign, major = match[1] or "=", int(match[2])
        if sign in (">=", "=", "=="):
            low = max(low, major)
        if sign == ">":
            low = max(low, major + 1)
        if sign in ("<=", "=", "=="):
            below = min(below, major + 1)
        if sign == "<":
            below = min(below, major)
    return low, below
