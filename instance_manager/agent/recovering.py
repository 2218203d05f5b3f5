"""Data directories from an archive, each made by a process of its own: the first of a new cluster, instead of initdb; and a standby's,
instead of a copy of the primary.

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

from instance_manager.archive.recovery.replica_request import NOT_FROM_ARCHIVE, ReplicaRequest
from instance_manager.codec import to_json
from instance_manager.postgres.clone import install_standby
from instance_manager.postgres.directory import CLONE_MARK, create_staging, discard_copy, install_staging
from instance_manager.postgres.server import LocalPostgresError, LocalServer

log = logging.getLogger("instance_manager.agent.recovering")

RECOVERED = ".recovery"
"""Beside the data directory; kept after a failure, and gone on with."""
STOP_DEADLINE_S = 20.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class RecoveryFailed(LocalPostgresError):
    """The directory has not opened; its text says why, and the next try goes on from there."""


class NotMade(LocalPostgresError):
    """There is no directory from an archive, and nothing is left of it. `is_choice`: nothing was begun, the primary is the better source."""

    def __init__(self, reason: str, *, is_choice: bool) -> None:
        super().__init__(reason)
        self.is_choice = is_choice


async def recover(server: LocalServer, configuration_file: Path, on_progress: Callable[[str], None]) -> None:
    """The data directory appears whole or not at all; `on_progress` gets each line that it says meanwhile.

    RecoveryFailed; DirectoryRefused. Cancelled, it stops first.
    """
    into = server.data_directory.with_name(server.data_directory.name + RECOVERED)
    code, said, _ = await _run("instance_manager.archive.recovery", server, configuration_file, into, b"", on_progress)
    if code != 0:
        raise RecoveryFailed(f"bootstrap.recovery: {said or f'ended with {code}'}")
    await asyncio.to_thread(install_staging, server, into)


async def make_replica(
    server: LocalServer, configuration_file: Path, request: ReplicaRequest, on_progress: Callable[[str], None]
) -> str:
    """A standby's directory in the data directory's place, which must be free; what it was made from.

    NotMade; DirectoryRefused. Cancelled, it stops first. Whatever happens, nothing is left but a leftover if this process is killed.
    """
    staging = await asyncio.to_thread(create_staging, server, CLONE_MARK)
    module = "instance_manager.archive.recovery.replica_command"
    try:
        code, said, told = await _run(module, server, configuration_file, staging, to_json(request), on_progress)
        if code != 0:
            raise NotMade(said or f"ended with {code}", is_choice=code == NOT_FROM_ARCHIVE)
        await asyncio.to_thread(install_standby, server, staging)
    finally:
        await asyncio.shield(asyncio.to_thread(discard_copy, server, staging))
    return told


async def _run(
    module: str,
    server: LocalServer,
    configuration_file: Path,
    into: Path,
    question: bytes,
    on_progress: Callable[[str], None],
) -> tuple[int, str, str]:
    """Its exit code, and the last lines of standard error and of standard output."""
    argv = [sys.executable, "-m", module, "--config", str(configuration_file)]
    process = await asyncio.create_subprocess_exec(
        *(*argv, "--into", str(into), "--bin-directory", str(server.bin_directory)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=_end_with_agent,
    )
    try:
        told, said, _ = await asyncio.gather(
            _tell(process.stdout, on_progress), _tell(process.stderr), _ask(process.stdin, question)
        )
        return await process.wait(), said, told
    finally:
        await asyncio.shield(_stop(process))


def _end_with_agent() -> None:
    # Two of them on one directory would be one too many.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _ask(stream: asyncio.StreamWriter | None, question: bytes) -> None:
    if stream is not None:
        with contextlib.suppress(ConnectionError):
            stream.write(question)
            await stream.drain()
        stream.close()


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
