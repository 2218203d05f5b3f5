"""The archiver's own status as metrics."""

from __future__ import annotations

from typing import get_args

import pytest
from metrics_servers import Scrape

from instance_manager.archive.backlog import Level
from instance_manager.archive.counters import ArchiverStatus, BackfillState, Backlog, PushCounters
from instance_manager.codec import to_json
from instance_manager.metrics.archive import _COUNTERS, archive_blocks


def test_what_the_archiver_tells_is_served() -> None:
    status = ArchiverStatus(
        archive="ok",
        push=PushCounters(archived=7, conflicts=1),
        backlog=Backlog(ready=3, oldest_age_s=2.5, level="behind"),
        backfill=BackfillState(gaps=("000000010000000000000002",)),
    )
    seen = Scrape(archive_blocks(to_json(status)))
    assert seen.value("instance_manager_archive_up") == 1
    assert seen.value("instance_manager_archive_sound") == 1
    assert seen.value("instance_manager_archive_archived_files_total") == 7
    assert seen.value("instance_manager_archive_conflicts_total") == 1
    assert seen.value("instance_manager_archive_ready_files") == 3
    assert seen.value("instance_manager_archive_oldest_ready_age_seconds") == 2.5
    assert seen.value("instance_manager_archive_level", level="behind") == 1
    assert seen.value("instance_manager_archive_level", level="calm") == 0
    assert seen.value("instance_manager_archive_gap_segments") == 1


@pytest.mark.parametrize("level", get_args(Level))
def test_each_level_of_the_archiver_is_told(level: Level) -> None:
    seen = Scrape(archive_blocks(to_json(ArchiverStatus(backlog=Backlog(level=level)))))
    assert seen.value("instance_manager_archive_level", level=level) == 1


def test_every_counter_is_one_that_the_archiver_tells() -> None:
    """A field that is renamed there must not vanish here."""
    seen = Scrape(archive_blocks(to_json(ArchiverStatus())))
    for name, _ in _COUNTERS.values():
        assert seen.value(f"instance_manager_archive_{name}") == 0, name


def test_an_archiver_that_does_not_answer_or_answers_nonsense_is_told_as_down() -> None:
    for answer in (None, b"failed TypeError", b"[]", b"\xff"):
        seen = Scrape(archive_blocks(answer))
        assert seen.value("instance_manager_archive_up") == 0
        assert len(seen.samples) == 1


def test_a_status_without_parts_costs_only_those() -> None:
    seen = Scrape(archive_blocks(b'{"archive": "another cluster\'s", "push": {"archived": "many"}, "stream": null}'))
    assert seen.value("instance_manager_archive_up") == 1
    assert seen.value("instance_manager_archive_sound") == 0
    assert seen.value("instance_manager_archive_archived_files_total") is None
