"""The archiver's status as metrics: nothing of it where no archive is configured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from instance_manager.core.archive_state import ARCHIVE_LEVELS
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
}


def archive_blocks(status: bytes | None) -> list[Block]:
    """From the archiver's answer to `status`. None, or what is no status: it does not answer, and only that is told."""
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
    value = _part(told, part).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    block = Block(family)
    block.add(value)
    return [block]
