"""The checkers are checked: each deliberately broken rule is caught, and the documentation lists exactly those there are.

The seeds run in a process of their own, because a seed is the same run everywhere only with PYTHONHASHSEED=0.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(__file__).with_name("check_broken_rules.py")
PAGE = Path(__file__).parents[2] / "docs" / "broken-rules.md"
JOBS = 2
LEAST = 30


def _ask(*arguments: str) -> list[dict[str, Any]]:
    answer = subprocess.run(
        [sys.executable, str(COMMAND), *arguments],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    found: list[dict[str, Any]] = json.loads(answer.stdout)
    return found


VARIANTS = _ask("--list")
QUICK = [variant["name"] for variant in VARIANTS if not variant["slow"]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All of them at once, on two cores, by whichever test comes first; the other processes of this run wait for what it found."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    found = directory / "broken-rules.json"
    with (directory / "broken-rules.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_text(json.dumps(_ask("--json", "--quick", "--jobs", str(JOBS))))
    return {result["name"]: result for result in json.loads(found.read_text())}


def test_there_are_enough_of_them() -> None:
    assert len(VARIANTS) >= LEAST


def test_the_documentation_lists_exactly_the_registered_variants() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Found by the simulation")[1].split("\n## ")[0]
    rows = [
        line.split("|") for line in section.splitlines() if line.startswith("| ") and not line.startswith("| variant")
    ]
    listed = [row[1].strip().removesuffix(" *") for row in rows]
    assert listed == [variant["name"] for variant in VARIANTS]
    assert "not caught" not in section


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", QUICK)
def test_a_broken_rule_is_caught(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[name]
    assert result["caught_by"] is not None, f"not caught in {result['seeds']} seeds; {result['others']}"
