"""The image as a container: the manager is PID 1, Postgres is ready, and both end in order."""

from __future__ import annotations

import json

import pytest
from image_container import Container
from image_engine import CommandFailed, Engine

GRACE_S = 30
"""Longer than the manager itself takes at most."""


def test_an_instance_becomes_ready_and_takes_what_an_application_writes(ready: Container) -> None:
    ready.sql("CREATE TABLE kept (n int); INSERT INTO kept VALUES (17)")
    assert ready.sql("SELECT n FROM kept") == "17"
    assert json.loads(ready.fetch("/readyz"))["role"] == "primary"


def test_the_supervisor_is_the_first_process_of_the_container(ready: Container) -> None:
    command_line = ready.execute("cat", "/proc/1/cmdline").split("\0")
    assert command_line[1:4] == ["-I", "-m", "instance_manager.supervisor"]


def test_no_process_is_root_or_holds_a_capability(ready: Container) -> None:
    statuses = ready.execute("sh", "-c", "cat /proc/[0-9]*/status").splitlines()
    found: dict[str, set[str]] = {}
    for line in statuses:
        key, _, value = line.partition(":")
        found.setdefault(key, set()).add(value.strip())
    assert found["Uid"] == {"999\t999\t999\t999"}
    assert found["Gid"] == {"999\t999\t999\t999"}
    assert {int(value, 16) for key in ("CapEff", "CapPrm", "CapInh", "CapAmb") for value in found[key]} == {0}
    assert found["NoNewPrivs"] == {"1"}
    assert len([line for line in statuses if line.startswith("Name:\tpostgres")]) > 3, "Postgres was not among them"


def test_the_root_filesystem_is_read_only(ready: Container) -> None:
    with pytest.raises(CommandFailed, match="Read-only file system"):
        ready.execute("touch", "/opt/instance-manager/file")


def test_in_the_container_psql_and_status_need_no_option(ready: Container) -> None:
    assert ready.execute("psql", "-XAtc", "SELECT current_user").strip() == "postgres"
    assert json.loads(ready.execute("instance-manager", "status", "--json"))["primary"] == "one-0"


def test_the_health_check_answers(ready: Container, engine: Engine) -> None:
    (image,) = json.loads(engine.call("image", "inspect", engine.image))
    config = image.get("Healthcheck") or image["Config"]["Healthcheck"]
    assert config["Test"][0] == "CMD"
    assert json.loads(ready.execute(*config["Test"][1:]))["ok"] is True


def test_the_health_check_fails_where_nobody_answers(ready: Container) -> None:
    with pytest.raises(CommandFailed, match="refused"):
        ready.execute(
            "env", "INSTANCE_MANAGER_HTTP_PORT=1", "python", "-I", "-S", "/opt/instance-manager/healthcheck.py"
        )


def test_a_stop_ends_in_order_within_the_grace_and_postgres_was_shut_down(fresh: Container) -> None:
    assert fresh.control_data()["Database cluster state"] == "in production"
    took_s = fresh.stop(GRACE_S)
    assert fresh.exit_code() == 0, fresh.logs()
    assert took_s < GRACE_S
    assert fresh.control_data()["Database cluster state"] == "shut down"


def test_a_killed_container_comes_back_with_all_that_was_acknowledged(fresh: Container) -> None:
    fresh.sql("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n")
    assert fresh.kill_and_restart() == 137
    assert fresh.sql("SELECT count(*) FROM kept") == "1000"
