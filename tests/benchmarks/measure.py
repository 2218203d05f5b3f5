"""What a run costs: CPU time of everything below this process, also of what has detached itself; peak memory."""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def adopt_orphans() -> None:
    """What a child leaves behind becomes a child of this process, so that nothing escapes the count."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    cpu_s: float
    """Its own, and of its children that it has waited for."""
    state: str


def _process(pid: int) -> _Process | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Process(pid, int(fields[1]), sum(map(int, fields[11:15])) / _TICKS_PER_S, fields[0])


@dataclass
class CpuMeter:
    """`used_s` of all descendants but `left_out` (the store, which is the other side's)."""

    left_out: frozenset[int] = frozenset()
    owned: set[int] = field(default_factory=set)
    """Children that somebody else waits for."""
    reaped_s: float = 0.0

    def reap(self) -> bool:
        """Wait for adopted orphans that have ended; whether some are still running."""
        running = False
        for child in self._children().get(os.getpid(), []):
            if child.pid in self.owned or child.pid in self.left_out:
                continue
            pid, _, usage = os.wait4(child.pid, os.WNOHANG)
            if pid == 0:
                running = True
            else:
                self.reaped_s += usage.ru_utime + usage.ru_stime
        return running

    def used_s(self) -> float:
        self.reap()
        children, total, waiting = self._children(), self.reaped_s, [os.getpid()]
        while waiting:
            for child in children.get(waiting.pop(), []):
                if child.pid not in self.left_out:
                    total += child.cpu_s
                    waiting.append(child.pid)
        return total

    @staticmethod
    def _children() -> dict[int, list[_Process]]:
        found: dict[int, list[_Process]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (process := _process(int(entry.name))) is not None:
                found.setdefault(process.parent, []).append(process)
        return found


def waited_for_s() -> float:
    """CPU of all processes below this one that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak_resident_mib(pid: int) -> float:
    """VmHWM since the process began, or since `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"{pid} has no VmHWM")


def forget_peak(pid: int) -> None:
    """From now on it counts anew, from what the process has."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
