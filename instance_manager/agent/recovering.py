"""Instead of initdb: the first data directory of a new cluster, recovered from an archive by a process of its own.

It may take hours, and needs memory and threads; the agent only waits for it, and renews its Lease meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from instance_manager.postgres.directory import install_staging
from instance_manager.postgres.server import LocalPostgresError, LocalServer

log = logging.getLogger("instance_manager.agent.recovering")

RECOVERED = ".recovery"
"""Beside the data directory; kept after a failure, and gone on with."""
STOP_DEADLINE_S = 20.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class RecoveryFailed(LocalPostgresError):
    """The directory has not opened; its text says why, and the next try goes on from there."""


async def recover(server: LocalServer, configuration_file: Path, on_progress: Callable[[str], None]) -> None:
    """The data directory appears whole or not at all; `on_progress` gets each line that it says meanwhile.

    RecoveryFailed; DirectoryRefused. Cancelled, it stops first.
    """
    into = server.data_directory.with_name(server.data_directory.name + RECOVERED)
    argv = [sys.executable, "-m", "instance_manager.archive.recovery", "--config", str(configuration_file)]
    process = await asyncio.create_subprocess_exec(
        *(*argv, "--into", str(into), "--bin-directory", str(server.bin_directory)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=_end_with_agent,
    )
    try:
        _, said = await asyncio.gather(_tell(process.stdout, on_progress), _tell(process.stderr))
        code = await process.wait()
    finally:
        await asyncio.shield(_stop(process))
    if code != 0:
        raise RecoveryFailed(f"bootstrap.recovery: {said or f'ended with {code}'}")
    await asyncio.to_thread(install_staging, server, into)


def _end_with_agent() -> None:
    # Two of them on one directory would be one too many.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _tell(stream: asyncio.StreamReader | None, on_line: Callable[[str], None] = lambda _: None) -> str:
    """Into the log as it comes; the last line."""
    last = ""
    while stream is not None and (line := await stream.readline()):
        last = line.decode(errors="replace").strip() or last
        log.info("recovery: %s", last)
        on_line(last)
    return last


async def _stop(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_DEADLINE_S)
