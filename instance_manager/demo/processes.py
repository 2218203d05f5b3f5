"""The processes of one instance as an outsider sees them: found by the process tree, never by a name alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from instance_manager.supervisor import fence
from instance_manager.supervisor.fence import Process

_PR_SET_PDEATHSIG = 1
_SCAN_PAUSE_S = 0.005
# Loaded before any fork, as the child between fork and exec must find it in place.
_libc = ctypes.CDLL(None, use_errno=True)


def now_s() -> float:
    """CLOCK_BOOTTIME: one reading for all processes and namespaces of this machine, never stepped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceProcesses:
    """One look at an instance. What is dead or was never there is None."""

    supervisor: Process | None
    agent: Process | None
    postmaster: Process | None
    archiver: Process | None = None
    everything: tuple[Process, ...]
    """All of the above, their descendants, and orphans of its Postgres."""

    def children_of_postmaster(self, title: str = "") -> tuple[Process, ...]:
        """Postgres's own children whose title is `postgres: <title>...`, after the cluster's name if it has one."""
        if self.postmaster is None:
            return ()
        parent = self.postmaster.pid
        return tuple(
            process
            for process in self.everything
            if process.ppid == parent and _has_title(title_of(process.pid), title)
        )


def look(supervisor_pid: int | None, data_directory: Path) -> InstanceProcesses:
    """The instance's living processes: the supervisor's tree, and every process that works in its data directory."""
    table = fence.read_processes()
    orphans = [pid for pid in table if pid != os.getpid() and _works_in(pid, data_directory)]
    roots = [*orphans] if supervisor_pid is None else [supervisor_pid, *orphans]
    everything = [process for process in fence.descendants(table, roots) if not process.is_dead]
    supervisor = next((process for process in everything if process.pid == supervisor_pid), None)
    children = [process for process in everything if process.ppid == supervisor_pid]
    agent = next((child for child in children if "instance_manager.agent" in title_of(child.pid)), None)
    archiver = next((child for child in children if "instance_manager.archive" in title_of(child.pid)), None)
    postmaster = next((child for child in children if program_of(child.pid) == "postgres"), None)
    return InstanceProcesses(
        supervisor=supervisor, agent=agent, postmaster=postmaster, archiver=archiver, everything=tuple(everything)
    )


def _has_title(whole: str, title: str) -> bool:
    # `cluster_name` comes before a child's own words: `postgres: demo-1: walsender ...`.
    return re.match(rf"postgres: (\S+: )?{re.escape(title)}", whole) is not None


def title_of(pid: int) -> str:
    """The command line, or the title that Postgres wrote over it; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def program_of(pid: int) -> str:
    """The executable's file name; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


def resident_bytes(pid: int) -> int:
    """Resident memory; 0 when the process is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def send(processes: Iterable[Process], number: signal.Signals) -> None:
    """The signal to those very processes, never to a later one with the same pid."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(process.pid)
            try:
                now = fence.read_process(process.pid)
                if now is not None and now.start_ticks == process.start_ticks:
                    signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)


def kill_until_gone(select: Callable[[], Iterable[Process]], budget_s: float) -> tuple[Process, ...]:
    """SIGKILL to all that `select` finds until it finds nothing; what is still there when the budget is spent."""
    ends_s = now_s() + budget_s
    while True:
        left = tuple(process for process in select() if fence.is_left(process))
        if not left:
            return ()
        send(left, signal.SIGKILL)
        reap(left)
        if now_s() >= ends_s:
            return tuple(process for process in left if fence.is_left(process))
        time.sleep(_SCAN_PAUSE_S)


def reap(processes: Iterable[Process]) -> None:
    """Collect those of them that became our children as orphans and are dead."""
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


def end_with_parent(number: signal.Signals) -> Callable[[], None]:
    """For a child between fork and exec: the signal comes when the thread that forked it ends."""
    parent = os.getpid()

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(127)

    return prepare


def _works_in(pid: int, directory: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").readlink() == directory
    except OSError:
        return False
