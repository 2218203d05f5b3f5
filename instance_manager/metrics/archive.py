"""The archiver's status as metrics: nothing of it where no archive is configured."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from instance_manager.core.archive_state import ARCHIVE_LEVELS, ArchiveState
from instance_manager.metrics.exposition import Block, Family, gauge, gauges

P = "instance_manager_archive_"
_COUNTERS = {
    ("push", "archived"): ("archived_files_total", "Files made durable in the archive."),
    ("push", "already_there"): ("already_there_files_total", "Files that were in the archive with the same content."),
    ("push", "retries"): ("upload_retries_total", "Uploads that were tried again."),
    ("push", "refused"): ("refused_files_total", "Files that do not belong into this archive."),
    ("push", "conflicts"): ("conflicts_total", "Attempts that met other content under the same name."),
    ("push", "wal_bytes"): ("wal_bytes_total", "Bytes of WAL that were archived."),
    ("push", "stored_bytes"): ("stored_bytes_total", "Bytes that they take in the store."),
    ("backfill", "brought"): (
        "brought_files_total",
        "Files that this standby has brought because its primary lacked them.",
    ),
    ("stream", "pieces"): ("stream_pieces_total", "Pieces of unfinished segments that were archived."),
    ("stream", "failures"): ("stream_failures_total", "Pieces that could not be archived."),
    ("fetch", "restored"): ("restored_files_total", "Files brought back by restore_command."),
    ("fetch", "failures"): ("restore_failures_total", "Files that restore_command could not bring."),
    ("fetch", "damaged"): ("restore_damaged_total", "Files in the archive whose content is damaged."),
}
_GAUGES = {
    ("backlog", "ready"): ("ready_files", "Files that wait to be archived."),
    ("backlog", "oldest_age_s"): ("oldest_ready_age_seconds", "How long the oldest of them has waited."),
    ("stream", "durable_lsn"): ("durable_lsn_bytes", "Everything before this position is in the archive."),
    ("backups", "good"): ("good_backups", "Backups without damage, with all of the log that makes them consistent."),
    ("backups", "newest_end_unix_s"): (
        "newest_backup_timestamp_seconds",
        "End of the newest of them, Unix seconds.",
    ),
    ("backups", "recoverable_from_unix_s"): (
        "recoverable_from_timestamp_seconds",
        "End of the oldest of them from which the log goes on without a gap, Unix seconds.",
    ),
}
_PHASES = {"prepare": "prepare_seconds", "store": "store_seconds"}
UPLOAD_SECONDS = Family(
    f"{P}upload_seconds_total",
    "counter",
    "Seconds of uploads by phase: reading, checking and compressing; then the store's answer, with retries.",
    ("phase",),
)
GROWTH_OVER_S = 600.0
SAMPLES = 60


def archive_blocks(status: bytes | None, now_s: float = 0.0) -> list[Block]:
    """From the archiver's answer to `status`. None, or what is no status: it does not answer, and only that is told.

    `now_s`: CLOCK_BOOTTIME, as the archiver's times.
    """
    told: Mapping[str, Any] | None = None
    if status is not None:
        try:
            found = json.loads(status)
            told = found if isinstance(found, dict) else None
        except ValueError:
            told = None
    blocks = [gauge(f"{P}up", "1: the archiver answers.", told is not None)]
    if told is None:
        return blocks
    blocks.append(gauge(f"{P}sound", "1: nothing is wrong with the archive as a whole.", told.get("archive") == "ok"))
    for (part, key), (name, help_) in _COUNTERS.items():
        blocks += _block(told, part, key, Family(P + name, "counter", help_))
    for (part, key), (name, help_) in _GAUGES.items():
        blocks += _block(told, part, key, Family(P + name, "gauge", help_))
    gaps = _part(told, "backfill").get("gaps")
    if isinstance(gaps, list):
        blocks.append(
            gauge(
                f"{P}gap_segments",
                "Segments of the accepted history that are missing: no recovery passes them.",
                len(gaps),
            )
        )
    first_gap = _part(told, "backups").get("first_gap")
    if isinstance(first_gap, str):
        blocks.append(
            gauge(
                f"{P}gap_behind_newest_backup",
                "1: the log behind the newest good backup has a gap: no recovery passes it.",
                first_gap != "",
            )
        )
    covered_s = _number(told, "stream", "covered_s")
    blocks.append(
        gauge(
            f"{P}stream_lag_seconds",
            "Since all that was flushed then was streamed or archived, but for segments that wait.",
            None if covered_s is None else round(max(0.0, now_s - covered_s), 3),
        )
    )
    upload = Block(UPLOAD_SECONDS)
    for phase, key in _PHASES.items():
        if (seconds := _number(told, "push", key)) is not None:
            upload.add(round(seconds, 6), phase)
    blocks.append(upload)
    level = _part(told, "backlog").get("level")
    blocks.append(
        gauges(
            f"{P}level",
            "1 for how far archiving is behind.",
            "level",
            {each: each == level for each in ARCHIVE_LEVELS},
        )
    )
    return blocks


def _part(told: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    found = told.get(part)
    return found if isinstance(found, dict) else {}


def _block(told: Mapping[str, Any], part: str, key: str, family: Family) -> list[Block]:
    value = _number(told, part, key)
    if value is None:
        return []
    block = Block(family)
    block.add(value)
    return [block]


def _number(told: Mapping[str, Any], part: str, key: str) -> float | None:
    value = _part(told, part).get(key)
    return None if isinstance(value, bool) or not isinstance(value, int | float) else value


def state_blocks(state: ArchiveState | None, wal_segment_bytes: int | None) -> list[Block]:
    """What the agent knows besides: of a primary's archive, how far it reaches and how far it is behind."""
    if state is None:
        return []
    waiting_bytes = state.waiting * wal_segment_bytes if wal_segment_bytes is not None else None
    return [
        gauge(
            f"{P}contiguous_lsn_bytes",
            "The log before this position is in the archive without a gap, as segments or pieces.",
            state.position,
        ),
        gauge(f"{P}lag_bytes", "Flushed on the primary's disk, and not in the archive.", state.lag_bytes),
        gauge(
            f"{P}lag_seconds",
            "Since everything that was flushed was in the archive: what the loss of every volume now would cost.",
            state.lag_s,
        ),
        gauge(f"{P}ready_bytes", "Bytes of the files that wait, each counted as a whole segment.", waiting_bytes),
    ]


class TimeUntilFull:
    """How soon what waits for the archive fills the volume, by its growth over the last ten minutes of scrapes."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def block(self, now_s: float, waiting_bytes: int | None, free_bytes: int | None) -> Block:
        """+Inf: it does not grow. No sample: not known. `now_s` only rises."""
        left_s: float | None = None
        if waiting_bytes is None:
            self._seen.clear()
        else:
            # One older sample stays, so that the time between two is never less than what is asked for once it was.
            while len(self._seen) > 1 and now_s - self._seen[1][0] >= GROWTH_OVER_S:
                self._seen.popleft()
            if self._seen and free_bytes is not None:
                began_s, before_bytes = self._seen[0]
                grown_bytes = waiting_bytes - before_bytes
                left_s = free_bytes * (now_s - began_s) / grown_bytes if grown_bytes > 0 else math.inf
            if not self._seen or now_s - self._seen[-1][0] >= GROWTH_OVER_S / SAMPLES:
                self._seen.append((now_s, waiting_bytes))
        return gauge(
            f"{P}seconds_until_full",
            "Until files that wait have filled the volume, if they go on growing as in the last ten minutes.",
            left_s,
        )
