"""What the processes of an instance write: one schema, no secret, and as much as was asked for."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from cluster_harness import eventually, sql
from cluster_tools import ask, done, log_end, psql, target_of

from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)

SCHEMA = ["time", "level", "instance", "process", "message", "fields"]
SECRET = "hunter2-Xq9"


def lines(cluster: LocalCluster, name: str, *, offset: int = 0) -> list[dict[str, Any]]:
    """All of them that are whole, Postgres's too: a line that is no JSON fails the test."""
    content = cluster.layout.log(name).read_bytes()[offset:]
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def of_postgres(cluster: LocalCluster, name: str, offset: int) -> list[dict[str, Any]]:
    return [line for line in lines(cluster, name, offset=offset) if line["process"] == "postgres"]


def raise_warning(cluster: LocalCluster, text: str) -> None:
    sql(cluster, f"SET client_min_messages = error; DO $$ BEGIN RAISE WARNING '{text}'; END $$")


def test_every_line_has_the_one_schema(lasting_cluster: LocalCluster) -> None:
    for name in lasting_cluster.names:
        found = lines(lasting_cluster, name)
        assert {line["process"] for line in found} >= {"supervisor", "agent", "postgres"}
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


def test_what_postgres_says_goes_on_being_told_when_the_agent_is_killed(lasting_cluster: LocalCluster) -> None:
    name = lasting_cluster.wait_primary()
    offset = log_end(lasting_cluster, name)
    raise_warning(lasting_cluster, "before the kill")
    agent = lasting_cluster.processes(name).agent
    assert agent is not None
    processes.send([agent], signal.SIGKILL)
    raise_warning(lasting_cluster, "after the kill")

    def told() -> bool:
        messages = {line["message"] for line in of_postgres(lasting_cluster, name, offset)}
        return messages >= {"before the kill", "after the kill"}

    eventually(lasting_cluster, told, within_s=20, what="both are told")


def test_a_failed_statement_with_a_password_is_told_without_it(lasting_cluster: LocalCluster) -> None:
    name = lasting_cluster.wait_primary()
    offset = log_end(lasting_cluster, name)
    refused = psql(target_of(lasting_cluster, name), f"ALTER ROLE nobody PASSWORD '{SECRET}'", timeout_s=10)
    assert refused.code != 0

    def told() -> dict[str, Any] | None:
        found = of_postgres(lasting_cluster, name, offset)
        return next((line for line in found if line["fields"].get("ps") == "ALTER ROLE"), None)

    line = eventually(lasting_cluster, told, within_s=10, what="the refusal is told")
    assert line is not None
    assert (line["level"], line["message"]) == ("error", 'role "nobody" does not exist')
    assert line["fields"]["statement"] == "ALTER ROLE nobody PASSWORD '***'"
    assert SECRET.encode() not in lasting_cluster.layout.log(name).read_bytes()


def test_the_last_words_of_a_postgres_that_stops_are_told(lasting_cluster: LocalCluster) -> None:
    standby = next(name for name in lasting_cluster.names if name != lasting_cluster.wait_primary())
    offset = log_end(lasting_cluster, standby)
    done(lasting_cluster, standby, "fence", standby)
    try:

        def told() -> bool:
            messages = [line["message"] for line in of_postgres(lasting_cluster, standby, offset)]
            return "database system is shut down" in messages

        eventually(lasting_cluster, told, within_s=20, what="Postgres's last line")
    finally:
        done(lasting_cluster, standby, "unfence", standby)
