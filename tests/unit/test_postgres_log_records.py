"""From a record of Postgres's log to a line of the one schema."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from instance_manager.postgres_log.records import (
    LEVELS,
    LINE_MAX_BYTES,
    Schema,
    from_csv,
    from_json,
    from_text,
    human_line,
    told,
)

NOW = "2026-11-29T01:00:00.000Z"
SCHEMA = ["time", "level", "instance", "process", "message", "fields"]


def line_of(record: dict[str, Any]) -> dict[str, Any]:
    line = Schema("pg-1", lambda: NOW).line(told(record, b""))
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    found: dict[str, Any] = json.loads(line)
    assert list(found) == SCHEMA
    return found


@pytest.mark.parametrize(
    ("severity", "level"),
    [
        ("DEBUG5", "debug"),
        ("LOG", "info"),
        ("INFO", "info"),
        ("NOTICE", "info"),
        ("WARNING", "warning"),
        ("ERROR", "error"),
        ("FATAL", "error"),
        ("PANIC", "critical"),
    ],
)
def test_each_severity_has_its_level_and_stays_among_the_fields(severity: str, level: str) -> None:
    raw = {"timestamp": "2026-11-29 00:44:32.123 UTC", "pid": 7, "error_severity": severity, "message": "m", "txid": 0}
    found = line_of(from_json(json.dumps(raw).encode()))
    assert found == {
        "time": "2026-11-29T00:44:32.123Z",
        "level": level,
        "instance": "pg-1",
        "process": "postgres",
        "message": "m",
        "fields": {"pid": 7, "error_severity": severity},
    }


def test_csv_and_json_of_one_record_become_the_same_line() -> None:
    record: dict[str, Any] = {
        "timestamp": "2026-11-29 00:44:32.123 UTC",
        "user": "app",
        "dbname": "app",
        "pid": 77,
        "remote_host": "10.0.0.1",
        "remote_port": 5000,
        "session_id": "6b0b.4d",
        "ps": "SELECT",
        "vxid": "3/4",
        "txid": 5,
        "error_severity": "ERROR",
        "state_code": "22012",
        "message": 'quote " and\nline\r\nfeed, comma',
        "detail": "é",
        "statement": "SELECT '\"'\n, 1",
        "cursor_position": 8,
        "application_name": "psql",
        "backend_type": "client backend",
        "query_id": -9,
    }
    row = [
        record["timestamp"], "app", "app", "77", "10.0.0.1:5000", "6b0b.4d", "3", "SELECT", "2026-11-29 00:44:00 UTC", "3/4",
        "5", "ERROR", "22012", record["message"], "é", "", "", "", "", record["statement"], "8", "", "psql",
        "client backend", "", "-9",
    ]  # fmt: skip
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="").writerow(row)
    assert line_of(from_csv(text.getvalue().encode())) == line_of(from_json(json.dumps(record).encode()))


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"message": "cut o', b"[1]", b'{"a": "\xff\xfe', b"\x00\x01", b'"', b"\r"]
)
def test_whatever_is_no_record_is_told_as_a_text(raw: bytes) -> None:
    for form in (from_json, from_csv, from_text):
        found = line_of(form(raw))
        assert found["level"] == "info"
        assert found["time"] == NOW


def test_bytes_that_are_no_unicode_are_told_by_their_numbers() -> None:
    assert line_of(from_json(b'{"message": "caf\xe9", "error_severity": "LOG"}'))["message"] == "caf\\xe9"


@pytest.mark.parametrize(
    ("raw", "level", "message", "time"),
    [
        (
            b'2026-11-29 00:55:59.731 UTC [4081] @/ FATAL:  configuration file "x" contains errors',
            "error",
            'configuration file "x" contains errors',
            "2026-11-29T00:55:59.731Z",
        ),
        (b"LOG:  a:  b", "info", "a:  b", NOW),
        (b"postgres: could not access directory", "info", "postgres: could not access directory", NOW),
        (b"2026-11-29 00:55:59.731 GMT [1] HINT:  Do x.", "info", "HINT: Do x.", "2026-11-29T00:55:59.731Z"),
    ],
)
def test_a_line_of_standard_error_keeps_its_severity_and_time(raw: bytes, level: str, message: str, time: str) -> None:
    found = line_of(from_text(raw))
    assert (found["level"], found["message"], found["time"]) == (level, message, time)


@pytest.mark.parametrize("character", ["x", "\u0001", "é", '"'])
def test_a_long_record_is_shortened_and_says_so(character: str) -> None:
    texts = dict.fromkeys(("message", "detail", "statement", "context", "hint", "internal_query"), character * 100_000)
    line = Schema("pg-1", lambda: NOW).line({"error_severity": "ERROR", **texts})
    assert len(line) <= LINE_MAX_BYTES
    found = json.loads(line)
    assert list(found) == SCHEMA
    assert found["level"] == "error"
    assert found["fields"]["shortened"] is True
    assert found["message"].startswith(character * 100)


def test_on_a_terminal_a_record_reads_as_the_agents_lines_and_steers_nothing() -> None:
    record = {"error_severity": "ERROR", "message": "bad \x1b[2J", "pid": 7, "user": "app", "statement": "SELECT\n1"}
    line = json.loads(Schema("pg-1", lambda: NOW).line(record))
    assert human_line(line, "01:02:03").decode() == (
        "01:02:03 error   pg-1 postgres: bad \\x1b[2J  pid=7 user=app\n    statement: SELECT\n1\n"
    )


def test_every_severity_of_postgres_is_known() -> None:
    assert set(LEVELS.values()) <= {"debug", "info", "warning", "error", "critical"}
    assert {"DEBUG1", "DEBUG5", "LOG", "INFO", "NOTICE", "WARNING", "ERROR", "FATAL", "PANIC"} <= set(LEVELS)
