"""Standbys that come from an archive, in real clusters: the primary is read by none, and nothing of the source past the fork gets in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from cluster_harness import eventually, logs, running_cluster, sql
from cluster_tools import Writer, log_end, messages, record, volume, wait_other_primary
from test_cluster_archive import archive_state
from test_cluster_recovery import backups

from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import ArchivePlan, RecoveryPlan, archive_server_name

pytestmark = pytest.mark.timeout(300)
# So that a base backup that a primary serves is in its log.
TOLD = (("log_replication_commands", "on"),)


def base_backups(cluster: LocalCluster, name: str, *, offset: int = 0) -> int:
    """How many the instance was asked for since, by its Postgres's own log."""
    content = cluster.layout.log(name).read_bytes()[offset:].decode(errors="replace")
    found = 0
    for line in content.splitlines():
        entry = json.loads(line) if line.startswith("{") else {}
        found += entry.get("process") == "postgres" and "BASE_BACKUP" in str(entry.get("message"))
    return found


def archived_to(cluster: LocalCluster) -> int:
    state = archive_state(cluster)
    return 0 if state is None or state.position is None else state.position


def origins(cluster: LocalCluster, name: str, *, offset: int = 0) -> list[str]:
    """What the instance said of where its directory came from."""
    words = ("clone: from ", "from the primary: ", "archive copy failed: ")
    return [line for line in messages(cluster, name, offset=offset) if line.startswith(words)]


def lose_volume(cluster: LocalCluster, name: str) -> int:
    """The instance comes back with nothing; the end of its log before."""
    cluster.kill(name)
    root = cluster.layout.instance(name)
    shutil.rmtree(root)
    root.mkdir(mode=0o755)
    offset = log_end(cluster, name)
    cluster.start(name)
    return offset


def test_standbys_of_a_recovered_cluster_come_from_its_sources_archive_and_a_failover_to_one_loses_nothing() -> None:
    with running_cluster(instances=1, archive=ArchivePlan()) as source:
        eventually(source, lambda: backups(source), within_s=90, what="the first backup")
        sql(source, "CREATE TABLE accounts AS SELECT n FROM generate_series(1, 1000) n")
        moment = sql(source, "SELECT clock_timestamp()")
        sql(source, "SELECT pg_sleep(0.05)")
        sql(source, "DELETE FROM accounts")
        sql(source, "INSERT INTO accounts SELECT -n FROM generate_series(1, 100000) n")
        plan = RecoveryPlan(
            directory=str(source.layout.archive), server_name=archive_server_name(source.plan), target_time=moment
        )
        with running_cluster(recovery=plan, replicas_from="archive", parameters=TOLD) as cluster:
            primary = cluster.wait_primary()
            standbys = [name for name in cluster.names if name != primary]
            for name in standbys:
                (came,) = origins(cluster, name)
                assert came.startswith("clone: from backup "), came
                assert "of the source's archive" in came
                assert base_backups(cluster, primary) == 0, "the primary was read by nobody"
            with Writer(cluster, "w") as writer:
                writer.wait_for_more(20)
                cluster.kill(primary)
                new = wait_other_primary(cluster, primary)
                assert new in standbys
                writer.wait_for_more(20)
                cluster.start(primary)
                cluster.wait_redundant(90)
                writer.wait_for_more(5)
            assert writer.missing() == set()
            for name in cluster.names:
                eventually(
                    cluster,
                    lambda name=name: sql(cluster, "SELECT count(*), min(n) FROM accounts", on=name) == "1000|1",  # type: ignore[misc]
                    within_s=30,
                    what=f"{name} has what was before the moment, and nothing of the source behind it",
                )


def test_where_the_source_is_gone_the_standby_too_comes_to_the_last_piece_of_its_log() -> None:
    """Of the last segment the archive has what was streamed of it. The new cluster archives for itself meanwhile."""
    with running_cluster(instances=1, archive=ArchivePlan()) as source:
        eventually(source, lambda: backups(source), within_s=90, what="the first backup")
        sql(source, "CREATE TABLE accounts AS SELECT n FROM generate_series(1, 1000) n")
        end = sql(source, "SELECT pg_current_wal_flush_lsn() - '0/0'")
        eventually(source, lambda: archived_to(source) >= int(end), within_s=30, what="the last row is in the archive")
        source.kill(source.names[0])
        plan = RecoveryPlan(directory=str(source.layout.archive), server_name=archive_server_name(source.plan))
        with running_cluster(
            instances=2, recovery=plan, archive=ArchivePlan(), replicas_from="archive", parameters=TOLD
        ) as cluster:
            primary = cluster.wait_primary()
            (standby,) = cluster.standbys()
            *_, came = origins(cluster, standby)
            assert came.startswith("clone: from backup "), came
            assert base_backups(cluster, primary) == 0
            sql(cluster, "INSERT INTO accounts VALUES (2000)")
            eventually(
                cluster,
                lambda: sql(cluster, "SELECT count(*), max(n) FROM accounts", on=standby) == "1001|2000",
                within_s=30,
                what="the standby has every row",
            )


