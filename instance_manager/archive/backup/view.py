"""The catalogue for people, and for machines."""

from __future__ import annotations

from typing import Any

from instance_manager.archive.backup.catalogue import Listed, Window
from instance_manager.archive.wal_names import SegmentSize
from instance_manager.core.types import format_lsn

_HEADS = (
    "ID",
    "NAME",
    "STATE",
    "COMPLETE AT (UTC)",
    "TIMELINE",
    "BEGIN",
    "END",
    "SIZE",
    "STORED",
    "KEEP",
    "LOG UNTIL",
    "STANDS ON",
)


def size_text(size_bytes: int | None) -> str:
    """`3.1 MiB`; empty where it is not known."""
    if size_bytes is None:
        return ""
    amount, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def plain_backup(listed: Listed, window: Window | None) -> dict[str, Any]:
    """One backup of `backups --json`."""
    info = listed.info
    found: dict[str, Any] = {
        "id": listed.backup_id,
        "state": listed.state,
        "keep": listed.keep,
        "problem": listed.problem,
        "parent": listed.parent_id,
    }
    if info is None:
        return found
    found |= {
        "name": info.name,
        "timeline": info.timeline,
        "begin_lsn": format_lsn(info.begin_lsn),
        "end_lsn": None if info.end_lsn is None else format_lsn(info.end_lsn),
        "begin_time": info.begin_time.isoformat(),
        "end_time": None if info.end_time is None else info.end_time.isoformat(),
        "size_bytes": info.size_bytes,
        "stored_bytes": info.stored_bytes,
        "system_identifier": info.system_identifier,
        "postgres_version": info.version_number,
        "made_by": "barman" if listed.manifest is None else "instance-manager",
    }
    if listed.manifest is not None:
        found |= {
            "taken_on": listed.manifest.instance,
            "from_standby": listed.manifest.was_standby,
            "whole_bytes": listed.manifest.whole_bytes,
            "checked_pages": listed.manifest.checked_pages,
            "damaged_pages": listed.manifest.damaged_count,
            "damaged": [{"file": each.file, "block": each.block} for each in listed.manifest.damaged],
        }
    if window is not None:
        size, last, missing = info.segment_size, window.reach.last, window.reach.missing
        found |= {
            "recoverable_until_lsn": None if last is None else format_lsn(size.end_lsn(last)),
            "recoverable_until_segment": None if last is None else size.name(last),
            "gap_at_segment": None if missing is None else size.name(missing),
        }
    return found


def table(rows: list[tuple[Listed, Window | None]]) -> str:
    """Lines, and a line for what is wrong with each."""
    cells = [_HEADS, *(_row(listed, window) for listed, window in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    notes = [f"{listed.backup_id}: {listed.problem}" for listed, _ in rows if listed.problem]
    for listed, window in rows:
        if listed.info is not None and window is not None and window.reach.missing is not None:
            name = listed.info.segment_size.name(window.reach.missing)
            notes.append(
                f"{listed.backup_id}: the log has a gap at {name}: nothing behind it can be recovered from this one"
            )
    return "\n".join([*lines, *notes])


def _row(listed: Listed, window: Window | None) -> tuple[str, ...]:
    info = listed.info
    if info is None:
        return (listed.backup_id, "", listed.state, *[""] * 6, listed.keep or "", "", listed.parent_id or "")
    return (
        listed.backup_id,
        info.name or "",
        listed.state,
        "" if info.end_time is None else f"{info.end_time:%Y-%m-%d %H:%M:%S}",
        str(info.timeline),
        format_lsn(info.begin_lsn),
        "" if info.end_lsn is None else format_lsn(info.end_lsn),
        size_text(info.size_bytes),
        size_text(info.stored_bytes),
        listed.keep or "",
        _until(window, info.segment_size),
        listed.parent_id or "",
    )


def _until(window: Window | None, size: SegmentSize) -> str:
    if window is None or window.reach.last is None:
        return ""
    last = window.reach.last
    gap = " (gap)" if window.reach.missing is not None else ""
    return f"{last.timeline}:{format_lsn(size.end_lsn(last))}{gap}"
