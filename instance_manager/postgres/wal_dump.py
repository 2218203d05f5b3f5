"""The end of the valid WAL that lies on this disk: the end of the last complete record, and that record's timeline.

A voter whose replay is paused or behind, and a directory that is stopped, have no server that could tell (P3, P11).

How it is found. Postgres's own reader decides what a valid record is, through pg_waldump; nothing is parsed twice.

1. A *view* is made: a directory of symbolic links to the segments, chosen as recovery chooses them (for each segment
   the newest timeline of the given history that has it, never going back to an older one), all under the name of one
   timeline, because pg_waldump follows one only. The last link is followed by a segment of zeros, so that the end of
   the files is met as an invalid page, with a position, and not as a missing file, without one.
2. `pg_waldump --limit=1` at the start proves that a record begins exactly there. If none does, the end is the start.
3. `pg_waldump --quiet` from the start checks every record up to the first that is none, at some hundred MB/s, and
   names the *start* of the last valid one: "error in WAL record at X: why". The position in `why` is not used: not
   every reason has one, and those of page headers name another thing.
4. `pg_waldump --limit=1` from X lists that record. Only the head of the first line counts, because what follows may
   be a user's text, line ends included (`pg_logical_emit_message`). The record's length gives the end: the headers of
   the pages it crosses are counted in, it is rounded up to 8 bytes, and a segment switch ends at the segment's end. That
   is the reader's EndRecPtr, at which a promotion forks.

A reason that does not mean "the log ends here", such as a read error, another system's segment, a version that says
something new, is PositionUnknown: the voter then makes no promise, rather than one on a guess.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from instance_manager.core.types import Lsn, Timeline, WalEnd, format_lsn, parse_lsn
from instance_manager.postgres.control_data import ControlData
from instance_manager.postgres.histories import History
from instance_manager.postgres.server import (
    DeadlinePassed,
    LocalPostgresError,
    LocalServer,
    OutputTooLong,
    ProgramFailed,
    run_program,
)

BLOCK_BYTES = 8192
VIEW_MARK = ".wal-view-"
_SHORT_HEADER_BYTES = 24
_LONG_HEADER_BYTES = 40
_MAXIMUM_SEGMENTS = 1 << 17
# XLogLongPageHeaderData: magic, info, timeline, page address, remaining length, padding, system, segment, block.
_LONG_HEADER = struct.Struct("=HHIQI4xQII")
_LONG_HEADER_FLAG = 0x0002

_SEGMENT_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")
_RECORD_LINE = re.compile(
    r"rmgr: (?P<manager>\S+)\s+len \(rec/tot\):\s*\d+/\s*(?P<total>\d+), tx:\s*\d+, "
    r"lsn: (?P<lsn>[0-9A-F]+/[0-9A-F]+), prev [0-9A-F]+/[0-9A-F]+, desc: (?P<description>.*)"
)
_SKIPPED = re.compile(r"\A\s*first record is after \S+, at \S+, skipping over \d+ bytes?\n")
_NOTHING_AT_START = re.compile(r"could not find a valid record after ([0-9A-F]+/[0-9A-F]+)(?:: (.*))?$", re.MULTILINE)
_ENDED = re.compile(r"error in WAL record at ([0-9A-F]+/[0-9A-F]+): (.*)$", re.MULTILINE)
# What Postgres 14 to 18 say where a log ends: zeros, an old segment's content, or a record that is only partly there.
_END_REASONS = (
    "invalid record length at",
    "invalid record offset at",
    "invalid resource manager ID",
    "record with incorrect prev-link",
    "record with invalid length at",
    "record length",
    "incorrect resource manager data checksum in record at",
    "there is no contrecord flag at",
    "contrecord is requested by",
    "invalid contrecord length",
    "missing contrecord at",
    "invalid magic number",
    "invalid info bits",
    "unexpected pageaddr",
    "out-of-sequence timeline ID",
)


class PositionUnknown(LocalPostgresError):
    """The end of the log cannot be told for certain; whoever asks must not claim any position."""


class WalMissing(PositionUnknown):
    """Recovery must reach `needed`, but pg_wal ends at `end`: as after a rewind, which leaves the rest to be received."""

    def __init__(self, end: WalEnd, needed: WalEnd) -> None:
        super().__init__(f"the log in pg_wal ends at {end}, before {needed} that recovery must reach")
        self.end = end
        self.needed = needed


@dataclass(frozen=True, slots=True)
class _Record:
    start: Lsn
    end: Lsn


_Path = tuple[tuple[Timeline, Lsn], ...]
"""Timelines that the log may go along from the start on, oldest first, each with the position where it begins."""


@dataclass(frozen=True, slots=True)
class _View:
    """Directory of links in which one timeline's names lead to the segments that recovery would read."""

    directory: Path
    timeline: Timeline
    segment_bytes: int
    first_segment: int
    owners: tuple[Timeline, ...]
    """Timeline of the real file of each segment, from `first_segment` on, without gap."""

    def segment_of(self, lsn: Lsn) -> int:
        return lsn // self.segment_bytes

    def name_of(self, segment: int) -> str:
        return segment_file_name(self.timeline, segment, self.segment_bytes)

    @property
    def zeros_segment(self) -> int:
        return self.first_segment + len(self.owners)


