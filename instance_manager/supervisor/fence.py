"""The fence: which processes are whose, by /proc, and killing all of Postgres.

Killing only the postmaster is no fence: a busy backend was seen to commit for 3 s more. Postgres's processes are the
postmaster's descendants (each backend calls setsid, so process groups do not help), and, since orphans become the
supervisor's children, all of those that are not the agent's. In doubt an orphan is Postgres's: a helper that the agent
daemonised (a session of its own and its parent gone) while Postgres runs would be killed with it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from instance_manager.supervisor.processes import Child

_PF_EXITING = 0x4  # linux/sched.h: the process is in do_exit and never returns to user code
_SIGKILL_BIT = 1 << (signal.SIGKILL - 1)
_SCAN_PAUSE_S = 0.002
# A process that can only die is given this long to be gone before the fence counts as complete without that.
_DYING_PATIENCE_S = 0.2
_STAT_MAX_BYTES = 4096
_REREAD_ROUNDS = 3


class Process(NamedTuple):
    """A line of /proc/PID/stat. `start_ticks` tells it from a later process with the same pid."""

    pid: int
    ppid: int
    session: int
    state: str
    flags: int
    threads: int
    start_ticks: int

    @property
    def is_dead(self) -> bool:
        """Executes nothing and holds no file open: a zombie, unless other threads outlived its first."""
        return self.state in "ZXx" and self.threads <= 1


Table = dict[int, Process]
Select = Callable[[Table], list[Process]]


class FenceResult(NamedTuple):
    """What a fence did."""

    killed: frozenset[tuple[int, int]]
    """Processes killed besides the postmaster, as (pid, start_ticks)."""
    dying: tuple[Process, ...]
    """Still there, but can only die: killed and in uninterruptible sleep, or exiting. They execute no user code."""
    running: tuple[Process, ...]
    """Still able to run. Not empty: the fence failed."""
    took_s: float


class FenceIncompleteError(Exception):
    """Some Postgres process may still run. Nothing but the supervisor's own end can help now."""


def boottime_s() -> float:
    """Seconds of CLOCK_BOOTTIME: the only clock by which the supervisor decides."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_process(pid: int) -> Process | None:
    """One process by its pid; None if there is none."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        line = os.read(fd, _STAT_MAX_BYTES)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    # The name in parentheses may hold spaces and parentheses itself: fields count from the last one.
    fields = line[line.rindex(b")") + 2 :].split()
    return Process(
        pid=pid,
        ppid=int(fields[1]),
        session=int(fields[3]),
        state=fields[0].decode(),
        flags=int(fields[6]),
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )


def read_processes() -> Table:
    """All visible processes, such that the parent of each is in the table too."""
    table: Table = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and (process := read_process(int(name))) is not None:
            table[process.pid] = process
    # A parent that went while we read leaves a link into nothing, and a child that nobody would find: read that one again.
    for _ in range(_REREAD_ROUNDS):
        for pid in [process.pid for process in table.values() if process.ppid and process.ppid not in table]:
            again = read_process(pid)
            if again is None:
                del table[pid]
                continue
            table[pid] = again
            if again.ppid not in table and (parent := read_process(again.ppid)) is not None:
                table[parent.pid] = parent
    return table


def descendants(table: Table, roots: Iterable[int], without: frozenset[int] = frozenset()) -> list[Process]:
    """The roots and all below them, except what is in or below `without`."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.ppid, []).append(process.pid)
    found: dict[int, Process] = {}
    todo = [pid for pid in roots if pid in table]
    while todo:
        pid = todo.pop()
        if pid not in found and pid not in without:
            found[pid] = table[pid]
            todo.extend(children.get(pid, ()))
    return list(found.values())


def postgres_processes(
    table: Table, *, supervisor_pid: int, postmaster_pid: int, agent_pid: int | None, companion_pid: int | None = None
) -> list[Process]:
    """Postgres's processes that are not dead: the postmaster's descendants, and orphans that are nobody else's."""
    others = frozenset(pid for pid in (agent_pid, companion_pid) if pid is not None)
    orphans = [p.pid for p in table.values() if p.ppid == supervisor_pid and p.session not in others]
    return [p for p in descendants(table, [postmaster_pid, *orphans], others) if not p.is_dead]


def agent_processes(
    table: Table, *, supervisor_pid: int, postmaster_pid: int | None, agent_pid: int, companion_pid: int | None = None
) -> list[Process]:
    """The agent's processes that are not dead: it, its descendants, orphans of its session; without Postgres, every orphan
    but the companion's.
    """
    orphans = [
        p.pid
        for p in table.values()
        if p.ppid == supervisor_pid
        and (
            p.session == agent_pid or (postmaster_pid is None and (companion_pid is None or p.session != companion_pid))
        )
    ]
    not_ours = frozenset(pid for pid in (postmaster_pid, companion_pid) if pid is not None)
    return [p for p in descendants(table, [agent_pid, *orphans], not_ours) if not p.is_dead]


def kill_process(process: Process) -> None:
    """SIGKILL to that very process, and never to a later one with its pid."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        now = read_process(process.pid)
        if now is not None and now.start_ticks == process.start_ticks:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def can_only_die(process: Process) -> bool:
    """Whether it never executes user code again: exiting, or in uninterruptible sleep with SIGKILL pending."""
    now = read_process(process.pid)
    if now is None or now.start_ticks != process.start_ticks or now.is_dead:
        return True
    if now.flags & _PF_EXITING and now.threads == 1:
        return True
    if now.state != "D":
        return False
    try:
        with open(f"/proc/{process.pid}/status", encoding="utf-8", errors="replace") as status:  # noqa: PTH123
            pending = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd:", "ShdPnd:"))]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return any(mask & _SIGKILL_BIT for mask in pending)


def is_left(process: Process) -> bool:
    """Whether that very process is still there and not dead."""
    now = read_process(process.pid)
    return now is not None and now.start_ticks == process.start_ticks and not now.is_dead


def kill_all(select: Select, budget_s: float, postmaster: Child | None = None) -> FenceResult:
    """Kill all that `select` finds, and scan and kill again until it finds nothing or `budget_s` seconds are spent.

    The postmaster is stopped first, so that it starts nothing more, however long its own death takes.
    """
    begun_s = boottime_s()
    if postmaster is not None:
        postmaster.send_signal(signal.SIGSTOP)
        postmaster.send_signal(signal.SIGKILL)
    killed: set[tuple[int, int]] = set()
    while True:
        left = select(read_processes())
        for process in left:
            kill_process(process)
            if postmaster is None or process.pid != postmaster.pid:
                killed.add((process.pid, process.start_ticks))
        took_s = boottime_s() - begun_s
        running = tuple(process for process in left if not can_only_die(process))
        if not left or took_s >= budget_s or (not running and took_s >= _DYING_PATIENCE_S):
            dying = tuple(process for process in left if process not in running and is_left(process))
            return FenceResult(frozenset(killed), dying, running, took_s)
        time.sleep(_SCAN_PAUSE_S)
