"""barman-cloud both ways: it lists and restores our backups, and we list, verify, restore and recover from its."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from archiving_server import all_archived, archiving, insert, prepared, run
from backup_harness import LAYOUT, store_of, take
from fault_proxy import FaultProxy
from harness import Cluster, run_as
from recovery_harness import Restoration

from instance_manager.archive.backup.catalogue import list_backups
from instance_manager.archive.backup.verify import verify_backup
from instance_manager.archive.codecs import Codec
from instance_manager.archive.wal_names import Segment
from instance_manager.core.types import Timeline

pytestmark = pytest.mark.timeout(240)

# `make test-barman` runs them all; `make test` those that are used most.
EVERY = bool(os.environ.get("BARMAN_EVERY"))
OUR_CODECS = ("lz4", "gzip", "none") if EVERY else ("lz4",)
THEIR_COMPRESSIONS = ("gzip", "lz4", "bzip2", "none") if EVERY else ("gzip", "lz4")


def options(proxy: FaultProxy) -> tuple[str, ...]:
    return ("--cloud-provider", "aws-s3", "--endpoint-url", proxy.url, "--addressing-style", "path")


def open_directory(path: Path) -> Path:
    """For Postgres's user, where the tests are root."""
    path.mkdir(mode=0o700)
    if (user := run_as()) is not None:
        os.chown(path, user.uid, user.gid)
    return path


def give_to_postgres(path: Path) -> None:
    if (user := run_as()) is not None:
        for each in (path, *path.rglob("*")):
            os.chown(each, user.uid, user.gid)


@pytest.mark.parametrize("codec", OUR_CODECS)
async def test_barman_cloud_lists_and_restores_what_we_took(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy, bucket: str, barman: Path, codec: str
) -> None:
    server, store = cluster.add("p"), store_of(s3_section)
    space, moved = open_directory(cluster.root / "space"), open_directory(cluster.root / "moved")
    with archiving(server, s3_section) as made:
        await prepared(cluster, made)
        await insert(server, 0, 500)
        await server.execute(f"CREATE TABLESPACE space LOCATION '{space}'")
        await server.execute("CREATE TABLE elsewhere TABLESPACE space AS SELECT n FROM generate_series(1, 500) n")
        taken = await take(made, store, codec=Codec(codec), split_bytes=4 << 20)
        server.kill()
    where = (f"s3://{bucket}/pre/fix", "orders")
    done = await run([barman / "barman-cloud-backup-list", *options(proxy), *where])
    assert done.returncode == 0, done.stderr
    assert taken.info.backup_id in done.stdout
    target = open_directory(cluster.root / "by-barman")
    relocation = ("--tablespace", f"space:{moved}")
    program = barman / "barman-cloud-restore"
    done = await run([program, *options(proxy), *relocation, *where, taken.info.backup_id, str(target)])
    assert done.returncode == 0, done.stderr
    assert (target / "pg_tblspc" / str(taken.info.tablespaces[0].oid)).resolve() == moved
    # Postgres's user may not run what the tests have installed: what it will ask for is fetched before.
    wal = open_directory(cluster.root / "wal")
    numbers = range(taken.info.begin_segment.number, taken.info.end_segment.number + 1)
    for name in (taken.info.segment_size.name(Segment(Timeline(1), number)) for number in numbers):
        done = await run([barman / "barman-cloud-wal-restore", *options(proxy), *where, name, str(wal / name)])
        assert done.returncode == 0, done.stderr
    for path in (target, moved, wal):
        give_to_postgres(path)
    restored = cluster.add("r", target)
    restored.write("recovery.signal", "")
    restored.set_dynamic(synchronous_standby_names="")
    restored.configure(archive_mode="off", restore_command=f"cp {wal}/%f %p")
    await restored.start()
    assert await restored.fetchval("SELECT count(*) FROM t") == 500
    assert await restored.fetchval("SELECT count(*) FROM elsewhere") == 500


@pytest.mark.parametrize("compression", THEIR_COMPRESSIONS)
async def test_what_barman_cloud_took_is_verified_restored_and_recovered(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy, bucket: str, barman: Path, compression: str
) -> None:
    server, store = cluster.add("p"), store_of(s3_section)
    with archiving(server, s3_section) as made:
        await prepared(cluster, made)
        await insert(server, 0, 500)
        connection = ("-d", f"host={server.socket} port={server.port} user=postgres dbname=postgres")
        how = () if compression == "none" else (f"--{compression}",)
        argv = [barman / "barman-cloud-backup", *options(proxy), *how, "--name", "theirs", "--immediate-checkpoint"]
        done = await run([*argv, *connection, f"s3://{bucket}/pre/fix", "orders"])
        assert done.returncode == 0, done.stderr
        await insert(server, 500, 500)
        await all_archived(server)
        server.kill()
    (listed,) = await list_backups(store, LAYOUT, deadline_s=10)
    assert (listed.state, listed.manifest) == ("done", None)
    assert listed.info is not None
    assert listed.info.name == "theirs"
    verdict = await verify_backup(store, LAYOUT, listed)
    assert verdict.is_good, (verdict.problems, verdict.unread)
    assert not verdict.has_hashes
    assert verdict.files > 100
    restoration = Restoration(cluster.add("r"), store)
    await restoration.run(backup="theirs")
    assert await restoration.numbers() == set(range(1000))
