"""What the clients saw, operation by operation, in a form that can be judged later and elsewhere.

One form for real runs and for simulated ones. All times are seconds of one clock that is never stepped: CLOCK_BOOTTIME
of the one machine, or the simulation's own. In a file: one JSON array per line (docs/histories.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import IO

import msgspec

from instance_manager.drill.runs import Run, as_runs

Row = tuple[int, int]
"""(client, number)."""


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
    """One attempt to insert the row (client, number).

    A client does one thing at a time and numbers its attempts upwards; a number is never used twice.
    """

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
    """One look at a member: what it is, and how new what it shows is."""

    member: str
    begin_s: float
    end_s: float
    seen: Seen
    timeline: int | None = None
    """Of a primary."""
    newest_s: float | None = None
    """When the newest row that it shows was begun."""


class Span(msgspec.Struct, frozen=True, array_like=True):
    """What a read showed of one client's rows from number `first` to `last`, both included; exact, in few words."""

    client: int
    first: int
    last: int | None
    """None: up to the newest."""
    runs: tuple[Run, ...]
    """The numbers shown, ascending."""
    twice: tuple[int, ...] = ()
    """Of those, the ones that were there more than once."""


class Read(msgspec.Struct, frozen=True, array_like=True, tag="read"):
    """One read of contents, in one snapshot. What no span covers was not asked for, unless the read is a whole one."""

    member: str
    begin_s: float
    end_s: float
    seen: Seen
    """What the member was before the snapshot was taken: one that is promoted meanwhile counts as a standby."""
    timeline: int | None = None
    """Of a primary. None: known to be the present one."""
    spans: tuple[Span, ...] = ()
    whole: bool = False
    """All rows of all clients: a client without a span has none."""


def whole_read(
    member: str, begin_s: float, end_s: float, seen: Seen, timeline: int | None, rows: Iterable[Row]
) -> Read:
    """A read that showed exactly these rows of the whole table, each as often as it comes."""
    copies: dict[int, Counter[int]] = {}
    for client, number in rows:
        copies.setdefault(client, Counter())[number] += 1
    spans = tuple(
        Span(client, 0, None, as_runs(found), tuple(sorted(number for number, count in found.items() if count > 1)))
        for client, found in sorted(copies.items())
    )
    return Read(member, begin_s, end_s, seen, timeline, spans, whole=True)


Event = Write | Sample | Read
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
        self.reads: list[Read] = []

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
            match event:
                case Write():
                    self.writes.append(event)
                case Sample():
                    self.samples.append(event)
                case Read():
                    self.reads.append(event)


def read_events(lines: Iterable[bytes]) -> Iterable[Event]:
    """Decode; msgspec.ValidationError or DecodeError for a line that is no event."""
    return (_decoder.decode(line) for line in lines if line.strip())
