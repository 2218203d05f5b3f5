"""The archiver's own status as metrics."""

from __future__ import annotations

from typing import get_args

import pytest
from metrics_servers import Scrape

from instance_manager.archive.backlog import Level
from instance_manager.archive.counters import (
    ArchiverStatus,
    BackfillState,
    Backlog,
    BackupsSeen,
    PushCounters,
    StreamCounters,
)
from instance_manager.codec import to_json
from instance_manager.core.archive_state import ArchiveState
from instance_manager.core.types import Lsn
from instance_manager.metrics.archive import _COUNTERS, TimeUntilFull, archive_blocks, state_blocks


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


def test_how_far_the_archive_reaches_and_what_can_be_recovered_from_it() -> None:
    status = ArchiverStatus(
        push=PushCounters(prepare_seconds=1.5, store_seconds=4.25),
        stream=StreamCounters(covered_s=990.0),
        backups=BackupsSeen(
            looked_s=1.0,
            looked_at_unix_s=1.7e9,
            good=2,
            newest="20261101T000000",
            newest_end_unix_s=1.6e9,
            recoverable_from_unix_s=1.5e9,
            first_gap="000000010000000000000002",
        ),
    )
    state = ArchiveState(level="calm", position=Lsn(4096), lag_bytes=100, lag_s=1.5, waiting=3)
    seen = Scrape([*archive_blocks(to_json(status), 1000.0), *state_blocks(state, 1 << 20)])
    prefix = "instance_manager_archive_"

    def told(name: str, **labels: str) -> float | None:
        return seen.value(prefix + name, **labels)

    assert told("upload_seconds_total", phase="prepare") == 1.5
    assert told("upload_seconds_total", phase="store") == 4.25
    assert told("stream_lag_seconds") == 10
    assert told("good_backups") == 2
    assert told("newest_backup_timestamp_seconds") == 1.6e9
    assert told("recoverable_from_timestamp_seconds") == 1.5e9
    assert told("gap_behind_newest_backup") == 1
    assert told("contiguous_lsn_bytes") == 4096
    assert (told("lag_bytes"), told("lag_seconds"), told("ready_bytes")) == (100, 1.5, 3 << 20)


def test_where_backups_were_not_looked_at_nothing_is_told_of_them() -> None:
    """Not 0 either: that would be an alarm."""
    seen = Scrape(archive_blocks(to_json(ArchiverStatus())))
    assert not [name for name, _ in seen.samples if "backup" in name or "recoverable" in name]
    assert state_blocks(None, 1) == []


def test_the_time_until_the_volume_is_full_follows_the_growth_of_the_last_ten_minutes() -> None:
    until_full = TimeUntilFull()

    def left_s(now_s: float, waiting_bytes: int | None) -> float | None:
        return Scrape([until_full.block(now_s, waiting_bytes, 1000)]).value(
            "instance_manager_archive_seconds_until_full"
        )

    assert left_s(0, 0) is None
    assert left_s(30, 0) == float("inf")
    assert left_s(100, 50) == 2000
    for second in range(105, 800, 5):
        left_s(second, 1000 + second)
    assert left_s(800, 1800) == pytest.approx(1000, rel=0.05), "a byte a second, whatever was before"
    assert left_s(805, 10) == float("inf"), "it shrinks"
    assert left_s(810, None) is None, "no primary any more"
    assert left_s(815, 0) is None
