"""Children of our own: fork, exec, and the settings between. A child is known by its pidfd, taken before it can be reaped."""

import ctypes
import os
import pwd
import signal
from typing import NamedTuple, NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MCL_CURRENT_ONFAULT = 1 | 4  # without MCL_FUTURE, which would make allocations fail at RLIMIT_MEMLOCK
_EXEC_FAILED = 127

# Loaded before any fork: a child between fork and exec must find everything in place.
_libc = ctypes.CDLL(None, use_errno=True)


class Credentials(NamedTuple):
    """A user to become, looked up once: between fork and exec nobody asks a directory server."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def credentials_of(user: str) -> Credentials:
    """The ids of a user. Raises KeyError if there is none of that name, ValueError if it is root in disguise."""
    entry = pwd.getpwnam(user)
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise ValueError(f"{user} is root, as which Postgres never runs")
    return Credentials(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(user, entry.pw_gid)))


def become_subreaper() -> None:
    """Make orphans below this process its children, as PID 1's are. Raises OSError."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def lock_memory() -> bool:
    """Keep what is in memory there, so that a stalled disk cannot stop the fence in a page fault. Whether that was allowed."""
    return bool(_libc.mlockall(_MCL_CURRENT_ONFAULT) == 0)


class Child:
    """A process that we forked and have not reaped: until then its pid cannot mean another process."""

    def __init__(self, pid: int, pidfd: int, exec_error_fd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._exec_error_fd = exec_error_fd

    def send_signal(self, number: signal.Signals) -> bool:
        """Send a signal; False if the process is dead already."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def exec_error(self) -> str | None:
        """Why its program was never executed; None if it was, or is still about to be."""
        try:
            return os.read(self._exec_error_fd, 512).decode("utf-8", "replace") or None
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Forget the process, after it was reaped."""
        os.close(self._pidfd)
        os.close(self._exec_error_fd)


def spawn(
    argv: tuple[str, ...],
    env: dict[str, str],
    *,
    inherited_fds: tuple[int, ...],
    credentials: Credentials | None = None,
    stdin_is_null: bool = False,
) -> Child:
    """Fork and execute `argv` in a session of its own; it dies when the supervisor dies.

    It inherits stdin unless `stdin_is_null`, stdout, stderr, and `inherited_fds`. This never waits for the exec: a stalled
    disk may hold that up, and the permit must be enforced meanwhile. A failed one ends the child; see `Child.exec_error`.
    Raises OSError if there can be no further process.
    """
    exec_error_fd, exec_error_write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    supervisor_pid = os.getpid()
    # A signal for the child, before it has its own settings, would otherwise reach the supervisor's wake-up pipe.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            try:
                _execute(argv, env, inherited_fds, credentials, stdin_is_null, supervisor_pid)
            except BaseException as error:
                os.write(exec_error_write_fd, str(error)[:500].encode("utf-8", "replace"))
            finally:
                os._exit(_EXEC_FAILED)
    except OSError:
        os.close(exec_error_fd)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        os.close(exec_error_write_fd)
    try:
        return Child(pid, os.pidfd_open(pid), exec_error_fd)
    except OSError:
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own
        os.close(exec_error_fd)
        raise


def _execute(
    argv: tuple[str, ...],
    env: dict[str, str],
    inherited_fds: tuple[int, ...],
    credentials: Credentials | None,
    stdin_is_null: bool,
    supervisor_pid: int,
) -> NoReturn:
    """What the child does between fork and exec."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (None, signal.SIG_DFL):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    if stdin_is_null:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd in inherited_fds:
        os.set_inheritable(fd, True)
    if credentials is not None:
        os.chdir("/")  # the present directory may be closed to that user, which Postgres cannot bear
        os.setgroups(credentials.groups)
        os.setresgid(credentials.gid, credentials.gid, credentials.gid)
        os.setresuid(credentials.uid, credentials.uid, credentials.uid)
    # After the change of user, which would clear it.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor_pid:
        os._exit(_EXEC_FAILED)  # the supervisor died before the line above: no signal will come
    os.execvpe(argv[0], argv, env)  # noqa: S606


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")
