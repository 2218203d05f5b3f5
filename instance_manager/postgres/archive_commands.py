"""What Postgres's archive_command and restore_command may do now, and the proof that nothing is being restored any more (P9).

The commands ask the archiver, which may hang, be stopped, or wait for a store that is away. So that nothing else waits for
it, they end by themselves as soon as the file here stops allowing them. A start of the server takes back what was allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import Literal

from instance_manager.core.types import Lsn
from instance_manager.postgres.deadlines import Deadline, Pause
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.server import LocalPostgresError, LocalServer

ALLOWS = "archive-allows"
Allowed = Literal["push", "fetch"]
_SEGMENT = re.compile(r"[0-9A-F]{24}")
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


def ask_again(server: LocalServer, since: Lsn | None) -> int:
    """Let Postgres archive, once it is promoted, what it holds of the log behind `since`; how many segments. Blocks on the disk.

    A standby marks what it receives as archived, because its primary was to do that. So what a crashed primary had not
    archived nobody would ask for, and the next checkpoint would remove it. Asked for again, it stays until it is archived;
    what is in the archive already is found there. None: it is not known how far the archive is, so all that is here.
    """
    status = server.data_directory / "pg_wal" / "archive_status"
    found = 0
    for path in status.glob("*.done"):
        if _SEGMENT.fullmatch(path.stem) is None:
            continue
        with contextlib.suppress(FileNotFoundError):
            if _end_of(server.data_directory / "pg_wal" / path.stem) > (since or 0):
                path.rename(path.with_suffix(".ready"))
                found += 1
    return found


def _end_of(segment: Path) -> int:
    """Where a whole segment ends. FileNotFoundError: it was removed."""
    size = segment.stat().st_size
    return (int(segment.name[8:16], 16) << 32) + (int(segment.name[16:], 16) + 1) * size


async def nothing_is_restored(server: LocalServer, postmaster: int, deadline: Deadline) -> None:
    """After `allow(None)`: return once no restore_command runs, and what the last one brought was taken over.

    StillRestoring: not seen in time, or the disk does not answer.
    """
    pause = Pause(0.02)
    try:
        async with asyncio.timeout(deadline.left_s):
            while await asyncio.to_thread(_is_restoring, server, postmaster):
                await pause(deadline)
    except TimeoutError:
        raise StillRestoring(f"restore_command has not ended within {deadline.whole_s:g} s") from None


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
