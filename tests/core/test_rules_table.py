"""The table of docs/rules.md cannot lie: every rule is in it, and all code and tests that it names exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from test_decide_scenarios import ALL as SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "rules.md"
NOT_YET = "not yet held by a test"


@cache
def functions(path: Path) -> dict[str, bool]:
    """Every test function of the file, and whether it is marked as a known defect."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: any(isinstance(mark, ast.Name) and mark.id == "defect" for mark in node.decorator_list)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def rows() -> dict[str, tuple[str, str]]:
    found = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| [SRP][0-9]", line):
            rule, _, code, tests = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            assert rule not in found, f"{rule} is there twice"
            found[rule] = (code, tests)
    return found


def variants() -> set[str]:
    """Names of the broken variants of the exhaustive check, which another folder's helpers hold."""
    tree = ast.parse((ROOT / "tests" / "exhaustive" / "broken_protocols.py").read_text(encoding="utf-8"))
    return {
        str(node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
    }


ROWS = rows()
BROKEN = variants()


def test_every_rule_is_in_the_table() -> None:
    wanted = {f"R{number}" for number in range(1, 17)} | {f"P{number}" for number in range(1, 14)}
    assert wanted <= set(ROWS)
    assert {rule.split(".")[0] for rule in ROWS if rule.startswith("S")} == {"S2", "S3", "S4"}


@pytest.mark.parametrize("rule", ROWS)
def test_the_tests_that_hold_a_rule_exist_and_hold_it_today(rule: str) -> None:
    named = re.findall(r"`([^`]+)`", ROWS[rule][1])
    assert named or NOT_YET in ROWS[rule][1]
    for test in named:
        file, _, function = test.partition("::")
        name, _, case = function.partition("[")
        path = ROOT / "tests" / file
        assert path.is_file(), test
        assert name in functions(path), test
        if name == "test_decide":
            assert case.removesuffix("]") in {scenario.name for scenario in SCENARIOS}, test
        if name == "test_a_broken_variant_is_caught":
            assert case.removesuffix("]") in BROKEN, test


@pytest.mark.parametrize("rule", ROWS)
def test_the_code_that_holds_a_rule_exists(rule: str) -> None:
    named = re.findall(r"`([^`]+)`", ROWS[rule][0])
    assert named
    for code in named:
        file, _, name = code.partition(":")
        path = ROOT / "instance_manager" / file
        assert path.exists(), code
        if name:
            assert re.search(rf"^(def|class) {name}\b|^{name} = ", path.read_text(encoding="utf-8"), re.MULTILINE), code
