"""Who gets in: applications through a multi-host string, the superuser not over TCP, monitoring with its rights only."""

from __future__ import annotations

import pytest
from cluster_tools import psql, superuser_sql, target_of

from instance_manager.demo.cluster import LocalCluster
from instance_manager.postgres.host_based_access import MONITORING_ROLE, REPLICATION_ROLE

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)


def test_a_multi_host_string_reaches_the_primary(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    port = psql(lasting_cluster.connection_string(), "SELECT current_setting('port')").out
    assert port == str(lasting_cluster.plan.member(primary).postgres_port)


def test_the_application_owns_its_database(lasting_cluster: LocalCluster) -> None:
    owner = psql(
        lasting_cluster.connection_string(),
        "SELECT current_database(), pg_get_userbyid(datdba), rolsuper FROM pg_database, pg_roles "
        "WHERE datname = current_database() AND rolname = current_user",
    )
    assert owner.out == "app|app|f"


@pytest.mark.parametrize("user", ["postgres", REPLICATION_ROLE])
def test_neither_superuser_nor_replication_logs_in_to_the_application_over_tcp(
    lasting_cluster: LocalCluster, user: str
) -> None:
    for name in lasting_cluster.names:
        told = psql(target_of(lasting_cluster, name, user=user), "SELECT 1")
        assert told.code != 0
        assert "pg_hba.conf rejects connection" in told.err


def test_a_wrong_password_is_refused(lasting_cluster: LocalCluster) -> None:
    target = target_of(lasting_cluster, lasting_cluster.wait_primary()).replace("passfile=", "password=wrong passfile=")
    assert "password authentication failed" in psql(target, "SELECT 1").err


def test_the_monitoring_role_may_look_and_nothing_else(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    roles = "SELECT pg_has_role('{0}', 'pg_monitor', 'USAGE'), rolsuper, rolcreatedb, rolcreaterole, rolreplication FROM pg_roles WHERE rolname = '{0}'"
    assert superuser_sql(lasting_cluster, primary, roles.format(MONITORING_ROLE)) == "t|f|f|f|f"
    password = (lasting_cluster.layout.secrets / "monitoring").read_text(encoding="utf-8")
    member = lasting_cluster.plan.member(primary)
    target = f"host=127.0.0.1 port={member.postgres_port} user={MONITORING_ROLE} dbname=postgres password={password}"
    assert psql(target, "SELECT count(*) > 0 FROM pg_stat_activity").out == "t"
    assert "read-only transaction" in psql(target, "CREATE TEMP TABLE t (id int)").err


def test_passwords_are_kept_as_scram_verifiers(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    kinds = "SELECT DISTINCT left(rolpassword, 14) FROM pg_authid WHERE rolpassword IS NOT NULL"
    assert superuser_sql(lasting_cluster, primary, kinds) == "SCRAM-SHA-256$"
