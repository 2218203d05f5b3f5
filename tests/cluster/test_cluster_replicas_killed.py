"""A standby that is being made from an archive in S3, whose instance manager is killed meanwhile, in a real cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_harness import eventually, running_cluster, sql
from cluster_tools import Writer, log_end, record, superuser_sql, volume
from test_cluster_replicas import TOLD, base_backups, lose_volume, origins

from instance_manager.archive.backup.catalogue import list_backups
from instance_manager.archive.codecs import Codec
from instance_manager.archive.layout import Layout
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import ArchivePlan, archive_server_name

sys.path.append(str(Path(__file__).parent.parent / "archive"))
from fault_proxy import FaultProxy
from s3_server import CREDENTIALS, REGION, make_bucket, s3_server, settings_for

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For what those have there who are killed."""
    with tempfile.TemporaryDirectory(prefix="im-killed-") as place:
        Path(place).chmod(0o711)
        monkeypatch.setenv("TMPDIR", place)
        yield


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    for name, value in {**CREDENTIALS, "AWS_REGION": REGION}.items():
        monkeypatch.setenv(name, value)
    with s3_server() as url, FaultProxy(url).running() as made:
        yield made


def has_backup(cluster: LocalCluster, proxy: FaultProxy, bucket: str) -> bool:
    async def look() -> bool:
        store = S3Store(settings_for(proxy.target, bucket, prefix=""))
        try:
            layout = Layout(archive_server_name(cluster.plan), Codec("zstd"))
            return any(each.state == "done" for each in await list_backups(store, layout, deadline_s=10))
        finally:
            await store.close()

    return asyncio.run(look())


def operation(cluster: LocalCluster, name: str) -> str:
    """What the instance says that it is doing."""
    status = cluster.status(name)
    own = [] if status is None else [each.operation for each in status.instances if each.name == name]
    return (own[0] or "") if own else ""


def test_killed_in_the_files_and_in_the_replay_it_is_begun_anew_from_there_and_nothing_is_lost(
    proxy: FaultProxy,
) -> None:
    bucket = make_bucket(proxy.target)
    plan = ArchivePlan(endpoint=proxy.url, bucket=bucket)
    with running_cluster(instances=2, archive=plan, replicas_from="archive", parameters=TOLD) as cluster:
        eventually(cluster, lambda: has_backup(cluster, proxy, bucket), within_s=120, what="the first backup")
        primary = cluster.wait_redundant()
        (standby,) = cluster.standbys()
        sql(cluster, "CREATE TABLE accounts AS SELECT n FROM generate_series(1, 1000) n")
        switch = "SELECT pg_walfile_name(pg_switch_wal() - 1)"
        segments = [superuser_sql(cluster, primary, f"CREATE TABLE t{n} (); {switch}") for n in range(3)]
        eventually(
            cluster,
            lambda: superuser_sql(cluster, primary, "SELECT last_archived_wal FROM pg_stat_archiver") >= segments[-1],
            within_s=60,
            what="three segments are archived",
        )
        was, offset = volume(cluster, standby).member_id, log_end(cluster, primary)
        with Writer(cluster, "busy") as writer:
            files = proxy.fail("silent", method="GET", path="/base/.*/data")
            replay = proxy.fail("silent", method="GET", path=segments[1])
            since = lose_volume(cluster, standby)
            eventually(cluster, lambda: files.met > 0, within_s=60, what="it stands in the files")
            agent = cluster.processes(standby).agent
            assert agent is not None
            met = files.met
            os.kill(agent.pid, signal.SIGKILL)
            eventually(cluster, lambda: files.met > met, within_s=60, what="it stands in the files again")
            assert len(halves(cluster, standby)) == 1
            proxy.faults.remove(files)
            # What hangs in the store is given up by the client, and asked for again.
            eventually(
                cluster,
                lambda: replay.met > 0 and "replayed to" in operation(cluster, standby),
                within_s=120,
                what="it stands in the replay",
            )
            cluster.kill(standby)
            assert len(halves(cluster, standby)) == 1
            assert not (cluster.layout.instance(standby) / "data").exists()
            proxy.heal()
            cluster.start(standby)
            cluster.wait_redundant(120)
            writer.wait_for_more(5)
        assert writer.missing() == set()
        assert halves(cluster, standby) == []
        *_, came = origins(cluster, standby, offset=since)
        assert came.startswith("clone: from backup "), came
        assert "of this cluster's archive" in came
        assert base_backups(cluster, primary, offset=offset) == 0
        member_id = volume(cluster, standby).member_id
        assert member_id not in (None, was), "R6, P7: another directory is another member"
        assert member_id in record(cluster).voters
        eventually(
            cluster,
            lambda: sql(cluster, "SELECT count(*) FROM accounts", on=standby) == "1000",
            within_s=30,
            what="the standby has every row",
        )


def halves(cluster: LocalCluster, name: str) -> list[Path]:
    return list(cluster.layout.instance(name).glob("data.clone-*"))
