"""One JSON object per line on stdout, in the schema of the agent's log (docs/logs.md), which never makes the supervisor wait."""

import json
import os
import select
import time

# What a pipe takes in one piece or not at all (PIPE_BUF): no line is ever torn.
_LINE_MAX_BYTES = 4096


def _wall_clock() -> str:
    """The time of day for human readers; nothing is ever decided by it."""
    now_s = time.time()  # noqa: TID251
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_s)) + f".{int(now_s * 1000) % 1000:03d}Z"


class Log:
    """Writes log lines; one that cannot be written at once is dropped and counted.

    The count is in the next line that gets through, as `dropped_lines`.
    """

    def __init__(self, name: str, incarnation: str, fd: int = 1) -> None:
        self._name = name
        self._incarnation = incarnation
        self._dropped = 0
        try:
            # O_NONBLOCK belongs to the open file, which Postgres and the agent share: theirs must stay as it is.
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._fd = fd  # a socket, or not ours to reopen: poll() below is then the only guard

    def info(self, event: str, **fields: object) -> None:
        """Something happened as it should."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Something was refused or repaired."""
        self._write("warning", event, fields)

    def failure(self, event: str, **fields: object) -> None:
        """Something failed; a process or the supervisor itself ends for it."""
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, object]) -> None:
        record: dict[str, object] = {
            "time": _wall_clock(),
            "level": level,
            "instance": self._name,
            "process": "supervisor",
            "message": event,
        }
        told: dict[str, object] = {"incarnation": self._incarnation, **fields}
        if self._dropped:
            told["dropped_lines"] = self._dropped
        record["fields"] = told
        line = json.dumps(record, default=repr).encode() + b"\n"
        if len(line) > _LINE_MAX_BYTES:
            record["fields"] = {"incarnation": self._incarnation, "shortened": True}
            line = json.dumps(record).encode() + b"\n"
        poll = select.poll()
        try:
            poll.register(self._fd, select.POLLOUT)
            ready = poll.poll(0)
            if not ready or not ready[0][1] & select.POLLOUT or os.write(self._fd, line) != len(line):
                self._dropped += 1
            else:
                self._dropped = 0
        except OSError:
            self._dropped += 1
