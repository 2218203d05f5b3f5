"""The server's WAL summaries (Postgres 17 and later, `summarize_wal`): which blocks have changed since another backup began.

The rules are those of PrepareForIncrementalBackup in Postgres's basebackup_incremental.c: the summaries must cover the log from the begin of
the backup before to the begin of this one, along the history of this one's timeline, without a gap. A standby has its own.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import asyncpg

from instance_manager.archive.accepted import switch_position
from instance_manager.archive.backup.catalogue import is_part_of
from instance_manager.archive.backup.increment import ChangedBlocks, RelationFile
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.backup.page_checksums import PAGE_BYTES, PAGES_PER_FILE
from instance_manager.core.types import Lsn, Timeline, TimelineChain, format_lsn, parse_lsn
from instance_manager.postgres.sql import Session

FIRST_MAJOR = 17
READ_DEADLINE_S = 600.0
_MAIN_FORK = 0
_AVAILABLE = """
    SELECT tli::bigint AS timeline, start_lsn::text AS start_lsn, end_lsn::text AS end_lsn FROM pg_available_wal_summaries()
    WHERE start_lsn < $2::text::pg_lsn AND end_lsn > $1::text::pg_lsn
"""
_CONTENTS = f"""
    SELECT reltablespace::bigint AS tablespace, reldatabase::bigint AS database, relfilenode::bigint AS relation,
           relblocknumber / {PAGES_PER_FILE} AS segment, min(relblocknumber) FILTER (WHERE is_limit_block) AS limit_blocks,
           string_agg(int4send((relblocknumber % {PAGES_PER_FILE})::int), ''::bytea) FILTER (WHERE NOT is_limit_block) AS blocks
    FROM pg_wal_summary_contents($1::bigint, $2::text::pg_lsn, $3::text::pg_lsn) WHERE relforknumber = {_MAIN_FORK}
    GROUP BY 1, 2, 3, 4
"""  # noqa: S608 - numbers of ours
_SERVER = """
    SELECT current_setting('server_version_num')::int / 10000 AS major, current_setting('summarize_wal', true) AS summarize,
           current_setting('block_size')::int AS block_bytes, pg_size_bytes(current_setting('segment_size')) AS file_bytes
"""
_COVERS = """
    SELECT coalesce(bool_or($2::text::pg_lsn >= start_lsn AND $2::text::pg_lsn < end_lsn) OR max(end_lsn) <= $2::text::pg_lsn, false)
    FROM pg_available_wal_summaries() WHERE tli = $1::bigint
"""


class IncrementRefused(Exception):
    """What has changed is not known here, and why; a full backup can be taken."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of the log on one timeline, from `start` to before `end`; a summary is one too."""

    timeline: Timeline
    start: Lsn
    end: Lsn


def spans_between(before: BackupInfo, chain: TimelineChain, begin: Lsn) -> list[Span]:
    """From the begin of a backup to `begin` on the current timeline of `chain`, oldest first.

    IncrementRefused: that backup is no earlier state of this one.
    """
    if before.end_lsn is None or not is_part_of(before, chain):
        raise IncrementRefused(
            f"backup {before.backup_id} ends behind the fork at which timeline {chain.current} left timeline {before.timeline}"
        )
    if begin < before.end_lsn:
        raise IncrementRefused(
            f"it would begin at {format_lsn(begin)}, and backup {before.backup_id} ends only at {format_lsn(before.end_lsn)}: this server's "
            "last checkpoint is from before that. Try again after the next one, or on the primary"
        )
    found, timeline, start = [], before.timeline, before.begin_lsn
    for switch in chain.switches:
        if switch.parent == timeline:
            left_at = switch_position(chain, timeline)
            end = begin if left_at is None else left_at
            found.append(Span(timeline, start, end))
            timeline, start = switch.timeline, end
    return [each for each in (*found, Span(timeline, start, begin)) if each.start < each.end]


def first_uncovered(span: Span, summaries: Iterable[Span]) -> Lsn | None:
    """The position from which on they say nothing of it; None: they cover it."""
    reached = span.start
    for each in sorted((each for each in summaries if each.timeline == span.timeline), key=lambda each: each.start):
        if each.start > reached:
            break
        reached = max(reached, each.end)
    return reached if reached < span.end else None