def segment_file_name(timeline: Timeline, segment: int, segment_bytes: int) -> str:
    """Name of the file of the `segment`th segment of the log (position / segment size) on `timeline`."""
    per_name = (1 << 32) // segment_bytes
    return f"{timeline:08X}{segment // per_name:08X}{segment % per_name:08X}"


def record_end(start: Lsn, total_bytes: int, *, segment_bytes: int, is_switch: bool = False) -> Lsn:
    """Where the record that starts at `start` and is `total_bytes` long ends: the reader's EndRecPtr."""
    position = int(start)
    left = total_bytes
    while True:
        taken = min(left, BLOCK_BYTES - position % BLOCK_BYTES)
        position += taken
        left -= taken
        if left == 0:
            break
        position += _LONG_HEADER_BYTES if position % segment_bytes == 0 else _SHORT_HEADER_BYTES
    position = (position + 7) & ~7
    if is_switch:
        position = -(-position // segment_bytes) * segment_bytes
    return Lsn(position)


async def end_of_wal(
    server: LocalServer,
    *,
    start: WalEnd,
    newest: Timeline,
    history: History,
    system_identifier: int,
    wal_segment_bytes: int,
    deadline_s: float = 30.0,
) -> WalEnd:
    """The end of the last complete record at or after `start` in this server's pg_wal.

    `start` is the end of a record that the caller knows to be good: the replay position and its timeline. `newest`
    and `history` are the accepted history (`histories.history_of_chain`): a segment of a timeline outside it is not
    looked at, and one that left the history before `start` is not followed away from `start.timeline`. The result may
    lie past the point where the history left a timeline: then this log has diverged.

    With a walreceiver still at work the answer is a lower bound. PositionUnknown, DeadlinePassed, or OSError.
    """
    if start.lsn % 8 != 0:
        raise PositionUnknown(f"{start} is not where a record can end")
    path = _path_from(start, newest, history)
    until_s = asyncio.get_running_loop().time() + deadline_s
    view = await asyncio.to_thread(_make_view, server, start, path, system_identifier, wal_segment_bytes)
    if view is None:
        return start
    try:
        last = await _last_record(server, view, start.lsn, until_s)
    except OutputTooLong as error:
        raise PositionUnknown(str(error)) from error
    finally:
        shutil.rmtree(view.directory, ignore_errors=True)
    if last is None:
        return start
    owner = view.owners[view.segment_of(last.start) - view.first_segment]
    timeline = max(each for each, begins in path if each <= owner and begins <= last.start)
    return WalEnd(timeline, last.end)


async def end_of_stopped_directory(
    server: LocalServer,
    control: ControlData,
    *,
    newest: Timeline,
    history: History,
    deadline_s: float = 60.0,
) -> WalEnd:
    """The end of the log of a data directory on which no server runs, from its last checkpoint's redo position on.

    `newest` and `history` as for `end_of_wal`. PositionUnknown; WalMissing: the log ends before the position that
    recovery must reach, and the directory cannot come up by itself.
    """
    start = WalEnd(control.timeline, control.redo_lsn)
    end = await end_of_wal(
        server,
        start=start,
        newest=newest,
        history=history,
        system_identifier=control.system_identifier,
        wal_segment_bytes=control.wal_segment_bytes,
        deadline_s=deadline_s,
    )
    needed = max(control.minimum_recovery_end_lsn, Lsn(control.checkpoint_lsn + 1))
    if end.lsn < needed:
        raise WalMissing(end, WalEnd(max(control.timeline, control.minimum_recovery_end_timeline), needed))
    return end


def _path_from(start: WalEnd, newest: Timeline, history: History) -> _Path:
    timelines = [*(parent for parent, _ in history), newest]
    begins = [Lsn(0), *(left_at for _, left_at in history)]
    path = [(start.timeline, Lsn(0))]
    if start.timeline in timelines:
        for index in range(timelines.index(start.timeline) + 1, len(timelines)):
            if begins[index] < start.lsn:
                # This log went on along a timeline that the history had left: it has diverged.
                break
            path.append((timelines[index], begins[index]))
    return tuple(path)


def _make_view(
    server: LocalServer, start: WalEnd, path: _Path, system_identifier: int, segment_bytes: int
) -> _View | None:
    """Links to the segments from `start` on; None: the log ends at `start`, a segment's start, and none follows."""
    wal_directory = server.data_directory / "pg_wal"
    first_segment = start.lsn // segment_bytes
    files: list[Path] = []
    owners: list[Timeline] = []
    for segment in range(first_segment, first_segment + _MAXIMUM_SEGMENTS):
        found = _segment_file(wal_directory, segment, owners, path, system_identifier, segment_bytes)
        if found is None:
            break
        owners.append(found[0])
        files.append(found[1])
    else:
        raise PositionUnknown(f"more than {_MAXIMUM_SEGMENTS} segments after {start}")
    if not files:
        if start.lsn % segment_bytes == 0:
            return None
        raise PositionUnknown(f"{wal_directory} does not hold the segment of {start}")
    directory = server.data_directory.with_name(f"{server.data_directory.name}{VIEW_MARK}{secrets.token_hex(4)}")
    view = _View(directory, path[-1][0], segment_bytes, first_segment, tuple(owners))
    directory.mkdir(mode=0o700)
    try:
        for segment, file in enumerate(files, first_segment):
            (directory / view.name_of(segment)).symlink_to(file)
        zeros = directory / view.name_of(view.zeros_segment)
        with zeros.open("wb") as stream:
            stream.truncate(segment_bytes)
        if server.run_as is not None:
            for each in (zeros, directory):
                os.chown(each, server.run_as.uid, server.run_as.gid)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return view


def _segment_file(
    wal_directory: Path,
    segment: int,
    owners: list[Timeline],
    path: _Path,
    system_identifier: int,
    segment_bytes: int,
) -> tuple[Timeline, Path] | None:
    """The file with this segment that recovery would read: of the newest timeline that had begun by its end."""
    lowest = owners[-1] if owners else Timeline(0)
    for timeline, begins in reversed(path):
        if timeline < lowest or begins // segment_bytes > segment:
            continue
        file = (wal_directory / segment_file_name(timeline, segment, segment_bytes)).resolve()
        try:
            with file.open("rb") as stream:
                header = stream.read(_LONG_HEADER.size)
        except FileNotFoundError:
            continue
        if _is_of_segment(header, file, segment, system_identifier, segment_bytes):
            return timeline, file
    return None


def _is_of_segment(header: bytes, file: Path, segment: int, system_identifier: int, segment_bytes: int) -> bool:
    """False: still zeros, or the old content of a recycled file. PositionUnknown: another system's segment."""
    if len(header) < _LONG_HEADER.size:
        return False
    magic, info, _, address, _, system, size, block = _LONG_HEADER.unpack(header)
    if magic == 0 or not info & _LONG_HEADER_FLAG or address != segment * segment_bytes:
        return False
    if (system, size, block) != (system_identifier, segment_bytes, BLOCK_BYTES):
        raise PositionUnknown(
            f"{file} belongs to system {system} with segments of {size} bytes in blocks of {block}, "
            f"not to {system_identifier} with {segment_bytes} in blocks of {BLOCK_BYTES}"
        )
    return True


async def _last_record(server: LocalServer, view: _View, start: Lsn, until_s: float) -> _Record | None:
    """The last complete record at or after `start`; None: none is valid there."""
    try:
        first = _first_line(await _dump(server, view, start, until_s, "--limit=1"), view.segment_bytes)
    except ProgramFailed as error:
        nothing = _NOTHING_AT_START.search(error.stderr)
        if nothing is not None and parse_lsn(nothing[1]) == start:
            _require_end_reason(nothing[2], error)
            return None
        raise PositionUnknown(f"pg_waldump from {format_lsn(start)}: {error.stderr.strip()}") from error
    if first.start != start and first.start != _after_page_header(start, view.segment_bytes):
        raise PositionUnknown(f"no record begins at {format_lsn(start)}: the next one is at {format_lsn(first.start)}")
    try:
        await _dump(server, view, start, until_s, "--quiet")
    except ProgramFailed as error:
        ended = _ENDED.search(error.stderr)
        if ended is None:
            raise PositionUnknown(f"pg_waldump from {format_lsn(start)}: {error.stderr.strip()}") from error
        _require_end_reason(ended[2], error)
        last_start = parse_lsn(ended[1])
    else:
        raise PositionUnknown("pg_waldump found no end of the log")
    if last_start < first.start:
        raise PositionUnknown(f"pg_waldump named {format_lsn(last_start)}, before its start at {format_lsn(start)}")
    try:
        last = _first_line(await _dump(server, view, last_start, until_s, "--limit=1"), view.segment_bytes)
    except ProgramFailed as error:
        raise PositionUnknown(f"pg_waldump of {format_lsn(last_start)}: {error.stderr.strip()}") from error
    if last.start != last_start:
        raise PositionUnknown(f"pg_waldump listed {format_lsn(last.start)} instead of {format_lsn(last_start)}")
    return last


async def _dump(server: LocalServer, view: _View, start: Lsn, until_s: float, option: str) -> str:
    left_s = until_s - asyncio.get_running_loop().time()
    if left_s <= 0:
        raise DeadlinePassed("finding the end of the log", 0)
    argv = [
        server.program("pg_waldump"),
        option,
        f"--path={view.directory}",
        f"--start={format_lsn(start)}",
        view.name_of(view.segment_of(start)),
        view.name_of(view.zeros_segment),
    ]
    return await run_program(server, argv, deadline_s=left_s)


def _first_line(output: str, segment_bytes: int) -> _Record:
    # Said first where the start is not a record's, which for the start of a page is as it should be.
    match = _RECORD_LINE.match(_SKIPPED.sub("", output, count=1))
    if match is None:
        raise PositionUnknown(f"pg_waldump printed no record: {output[:200]!r}")
    start = parse_lsn(match["lsn"])
    is_switch = match["manager"] == "XLOG" and match["description"].strip() == "SWITCH"
    return _Record(start, record_end(start, int(match["total"]), segment_bytes=segment_bytes, is_switch=is_switch))


def _after_page_header(lsn: Lsn, segment_bytes: int) -> int:
    """Where the first record of a page begins, if `lsn` is the page's start; else `lsn`."""
    if lsn % segment_bytes == 0:
        return lsn + _LONG_HEADER_BYTES
    return lsn + _SHORT_HEADER_BYTES if lsn % BLOCK_BYTES == 0 else lsn


def _require_end_reason(reason: str | None, error: ProgramFailed) -> None:
    if reason is not None and not reason.startswith(_END_REASONS):
        raise PositionUnknown(f"pg_waldump stopped for a reason that is not the end of the log: {reason}") from error
