"""Tables of the documentation that name tests: what they say, and whether those tests are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def table(document: str, heading: str, first_column: str) -> dict[str, list[str]]:
    """The rows of two columns below the heading: what is told, and the tests named for it."""
    found = {}
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    for line in text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 2 and not set(cells[0]) <= {"-"} and cells[0] != first_column:
            found[cells[0]] = re.findall(r"`([^`]+::[^`]+)`", cells[1])
    return found


def check_tests(named: list[str]) -> None:
    """AssertionError: none is named, or one is not there."""
    assert named
    for test in named:
        file, _, name = test.partition("::")
        path = ROOT / "tests" / file
        assert path.is_file(), test
        assert _functions_of(path), test
        assert name == "*" or name in _functions_of(path), test


@cache
def _functions_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))
