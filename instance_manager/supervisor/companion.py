"""A third child beside the agent and Postgres: it is kept running, and nothing else here depends on it.

No deadline waits for it, no permit counts it, no failure of it ends anything. It gets no socket of the supervisor's.
"""

import os
import signal

from instance_manager.supervisor.backoff import Backoff
from instance_manager.supervisor.log import Log
from instance_manager.supervisor.processes import Child, spawn

COMPANION_SEPARATOR = "---"
"""Stands between the agent's command line and the companion's."""


class Companion:
    """The command that is to run, and its process while there is one. An empty command: there is none, ever."""

    def __init__(self, argv: tuple[str, ...], log: Log, now_s: float) -> None:
        self._argv = argv
        self._log = log
        self._backoff = Backoff()
        self._child: Child | None = None
        self._started_s = now_s
        self._start_s: float | None = now_s if argv else None
        """When it is to be started; None: it runs, or never again."""

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    @property
    def start_s(self) -> float | None:
        """When `look_after` has something to do."""
        return self._start_s

    def look_after(self, now_s: float) -> None:
        """Start it if it is time to."""
        if self._start_s is None or now_s < self._start_s:
            return
        try:
            self._child = spawn(self._argv, dict(os.environ), inherited_fds=(), stdin_is_null=True)
        except OSError as error:
            self._start_s = now_s + self._backoff.after_run_of(0.0)
            self._log.failure("companion_not_started", error=str(error))
            return
        self._start_s, self._started_s = None, now_s
        self._log.info("companion_started", pid=self._child.pid)

    def kill(self) -> None:
        """SIGKILL; it is started again when it was reaped."""
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Ask it to end, and start it no more."""
        self._start_s, self._argv = None, ()
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def reap(self, now_s: float) -> None:
        """It is dead: reap it, and say when it is started again."""
        child = self._child
        if child is None:
            return
        _, status = os.waitpid(child.pid, 0)
        exec_error = child.exec_error()
        child.close()
        self._child = None
        wait_s = self._backoff.after_run_of(now_s - self._started_s) if self._argv else None
        self._start_s = None if wait_s is None else now_s + wait_s
        self._log.warning(
            "companion_died",
            pid=child.pid,
            status=os.waitstatus_to_exitcode(status),
            exec_error=exec_error,
            restart_in_s=wait_s,
        )