def is_gap(span: Span, missing: Lsn, spans: Sequence[Span], summaries: Iterable[Span]) -> bool:
    """Summaries are written in the order of the log: where there is a later one, what is missing never comes."""
    later = {each.timeline for each in spans[spans.index(span) + 1 :]}
    return any(
        each.timeline in later or (each.timeline == span.timeline and each.start > missing) for each in summaries
    )


async def require_summaries(sql: Session) -> None:
    """IncrementRefused: this server writes none."""
    row = await sql.fetchrow(_SERVER)
    if row is None or row["major"] < FIRST_MAJOR:
        have = "an older one" if row is None else f"Postgres {row['major']}"
        raise IncrementRefused(f"incremental backups need Postgres {FIRST_MAJOR} or later, and this is {have}")
    if row["summarize"] != "on":
        raise IncrementRefused(
            "the server writes no summaries of its WAL: set archive.backup.incremental to true; the first backup after that is a full one"
        )
    if (row["block_bytes"], row["file_bytes"]) != (PAGE_BYTES, PAGE_BYTES * PAGES_PER_FILE):
        raise IncrementRefused("the server was built with another size of blocks or files than 8 kB and 1 GB")


async def timeline_now(sql: Session) -> Timeline:
    """Of the server's last checkpoint, or restart point."""
    return Timeline(await sql.fetchval("SELECT timeline_id FROM pg_control_checkpoint()"))


async def covers_begin(sql: Session, before: BackupInfo) -> bool:
    """Has this server a summary of where that backup begins, or has it not come there yet?"""
    return bool(await sql.fetchval(_COVERS, before.timeline, format_lsn(before.begin_lsn)))


async def changes_in(sql: Session, spans: Sequence[Span], *, deadline_s: float, poll_s: float = 0.5) -> ChangedBlocks:
    """Waits until the summaries have come to the end. IncrementRefused: a gap, or not within `deadline_s`."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + deadline_s
    while True:
        summaries = await _available(sql, spans)
        missing = [(span, lsn) for span in spans if (lsn := first_uncovered(span, summaries)) is not None]
        if not missing:
            break
        span, lsn = missing[0]
        what = f"of timeline {span.timeline} from {format_lsn(lsn)} to {format_lsn(span.end)}"
        if is_gap(span, lsn, spans, summaries):
            raise IncrementRefused(
                f"the server has no summary {what}, and has later ones: it was off then, or they were removed"
            )
        if loop.time() > end_s:
            raise IncrementRefused(f"the server's summaries {what} did not come within {deadline_s:g} s")
        await asyncio.sleep(poll_s)
    found = ChangedBlocks()
    for each in summaries:
        if any(_overlap(each, span) for span in spans):
            await _read(sql, each, found)
    return found


async def _available(sql: Session, spans: Sequence[Span]) -> list[Span]:
    if not spans:
        return []
    rows = await sql.fetch(_AVAILABLE, format_lsn(spans[0].start), format_lsn(spans[-1].end))
    return [Span(Timeline(row["timeline"]), parse_lsn(row["start_lsn"]), parse_lsn(row["end_lsn"])) for row in rows]


def _overlap(one: Span, other: Span) -> bool:
    return one.timeline == other.timeline and one.start < other.end and other.start < one.end


async def _read(sql: Session, summary: Span, found: ChangedBlocks) -> None:
    rows = await sql.fetch(
        _CONTENTS,
        summary.timeline,
        format_lsn(summary.start),
        format_lsn(summary.end),
        deadline_s=READ_DEADLINE_S,
    )
    await asyncio.to_thread(_take, rows, found)


def _take(rows: Iterable[asyncpg.Record], found: ChangedBlocks) -> None:
    for row in rows:
        tablespace, database, relation, segment, limit_blocks, blocks = row.values()
        if limit_blocks is not None:
            found.limit(tablespace, database, relation, limit_blocks)
        if blocks is not None:
            numbers = array("I", blocks)
            if sys.byteorder == "little":
                numbers.byteswap()
            found.change(RelationFile(tablespace, database, relation, segment), numbers)
