"""What the supervisor is told once, at its start."""

from typing import NamedTuple

from instance_manager.supervisor.processes import Credentials


class Options(NamedTuple):
    """What the command line says. All times in seconds."""

    name: str
    lock_file: str
    hard_s: float
    heartbeat_timeout_s: float
    kill_budget_s: float
    shutdown_timeout_s: float
    agent_argv: tuple[str, ...]
    postgres_credentials: Credentials | None
    """The user to run Postgres as; None: the supervisor's own, which is not root."""
    companion_argv: tuple[str, ...] = ()
    """A third child, on which nothing depends; empty: there is none."""
