"""barman-cloud both ways: it restores what we pushed, and we restore and take over what it pushed."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest
from archiving_server import (
    all_archived,
    archiving,
    insert,
    prepared,
    run,
)
from fault_proxy import FaultProxy
from harness import Cluster
from wal_builders import make_ready

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "gzip", "none"])
async def test_barman_cloud_restores_what_was_pushed(
    cluster: Cluster,
    s3_section: dict[str, Any],
    proxy: FaultProxy,
    bucket: str,
    barman: Path,
    codec: str,
    tmp_path: Path,
) -> None:
    server = cluster.add("p")
    with archiving(server, {**s3_section, "codec": codec}) as made:
        await prepared(cluster, made, wal_keep_size="64MB")
        await insert(server, 0, 3000)
        name = await all_archived(server)
        expected = (server.data / "pg_wal" / name).read_bytes()
    target = tmp_path / "restored"
    done = await run(
        [
            *(barman / "barman-cloud-wal-restore", "--cloud-provider", "aws-s3", "--endpoint-url", proxy.url),
            *("--addressing-style", "path", f"s3://{bucket}/pre/fix", "orders", name, str(target)),
        ],
    )
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == expected


async def test_what_barman_cloud_pushed_is_restored_and_never_overwritten(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy, bucket: str, barman: Path
) -> None:
    """As a cluster that comes from CloudNativePG: its archive is taken over, if it is of this system."""
    server = cluster.add("p")
    with archiving(server, s3_section) as made:
        system = await prepared(cluster, made)
        await insert(server, 0, 3000)
        await all_archived(server)
        wal = sorted(path for path in (server.data / "pg_wal").iterdir() if len(path.name) == 24)[0]
        theirs = {**s3_section, "server_name": "theirs"}
        done = await run(
            [
                *(barman / "barman-cloud-wal-archive", "--cloud-provider", "aws-s3", "--endpoint-url", proxy.url),
                *("--addressing-style", "path", "--zstd", f"s3://{bucket}/pre/fix", "theirs", str(wal)),
            ],
        )
        assert done.returncode == 0, done.stderr
        server.kill()
    other = cluster.add("r")
    with archiving(other, theirs) as reading:
        await reading.start_archiver()
        reading.order("standby", system)
        command = reading.restore_settings("recovery")["restore_command"].replace("%f", wal.name)
        target = other.data / "pg_wal" / "RECOVERYXLOG"
        text = command.replace("%p", str(target)).replace("%%", "%")
        assert (await asyncio.to_thread(subprocess.run, ["sh", "-c", text])).returncode == 0
        assert target.read_bytes() == wal.read_bytes()
        target.unlink()
        reading.order("primary", system, epoch=2)
        push = reading.archive_settings()["archive_command"].replace("%f", wal.name).replace("%%", "%")
        content = wal.read_bytes()
        for attempt, code in ((content, 0), (content[:-1] + b"!", 1)):
            make_ready(other.data / "pg_wal", wal.name, attempt)
            assert (await asyncio.to_thread(subprocess.run, ["sh", "-c", push])).returncode == code
        status = reading.status()["push"]
        assert (status["already_there"], status["archived"], status["conflicts"]) == (1, 0, 1)
