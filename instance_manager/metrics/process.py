"""The standard families of a process (`process_*`), of the agent's, and the memory of the processes beside it, from /proc."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from instance_manager.metrics.exposition import Block, Family, gauge, gauges

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_UNLIMITED = 1.8446744073709552e19


def resident_bytes(pid: int) -> int | None:
    """None: there is no such process, or it is not ours to look at."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


def own_process() -> list[Block]:
    """As every client library of Prometheus has them; dashboards for postgres_exporter show the exporter's own by them."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    boot_s = next(
        float(line.split()[1])
        for line in Path("/proc/stat").read_text(encoding="ascii").split("\n")
        if line.startswith("btime ")
    )
    cpu = Block(Family("process_cpu_seconds_total", "counter", "Processor time of the agent, in seconds."))
    cpu.add((int(fields[11]) + int(fields[12])) / _TICKS)
    files_max, memory_max = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS))
    return [
        cpu,
        gauge("process_resident_memory_bytes", "Resident memory of the agent.", int(fields[21]) * _PAGE_BYTES),
        gauge("process_virtual_memory_bytes", "Virtual memory of the agent.", int(fields[20])),
        gauge(
            "process_virtual_memory_max_bytes",
            "Its limit.",
            _UNLIMITED if memory_max == resource.RLIM_INFINITY else memory_max,
        ),
        gauge("process_start_time_seconds", "When the agent started, Unix seconds.", boot_s + int(fields[19]) / _TICKS),
        gauge("process_open_fds", "Open files of the agent.", len(os.listdir("/proc/self/fd"))),  # noqa: PTH208
        gauge("process_max_fds", "Their limit.", files_max),
    ]


def memory_of(processes: dict[str, int]) -> Block:
    """`processes`: pid by name."""
    return gauges(
        "instance_manager_process_resident_memory_bytes",
        "Resident memory of the instance manager's processes.",
        "process",
        {name: resident_bytes(pid) for name, pid in processes.items()},
    )
