"""Cold starts: everything ends, in order or at once, and comes back with the same data and one primary."""

from __future__ import annotations

import signal
from functools import partial

import pytest
import yaml
from cluster_harness import eventually
from cluster_tools import (
    Writer,
    done,
    everything_of,
    http_get,
    is_writable,
    log_end,
    messages,
    psql,
    record,
    superuser_sql,
    target_of,
)

from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)


def _remember(cluster: LocalCluster, table: str) -> None:
    told = psql(cluster.connection_string(), f"DROP TABLE IF EXISTS {table}; CREATE TABLE {table} AS SELECT 42 AS id")
    assert told.code == 0, str(told)


def _remembers(cluster: LocalCluster, table: str) -> bool:
    return psql(cluster.connection_string(), f"SELECT id FROM {table}").out == "42"  # noqa: S608


def _assert_one_primary(cluster: LocalCluster, primary: str) -> None:
    assert [name for name in cluster.names if is_writable(cluster, name)] == [primary]


def test_r14_after_an_orderly_end_of_all_the_cluster_comes_back_by_the_stamp_of_its_release(
    lasting_cluster: LocalCluster,
) -> None:
    _remember(lasting_cluster, "over_an_end")
    system = superuser_sql(
        lasting_cluster, lasting_cluster.wait_primary(), "SELECT system_identifier FROM pg_control_system()"
    )
    assert lasting_cluster.stop_all() == ()
    at_rest = record(lasting_cluster)
    assert at_rest.holder is None
    assert at_rest.release is not None, "a clean stop leaves a stamp (R4)"
    offsets = {name: log_end(lasting_cluster, name) for name in lasting_cluster.names}
    for name in reversed(lasting_cluster.names):
        lasting_cluster.start(name)
    primary = lasting_cluster.wait_redundant(60)
    _assert_one_primary(lasting_cluster, primary)
    assert _remembers(lasting_cluster, "over_an_end")
    assert record(lasting_cluster).epoch > at_rest.epoch
    assert superuser_sql(lasting_cluster, primary, "SELECT system_identifier FROM pg_control_system()") == system
    since = [line for name in lasting_cluster.names for line in messages(lasting_cluster, name, offset=offsets[name])]
    assert any(line.startswith("take_release: ") for line in since)
    assert not any(line.startswith("stand: ") for line in since), "nobody needs to be elected"


def test_r16_after_a_loss_of_power_the_holder_resumes_behind_a_later_epoch(lasting_cluster: LocalCluster) -> None:
    _remember(lasting_cluster, "over_a_power_failure")
    before = record(lasting_cluster)
    assert before.holder is not None
    holder = before.holder.name
    for name in lasting_cluster.names:
        processes.send(everything_of(lasting_cluster, name), signal.SIGKILL)
    for name in lasting_cluster.names:
        lasting_cluster.kill(name)
    offset = log_end(lasting_cluster, holder)
    lasting_cluster.start_all()
    primary = lasting_cluster.wait_redundant(60)
    now = record(lasting_cluster)
    assert now.epoch > before.epoch
    _assert_one_primary(lasting_cluster, primary)
    assert _remembers(lasting_cluster, "over_a_power_failure")
    if primary == holder:
        assert now.chain == before.chain, "the same log goes on"
        assert any(line.startswith("resume: epoch ") for line in messages(lasting_cluster, holder, offset=offset))


@pytest.mark.parametrize("first", ["primary", "standby"])
def test_a_cluster_starts_in_any_order_and_only_with_enough_of_it(lasting_cluster: LocalCluster, first: str) -> None:
    """Killed at once: a standby alone may not serve; the holder alone neither, for it cannot ask enough voters (R16)."""
    _remember(lasting_cluster, "in_any_order")
    before = record(lasting_cluster)
    assert before.holder is not None
    holder = str(before.holder.name)
    standbys = [name for name in lasting_cluster.names if name != holder]
    for name in (holder, *standbys):
        lasting_cluster.kill(name)
    order = [holder, *standbys] if first == "primary" else [*standbys, holder]
    lasting_cluster.start(order[0])
    lasting_cluster.wait(partial(lasting_cluster.status, order[0]), 20, f"{order[0]} answers")
    assert lasting_cluster.primary_status() is None or not is_writable(lasting_cluster, order[0])
    lasting_cluster.start(order[1])
    lasting_cluster.start(order[2])
    primary = lasting_cluster.wait_redundant(60)
    _assert_one_primary(lasting_cluster, primary)
    assert _remembers(lasting_cluster, "in_any_order")


