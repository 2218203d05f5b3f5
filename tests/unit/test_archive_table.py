"""The table of docs/archive.md cannot lie: every known way to lose data is in it, and each has tests that exist."""

from __future__ import annotations

import pytest
from documented_tests import check_tests, table

FACTS: tuple[str, ...] = (
    "exit 1 to 125 of restore_command",
    "a short file",
    "a wrong segment under the right name",
    "above 125 from archive_command",
    "the oldest `.ready`",
    "a standby marks every segment `.done`",
    "`.partial` is never asked for",
    "behind the fork are garbage",
    "barman-cloud, WAL-G",
    "a different history overwritten (pgBackRest)",
    "a spool acknowledged",
    "409 in a race",
    "ignores `If-None-Match`",
)
INCIDENTS: tuple[str, ...] = (
    "#11219",
    "#4990",
    "#10394",
    "#4188",
    "plugin-barman-cloud#842",
    "#5969",
    "#6141",
    "#8874",
    "#10092",
)
INCIDENTS += ("#7150", "#10591")


def rows() -> dict[str, list[str]]:
    return table("archive.md", "Ways to lose data that others have, and the test here", "what was seen elsewhere")


@pytest.mark.parametrize("word", FACTS + INCIDENTS)
def test_every_known_way_is_in_the_table(word: str) -> None:
    assert [way for way in rows() if word in way]


@pytest.mark.parametrize("way", rows())
def test_the_tests_that_show_that_it_is_not_lost_here_exist(way: str) -> None:
    check_tests(rows()[way])
