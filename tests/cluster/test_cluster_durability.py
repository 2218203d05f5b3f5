"""What a primary does without its standbys, by the durability that was chosen; clusters of one and two instances."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
from cluster_harness import PSQL, logs, running_cluster
from cluster_tools import (
    Writer,
    done,
    everything_of,
    is_writable,
    make_whole,
    psql,
    record,
    stopped,
    target_of,
    wait_other_primary,
)

from instance_manager.demo import plan
from instance_manager.demo.cluster import LocalCluster

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def shared_asynchronous_pair() -> Iterator[LocalCluster]:
    with running_cluster(instances=2, durability="asynchronous") as made:
        yield made


@pytest.fixture
def asynchronous_pair(shared_asynchronous_pair: LocalCluster, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    failed_before = request.session.testsfailed
    make_whole(shared_asynchronous_pair)
    yield shared_asynchronous_pair
    if request.session.testsfailed > failed_before:
        print(logs(shared_asynchronous_pair))


def _writable(cluster: LocalCluster) -> list[str]:
    return [name for name in cluster.names if is_writable(cluster, name)]


def test_preferred_goes_on_alone_when_every_standby_is_gone(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    standbys = lasting_cluster.standbys()
    with Writer(lasting_cluster, "written_alone") as writer:
        writer.wait_for_more()
        for name in standbys:
            lasting_cluster.kill(name)
        writer.wait_for_more(20)
        now = record(lasting_cluster)
        assert now.quorum == 0, "recorded before a commit is acknowledged alone (R7)"
        status = done(lasting_cluster, primary, "status")
        assert "no standby is a voter: commits are on one disk only, and nobody can be elected" in status
        for name in standbys:
            lasting_cluster.start(name)
        assert lasting_cluster.wait_redundant(75) == primary
        writer.wait_for_more()
    assert writer.missing() == set()


def test_required_lets_no_commit_return_while_every_standby_is_gone() -> None:
    with running_cluster(instances=2, durability="required") as cluster:
        primary = cluster.wait_primary()
        standby = cluster.standbys()[0]
        assert psql(cluster.connection_string(), "CREATE TABLE waits (id int)").code == 0
        before = record(cluster)
        cluster.kill(standby)
        with subprocess.Popen(
            [PSQL, "--no-psqlrc", "-q", "-c", "INSERT INTO waits VALUES (1)", target_of(cluster, primary)],
            stderr=subprocess.PIPE,
        ) as commit:
            try:
                # As long as it takes until `preferred` goes on alone, twice.
                with pytest.raises(subprocess.TimeoutExpired):
                    commit.wait(5)
                assert record(cluster).quorum == before.quorum == 1
                cluster.start(standby)
                assert commit.wait(60) == 0, "it returns once the standby has it"
            finally:
                commit.kill()
        cluster.wait_redundant(60)
        assert psql(target_of(cluster, standby), "SELECT count(*) FROM waits").out == "1"


def test_a_cluster_of_one_instance_serves_and_restarts() -> None:
    with running_cluster(instances=1) as cluster:
        (name,) = cluster.names
        now = record(cluster)
        assert (now.quorum, now.voters) == (0, frozenset())
        assert psql(cluster.connection_string(), "CREATE TABLE kept AS SELECT 1").code == 0
        assert "at risk: nothing" in done(cluster, name, "status")
        assert f"{name} was restarted and is primary" in done(cluster, name, "restart")
        assert cluster.stop(name) == 0
        cluster.start(name)
        cluster.wait_redundant(60)
        cluster.kill(name)
        cluster.start(name)
        cluster.wait_redundant(60)
        assert psql(cluster.connection_string(), "SELECT count(*) FROM kept").out == "1"
        assert record(cluster).epoch > now.epoch


def test_asynchronous_a_proven_death_is_taken_over_at_once(asynchronous_pair: LocalCluster) -> None:
    cluster = asynchronous_pair
    old = cluster.wait_primary()
    began_s = time.monotonic()
    cluster.kill(old)
    new = wait_other_primary(cluster, old)
    assert time.monotonic() - began_s < record(cluster).lease_duration_s, "not by time"
    assert _writable(cluster) == [new]
    cluster.start(old)
    assert cluster.wait_redundant(60) == new
    assert _writable(cluster) == [new]


def test_asynchronous_a_primary_cut_off_from_the_store_goes_on_or_is_replaced(asynchronous_pair: LocalCluster) -> None:
    """The other instance is asked not to take over (R11), or takes over by time: the outage must end while the fault lasts."""
    cluster = asynchronous_pair
    old = cluster.wait_primary()
    plan.disconnect_store(cluster.layout, old)
    try:
        ends_s = time.monotonic() + 12
        while time.monotonic() < ends_s:
            assert len(_writable(cluster)) <= 1
        cluster.wait(lambda: len(_writable(cluster)) == 1, 30, "one instance is writable")
    finally:
        plan.connect_store(cluster.layout, old)
    cluster.wait_redundant(30)
    assert len(_writable(cluster)) == 1


def test_r10_asynchronous_a_silent_holder_is_taken_over_by_time_and_never_two_are_writable(
    asynchronous_pair: LocalCluster,
) -> None:
    """All of it frozen: its lock is held, so nothing proves its death, and nothing of it can write."""
    cluster = asynchronous_pair
    old = cluster.wait_primary()
    began_s = time.monotonic()
    with stopped(*everything_of(cluster, old)):
        new = wait_other_primary(cluster, old)
        assert time.monotonic() - began_s > 0.8 * record(cluster).lease_duration_s - 2, "only by time"
        assert psql(target_of(cluster, new), "CREATE TABLE IF NOT EXISTS only_here (id int)").code == 0
    cluster.wait(lambda: not is_writable(cluster, old), 10, f"{old} is not writable")
    assert cluster.wait_redundant(20) == new
    assert _writable(cluster) == [new]


def test_two_instances_a_killed_primary_is_replaced_and_a_killed_standby_missed_by_nobody() -> None:
    with running_cluster(instances=2) as cluster:
        old = cluster.wait_primary()
        with Writer(cluster, "of_two") as writer:
            writer.wait_for_more()
            cluster.kill(old)
            new = wait_other_primary(cluster, old)
            writer.wait_for_more()
            cluster.start(old)
            assert cluster.wait_redundant(75) == new
            cluster.kill(old)
            writer.wait_for_more(20)
            assert cluster.primary() == new
        assert writer.missing() == set()
        assert _writable(cluster) == [new]
