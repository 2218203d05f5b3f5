"""pg_settings as postgres_exporter shows it: every numeric or boolean parameter a gauge, units turned into bytes and seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable

from instance_manager.metrics.exposition import Block, Family, label_set, number
from instance_manager.metrics.queries import Row

SQL = (
    "SELECT name, setting, coalesce(unit, '') AS unit, short_desc, vartype FROM pg_settings "
    "WHERE vartype IN ('bool', 'integer', 'real')"
)
_UNIT = re.compile(r"([0-9]*)(B|kB|MB|GB|TB|ms|s|min|h|d)")
_FACTORS = {"B": 1, "kB": 1024, "MB": 1024**2, "GB": 1024**3, "TB": 1024**4}
_SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def read(rows: Iterable[Row], server: str) -> list[Block]:
    """One family for each parameter. One whose unit is new to us is left out rather than told in a wrong one."""
    blocks, told = [], label_set(("server",), (server,))
    for row in rows:
        name, text = row["name"].replace(".", "_"), row["setting"]
        description = row["short_desc"] or "A parameter of Postgres."
        if row["vartype"] == "bool":
            value: float = 1 if text == "on" else 0
        else:
            value = float(text)
            if row["unit"]:
                match = _UNIT.fullmatch(row["unit"])
                if match is None:
                    continue
                count, unit = int(match[1] or 1), match[2]
                if unit in _FACTORS:
                    name, word, factor = f"{name}_bytes", "bytes", float(_FACTORS[unit] * count)
                else:
                    name, word, factor = f"{name}_seconds", "seconds", _SECONDS[unit] * count
                # -1 stands for "off" or "as elsewhere", and is no amount.
                value = value if value < 0 else value * factor
                description += f" [Units converted to {word}.]"
        family = Family(f"pg_settings_{name}", "gauge", description, ("server",))
        blocks.append(Block(family, [f"{family.name}{told} {number(value)}\n"]))
    return blocks
