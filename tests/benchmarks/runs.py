"""One run of one program: N segments archived by Postgres's own archiver, and replayed by Postgres's own recovery."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import BIN_DIRECTORY
from measure import CpuMeter, peak_resident_mib, waited_for_s
from peers import Ours, Peer
from wal_source import SEGMENT_BYTES, WalSource, server_at

from instance_manager.archive.recovery.sizes import replay_sizes

ARCHIVING_DEADLINE_S = 280.0
REPLAY_DEADLINE_S = 280.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Archived:
    seconds: float
    cpu_s: float
    peak_mib: float | None
    """Of the process that stays; None: there is none."""
    failed: int


@dataclass(frozen=True, slots=True)
class Replayed:
    seconds: float
    """From Postgres's first to its last record, by its own log."""
    cpu_s: float
    """Of Postgres and of all that it or its manager runs, from start to end."""


def system_identifier(data: Path) -> int:
    output = subprocess.run(
        [str(BIN_DIRECTORY / "pg_controldata"), str(data)], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"system identifier:\s+(\d+)", output)
    assert found is not None
    return int(found[1])


async def archive(source: WalSource, count: int, peer: Peer, meter: CpuMeter) -> Archived:
    """From the reload that gives Postgres its archive_command until the last segment is marked as done."""
    names = source.mark(count)
    server = source.server
    server.configure(archive_command="", fsync="on")
    await server.start(deadline_s=60)
    assert server.process is not None
    meter.owned.add(server.pid)
    try:
        await peer.begin(server, system_identifier(server.data))
        if peer.resident_pid is not None:
            meter.owned.add(peer.resident_pid)
        server.configure(archive_command=peer.archive_command())
        cpu_before_s, begin_s = meter.used_s(), time.monotonic()
        await server.reload()
        while not source.is_archived(names):
            if time.monotonic() - begin_s > ARCHIVING_DEADLINE_S:
                raise TimeoutError(f"{peer.name}: {server.log_text()[-3000:]}")
            await asyncio.sleep(_POLL_S)
        seconds = time.monotonic() - begin_s
        await _detached_end(meter)
        cpu_s = meter.used_s() - cpu_before_s
        peak = None if peer.resident_pid is None else peak_resident_mib(peer.resident_pid)
        failed = int(await server.fetchval("SELECT failed_count FROM pg_stat_archiver"))
        server.configure(archive_command="/bin/true")
        await server.reload()
    finally:
        server.kill()
        meter.reap()
    return Archived(seconds, cpu_s, peak, failed)


async def _detached_end(meter: CpuMeter) -> None:
    """pgBackRest's background process outlives the last command; its end belongs to the cost."""
    end_s = time.monotonic() + 10
    while meter.reap() and time.monotonic() < end_s:  # noqa: ASYNC110 - nothing tells of a grandchild's end
        await asyncio.sleep(_POLL_S)


async def replay(
    source: WalSource, count: int, peer: Peer, meter: CpuMeter, root: Path, *, from_pg_wal: bool
) -> Replayed:
    """Of `count` segments."""
    server = server_at(root, "replaying")
    shutil.rmtree(server.data, ignore_errors=True)
    server.log.unlink(missing_ok=True)
    await asyncio.to_thread(subprocess.run, ["cp", "-a", str(source.before), str(server.data)], check=True)
    wal = server.data / "pg_wal"
    for path in wal.iterdir():
        if path.is_file():
            path.unlink()
    names = source.segments[:count]
    if from_pg_wal:
        copies = [str(source.server.data / "pg_wal" / name) for name in names]
        await asyncio.to_thread(subprocess.run, ["cp", "-a", *copies, str(wal)], check=True)
    # Whatever writes back what was copied just now would do so beside replay.
    await asyncio.to_thread(subprocess.run, ["sync", "--file-system", str(wal)], check=True)
    number = int(names[-1][8:16], 16) << 32 | int(names[-1][16:], 16) * SEGMENT_BYTES
    target_lsn = f"{number >> 32:X}/{number & 0xFFFFFFFF:X}"
    await peer.begin_restore(server, system_identifier(server.data))
    cpu_before_s = waited_for_s()
    try:
        if isinstance(peer, Ours):
            server.write("standby.signal", "")
            log = await peer.recover(server, system_identifier(server.data), target_lsn)
            return Replayed(replay_seconds(log), waited_for_s() - cpu_before_s)
        server.write("standby.signal" if from_pg_wal else "recovery.signal", "")
        server.configure(
            **{"archive_mode": "off", "archive_command": "", "hot_standby": "on", "fsync": "on"},
            recovery_target_lsn=target_lsn,
            recovery_target_action="shutdown",
            restore_command=peer.restore_command(),
            **replay_sizes(server.data),
        )
        await server.start(wait=False)
        meter.owned.add(server.pid)
        await server.wait_ended(deadline_s=REPLAY_DEADLINE_S)
        return Replayed(replay_seconds(server.log_text()), waited_for_s() - cpu_before_s)
    finally:
        server.kill()
        meter.reap()
        shutil.rmtree(server.data, ignore_errors=True)


def replay_seconds(log: str) -> float:
    """Between `redo starts at` and `recovery stopping`."""
    times = []
    for text in ("redo starts at", "recovery stopping"):
        line = next((line for line in log.splitlines() if text in line), None)
        assert line is not None, log[-3000:]
        times.append(datetime.datetime.fromisoformat(line[:23]))
    return (times[1] - times[0]).total_seconds()


@contextlib.contextmanager
def stand_in(directory: Path, certificate: Path, key: Path, delay_ms: float) -> Iterator[subprocess.Popen[str]]:
    """The S3 server; its port is the first line that it prints."""
    argv = [sys.executable, str(Path(__file__).with_name("s3_stand_in.py")), "--directory", str(directory)]
    argv += ["--certificate", str(certificate), "--key", str(key), "--delay-ms", str(delay_ms)]
    # A session of its own, as every program that is compared has: Linux may share out the processor by sessions
    # (sched_autogroup), and whoever shares one with the store would pay for it.
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)
