"""HAProxy and check_patroni, unchanged and as Patroni's documentation configures them, on a cluster of ours."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_tools import done, everything_of, other_primary, psql, record, wait_other_primary
from patroni_programs import HaProxy, check_patroni, running_haproxy

from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import APPLICATION
from instance_manager.demo.processes import now_s
from instance_manager.http.patroni import API_VERSION

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(240)

INTERVAL_S = 1.0
"""Of HAProxy's checks, with `rise 1` and `fall 1`."""
LOADED_S = 1.0
"""How long a check and a glance at the statistics may take on a busy machine of two cores."""


@pytest.fixture(scope="session")
def program() -> Path:
    return check_patroni()


def checked(program: Path, cluster: LocalCluster, name: str, *words: str) -> tuple[int, str]:
    """Nagios' code (0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN) and what was printed."""
    member = cluster.plan.member(name)
    ended = subprocess.run(
        [str(program), "-e", f"http://{member.host}:{member.http_port}", *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("check", "of_primary", "of_standby"),
    [
        ("cluster_has_leader", 0, 0),
        ("cluster_has_replica", 0, 0),
        ("cluster_has_replica --critical 1: --warning 2: --max-lag 16MB", 0, 0),
        ("cluster_has_replica --sync-critical 2: --sync-type quorum", 0, 0),
        ("cluster_has_replica --sync-critical 2: --sync-type any", 0, 0),
        ("cluster_has_replica --critical 3:", 2, 2),
        ("cluster_has_scheduled_action", 0, 0),
        ("cluster_is_in_maintenance", 0, 0),
        ("cluster_node_count --critical 3: --healthy-critical 3:", 0, 0),
        ("cluster_node_count --critical 4:", 2, 2),
        ("node_is_alive", 0, 0),
        ("node_is_leader", 0, 2),
        ("node_is_leader --is-standby-leader", 2, 2),
        ("node_is_pending_restart", 0, 0),
        ("node_is_primary", 0, 2),
        ("node_is_replica", 2, 0),
        ("node_is_replica --max-lag 16MB", 2, 0),
        ("node_is_replica --is-sync", 2, 0),
        ("node_is_replica --is-sync --sync-type quorum", 2, 0),
        ("node_is_replica --is-async", 2, 2),
        (f"node_patroni_version --patroni-version {API_VERSION}", 0, 0),
        ("node_patroni_version --patroni-version 1.0", 2, 2),
    ],
)
def test_a_check_of_check_patroni_tells_what_is_so(
    lasting_cluster: LocalCluster, program: Path, check: str, of_primary: int, of_standby: int
) -> None:
    primary, standby = lasting_cluster.wait_primary(), lasting_cluster.standbys()[0]
    assert checked(program, lasting_cluster, primary, *check.split())[0] == of_primary
    code, told = checked(program, lasting_cluster, standby, *check.split())
    assert code == of_standby, told


def test_check_patroni_knows_every_check_that_is_tried_here(program: Path) -> None:
    """So that a new one is not overlooked."""
    told = subprocess.run([str(program), "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert set(re.findall(r"^  ((?:cluster|node)_\w+)", told, re.MULTILINE)) == {
        "cluster_config_has_changed",
        "cluster_has_leader",
        "cluster_has_replica",
        "cluster_has_scheduled_action",
        "cluster_is_in_maintenance",
        "cluster_node_count",
        "node_is_alive",
        "node_is_leader",
        "node_is_pending_restart",
        "node_is_primary",
        "node_is_replica",
        "node_patroni_version",
        "node_tl_has_changed",
    }


def test_check_patroni_sees_a_pause_and_its_end(lasting_cluster: LocalCluster, program: Path) -> None:
    primary = lasting_cluster.wait_primary()
    done(lasting_cluster, primary, "pause")
    assert checked(program, lasting_cluster, primary, "cluster_is_in_maintenance")[0] == 2
    done(lasting_cluster, primary, "resume")
    assert checked(program, lasting_cluster, primary, "cluster_is_in_maintenance")[0] == 0


def test_check_patroni_sees_an_unchanged_configuration_and_a_changed_timeline(
    lasting_cluster: LocalCluster, program: Path, tmp_path: Path
) -> None:
    primary = lasting_cluster.wait_primary()
    state = ("--state-file", str(tmp_path / "state"))
    assert checked(program, lasting_cluster, primary, "cluster_config_has_changed", *state, "--save")[0] == 2
    assert checked(program, lasting_cluster, primary, "cluster_config_has_changed", *state)[0] == 0
    chain = record(lasting_cluster).chain
    assert chain is not None
    timeline = str(chain.current)
    assert checked(program, lasting_cluster, primary, "node_tl_has_changed", "--timeline", timeline)[0] == 0
    assert checked(program, lasting_cluster, primary, "node_tl_has_changed", "--timeline", "99")[0] == 2


def test_check_patroni_sees_a_lost_standby(lasting_cluster: LocalCluster, program: Path) -> None:
    primary, standby = lasting_cluster.wait_primary(), lasting_cluster.standbys()[0]
    done(lasting_cluster, primary, "fence", standby)
    lasting_cluster.wait(
        lambda: checked(program, lasting_cluster, primary, "cluster_has_replica", "--critical", "2:")[0] == 2,
        20,
        "the fenced standby counts no more",
    )
    assert checked(program, lasting_cluster, standby, "node_is_replica")[0] == 2
    assert checked(program, lasting_cluster, standby, "node_is_alive")[0] == 0


@pytest.fixture
def haproxy(lasting_cluster: LocalCluster, tmp_path: Path) -> Iterator[HaProxy]:
    with running_haproxy(lasting_cluster, tmp_path, interval_s=int(INTERVAL_S)) as proxy:
        primary = lasting_cluster.wait_primary()
        lasting_cluster.wait(lambda: _ready(proxy, primary), 20, "HAProxy has found the primary and both standbys")
        yield proxy


def _ready(proxy: HaProxy, primary: str) -> bool:
    try:
        return proxy.up("batman") == [primary] and len(proxy.up("replicas")) == 2
    except OSError:
        return False


def _through(cluster: LocalCluster, port: int) -> tuple[str, str]:
    """Whom a client meets behind HAProxy, and whether that one is in recovery."""
    target = (
        f"host=127.0.0.1 port={port} dbname={APPLICATION} user={APPLICATION} passfile={cluster.layout.password_file} "
        "connect_timeout=3"
    )
    told = psql(target, "SELECT inet_server_port(), pg_is_in_recovery()")
    assert told.code == 0, str(told)
    met, in_recovery = told.out.split("|")
    return next(name for name in cluster.names if cluster.plan.member(name).postgres_port == int(met)), in_recovery


def test_haproxy_leads_writers_to_the_primary_and_readers_to_the_standbys(
    lasting_cluster: LocalCluster, haproxy: HaProxy
) -> None:
    primary = lasting_cluster.wait_primary()
    standbys = sorted(set(lasting_cluster.names) - {primary})
    assert haproxy.up("batman") == [primary]
    assert sorted(haproxy.up("replicas")) == standbys
    assert _through(lasting_cluster, haproxy.primary_port) == (primary, "f")
    assert {_through(lasting_cluster, haproxy.replicas_port) for _ in range(6)} == {(name, "t") for name in standbys}


def _switch_over(cluster: LocalCluster, primary: str) -> None:
    done(cluster, primary, "switchover")


def _kill_all(cluster: LocalCluster, primary: str) -> None:
    processes.send(everything_of(cluster, primary), signal.SIGKILL)


@pytest.mark.parametrize("fault", [_switch_over, _kill_all], ids=["switchover", "kill-all"])
def test_haproxy_moves_traffic_to_the_new_primary_within_one_interval_of_its_checks(
    lasting_cluster: LocalCluster, haproxy: HaProxy, fault: Callable[[LocalCluster, str], None]
) -> None:
    old = lasting_cluster.wait_primary()
    fault(lasting_cluster, old)
    new = wait_other_primary(lasting_cluster, old)
    opened_s = now_s()
    while haproxy.up("batman") != [new]:
        assert now_s() - opened_s < INTERVAL_S + LOADED_S, f"{haproxy.up('batman')} after {now_s() - opened_s:.1f} s"
        time.sleep(0.02)
    assert other_primary(lasting_cluster, old) == new
