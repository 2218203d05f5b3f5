"""Failures of a real cluster, each from a client's point of view."""

from __future__ import annotations

import signal
from functools import partial

import pytest
from cluster_harness import eventually, sql

from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster

pytestmark = pytest.mark.timeout(180)


def test_a_row_is_on_every_standby_soon(cluster: LocalCluster) -> None:
    sql(cluster, "CREATE TABLE IF NOT EXISTS kept (id int); TRUNCATE kept; INSERT INTO kept VALUES (1)")
    primary = cluster.wait_primary()
    for name in cluster.names:
        if name != primary:
            eventually(cluster, partial(_holds_one, cluster, name), within_s=10, what=f"the row on {name}")


def _holds_one(cluster: LocalCluster, name: str) -> bool:
    return sql(cluster, "SELECT count(*) FROM kept", on=name) == "1"


def test_a_killed_primary_is_replaced_and_returns_as_a_standby(cluster: LocalCluster) -> None:
    old = cluster.wait_primary()
    sql(cluster, "CREATE TABLE IF NOT EXISTS survives (id int); INSERT INTO survives VALUES (1)")
    cluster.kill(old)
    new = eventually(cluster, lambda: _other_primary(cluster, old), within_s=20, what="another primary")
    assert sql(cluster, "SELECT count(*) FROM survives") == "1"
    cluster.start(old)
    assert cluster.wait_redundant(60) == new


def _other_primary(cluster: LocalCluster, old: str) -> str | None:
    status = cluster.primary_status()
    return status.primary if status is not None and status.accepts_clients and status.primary != old else None


def test_the_agent_of_the_primary_dies_and_nobody_outside_notices(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()
    before = cluster.processes(primary)
    assert before.agent is not None
    assert before.postmaster is not None
    processes.send([before.agent], signal.SIGKILL)
    sql(cluster, "CREATE TABLE IF NOT EXISTS unnoticed (id int); INSERT INTO unnoticed VALUES (1)")
    eventually(cluster, lambda: cluster.processes(primary).agent, within_s=10, what="a new agent")
    assert cluster.wait_redundant(30) == primary
    after = cluster.processes(primary)
    assert after.postmaster is not None
    assert after.postmaster.pid == before.postmaster.pid


def test_memory_stays_within_its_limits(cluster: LocalCluster) -> None:
    for name in cluster.names:
        found = cluster.processes(name)
        assert found.supervisor is not None
        assert found.agent is not None
        assert processes.resident_bytes(found.supervisor.pid) < 16 * 1024 * 1024
        assert processes.resident_bytes(found.agent.pid) < 56 * 1024 * 1024


def test_a_stopped_cluster_leaves_no_process_and_comes_back_with_its_rows(cluster: LocalCluster) -> None:
    sql(cluster, "CREATE TABLE IF NOT EXISTS kept_over (id int); TRUNCATE kept_over; INSERT INTO kept_over VALUES (1)")
    assert cluster.stop_all() == ()
    for name in cluster.names:
        assert cluster.processes(name).everything == ()
    cluster.start_all()
    cluster.wait_redundant(60)
    assert sql(cluster, "SELECT count(*) FROM kept_over") == "1"
