"""The log of the agent and of the archiver: one JSON object per line on standard output, or plain lines on a terminal.

Schema, the supervisor's too (docs/logs.md): `time`, `level`, `instance`, `process`, `message`, and `fields` with the logger and whatever
the call gave as `extra`; `fields.exception` where there is one.
Writing is done by a thread: a reader that stalls costs lines, which are counted, and never the loop's time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TextIO

LINES_WAITING_MAX = 4096
LEVELS = ("debug", "info", "warning", "error")
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def extras(record: logging.LogRecord) -> dict[str, object]:
    """What the caller gave as `extra`; a dict under `fields` is laid flat, for names that logging keeps for itself."""
    given = {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
    fields = given.pop("fields", None)
    return {**given, **fields} if isinstance(fields, dict) else given


class JsonFormatter(logging.Formatter):
    """One line of JSON; a value that JSON does not know is told by its repr."""

    def __init__(self, instance: str, process: str) -> None:
        super().__init__()
        self._instance = instance
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        written_at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": written_at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{written_at.microsecond // 1000:03d}Z",
            "level": record.levelname.lower(),
            "instance": self._instance,
            "process": self._process,
            "message": record.getMessage(),
        }
        fields = {"logger": record.name, **extras(record)}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            fields["exception"] = record.exc_text
        line["fields"] = fields
        return json.dumps(line, default=repr, ensure_ascii=False)


class HumanFormatter(logging.Formatter):
    """`09:08:07.123 warning demo-1 agent: message  key=value`, in local time."""

    def __init__(self, instance: str) -> None:
        super().__init__()
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        """The line, and an exception's own lines below it."""
        written_at = datetime.fromtimestamp(record.created, UTC).astimezone()
        time_of_day = f"{written_at:%H:%M:%S}.{written_at.microsecond // 1000:03d}"
        name = record.name.removeprefix("instance_manager.")
        pairs = "".join(f" {key}={value}" for key, value in extras(record).items())
        line = f"{time_of_day} {record.levelname.lower():7} {self._instance} {name}: {record.getMessage()}{' ' if pairs else ''}{pairs}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        elif record.exc_text:
            line += "\n" + record.exc_text
        return line


class _NeverWaiting(logging.handlers.QueueHandler):
    """Counts what did not fit; the next line that does tells the number as `dropped_lines`."""

    def __init__(self, waiting: queue.Queue[logging.LogRecord], formatter: logging.Formatter) -> None:
        super().__init__(waiting)
        self._lines = formatter
        self._dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Formatted here: what the arguments point to may have changed by the time it is written."""
        if self._dropped:
            record.dropped_lines = self._dropped
        return logging.makeLogRecord({"msg": self._lines.format(record), "levelno": record.levelno})

    def enqueue(self, record: logging.LogRecord) -> None:
        """Without waiting."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1
        else:
            self._dropped = 0


def set_level(level: str) -> str:
    """From now on; returns the level before. ValueError: there is no such level."""
    if level not in LEVELS:
        raise ValueError(f"no level {level!r}; there are {', '.join(LEVELS)}")
    root = logging.getLogger()
    before = logging.getLevelName(root.level).lower()
    root.setLevel(level.upper())
    return before


@contextlib.contextmanager
def logging_to(instance: str, level: str, stream: TextIO | None = None, *, process: str = "agent") -> Iterator[None]:
    """Log everything of this process at `level` or above until the block is left. `set_level` changes the level meanwhile."""
    target = stream if stream is not None else sys.stdout
    formatter = HumanFormatter(instance) if target.isatty() else JsonFormatter(instance, process)
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(LINES_WAITING_MAX)
    writer = logging.StreamHandler(target)
    listener = logging.handlers.QueueListener(waiting, writer)
    handler = _NeverWaiting(waiting, formatter)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        logging.captureWarnings(False)
        # A stalled reader must not hold up the end; the listener's thread is a daemon.
        with contextlib.suppress(queue.Full):
            waiting.put_nowait(listener._sentinel)  # type: ignore[attr-defined]
        thread = listener._thread
        if thread is not None:
            thread.join(1.0)
