"""`/metrics` of a whole cluster, scraped by a real Prometheus: what dashboards and alerts ask for is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cluster_tools import Writer, http_get, psql, stopped, wait_other_primary

from instance_manager.demo.cluster import LocalCluster

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/metrics"), str(ROOT / "deploy/monitoring")]

from community_dashboard import QUERIES  # noqa: E402
from dashboard import dashboard  # noqa: E402
from dashboard_panels import substituted  # noqa: E402
from monitoring_tools import promtool  # noqa: E402
from prometheus_server import prometheus_of  # noqa: E402

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)

SCRAPES = 4
VARIABLES = {"namespace": "n", "cluster": "pg", "pod": ".*", "__rate_interval": "30s"}
# Of things that a healthy cluster without an archive does not have; each says why it may be empty.
MAY_BE_EMPTY = {
    "instance_manager_archive_": "there is no archive",
    "instance_manager_certificate_days_left": "there is no TLS",
    "instance_manager_collector_success": "no collector fails",
    "instance_manager_decisions_total": "none changes while all is well",
}


def test_every_query_of_both_dashboards_returns_data_after_a_failover(
    lasting_cluster: LocalCluster, tmp_path: Path
) -> None:
    old = lasting_cluster.wait_primary()
    lasting_cluster.kill(old)
    wait_other_primary(lasting_cluster, old)
    lasting_cluster.start(old)
    lasting_cluster.wait_redundant(75)
    with (
        Writer(lasting_cluster, "metrics_are_told") as writer,
        prometheus_of(lasting_cluster, tmp_path, namespace="n", name="pg") as prometheus,
    ):
        writer.wait_for_more(20)
        told = psql(
            lasting_cluster.connection_string(),
            "CREATE TABLE IF NOT EXISTS measured (id int); INSERT INTO measured VALUES (1), (2); "
            "UPDATE measured SET id = 3 WHERE id = 1; DELETE FROM measured",
        )
        assert told.code == 0, str(told)
        wanted = f"min(count_over_time(instance_manager_build_info[1m])) >= {SCRAPES} and count(up == 1) == 3"
        lasting_cluster.wait(lambda: prometheus.ask(wanted), 60, "all three are scraped")
        empty = [query for query in QUERIES if not prometheus.ask(query)]
        assert not empty, f"of dashboard 9628: {empty}"
        empty = []
        for panel in dashboard()["panels"]:
            for target in panel.get("targets", []):
                expr = substituted(target["expr"], VARIABLES)
                if not prometheus.ask(expr) and not any(why in expr for why in MAY_BE_EMPTY):
                    empty.append(f"{panel['title']}: {expr}")
        assert not empty, "\n".join(empty)
        # Who is primary is told by one, and how it became so by phases.
        assert prometheus.ask("sum(instance_manager_accepts_writes) == 1")
        phases = prometheus.ask("instance_manager_failover_phase_seconds_count >= 1")
        assert {each["metric"]["phase"] for each in phases} >= {"suspicion", "election", "promotion", "opening"}
        assert prometheus.ask('instance_manager_failovers_total{kind="election"} >= 1')


def test_promtool_finds_nothing_wrong_in_what_is_our_own(lasting_cluster: LocalCluster) -> None:
    for name in lasting_cluster.names:
        answer = http_get(lasting_cluster, name, "/metrics")
        assert answer.status == 200
        _, report = promtool("check", "metrics", stdin=answer.body.encode())
        assert "error while linting" not in report, report
        assert not [line for line in report.splitlines() if line.startswith("instance_manager_")], report


def test_a_scrape_of_a_frozen_postgres_tells_the_rest_within_a_second(lasting_cluster: LocalCluster) -> None:
    standby = lasting_cluster.standbys()[0]
    found = lasting_cluster.processes(standby)
    with stopped(*(each for each in found.everything if each not in (found.supervisor, found.agent))):
        for _ in range(3):
            answer = http_get(lasting_cluster, standby, "/metrics")
            assert answer.status == 200
            assert answer.took_s < 1.0
            assert "\npg_up 0\n" in answer.body
            assert '\ninstance_manager_collector_success{collector="connect",database="postgres"} 0\n' in answer.body
            assert '\ninstance_manager_role{role="standby"} 1\n' in answer.body
