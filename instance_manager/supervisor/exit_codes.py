"""Why a supervisor ended, as its exit code."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the supervisor. All but ORDERLY leave a log line that says more."""

    ORDERLY = 0
    """The agent said goodbye, or a signal to end came before anything was started. Nothing is left."""

    BAD_USAGE = 2
    """The command line or the machine does not fit: unknown option, no such user, Postgres would run as root."""

    LOCK_BUSY = 3
    """Another supervisor, or a Postgres that outlived one, still holds the lock file."""

    FENCE_INCOMPLETE = 4
    """A Postgres process could still run when the kill budget was spent. In a container this exit makes the kernel kill it."""

    SHUTDOWN_DEADLINE = 5
    """The agent did not finish its shutdown in time after SIGTERM; Postgres was killed."""

    SHARED_PID_NAMESPACE = 6
    """Processes of others can be seen, or /proc is another namespace's: its death would prove nothing, nor could it fence."""

    AGENT_CANNOT_START = 7
    """The agent's program could not be executed ten times in a row."""

    QUIT = 8
    """SIGQUIT: Postgres was killed at once, and nothing was handed over."""

    INTERNAL_ERROR = 70
    """An error of the supervisor's own; Postgres was killed before it ended."""


class EndError(Exception):
    """The supervisor has to end, with this code, after killing what is left."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code.name)
        self.code = code
