"""A store outage that fills the volume of pg_wal: Postgres stops its writes, and nothing that it acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from archive_harness import until
from archiving_server import INSERT, ArchivingServer, all_archived, archiving, ask, cold_copy, prepared
from fault_proxy import FaultProxy
from harness import Cluster, PostgresProcess
from recovering_server import recovery_of

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small volume"),
]
VOLUME_MIB = 56


@contextlib.contextmanager
def wal_on_a_small_volume(server: PostgresProcess) -> Iterator[Path]:
    """pg_wal of a server that is not running is moved to a volume of its own; its mount point."""
    mounted = server.root / "wal-volume"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={VOLUME_MIB}m,mode=0755", "tmpfs", str(mounted)], check=True)
    try:
        wal = server.data / "pg_wal"
        subprocess.run(["cp", "-a", str(wal), str(mounted / "pg_wal")], check=True)
        subprocess.run(["rm", "-r", str(wal)], check=True)
        wal.symlink_to(mounted / "pg_wal")
        yield mounted
    finally:
        server.kill()
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


async def insert_until_postgres_stops(server: PostgresProcess) -> int:
    """How many rows it has acknowledged, in order from 0."""
    acknowledged = 0
    async with server.session(synchronous_commit="on") as session:
        while True:
            try:
                await session.fetchval(INSERT, acknowledged, acknowledged + 1999)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                return acknowledged
            acknowledged += 2000


async def test_a_full_volume_costs_availability_and_no_acknowledged_write(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy
) -> None:
    server = cluster.add("p")
    copy = await cold_copy(cluster, server)
    with wal_on_a_small_volume(server) as mounted, archiving(server, s3_section) as made:
        system = await prepared(cluster, made, wal_keep_size=0)
        proxy.fail("503 SlowDown")
        acknowledged = await insert_until_postgres_stops(server)
        await server.wait_ended(deadline_s=30)
        assert "No space left on device" in server.log_text()
        assert acknowledged > 0
        waiting = ready(server)
        assert len(waiting) >= 32
        await until(lambda: made.status()["backlog"]["level"] == "critical", deadline_s=20)
        # The archiver needs no space: what waits goes out while the volume is as full as it can be.
        proxy.heal()
        fill(mounted)
        answer = await asyncio.to_thread(ask, made.socket, f"push\t{waiting[0]}".encode())
        assert (answer, free_bytes(mounted)) == ("done", 0)
        # What the operator does: give it space. Postgres itself then works off the rest.
        subprocess.run(["mount", "-o", f"remount,size={2 * VOLUME_MIB}m", str(mounted)], check=True)  # noqa: ASYNC221
        await server.start(deadline_s=60)
        await archived_to_the_end(made)
        server.kill()
    async with recovery_of(cluster, copy, s3_section, system) as recovery:
        await recovery.start()
        rows = await recovery.rows()
        assert set(range(acknowledged)) <= rows <= set(range(acknowledged + 2000))


async def archived_to_the_end(made: ArchivingServer) -> None:
    await all_archived(made.server, deadline_s=90)
    assert made.status()["push"]["conflicts"] == 0


def ready(server: PostgresProcess) -> list[str]:
    return sorted(path.stem for path in (server.data / "pg_wal/archive_status").glob("*.ready"))


def free_bytes(mounted: Path) -> int:
    found = os.statvfs(mounted)
    return found.f_bavail * found.f_frsize


def fill(mounted: Path) -> None:
    with (mounted / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
