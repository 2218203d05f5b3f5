"""Probes and status over HTTP, of a primary and of a standby, also while Postgres is frozen."""

from __future__ import annotations

import json
import time

import pytest
from cluster_tools import http_get, stopped

from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)

PROBES = ("/livez", "/readyz", "/startupz", "/primary", "/replica?lag=16MB", "/read-only", "/lag", "/status")


@pytest.mark.parametrize(
    ("path", "of_primary", "of_standby"),
    [
        ("/livez", 200, 200),
        ("/readyz", 200, 200),
        ("/startupz", 200, 200),
        ("/primary", 200, 503),
        ("/replica", 503, 200),
        ("/replica?lag=16MB", 503, 200),
        ("/read-only", 200, 200),
        ("/status", 200, 200),
        ("/lag", 200, 200),
        ("/lag?max=16MB", 200, 200),
        ("/replica?lag=much", 400, 400),
        ("/control/pause", 404, 404),
    ],
)
def test_a_route_answers_by_the_role(
    lasting_cluster: LocalCluster, path: str, of_primary: int, of_standby: int
) -> None:
    primary = lasting_cluster.wait_primary()
    for name in lasting_cluster.names:
        answer = http_get(lasting_cluster, name, path)
        assert answer.status == (of_primary if name == primary else of_standby), f"{name}: {answer.body}"
        assert answer.took_s < 1.0


def test_status_over_http_is_all_that_the_command_shows(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    told = json.loads(http_get(lasting_cluster, primary, "/status").body)
    assert told["primary"] == told["told_by"] == primary
    assert told["quorum"] == 1
    assert len(told["voters"]) == 2
    assert told["seconds_to_fence"] > 0
    assert told["synchronous_standby_names"]
    assert told["decisions"]
    assert {instance["name"] for instance in told["instances"]} == set(lasting_cluster.names)


def test_lag_tells_bytes(lasting_cluster: LocalCluster) -> None:
    standby = lasting_cluster.standbys()[0]
    told = json.loads(http_get(lasting_cluster, standby, "/lag").body)
    assert 0 <= told["lag_bytes"] < 16 * 1024 * 1024
    assert told["replay_lag_bytes"] >= 0


@pytest.mark.parametrize("role", ["primary", "standby"])
def test_every_probe_answers_within_a_second_while_the_postmaster_is_frozen(
    lasting_cluster: LocalCluster, role: str
) -> None:
    primary = lasting_cluster.wait_primary()
    name = primary if role == "primary" else lasting_cluster.standbys()[0]
    postmaster = lasting_cluster.processes(name).postmaster
    assert postmaster is not None
    # For less than the time after which the primary's manager gives up such a Postgres (health_timeout_s).
    ends_s = processes.now_s() + 2.0
    with stopped(postmaster):
        while processes.now_s() < ends_s:
            for path in PROBES:
                answer = http_get(lasting_cluster, name, path)
                assert answer.took_s < 1.0, f"{path} took {answer.took_s:.2f} s"
            # Beyond 500 requests a second they are refused.
            time.sleep(0.05)
        assert http_get(lasting_cluster, name, "/livez").status == 200
    assert lasting_cluster.wait_redundant(60) == primary


def test_every_probe_answers_within_a_second_while_all_of_postgres_is_frozen(lasting_cluster: LocalCluster) -> None:
    """Until the manager itself stops waiting for it, and after that."""
    primary = lasting_cluster.wait_primary()
    found = lasting_cluster.processes(primary)
    manager = {process.pid for process in (found.supervisor, found.agent) if process is not None}
    with stopped(*(process for process in found.everything if process.pid not in manager)):
        lasting_cluster.wait(
            lambda: (
                all(http_get(lasting_cluster, primary, path).took_s < 1.0 for path in PROBES)
                and http_get(lasting_cluster, primary, "/primary").status == 503
            ),
            20,
            "the frozen primary is no primary any more, and says so in time",
        )
    assert lasting_cluster.wait_redundant(60) in lasting_cluster.names