@pytest.fixture(scope="module")
def archiving_cluster() -> Iterator[LocalCluster]:
    """Two instances with an archive and a backup in it, whose standbys come from there."""
    with running_cluster(instances=2, archive=ArchivePlan(), replicas_from="archive", parameters=TOLD) as made:
        eventually(made, lambda: backups(made), within_s=120, what="the first backup")
        sql(made, "CREATE TABLE accounts AS SELECT n FROM generate_series(1, 1000) n")
        yield made


@pytest.fixture
def cluster(archiving_cluster: LocalCluster, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    failed_before = request.session.testsfailed
    archiving_cluster.wait_redundant(90)
    yield archiving_cluster
    if request.session.testsfailed > failed_before:
        print(logs(archiving_cluster))


def test_a_lost_volume_comes_back_from_the_clusters_own_archive(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()
    (standby,) = cluster.standbys()
    was, offset = volume(cluster, standby).member_id, log_end(cluster, primary)
    # While the archive grows all the time.
    with Writer(cluster, "busy") as writer:
        since = lose_volume(cluster, standby)
        sql(cluster, "INSERT INTO accounts VALUES (2000)")
        cluster.wait_redundant(120)
        writer.wait_for_more(5)
    assert writer.missing() == set()
    (came,) = origins(cluster, standby, offset=since)
    assert came.startswith("clone: from backup "), came
    assert "of this cluster's archive" in came
    assert base_backups(cluster, primary, offset=offset) == 0
    member_id = volume(cluster, standby).member_id
    assert member_id not in (None, was), "R6, P7: another directory is another member"
    assert member_id in record(cluster).voters
    sql(cluster, "INSERT INTO accounts VALUES (2001)")
    eventually(
        cluster,
        lambda: sql(cluster, "SELECT count(*) FROM accounts WHERE n > 1999", on=standby) == "2",
        within_s=30,
        what="it follows",
    )
    # And leads, without a loss.
    with Writer(cluster, "w") as writer:
        writer.wait_for_more(20)
        cluster.kill(primary)
        assert wait_other_primary(cluster, primary) == standby
        writer.wait_for_more(20)
        cluster.start(primary)
    assert writer.missing() == set()


def test_a_store_that_is_away_and_a_damaged_backup_cost_a_copy_of_the_primary_and_the_reason_is_told(
    cluster: LocalCluster,
) -> None:
    primary = cluster.wait_primary()
    (standby,) = cluster.standbys()
    archive, away = cluster.layout.archive, cluster.layout.directory / "away"
    archive.rename(away)
    try:
        offset = log_end(cluster, primary)
        since = lose_volume(cluster, standby)
        cluster.wait_redundant(120)
    finally:
        away.rename(archive)
    failed, came = origins(cluster, standby, offset=since)
    assert failed.startswith("archive copy failed: this cluster's archive: "), failed
    assert f"{primary} is copied instead" in failed
    assert came.startswith(f"clone: from {primary}: ")
    assert base_backups(cluster, primary, offset=offset) == 1

    for each in backups(cluster):
        (tar,) = (archive / archive_server_name(cluster.plan) / "base" / each.backup_id).glob("data_0001.tar*")
        content = bytearray(tar.read_bytes())
        content[len(content) // 2] ^= 0x55
        tar.chmod(0o600)
        tar.write_bytes(content)
    since = lose_volume(cluster, standby)
    cluster.wait_redundant(120)
    failed, came = origins(cluster, standby, offset=since)
    assert failed.startswith("archive copy failed: "), failed
    assert came.startswith(f"clone: from {primary}: ")
    assert [path.name for path in cluster.layout.instance(standby).glob("data*")] == ["data"], "nothing is left of it"
