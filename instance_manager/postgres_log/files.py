"""The directory of the log: what in its files was not told yet, and which of them may go.

Postgres writes, this reads, and the directory is the buffer between both. Its bound is kept here: files that were told are
deleted, and beyond `WAITING_MAX_BYTES` the oldest lines are given up, counted. How far each file was told is kept beside
them, so that another agent goes on from there: it may tell a few lines twice, and leaves none out.

All functions block on the disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from instance_manager.postgres_log.records import RECORD_MAX_BYTES, Record, from_csv, from_json, from_text
from instance_manager.wall_clock import now_utc

COLLECTED = "postgres"
STARTING = "start"
LOG_FILENAME = f"{COLLECTED}-%Y%m%d-%H%M%S.log"
"""For `log_filename`: a new name for each file, so that none is written to again after it was left."""
FILE_BYTES = 8 * 1024 * 1024
"""A file is left for the next when it is so large."""
WAITING_MAX_BYTES = 64 * 1024 * 1024
"""What may wait for its reader; beyond it the oldest is given up."""
READ_BYTES = 128 * 1024
FINISHED_AFTER_S = 10.0
"""So long without a change, and not the newest: nobody writes to it any more."""
SEEN_FOR_S = 1.0

_NAME = re.compile(rf"({COLLECTED}|{STARTING})-(\d{{8}}-\d{{6}})[0-9a-f-]*\.(log|json|csv)")
_PLACES = Path(".relayed") / "places.json"
_FORMS: dict[str, Callable[[bytes], Record]] = {"json": from_json, "csv": from_csv, "log": from_text}


def start_file(directory: Path) -> Path:
    """A new one for what a server says before its collector runs."""
    return directory / f"{STARTING}-{now_utc():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}.log"


@dataclass(slots=True)
class LogFile:
    """One file, as it was at the last look."""

    path: Path
    kind: tuple[str, str]
    """Who writes it, and in which form: of each kind one file is being written."""
    order: tuple[str, str]
    place: int
    """Up to here it was told, in bytes."""
    seen_s: float
    changed_s: float
    size: int = 0
    is_last: bool = True
    """No later one of its kind is known."""
    skips_to_line_end: bool = False
    """Inside a record that is too long."""

    @property
    def waiting_bytes(self) -> int:
        return max(0, self.size - self.place)


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of one file, and where it goes on after them."""

    file: LogFile
    records: list[bytes]
    place: int
    dropped: int = 0
    """Records that were too long."""

    def parsed(self) -> list[tuple[Record, bytes]]:
        form = _FORMS[self.file.kind[1]]
        return [(form(raw), raw) for raw in self.records]


