"""The thread that turns Postgres's log into lines of the one schema on standard output.

A thread of the agent, not a process (20 MiB) and not a task (files and a slow reader may hold it up). Nothing waits for it:
Postgres writes to files, whatever becomes of them. It takes turns with the agent's loop, and pauses as long as it worked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from instance_manager.postgres_log.files import READ_BYTES, LogFiles
from instance_manager.postgres_log.notify import Changes
from instance_manager.postgres_log.output import Output
from instance_manager.postgres_log.records import Record, Schema, human_line, told
from instance_manager.wall_clock import local_time, timestamp

log = logging.getLogger("instance_manager.postgres_log")

READER_WAIT_S = 1.0
"""How long a reader may take before the bound on what waits is looked at again."""
PAUSE_S = 0.05
"""Before the next look after one that found lines: those that come one by one are told together."""
FLOOD_PAUSE_MAX_S = 0.2
"""Where more waits than one look reads, the pause is as long as the work was: a flood costs half a core at most."""
TIDY_S = 2.0
AFTER_FAILURE_S = 1.0
CLOSE_S = 0.5
"""What the end of the agent waits for the last lines; what is left then is told by the next one."""


@dataclass(slots=True)
class RelayCounts:
    """For /metrics; since this agent started."""

    lines: int = 0
    dropped: int = 0
    """Records that nobody will see: given up for the bound, or too long."""
    waiting_bytes: int = 0
    failures: int = 0
    """Times that the relay itself failed, and began again."""


class Relay:
    """One instance's. `run` returns when `close` was called; `human`: for a terminal instead of JSON."""

    def __init__(self, instance: str, files: LogFiles, *, human: bool, descriptor: int = 1) -> None:
        self.counts = RelayCounts()
        self._files = files
        self._schema = Schema(instance, _now)
        self._human = human
        self._descriptor = descriptor
        self._changes: Changes | None = None
        self._closing_s: float | None = None
        self._untold = 0
        """Dropped, and not yet said."""
        self._in_hand = 0
        """Records that were read and are not written yet."""

    def run(self) -> None:
        """Until `close`. A failure costs a second and a line in the agent's log, and no record."""
        said = ""
        while self._closing_s is None:
            try:
                with (
                    contextlib.closing(Output(self._descriptor)) as output,
                    contextlib.closing(Changes(self._files.directory)) as changes,
                ):
                    self._changes = changes
                    try:
                        self._follow(output, changes)
                    finally:
                        self._changes = None
            except Exception as error:
                self.counts.failures += 1
                # What could not even be turned into lines is not tried for ever.
                self.counts.dropped += self._in_hand
                self._untold += self._in_hand
                self._in_hand = 0
                if (what := f"{type(error).__name__}: {error}") != said:
                    said = what
                    log.exception("Postgres's log is not relayed, and tried again every second")
                time.sleep(AFTER_FAILURE_S)

    def close(self) -> None:
        """Tell what is left within half a second, and end. From another thread."""
        self._closing_s = _now_s() + CLOSE_S
        changes = self._changes
        if changes is not None:
            with contextlib.suppress(OSError):
                changes.wake()

    @property
    def _is_over(self) -> bool:
        return self._closing_s is not None and _now_s() >= self._closing_s

    def _follow(self, output: Output, changes: Changes) -> None:
        while not self._is_over:
            begun_s = _now_s()
            self._files.look()
            worked = self._tell_batch(output)
            self._keep_bound()
            if worked:
                if self._closing_s is None:
                    flood = self._files.waiting_bytes > READ_BYTES
                    time.sleep(min(FLOOD_PAUSE_MAX_S, _now_s() - begun_s) if flood else PAUSE_S)
                continue
            if self._closing_s is not None:
                return
            self._files.tidy()
            changes.wait(TIDY_S if self._files.needs_tidying else None)

    def _tell_batch(self, output: Output) -> bool:
        """False: there was nothing to tell."""
        batch = self._files.next()
        if batch is None:
            return False
        # Not said to be kept before they are: whoever comes after a kill tells them again.
        self._files.told(batch)
        self._in_hand = len(batch.records)
        self.counts.dropped += batch.dropped
        self._untold += batch.dropped
        lines = [self._line(told(record, raw)) for record, raw in batch.parsed()]
        if self._untold:
            lines.insert(0, self._dropped_line(self._untold))
            self._untold = 0
        while lines:
            taken = output.write(lines, READER_WAIT_S)
            del lines[:taken]
            if lines:
                # Nobody reads. What waits here is one batch; what waits in the files has its bound.
                if self._is_over:
                    return True
                self._files.look()
                self._keep_bound()
        self.counts.lines += self._in_hand
        self._in_hand = 0
        self._files.save()
        return True

    def _keep_bound(self) -> None:
        lost = self._files.give_up_oldest()
        self.counts.dropped += lost
        self._untold += lost
        self.counts.waiting_bytes = self._files.waiting_bytes
        if lost:
            self._files.tidy()

    def _dropped_line(self, number: int) -> bytes:
        text = f"{number} records of Postgres's log were left out: nobody read them in time, or they were too long"
        return self._line({"error_severity": "WARNING", "message": text, "dropped_lines": number})

    def _line(self, record: Record) -> bytes:
        line = self._schema.line(record)
        return human_line(msgspec.json.decode(line), local_time()) if self._human else line


@contextlib.contextmanager
def relaying(instance: str, directory: Path, data_directory: Path) -> Iterator[RelayCounts]:
    """In a thread of its own, until the block is left."""
    files = LogFiles(directory, data_directory, _now_s)
    relay = Relay(instance, files, human=os.isatty(1))
    thread = threading.Thread(target=relay.run, name="postgres-log", daemon=True)
    thread.start()
    try:
        yield relay.counts
    finally:
        relay.close()
        # A stalled disk or reader must not hold up the end; the thread is a daemon.
        thread.join(2 * CLOSE_S)


def _now() -> str:
    return timestamp()[:23] + "Z"


def _now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
