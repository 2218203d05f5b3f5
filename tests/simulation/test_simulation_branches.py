"""Why a branch may be at zero is said of branches that there are: without running any seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ASK = """
import simulation_branches
simulation_branches.count_branches()
import simulated_cluster
from collections import Counter
assert len(simulation_branches.NAMES) > 100
print(list(simulation_branches.wrong_excuses(Counter({extra}))))
"""


def _wrong_excuses(extra: str = "") -> str:
    """Asked in a process of its own: branches are counted only in modules that are loaded after that was wanted."""
    return subprocess.run(
        [sys.executable, "-c", ASK.replace("{extra}", extra)],
        cwd=FOLDER, stdout=subprocess.PIPE, text=True, check=True, timeout=100,
    ).stdout.strip()  # fmt: skip


def test_each_excuse_names_a_branch_and_is_wrong_once_it_was_taken() -> None:
    assert _wrong_excuses() == "[]"
    taken = "{name: 1 for name in simulation_branches.NAMES if 'this member has not promised itself' in name}"
    assert _wrong_excuses(taken) == "['this member has not promised itself']"
