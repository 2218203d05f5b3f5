"""What is changed in a running cluster while rows are written: the password of replication, and TLS, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import yaml
from cluster_harness import FAST_DIRECTORY, START_DEADLINE_S, eventually, logs
from cluster_tools import Writer, peer_call, psql, superuser_sql, target_of

from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import loopback_plan, ports_needed
from instance_manager.demo.ports import choose_base_port
from instance_manager.postgres.host_based_access import REPLICATION_ROLE

pytestmark = pytest.mark.timeout(400)

WITHIN_S = 60.0
STREAMS = "SELECT pid FROM pg_stat_replication WHERE state = 'streaming'"


def change_configuration(cluster: LocalCluster, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = cluster.layout.config(name)
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two instances whose certificates are there, and not yet configured."""
    plan = loopback_plan(
        instances=2,
        base_port=choose_base_port(ports_needed(2, tls=True), None, spread=True),
        parameters=(("shared_buffers", "32MB"),),
        tls=True,
    )
    with LocalCluster.create(plan, below=FAST_DIRECTORY) as made:
        for name in made.names:
            change_configuration(made, name, lambda content: (content.pop("tls"), content.pop("control")))
        made.start_all()
        try:
            made.wait_redundant(START_DEADLINE_S)
            yield made
        except BaseException:
            print(logs(made))
            raise


def configure_tls(cluster: LocalCluster, **section: str) -> None:
    for name in cluster.names:
        own = {"directory": str(cluster.layout.certificates / "members" / name), **section}
        change_configuration(cluster, name, partial(dict.update, tls=own))


def restart_one_by_one(cluster: LocalCluster) -> None:
    """Standbys first; the primary hands over. After each the cluster is redundant again."""
    primary = cluster.wait_redundant(WITHIN_S)
    for name in (*cluster.standbys(), primary):
        assert cluster.stop(name) == 0
        cluster.start(name)
        cluster.wait_redundant(WITHIN_S)


def test_the_password_of_replication_is_replaced_while_rows_are_written(cluster: LocalCluster) -> None:
    """Who streams goes on; whoever connects anew does so by the new one, and nobody by the old one."""
    primary = cluster.wait_redundant(WITHIN_S)
    secret = cluster.layout.secrets / "replication"
    old, new = secret.read_text(), "a-new-secret-of-replication"
    verifier = f"SELECT rolpassword FROM pg_authid WHERE rolname = '{REPLICATION_ROLE}'"  # noqa: S608
    before, streams = superuser_sql(cluster, primary, verifier), superuser_sql(cluster, primary, STREAMS)

    def may_replicate(password: str) -> bool:
        # A line of a passfile would be taken first.
        target = f"{target_of(cluster, primary, user=REPLICATION_ROLE, database='postgres')} replication=true"
        target = target.replace(f"passfile={cluster.layout.password_file}", f"password={password}")
        return psql(target, "IDENTIFY_SYSTEM").code == 0

    assert may_replicate(old)
    with Writer(cluster, "over_a_rotation") as writer:
        secret.write_text(new)
        eventually(cluster, lambda: may_replicate(new), within_s=WITHIN_S, what="the new password counts")
        assert not may_replicate(old)
        assert superuser_sql(cluster, primary, verifier).startswith("SCRAM-SHA-256$")
        assert superuser_sql(cluster, primary, verifier) != before
        assert superuser_sql(cluster, primary, STREAMS) == streams, "who streams goes on"
        writer.wait_for_more(20)
        superuser_sql(cluster, primary, "SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
        eventually(
            cluster,
            lambda: superuser_sql(cluster, primary, STREAMS) not in ("", streams),
            within_s=WITHIN_S,
            what="the standby streams again, by the new password",
        )
        assert cluster.wait_redundant(WITHIN_S) == primary
        writer.wait_for_more(20)
    assert writer.missing() == set()


def test_tls_is_turned_on_in_a_running_cluster_in_two_rounds(cluster: LocalCluster) -> None:
    """The order of docs/configuration.md: permissive everywhere, then required; between two restarts members with and without it agree."""
    with Writer(cluster, "while_tls_is_turned_on") as writer:
        configure_tls(cluster, mode="permissive")
        restart_one_by_one(cluster)
        assert psql(f"{cluster.connection_string()} sslmode=require", "SELECT 1").code == 0
        assert psql(f"{cluster.connection_string()} sslmode=disable", "SELECT 1").code == 0
        writer.wait_for_more(20)
        configure_tls(cluster, mode="required", replication=str(cluster.layout.certificates / "replication"))
        restart_one_by_one(cluster)
        writer.wait_for_more(20)
    assert writer.missing() == set()
    primary = cluster.wait_primary()
    assert "no encryption" in psql(f"{cluster.connection_string()} sslmode=disable", "SELECT 1").err
    walsender = "SELECT s.ssl, s.client_dn FROM pg_stat_ssl s JOIN pg_stat_replication r ON r.pid = s.pid"
    assert superuser_sql(cluster, primary, walsender) == "t|/CN=streaming_replica"
    assert peer_call(cluster, primary, "state", None).status == 403, "peers are asked by TLS only"
