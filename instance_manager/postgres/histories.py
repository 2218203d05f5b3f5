"""Timeline history files: which timelines a timeline descends from, and where each was left.

Their content comes from outside (an archive, a primary): it is checked as strictly as Postgres does, and more.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from instance_manager.core.types import Lsn, Timeline, TimelineChain, parse_lsn, without_empty_timelines
from instance_manager.postgres.files import read_if_present
from instance_manager.postgres.server import LocalPostgresError

History = tuple[tuple[Timeline, Lsn], ...]
"""(parent timeline, where it was left), oldest first."""

_LINE = re.compile(r"\s*(\d{1,10})\s+([0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8})(?:\s.*)?")
_FILE_NAME = re.compile(r"([0-9A-F]{8})\.history")
_LIMIT_BYTES = 1024 * 1024


class HistoryInvalid(LocalPostgresError):
    """A history file that Postgres, or the order of timelines, does not allow."""


def history_file_name(timeline: Timeline) -> str:
    """Name in pg_wal and in the archive, `0000000A.history`."""
    return f"{timeline:08X}.history"


def parse_history(timeline: Timeline, text: str) -> History:
    """The parents of `timeline`, oldest first. An empty text is `()`: nothing known (P4's `present` answer is empty).

    HistoryInvalid: a line that is none, timelines that do not rise or are not below `timeline`, or switch positions
    that fall.
    """
    found: list[tuple[Timeline, Lsn]] = []
    for line in text.splitlines():
        bare = line.split("#", 1)[0]
        if not bare.strip():
            continue
        match = _LINE.fullmatch(bare)
        if match is None:
            raise HistoryInvalid(f"history of timeline {timeline}: not a line of a history file: {line[:200]!r}")
        found.append((Timeline(int(match[1])), parse_lsn(match[2])))
    for (before, left_at), (after, left_after) in itertools.pairwise(found):
        if after <= before:
            raise HistoryInvalid(f"history of timeline {timeline}: {after} after {before}")
        if left_after < left_at:
            raise HistoryInvalid(f"history of timeline {timeline}: timeline {after} ends before it begins")
    if found and not 1 <= found[0][0] <= found[-1][0] < timeline:
        raise HistoryInvalid(f"history of timeline {timeline}: names timeline {found[-1][0]}")
    return tuple(found)


def read_history(wal_directory: Path, timeline: Timeline) -> History | None:
    """The parents of `timeline` from its file in `wal_directory`; None: no file, or an empty one.

    Timeline 1 has none. HistoryInvalid, or OSError.
    """
    content = read_if_present(wal_directory / history_file_name(timeline), limit_bytes=_LIMIT_BYTES)
    if content is None:
        return None
    return parse_history(timeline, content.decode(errors="replace")) or None


def timelines_with_history(wal_directory: Path) -> tuple[Timeline, ...]:
    """Timelines whose history file, with something in it, is in `wal_directory`; ascending."""
    found = []
    for path in wal_directory.iterdir():
        match = _FILE_NAME.fullmatch(path.name)
        if match is not None and path.stat().st_size > 0:
            found.append(Timeline(int(match[1], 16)))
    return tuple(sorted(found))


def ends_as(history: History | None, wanted: History) -> bool:
    """Does it end with these switches, timelines on which nothing was written aside?"""
    told, expected = without_empty_timelines(history or ()), without_empty_timelines(wanted)
    return told[-len(expected) :] == expected


def history_of_chain(chain: TimelineChain) -> History:
    """The list that the history file of the chain's current timeline should hold."""
    return tuple((switch.parent, switch.switch_lsn) for switch in chain.switches)
