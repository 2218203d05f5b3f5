"""What the clients saw, operation by operation, in a form that can be judged later and elsewhere.

All times are CLOCK_BOOTTIME seconds of the one machine, which no clock step reaches. One JSON array per line.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import IO

import msgspec


class Outcome(StrEnum):
    ACKNOWLEDGED = "acknowledged"
    """The commit was reported as done, without a warning: it must never be lost."""
    FAILED = "failed"
    """Certainly not committed: the server said so, or the command was never sent."""
    UNKNOWN = "unknown"
    """Sent, and no answer: the row may or may not be there."""
    CANCELLED_WAIT = "cancelled_wait"
    """Success with the warning of a cancelled wait for the standbys (P13): no acknowledgement."""


class Seen(StrEnum):
    """What a member was when it answered a read."""

    PRIMARY = "primary"
    STANDBY = "standby"
    NONE = "none"
    """No answer in time."""


class Write(msgspec.Struct, frozen=True, array_like=True, tag="write"):
    """One attempt to insert the row (client, number); a number is never used twice."""

    client: int
    number: int
    member: str
    begin_s: float
    end_s: float
    outcome: Outcome
    timeline: int | None = None
    """On which the server wrote it, by its own word."""
    error: str = ""


class Sample(msgspec.Struct, frozen=True, array_like=True, tag="sample"):
    """One read of one member."""

    member: str
    begin_s: float
    end_s: float
    seen: Seen
    timeline: int | None = None
    """Of a primary."""
    newest_s: float | None = None
    """When the newest row that it shows was begun."""


Event = Write | Sample
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


class HistoryWriter:
    """Appends events to a file; the reader may follow it while it grows."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._pending = bytearray()

    def add(self, event: Event) -> None:
        self._pending += _encoder.encode(event)
        self._pending += b"\n"

    def flush(self) -> None:
        if self._pending:
            self._file.write(self._pending)
            self._file.flush()
            self._pending.clear()


class HistoryReader:
    """Follows a growing history; whole lines only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.writes: list[Write] = []
        self.samples: list[Sample] = []

    def read_on(self) -> None:
        """Take in what was added since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for event in read_events(data[:whole].splitlines()):
            if isinstance(event, Write):
                self.writes.append(event)
            else:
                self.samples.append(event)


def read_events(lines: Iterable[bytes]) -> Iterable[Event]:
    """Decode; msgspec.ValidationError or DecodeError for a line that is no event."""
    return (_decoder.decode(line) for line in lines if line.strip())
