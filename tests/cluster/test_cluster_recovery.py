"""A second cluster from the archive of a first one that lives on, at a moment before a mistake."""

from __future__ import annotations

import asyncio
import time

import pytest
from cluster_harness import eventually, running_cluster, sql

from instance_manager.archive.backup.catalogue import Listed, list_backups
from instance_manager.archive.codecs import Codec
from instance_manager.archive.layout import Layout
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import ArchivePlan, RecoveryPlan, archive_server_name

pytestmark = pytest.mark.timeout(240)


def backups(cluster: LocalCluster) -> tuple[Listed, ...]:
    layout = Layout(archive_server_name(cluster.plan), Codec("zstd"))
    found = asyncio.run(list_backups(DirectoryStore(cluster.layout.archive), layout, deadline_s=10))
    return tuple(each for each in found if each.state == "done")


def test_a_cluster_begins_at_a_moment_of_another_one_and_archives_for_itself() -> None:
    with running_cluster(instances=1, archive=ArchivePlan()) as source:
        # The moment of its schedule that lies behind is made up for at once.
        eventually(source, lambda: backups(source), within_s=90, what="the first backup")
        sql(source, "CREATE TABLE accounts AS SELECT n FROM generate_series(1, 1000) n")
        before = sql(source, "SELECT clock_timestamp()")
        time.sleep(0.05)
        sql(source, "DELETE FROM accounts")
        sql(source, "INSERT INTO accounts VALUES (-1)")
        plan = RecoveryPlan(
            directory=str(source.layout.archive), server_name=archive_server_name(source.plan), target_time=before
        )
        with running_cluster(instances=2, archive=ArchivePlan(), recovery=plan) as recovered:
            assert sql(recovered, "SELECT count(*), min(n) FROM accounts") == "1000|1"
            sql(recovered, "INSERT INTO accounts VALUES (2000)")
            eventually(
                recovered,
                lambda: (
                    {sql(recovered, "SELECT count(*) FROM accounts", on=name) for name in recovered.names} == {"1001"}
                ),
                within_s=30,
                what="every instance has the rows",
            )
            # Its own archive begins on its own timeline, and a backup of its own can be taken in it.
            (first,) = eventually(recovered, lambda: backups(recovered), within_s=90, what="a backup of its own")
            assert first.info is not None
            assert first.info.timeline == 2
            assert first.info.system_identifier == backups(source)[0].info.system_identifier  # type: ignore[union-attr]
        assert sql(source, "SELECT count(*) FROM accounts") == "1", "the source goes on"
        assert not (source.layout.archive / "demo/wals/00000002.history.zst").exists(), "and its archive is only read"
