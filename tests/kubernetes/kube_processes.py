"""Programs that a test starts: ended by their own pid when their block ends, and by the kernel should the tests die."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from instance_manager.demo.processes import end_with_parent, now_s

T = TypeVar("T")

_KILL_WAIT_S = 10.0
_PAUSE_S = 0.05


class NotInTime(Exception):
    """Something did not come about before its deadline; the text says what."""


class Program:
    """One program with its log; it can be stopped and started again with the same command."""

    def __init__(self, argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._argv = [*argv]
        self._environment = environment
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs or when it was never started."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        with self.log.open("ab") as log:
            # The signal comes with the end of the thread that forks: start programs from the main thread.
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=None if self._environment is None else {**self._environment},
                preexec_fn=end_with_parent(signal.SIGKILL),
            )

    def send(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def stop(self, *, grace_s: float = 0.0) -> None:
        """End it: by SIGTERM if it is given time, else by SIGKILL."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        if grace_s > 0:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        if process.poll() is None:
            process.kill()
            process.wait(_KILL_WAIT_S)

    def tail(self, lines: int = 30) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


def wait_for(condition: Callable[[], T | None], within_s: float, what: str) -> T:
    """The first true answer. NotInTime at the deadline."""
    ends_s = now_s() + within_s
    while True:
        found = condition()
        if found:
            return found
        if now_s() >= ends_s:
            raise NotInTime(f"not within {within_s:g} s: {what}")
        time.sleep(_PAUSE_S)
