"""Base backups to MinIO and restores from it: how long they take, and the most memory that the processes had.

    python backup_benchmark.py [--scale 100] [--rounds 1]

The archiver takes the backup, so what it had is of archiving too: once alone, once while pgbench writes and its log is archived.
The cluster is pgbench's, made once and kept. MinIO is built by tests/programs/minio_program.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("postgres", "archive")]

from archive_harness import until  # noqa: E402
from archiving_server import REPOSITORY, ArchivingServer, all_archived  # noqa: E402
from harness import BIN_DIRECTORY, PostgresProcess  # noqa: E402
from measure import forget_peak, peak_resident_mib  # noqa: E402
from minio_server import Minio, minio_server  # noqa: E402
from runs import system_identifier  # noqa: E402
from s3_server import REGION, make_bucket  # noqa: E402
from wal_source import SEGMENT_BYTES, emptied, make_before, pgbench, server_at  # noqa: E402

DEFAULT_ROOT = Path("/tmp/instance-manager-benchmark/backups")
DEADLINE_S = 900.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Done:
    """What one command came to."""

    output: str
    seconds: float
    peak_mib: float
    """Of the command's own process, without those that it started."""


async def command(*words: str) -> Done:
    begin_s = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "instance_manager", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    reading = asyncio.create_task(process.communicate())
    peak_mib = 0.0
    # A process that has ended tells nothing any more: what it had most is the last that was seen.
    while not reading.done():
        try:
            peak_mib = peak_resident_mib(process.pid)
        except (OSError, ValueError):
            break
        await asyncio.sleep(_POLL_S)
    output, _ = await reading
    if process.returncode != 0:
        raise RuntimeError(f"{words[0]}: {output.decode()[-3000:]}")
    return Done(output.decode(), time.monotonic() - begin_s, peak_mib)


async def kept_cluster(root: Path, scale: int) -> PostgresProcess:
    """Not started."""
    place = root / f"cluster-{scale}"
    place.mkdir(parents=True, exist_ok=True)
    server = server_at(place, "p")
    if not (place / "made").exists():
        shutil.rmtree(server.data, ignore_errors=True)
        await make_before(server, scale)
        (place / "made").touch()
    return server


def section(minio: Minio, bucket: str) -> dict[str, object]:
    place = {"bucket": bucket, "endpoint": minio.url, "region": REGION, "path_style": True}
    return {"s3": {**place, "ca_file": str(minio.certificate)}}


def say(what: str, done: Done | None, peak_mib: float) -> None:
    took = "" if done is None else f"{done.seconds:.0f} s, "
    print(f"{what}: {took}peak {peak_mib:.1f} MiB", flush=True)


async def benchmark(server: PostgresProcess, minio: Minio, work: Path) -> None:
    bucket = make_bucket(minio.url, minio.certificate)
    made = ArchivingServer(server, section(minio, bucket), segment_bytes=SEGMENT_BYTES)
    server.configure(**made.archive_settings(), fsync="on", wal_keep_size="512MB")
    for path in (server.data / "pg_wal/archive_status").iterdir():
        path.unlink()  # of an earlier run, in whose archive it is
    await server.start(deadline_s=60)
    try:
        await made.start_archiver()
        assert made.process is not None
        archiver = made.process.pid
        made.order("primary", system_identifier(server.data))
        await until(lambda: made.status()["archive"] == "ok", deadline_s=60)
        size = int(await server.fetchval("SELECT sum(pg_database_size(oid)) FROM pg_database"))
        print(f"a cluster of {size / 2**30:.2f} GiB", flush=True)
        say("the archiver, nothing to do", None, peak_resident_mib(archiver))
        backup = ("backup", "--wait", "--config", str(server.root / "instance.yaml"))

        forget_peak(archiver)
        await asyncio.to_thread(pgbench, server, "-n", "-c", "4", "-T", "30")
        await all_archived(server, deadline_s=DEADLINE_S)
        say("archiving alone, of 30 s of pgbench: archiver", None, peak_resident_mib(archiver))

        forget_peak(archiver)
        done = await command(*backup)
        say("a backup alone (20 s of it waiting for a standby): archiver", done, peak_resident_mib(archiver))

        forget_peak(archiver)
        writing = asyncio.create_task(asyncio.to_thread(pgbench, server, "-n", "-c", "4", "-T", "60"))
        done = await command(*backup)
        say("a backup while pgbench writes: archiver", done, peak_resident_mib(archiver))
        await writing
        await all_archived(server, deadline_s=DEADLINE_S)
    finally:
        server.kill()
        made.close()

    place = ["--bucket", bucket, "--endpoint", minio.url, "--region", REGION, "--path-style"]
    place += ["--ca-file", str(minio.certificate), "--server", "orders"]
    done = await command("restore", str(work / "restored"), *place, "--bin-directory", str(BIN_DIRECTORY))
    found = re.search(r"recovered to \S+", done.output)
    assert found is not None, done.output
    say(f"restore, {found[0]}", done, done.peak_mib)
    done = await command("archive", "verify", *place)
    say("archive verify", done, done.peak_mib)


async def main_async(arguments: argparse.Namespace) -> None:
    server = await kept_cluster(arguments.root, arguments.scale)
    for _ in range(arguments.rounds):
        with emptied(arguments.root / "store") as directory, emptied(arguments.root / "work") as work:
            server.own(work)
            with minio_server(directory) as minio:
                await benchmark(server, minio, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=100, help="pgbench's: 15 MB each")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT)
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()
