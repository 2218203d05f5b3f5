"""The two children on which everything depends, while they live."""

import os

from instance_manager.supervisor.link import Link
from instance_manager.supervisor.messages import Mode, Start
from instance_manager.supervisor.processes import Child, Credentials, spawn

SOCKET_VARIABLE = "INSTANCE_MANAGER_SUPERVISOR_FD"
"""The agent's environment variable with the number of its end of the socket pair."""

START_GRACE_S = 10.0
"""An agent may be silent for so long after its start."""


class Agent:
    """The running agent."""

    def __init__(self, child: Child, link: Link, started_s: float) -> None:
        self.child = child
        self.link = link
        self.started_s = started_s
        self.silent_after_s = started_s + START_GRACE_S
        self.linked = True
        self.condemned: str | None = None
        """Why it is being killed."""

    @classmethod
    def start(cls, argv: tuple[str, ...], greeting: dict[str, object], now_s: float) -> "Agent":
        """OSError: there can be no further process."""
        link = Link()
        # Queued before it exists, so that nothing can come before it.
        link.send(greeting)
        environment = {**os.environ, SOCKET_VARIABLE: str(link.agents.fileno())}
        try:
            child = spawn(argv, environment, inherited_fds=(link.agents.fileno(),))
        except OSError:
            link.close()
            raise
        link.close_agents_end()
        return cls(child, link, now_s)


class Postgres:
    """The postmaster that we started, until it is reaped."""

    def __init__(self, child: Child, mode: Mode, started_s: float) -> None:
        self.child = child
        self.mode: Mode = mode
        self.started_s = started_s
        self.reason = "exit"
        self.killed: frozenset[tuple[int, int]] = frozenset()
        self.fenced = False
        self.log_until_s: float | None = None
        """It ended, and what it left may write its log until then."""

    @classmethod
    def start(cls, message: Start, lock_fd: int, credentials: Credentials | None, now_s: float) -> "Postgres":
        """It holds the lock as long as one of its processes lives. OSError: there can be no further process."""
        child = spawn(message.argv, message.env, inherited_fds=(lock_fd,), credentials=credentials, stdin_is_null=True)
        return cls(child, message.mode, now_s)

    def exited(self, code: int) -> dict[str, object]:
        """What is told of its end; `code` is negative for a signal."""
        return {
            "pid": self.child.pid,
            "mode": self.mode,
            "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "reason": self.reason,
            "remaining_killed": len(self.killed),
        }