def test_a_standby_that_is_stopped_and_started_is_missed_by_no_client(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    epoch = record(lasting_cluster).epoch
    standby = lasting_cluster.standbys()[0]
    with Writer(lasting_cluster, "while_a_standby_is_away") as writer:
        writer.wait_for_more()
        assert lasting_cluster.stop(standby) == 0
        writer.wait_for_more(20, within_s=5)
        lasting_cluster.start(standby)
        assert lasting_cluster.wait_redundant(60) == primary
        writer.wait_for_more()
    assert writer.missing() == set()
    assert record(lasting_cluster).epoch == epoch


def _has_another_agent(cluster: LocalCluster, name: str, than: int) -> bool:
    found = cluster.processes(name).agent
    return found is not None and found.pid != than


def _says_its_role(cluster: LocalCluster, name: str, role: str) -> bool:
    status = cluster.status(name)
    return status is not None and {each.name: each.role for each in status.instances}[name] == role


def test_an_agent_that_dies_leaves_postmaster_and_permit_alone(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    for name in lasting_cluster.names:
        epoch = record(lasting_cluster).epoch
        before = lasting_cluster.processes(name)
        assert before.agent is not None
        assert before.postmaster is not None
        offset = log_end(lasting_cluster, name)
        processes.send([before.agent], signal.SIGKILL)
        lasting_cluster.wait(
            partial(_has_another_agent, lasting_cluster, name, before.agent.pid), 15, f"{name} has a new agent"
        )
        role = "primary" if name == primary else "standby"
        lasting_cluster.wait(
            partial(_says_its_role, lasting_cluster, name, role), 20, f"the new agent of {name} knows its role"
        )
        after = lasting_cluster.processes(name)
        assert after.postmaster is not None
        assert after.postmaster.pid == before.postmaster.pid
        assert lasting_cluster.wait_redundant(60) == primary
        assert record(lasting_cluster).epoch == epoch
        assert not any("was killed" in line for line in messages(lasting_cluster, name, offset=offset))


def _restarts_told(cluster: LocalCluster, name: str) -> int:
    metrics = http_get(cluster, name, "/metrics").body
    (line,) = [line for line in metrics.splitlines() if line.startswith("instance_manager_agent_restarts_total ")]
    return int(line.split()[1])


@pytest.mark.parametrize("role", ["standby", "primary"])
def test_what_an_agent_that_died_had_written_and_not_reloaded_is_told_to_postgres_by_the_next(
    lasting_cluster: LocalCluster, role: str
) -> None:
    """As if it had died between writing access rules and the reload: clients would stay out for ever. A changed configuration
    that the agent before never took over counts as well, its access rules too; and a primary's gate is open all the time."""
    cluster = lasting_cluster
    primary = cluster.wait_redundant(60)
    name = primary if role == "primary" else cluster.standbys()[0]
    data, file = cluster.layout.data(name), cluster.layout.config(name)
    rules, configuration = data / "pg_hba.conf", file.read_text()
    opened = rules.read_text()
    target, other = target_of(cluster, name), target_of(cluster, name, database="postgres")
    # No password is known for that database: it is asked for, or the rules refuse before.
    assert "no password" in psql(other, "SELECT 1").err
    epoch, offset = record(cluster).epoch, log_end(cluster, name)
    postmaster = cluster.processes(name).postmaster
    agent = cluster.processes(name).agent
    restarts = _restarts_told(cluster, name)
    assert postmaster is not None
    assert agent is not None
    try:
        rules.write_text("".join(line for line in opened.splitlines(True) if not line.startswith("host")))
        processes.send([postmaster], signal.SIGHUP)
        eventually(cluster, lambda: psql(target, "SELECT 1").code != 0, within_s=10, what="clients are kept out")
        rules.write_text(opened)
        changed = yaml.safe_load(configuration)
        changed["postgres"].setdefault("parameters", {})["work_mem"] = "7MB"
        changed["postgres"]["host_based_access"] = ["host postgres all all reject"]
        file.write_text(yaml.safe_dump(changed))
        processes.send([agent], signal.SIGKILL)
        eventually(cluster, lambda: psql(target, "SELECT 1").code == 0, within_s=20, what="clients are let in")
        eventually(cluster, lambda: psql(target, "SHOW work_mem").out == "7MB", within_s=20, what="the new value")
        eventually(cluster, lambda: "rejects" in psql(other, "SELECT 1").err, within_s=20, what="the new access rule")
        found = cluster.processes(name).postmaster
        assert found is not None
        assert found.pid == postmaster.pid
        assert _restarts_told(cluster, name) == restarts + 1
        cluster.wait(partial(_says_its_role, cluster, name, role), 20, f"the new agent of {name} knows its role")
        assert record(cluster).epoch == epoch
        if role == "primary":
            since = messages(cluster, name, offset=offset)
            assert any("the agent restarted over a serving primary" in line for line in since)
            assert not any(line.startswith("open: ") for line in since), "it was open already"
    finally:
        rules.write_text(opened)
        file.write_text(configuration)
        done(cluster, name, "reload")
