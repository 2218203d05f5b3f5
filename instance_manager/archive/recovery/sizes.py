"""Memory and log of a Postgres that only replays, by what the machine has.

With Postgres's own defaults the pages that replay writes leave memory soon, and a restart point comes with each half a GB of log: both
write the same pages again and again. Restart points also come every five minutes (checkpoint_timeout), so a replay that breaks off has at
most so much to do again.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

log = logging.getLogger("instance_manager.archive.recovery")

SHARE = 4
"""A quarter of each: of the memory as Postgres's documentation recommends it (shared_buffers), of the free room because the rows may need
it too."""
GROWTH = 2
FEW_BYTES = 512 << 20
"""More than so many times what the directory holds is seldom used, and the more there is, the slower a table is dropped; but this much
costs nothing."""
BUFFERS_BYTES = 128 << 20, 16 << 30
LOG_BYTES = 1 << 30, 16 << 30
"""From Postgres's own default on."""
_STRICT = "2"
"""vm.overcommit_memory: no more is promised than there is."""


def replay_sizes(data_directory: Path) -> dict[str, str]:
    """shared_buffers and max_wal_size. OSError: of the directory; a kernel that does not tell of its memory costs speed, and no recovery."""
    try:
        memory = memory_bytes() // SHARE
    except (OSError, ValueError, KeyError) as error:
        log.warning("replay has the least memory, since what there is cannot be read: %r", error)
        memory = 0
    held = _pages_bytes(data_directory, memory)
    volume = os.statvfs(data_directory / "pg_wal")
    return {
        "shared_buffers": _within(BUFFERS_BYTES, min(memory, max(FEW_BYTES, GROWTH * held))),
        "max_wal_size": _within(LOG_BYTES, volume.f_bavail * volume.f_frsize // SHARE),
    }


def memory_bytes(root: Path = Path("/")) -> int:
    """What could be used, as far as the kernel tells: of the machine what is available now, of a cgroup its limit. OSError."""
    lines = (line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    machine = {name: int(value.split()[0]) << 10 for name, value in lines}
    most = [machine["MemAvailable"], *_limits(root)]
    if (root / "proc/sys/vm/overcommit_memory").read_text().strip() == _STRICT:
        most.append(max(0, machine["CommitLimit"] - machine["Committed_AS"]))
    return min(most)


def _limits(root: Path) -> Iterator[int]:
    """Of this process's cgroup and all above it, as far as they are mounted (cgroups(7): the second version, and the first)."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            tree, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            tree, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(name)
        for each in (group, *group.parents):
            limit = tree / each.relative_to("/") / file
            if limit.exists() and (text := limit.read_text().strip()).isdigit():
                yield int(text)


def _pages_bytes(data_directory: Path, enough_bytes: int) -> int:
    """Of all databases, tablespaces included; counted until it is enough."""
    total = 0
    for top in ("base", "pg_tblspc"):
        for folder, _, names in os.walk(data_directory / top, followlinks=True):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += (Path(folder) / name).stat().st_size
            if total >= enough_bytes:
                return total
    return total


def _within(limits_bytes: tuple[int, int], wanted_bytes: int) -> str:
    least, most = limits_bytes
    return f"{min(max(wanted_bytes, least), most) >> 20}MB"