@dataclass(slots=True)
class LogFiles:
    """`data_directory` tells which files Postgres writes now; `now_s` is a clock that is never stepped."""

    directory: Path
    data_directory: Path
    now_s: Callable[[], float]
    _files: dict[str, LogFile] = field(default_factory=dict)
    _places: dict[str, int] | None = None

    @property
    def waiting_bytes(self) -> int:
        return sum(file.waiting_bytes for file in self._files.values())

    @property
    def needs_tidying(self) -> bool:
        """Something will be to delete or to finish, without another word of Postgres."""
        return any(not file.is_last for file in self._files.values())

    def look(self) -> None:
        """What files there are, and how large."""
        if self._places is None:
            self._places = self._read_places()
        now_s = self.now_s()
        found: dict[str, LogFile] = {}
        with os.scandir(self.directory) as entries:
            for entry in entries:
                name = _NAME.fullmatch(entry.name)
                if name is None:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    size = entry.stat(follow_symlinks=False).st_size
                    file = self._files.get(entry.name)
                    if file is None:
                        place = self._places.get(entry.name, 0)
                        order = (name[2], entry.name)
                        file = LogFile(Path(entry.path), (name[1], name[3]), order, place, now_s, now_s, size)
                    elif size != file.size:
                        file.size, file.changed_s = size, now_s
                    if size < file.place:
                        file.place = 0
                    found[entry.name] = file
        self._files = found
        last: dict[tuple[str, str], LogFile] = {}
        for file in self._in_order():
            if (before := last.get(file.kind)) is not None:
                before.is_last = False
            last[file.kind], file.is_last = file, True

    def next(self) -> Batch | None:
        """The oldest records that were not told; None: there are none that are whole."""
        for file in self._in_order():
            if file.waiting_bytes:
                batch = self._batch(file)
                if batch.records or batch.dropped or batch.place != file.place:
                    return batch
        return None

    def told(self, batch: Batch) -> None:
        """Its records are in somebody's hands; `save` keeps that."""
        batch.file.place = batch.place

    def save(self) -> None:
        """Against this process's death; a loss of power may have lines told twice."""
        path = self.directory / _PLACES
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode({name: file.place for name, file in self._files.items()}))
        fresh.replace(path)

    def give_up_oldest(self) -> int:
        """Keep the bound; how many lines it cost."""
        lost = 0
        for file in self._in_order():
            if self.waiting_bytes <= WAITING_MAX_BYTES:
                break
            lost += self._skip(file)
        return lost

    def tidy(self) -> None:
        """Delete what was told and is not written to any more."""
        current = self._being_written()
        now_s = self.now_s()
        for name, file in list(self._files.items()):
            if file.waiting_bytes or file.is_last or name in current.values() or now_s - file.seen_s < SEEN_FOR_S:
                continue
            newer_is_written = name < current.get(file.kind[1], "") and file.kind[0] == COLLECTED
            if newer_is_written or now_s - file.changed_s >= FINISHED_AFTER_S:
                file.path.unlink(missing_ok=True)
                del self._files[name]

    def _in_order(self) -> list[LogFile]:
        return sorted(self._files.values(), key=lambda file: file.order)

    def _batch(self, file: LogFile) -> Batch:
        with file.path.open("rb") as opened:
            opened.seek(file.place)
            content = opened.read(READ_BYTES)
            records, used = self._split(file, content)
            if not records and not used and len(content) == READ_BYTES:
                content += opened.read(RECORD_MAX_BYTES - READ_BYTES)
                records, used = self._split(file, content)
        if records or used:
            return Batch(file, records, file.place + used)
        if len(content) >= RECORD_MAX_BYTES:
            # What follows belongs to the same record, up to the end of its line.
            file.skips_to_line_end = True
            return Batch(file, [], file.place + len(content), dropped=1)
        finished = not file.is_last and self.now_s() - file.changed_s >= SEEN_FOR_S
        return Batch(file, [content] if finished else [], file.place + len(content) if finished else file.place)

    @staticmethod
    def _split(file: LogFile, content: bytes) -> tuple[list[bytes], int]:
        """Whole records, and how many bytes they are."""
        start = 0
        if file.skips_to_line_end:
            end = content.find(b"\n")
            if end < 0:
                return [], len(content)
            file.skips_to_line_end = False
            start = end + 1
        whole = content.rfind(b"\n") + 1
        if whole <= start:
            return [], start
        lines = content[start : whole - 1].split(b"\n")
        if file.kind[1] != "csv":
            return [line for line in lines if line], whole
        # A line feed within quotes does not end a record.
        records: list[bytes] = []
        open_from: int | None = None
        for index, line in enumerate(lines):
            if line.count(b'"') % 2:
                if open_from is None:
                    open_from = index
                    continue
                records.append(b"\n".join(lines[open_from : index + 1]))
                open_from = None
            elif open_from is None and line:
                records.append(line)
        left = 0 if open_from is None else sum(len(line) + 1 for line in lines[open_from:])
        return records, whole - left

    def _skip(self, file: LogFile) -> int:
        """Whole records, as many as needed and a few more, so that it is not every other line; their number."""
        lost = 0
        while self.waiting_bytes > WAITING_MAX_BYTES // 2:
            batch = self._batch(file)
            if batch.place == file.place:
                break
            file.place = batch.place
            lost += len(batch.records) + batch.dropped
        return lost

    def _being_written(self) -> dict[str, str]:
        """By form, from the file that Postgres keeps for this. Empty: it does not run, or has not told yet."""
        found = {}
        with contextlib.suppress(OSError):
            for line in (self.data_directory / "current_logfiles").read_text(encoding="utf-8").splitlines():
                name = Path(line.partition(" ")[2]).name
                found[name.rpartition(".")[2]] = name
        return found

    def _read_places(self) -> dict[str, int]:
        try:
            return msgspec.json.decode((self.directory / _PLACES).read_bytes(), type=dict[str, int])
        except (OSError, msgspec.DecodeError):
            return {}
