"""The table of docs/security.md cannot lie: every rule is in it, and each has tests that exist."""

from __future__ import annotations

import pytest
from documented_tests import check_tests, table

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
    return table("security.md", "Rules", "rule")


@pytest.mark.parametrize("word", WANTED)
def test_every_rule_of_the_field_is_in_the_table(word: str) -> None:
    assert [rule for rule in rows() if word in rule]


@pytest.mark.parametrize("rule", rows())
def test_the_tests_that_hold_a_rule_exist(rule: str) -> None:
    check_tests(rows()[rule])
