"""One record of Postgres's log in each of its forms, and the one schema that it becomes. Pure: no clock, no file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from instance_manager.postgres_log.secrets import TEXTS, hide_secrets, may_hold_secret

Record = dict[str, Any]
"""By the names that jsonlog has for its keys."""

RECORD_MAX_BYTES = 1024 * 1024
"""Of one record in a file; a longer one is left out and counted."""
LINE_MAX_BYTES = 32 * 1024
"""Of one line on standard output; a longer one is shortened."""
SHORTENED_CHARACTERS = 1000

LEVELS: Mapping[str, str] = {
    **{f"DEBUG{depth}": "debug" for depth in range(1, 6)},
    "DEBUG": "debug",
    "LOG": "info",
    "INFO": "info",
    "NOTICE": "info",
    "WARNING": "warning",
    # FATAL ends a session, as a wrong password does; PANIC ends the server.
    "ERROR": "error",
    "FATAL": "error",
    "PANIC": "critical",
}
_CSV_KEYS = (
    "timestamp",
    "user",
    "dbname",
    "pid",
    "remote_host",
    "session_id",
    "line_num",
    "ps",
    "session_start",
    "vxid",
    "txid",
    "error_severity",
    "state_code",
    "message",
    "detail",
    "hint",
    "internal_query",
    "internal_position",
    "context",
    "statement",
    "cursor_position",
    "location",
    "application_name",
    "backend_type",
    "leader_pid",
    "query_id",
)
_CSV_NUMBERS = frozenset(
    {"pid", "line_num", "txid", "internal_position", "cursor_position", "leader_pid", "query_id", "remote_port"}
)
_ESCAPED = re.compile("[\udc80-\udcff]")
_LEFT_OUT = ("line_num", "session_start")
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (?:UTC|GMT)")
# `log_line_prefix` is the user's; the severity is two spaces before the text, whatever stands before it.
_TEXT = re.compile(
    r"(?:.{0,500}?(?:^|\s))?(DEBUG[1-5]?|LOG|INFO|NOTICE|WARNING|ERROR|FATAL|PANIC"
    r"|DETAIL|HINT|CONTEXT|STATEMENT|QUERY):  (.*)",
    re.DOTALL,
)


def from_json(raw: bytes) -> Record:
    """One line of jsonlog. What is none is told as a text."""
    found = _object(raw)
    if found is None and not raw.isascii():
        found = _object(_as_unicode(raw))
    return from_text(raw) if found is None else found


def _object(raw: bytes) -> Record | None:
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _as_unicode(raw: bytes) -> bytes:
    """Postgres writes what its databases hold, in whatever encoding that is: such bytes become `\\xe9`."""
    text = raw.decode("utf-8", "surrogateescape")
    return _ESCAPED.sub(lambda found: f"\\\\x{ord(found[0]) - 0xDC00:02x}", text).encode()


def from_csv(raw: bytes) -> Record:
    """One record of csvlog as 14 writes it (and 15 to 18), which may be of several lines."""
    text = raw.decode("utf-8", "backslashreplace")
    csv.field_size_limit(2 * RECORD_MAX_BYTES)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error:
        return from_text(raw)
    if len(rows) != 1 or len(rows[0]) != len(_CSV_KEYS) or rows[0][11] not in LEVELS:
        return from_text(raw)
    record: Record = {key: value for key, value in zip(_CSV_KEYS, rows[0], strict=True) if value}
    if ":" in record.get("remote_host", "") and (found := re.fullmatch(r"(.*):(\d+)", record["remote_host"])):
        record["remote_host"], record["remote_port"] = found[1], found[2]
    for key in _CSV_NUMBERS & record.keys():
        if re.fullmatch(r"-?\d{1,20}", record[key]):
            record[key] = int(record[key])
    return record


def from_text(raw: bytes) -> Record:
    """A line that went to standard error: before the collector ran, or of a program that Postgres ran."""
    text = raw.decode("utf-8", "backslashreplace").strip("\r\n")
    record: Record = {"message": text}
    if time := _TIME.match(text):
        record["timestamp"] = time[0]
    if found := _TEXT.fullmatch(text):
        if found[1] in LEVELS:
            record["error_severity"], record["message"] = found[1], found[2]
        else:
            record["message"] = f"{found[1]}: {found[2]}"
    return record


def told(record: Record, raw: bytes) -> Record:
    """Without what is a secret, and without what says nothing. `raw`: the record as it was written."""
    if may_hold_secret(raw):
        hide_secrets(record)
    for key in _LEFT_OUT:
        record.pop(key, None)
    for key in ("txid", "query_id"):
        if not record.get(key):
            record.pop(key, None)
    return record


class Schema:
    """Turns records into lines for one instance. `now` is the time of a record that has none, in the form of the schema."""

    def __init__(self, instance: str, now: Callable[[], str]) -> None:
        self._instance = instance
        self._now = now
        self._encode = msgspec.json.Encoder().encode

    def line(self, record: Record) -> bytes:
        """One line of JSON with its end."""
        return self._shortened(self._encode(self._whole(record)), record) + b"\n"

    def _whole(self, record: Record) -> dict[str, object]:
        time, message = record.pop("timestamp", ""), record.pop("message", "")
        is_time = isinstance(time, str) and _TIME.fullmatch(time) is not None
        return {
            "time": f"{time[:10]}T{time[11:23]}Z" if is_time else self._now(),
            "level": LEVELS.get(record.get("error_severity", "LOG"), "info"),
            "instance": self._instance,
            "process": "postgres",
            "message": message,
            "fields": record,
        }

    def _shortened(self, line: bytes, record: Record) -> bytes:
        if len(line) < LINE_MAX_BYTES:
            return line
        whole = msgspec.json.decode(line)
        for characters in (SHORTENED_CHARACTERS, SHORTENED_CHARACTERS // 10):
            fields = {key: _cut(value, characters) for key, value in record.items()}
            whole |= {"message": _cut(whole["message"], characters), "fields": {**fields, "shortened": True}}
            line = self._encode(whole)
            if len(line) < LINE_MAX_BYTES:
                return line
        return self._encode({**whole, "fields": {"shortened": True}})


def _cut(value: object, characters: int) -> object:
    return value[:characters] + "..." if isinstance(value, str) and len(value) > characters else value


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HUMAN_FIELDS = ("pid", "user", "dbname", "state_code")


def human_line(line: Mapping[str, Any], time_of_day: str) -> bytes:
    """The line for a terminal: the message with a few fields, and the other texts below it. `time_of_day` in local time."""
    fields = line["fields"]
    pairs = "".join(f" {key}={fields[key]}" for key in _HUMAN_FIELDS if fields.get(key) not in (None, "", "00000"))
    head = (
        f"{time_of_day} {line['level']:7} {line['instance']} postgres: {line['message']}{' ' if pairs else ''}{pairs}"
    )
    below = "".join(f"\n    {key}: {fields[key]}" for key in TEXTS if key in fields)
    # What a client sent must not steer the terminal.
    return (_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", head + below) + "\n").encode("utf-8", "replace")
