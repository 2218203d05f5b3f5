"""What the processes of an instance write: one schema, no secret, and as much as was asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cluster_tools import ask, done, log_end

from instance_manager.demo.cluster import LocalCluster

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)

SCHEMA = ["time", "level", "instance", "process", "message", "fields"]


def lines(cluster: LocalCluster, name: str, *, offset: int = 0) -> list[dict[str, Any]]:
    """Of the instance manager's processes; Postgres's own lines are no JSON."""
    content = cluster.layout.log(name).read_bytes()[offset:].decode(errors="replace")
    return [json.loads(line) for line in content.splitlines() if line.startswith('{"time"')]


def test_every_line_has_the_one_schema(lasting_cluster: LocalCluster) -> None:
    for name in lasting_cluster.names:
        found = lines(lasting_cluster, name)
        assert {line["process"] for line in found} >= {"supervisor", "agent"}
        for line in found:
            assert list(line) == SCHEMA
            assert line["instance"] == name
            assert line["level"] in ("debug", "info", "warning", "error", "critical")


def test_no_secret_is_in_any_log(lasting_cluster: LocalCluster) -> None:
    secrets = [path.read_text().strip() for path in sorted(lasting_cluster.layout.secrets.iterdir()) if path.is_file()]
    secrets = [secret for secret in secrets if len(secret) >= 8]
    assert len(secrets) >= 3
    for name in lasting_cluster.names:
        content = lasting_cluster.layout.log(name).read_text(errors="replace")
        assert not [secret for secret in secrets if secret in content]


def test_the_level_changes_while_the_agent_runs(lasting_cluster: LocalCluster) -> None:
    name = lasting_cluster.wait_primary()
    assert f"{name} logs at error now, was info" in done(lasting_cluster, name, "log-level", "error")
    try:
        offset = log_end(lasting_cluster, name)
        done(lasting_cluster, name, "pause")
        done(lasting_cluster, name, "resume")
        assert not [line for line in lines(lasting_cluster, name, offset=offset) if line["process"] == "agent"]
    finally:
        done(lasting_cluster, name, "reload")
    assert f"{name} logs at info now, was info" in done(lasting_cluster, name, "log-level", "info")
    assert ask(lasting_cluster, name, "log-level", "loud").code == 2
