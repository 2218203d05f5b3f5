"""What Postgres's archive_command and restore_command may do now, and the proof that nothing is being restored any more (P9).

The commands ask the archiver, which may hang, be stopped, or wait for a store that is away. So that nothing else waits for
it, they end by themselves as soon as the file here stops allowing them. A start of the server takes back what was allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Literal

from instance_manager.postgres.deadlines import Deadline, Pause
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.server import LocalPostgresError, LocalServer

ALLOWS = "archive-allows"
Allowed = Literal["push", "fetch"]
_RESTORED = "RECOVERYXLOG"
"""Where Postgres has a segment put, before it takes it over under its own name."""


class StillRestoring(LocalPostgresError):
    """A file may yet come from the archive: no promise may be made (P9)."""


def allow(server: LocalServer, what: Allowed | None) -> None:
    """From now on; None: nothing. A command that waits for something else ends within 50 ms. Blocks on the disk."""
    path = server.state_directory / ALLOWS
    if what is None:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, f"{what}\n".encode(), mode=0o644, run_as=server.run_as)


async def nothing_is_restored(server: LocalServer, postmaster: int, deadline: Deadline) -> None:
    """After `allow(None)`: return once no restore_command runs, and what the last one brought was taken over.

    StillRestoring: not seen in time.
    """
    pause = Pause(0.02)
    while await asyncio.to_thread(_is_restoring, server, postmaster):
        if deadline.passed:
            raise StillRestoring(f"restore_command has not ended within {deadline.whole_s:g} s")
        await pause(deadline)


def _is_restoring(server: LocalServer, postmaster: int) -> bool:
    parents = _parents()
    startup = {pid for pid, parent in parents.items() if parent == postmaster and "startup" in _title(pid)}
    if any(parent in startup for parent in parents.values()):
        return True
    # Between its end and the take-over no process shows it.
    return (server.data_directory / "pg_wal" / _RESTORED).exists()


def _parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""
