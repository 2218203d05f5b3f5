"""The table of docs/security.md cannot lie: every rule is in it, and each has tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WANTED: tuple[str, ...] = (
    "CVE-2026-55769",
    "CVE-2026-44477",
    "CVE-2026-55765",
    "GHSA-7qwx-x8ff-3px9",
    "#11029",
    "WAL files",
    "no ClusterRole",
)
WANTED += ("NetworkPolicy", "no secret in logs", "non-root")


def rows() -> dict[str, list[str]]:
    found = {}
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    for line in text.partition("\n## Rules\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 2 and not set(cells[0]) <= {"-"} and cells[0] != "rule":
            found[cells[0]] = re.findall(r"`([^`]+::[^`]+)`", cells[1])
    return found


@cache
def functions_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


@pytest.mark.parametrize("word", WANTED)
def test_every_rule_of_the_field_is_in_the_table(word: str) -> None:
    assert [rule for rule in rows() if word in rule]


@pytest.mark.parametrize("rule", rows())
def test_the_tests_that_hold_a_rule_exist(rule: str) -> None:
    named = rows()[rule]
    assert named
    for test in named:
        file, _, name = test.partition("::")
        path = ROOT / "tests" / file
        assert path.is_file(), test
        assert functions_of(path), test
        assert name == "*" or name in functions_of(path), test
