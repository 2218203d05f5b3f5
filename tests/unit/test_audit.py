"""`make audit` never says that all is well when it does not know."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tests" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KNOWN = {"name": "one", "version": "1", "vulns": []}


@pytest.mark.parametrize(
    ("dependencies", "code"),
    [
        ([KNOWN], 2),
        ([KNOWN, {"name": "Two.three", "version": "1", "vulns": []}], 0),
        ([KNOWN, {"name": "two-three", "skip_reason": "Dependency not found"}], 2),
        ([KNOWN, {"name": "two_three", "version": "1", "vulns": [{"id": "PYSEC-1"}]}], 1),
        ([{"name": "one", "version": "1", "vulns": [{"id": "PYSEC-1"}]}], 1),
    ],
)
def test_it_passes_only_when_every_package_was_judged(audit: ModuleType, dependencies: list[object], code: int) -> None:
    assert audit.judge(json.dumps({"dependencies": dependencies}), {"one", "two-three"})[0] == code


@pytest.mark.parametrize("report", ["", "{}", "[]", "Traceback"])
def test_no_report_is_no_pass(audit: ModuleType, report: str) -> None:
    assert audit.judge(report, {"one"})[0] == 2


def test_every_package_of_the_lock_is_asked_for(audit: ModuleType) -> None:
    names = audit.packages((ROOT / "constraints.txt").read_text())
    assert {"aiohttp", "pyyaml", "kubernetes-asyncio", "jsonschema-path"} <= names
    assert len(names) == len((ROOT / "constraints.txt").read_text().splitlines())
