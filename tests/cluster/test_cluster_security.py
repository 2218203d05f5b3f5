"""A cluster with TLS for everything: who reaches what, rotation without a restart, and secrets that show up nowhere."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_harness import FAST_DIRECTORY, START_DEADLINE_S, eventually, logs
from cluster_tools import psql, superuser_sql, target_of

from instance_manager import certificates
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import ADMINISTRATOR, loopback_plan, ports_needed
from instance_manager.demo.ports import choose_base_port

pytestmark = pytest.mark.timeout(240)

PLANTED = "planted-7f3a9c"
"""In every secret of this cluster; it must be found nowhere else."""
REPORTING_PASSWORD = f"{PLANTED}-reporting"
MANAGED = """
roles:
  - {{name: reporting, member_of: [pg_read_all_data], password_file: {directory}/reporting}}
databases:
  - {{name: orders, owner: reporting, extensions: [{{name: pg_trgm}}]}}
"""
WITHIN_S = 40.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    outside = tmp_path_factory.mktemp("declared")
    (outside / "reporting").write_text(REPORTING_PASSWORD)
    plan = loopback_plan(
        instances=2,
        base_port=choose_base_port(ports_needed(2, tls=True), None, spread=True),
        # A configuration value that is a secret, as extensions have them.
        parameters=(("shared_buffers", "32MB"), ("app.key", f"{PLANTED}-parameter")),
        tls=True,
        managed=MANAGED.format(directory=outside),
    )
    with LocalCluster.create(plan, below=FAST_DIRECTORY) as made:
        for path in made.layout.secrets.iterdir():
            path.write_text(f"{PLANTED}-{path.name}")
        made.layout.password_file.write_text(f"*:*:app:app:{PLANTED}-application\n")
        for name in made.names:
            config = made.layout.config(name)
            ldap = f'host all ldapuser 192.0.2.0/24 ldap ldapserver=192.0.2.1 ldapbasedn="dc=example" ldapbindpasswd="{PLANTED}-ldap"'
            config.write_text(
                config.read_text().replace("postgres:\n", f"postgres:\n  host_based_access: ['{ldap}']\n")
            )
        made.start_all()
        try:
            made.wait_redundant(START_DEADLINE_S)
            yield made
        except BaseException:
            print(logs(made))
            raise


def certificate_of(cluster: LocalCluster, name: str) -> Path:
    return cluster.layout.certificates / "members" / name


def shown_days_left(cluster: LocalCluster, name: str, use: str) -> float:
    status = cluster.status(name)
    assert status is not None
    return next(each.days_left or 0.0 for each in status.certificates if each.use == use)


def test_members_reach_each_other_and_clients_reach_them_by_tls_only(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()
    walsender = "SELECT s.ssl, s.version, s.client_dn FROM pg_stat_ssl s JOIN pg_stat_replication r ON r.pid = s.pid"
    assert superuser_sql(cluster, primary, walsender) == "t|TLSv1.3|/CN=streaming_replica"
    root = certificate_of(cluster, primary) / "ca.crt"
    verified = f"{cluster.connection_string()} sslmode=verify-full sslrootcert={root}"
    assert psql(verified, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").out == "t"
    assert "no encryption" in psql(f"{cluster.connection_string()} sslmode=disable", "SELECT 1").err


def test_the_password_of_replication_is_no_way_in_where_certificates_are(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()
    target = target_of(cluster, primary, user="streaming_replica", database="postgres")
    by_password = psql(f"{target} password={PLANTED}-replication sslmode=require", "SELECT 1")
    assert "connection requires a valid client certificate" in by_password.err


def command(cluster: LocalCluster, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "instance_manager", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"INSTANCE_MANAGER_SOCKET": "/nowhere"},
    )


def test_an_administrator_controls_over_the_network_and_the_read_routes_let_nobody(cluster: LocalCluster) -> None:
    member = cluster.plan.members[0]
    admin = cluster.layout.certificates / "control" / ADMINISTRATOR
    over_network = ("--host", f"{member.host}:{member.control_port}", "--certificate", str(admin))
    told = command(cluster, member.name, "status", "--json", *over_network)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["told_by"] == member.name
    stranger = (*over_network[:3], str(cluster.layout.certificates / "replication"))
    refused = command(cluster, member.name, "pause", *stranger)
    assert refused.returncode == 1
    assert "not among control.allowed_names" in refused.stderr
    connection = http.client.HTTPConnection(member.host, member.http_port, timeout=5)
    connection.request("POST", "/control/pause", "{}")
    assert connection.getresponse().status == 404
    connection.close()


def test_what_is_declared_is_there_on_the_primary_and_shown(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()

    eventually(
        cluster,
        lambda: (s := cluster.status(primary)) is not None and len(s.managed) == 3,
        within_s=WITHIN_S,
        what="what is declared was looked at",
    )
    reporting = psql(
        f"{target_of(cluster, primary, user='reporting', database='orders')} password={REPORTING_PASSWORD}",
        "SELECT similarity('abc', 'abd') > 0",
    )
    assert reporting.out == "t", reporting.err
    status = cluster.status(primary)
    assert status is not None
    assert all(each.problem is None for each in status.managed)


def test_secrets_show_up_nowhere(cluster: LocalCluster) -> None:
    """In no log, no status, no metrics, no command line, and no environment of any process of the cluster."""
    primary = cluster.wait_primary()
    psql(cluster.connection_string().replace("passfile=", "password=wrong passfile="), "SELECT 1")
    command(cluster, primary, "reload", "--socket", str(cluster.layout.control_socket(primary)))
    places: dict[str, str] = {}
    for name in cluster.names:
        places[f"log of {name}"] = cluster.layout.log(name).read_text(errors="replace")
        member = cluster.plan.member(name)
        for path in ("/status", "/metrics", "/readyz", "/cluster", "/patroni"):
            connection = http.client.HTTPConnection(member.host, member.http_port, timeout=5)
            connection.request("GET", path)
            places[f"{path} of {name}"] = connection.getresponse().read().decode(errors="replace")
            connection.close()
        for verb in ("status", "lease"):
            told = command(cluster, name, verb, "--socket", str(cluster.layout.control_socket(name)))
            assert told.returncode == 0
            places[f"{verb} of {name}"] = told.stdout + told.stderr
        for process in cluster.processes(name).everything:
            for file in ("cmdline", "environ"):
                content = Path(f"/proc/{process.pid}/{file}").read_bytes()
                places[f"{file} of {process.pid}"] = content.decode(errors="replace")
    activity = "SELECT string_agg(query, ' ') FROM pg_stat_activity"
    places["pg_stat_activity"] = superuser_sql(cluster, primary, activity)
    assert sum(len(text) for text in places.values()) > 10_000
    assert sum(place.startswith("environ") for place in places) >= 2 * 8
    assert [place for place, text in places.items() if PLANTED in text] == []
    keys = [path.read_text().splitlines()[1] for path in cluster.layout.certificates.rglob("tls.key")]
    assert len(keys) == 5
    assert [place for place, text in places.items() if any(key in text for key in keys)] == []


def test_certificates_are_renewed_in_place(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()
    before = {name: cluster.processes(name).postmaster for name in cluster.names}
    for name in cluster.names:
        shutil.rmtree(certificate_of(cluster, name))
    certificates.make(
        cluster.layout.certificates,
        [certificates.member(member.name, (member.host,)) for member in cluster.plan.members],
        cluster=cluster.plan.name,
        renew=False,
        lifetimes=certificates.Lifetimes(days=60),
    )
    eventually(
        cluster,
        lambda: all(
            shown_days_left(cluster, name, use) < 61
            for name in cluster.names
            for use in ("postgres", "peers", "control")
        ),
        within_s=WITHIN_S,
        what="the new certificates are in use",
    )
    served = certificate_of(cluster, primary) / "tls.crt"
    wanted = certificate_fingerprint(served.read_text())
    member = cluster.plan.member(primary)

    def postgres_shows_it() -> bool:
        shown = subprocess.run(
            ["openssl", "s_client", "-starttls", "postgres", "-connect", f"{member.host}:{member.postgres_port}"],
            input="",
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        return certificate_fingerprint(shown.stdout) == wanted

    eventually(cluster, postgres_shows_it, within_s=WITHIN_S, what="Postgres shows the new certificate")
    cluster.wait_redundant(WITHIN_S)
    assert {name: cluster.processes(name).postmaster for name in cluster.names} == before
    assert cluster.wait_primary() == primary


def certificate_fingerprint(text: str) -> str:
    """The first certificate of the text, without its line ends."""
    _, _, rest = text.partition("-----BEGIN CERTIFICATE-----")
    return "".join(rest.partition("-----END CERTIFICATE-----")[0].split())


def test_a_certificate_that_peers_would_refuse_is_told_and_not_used(cluster: LocalCluster) -> None:
    name = cluster.standbys()[0]
    good = certificate_of(cluster, name)
    kept = {path.name: path.read_bytes() for path in good.iterdir()}
    (good / "tls.crt").write_bytes((certificate_of(cluster, cluster.wait_primary()) / "tls.crt").read_bytes())

    def told() -> bool:
        status = cluster.primary_status()
        return status is not None and any("the new certificate is not used" in risk for risk in status.at_risk)

    eventually(cluster, told, within_s=WITHIN_S, what="the problem in what the primary tells")
    assert cluster.why_not_redundant() is None
    for file, content in kept.items():
        (good / file).write_bytes(content)
    eventually(cluster, lambda: not told(), within_s=WITHIN_S, what="no problem any more")


def test_changed_passwords_count_without_a_restart(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()
    before = cluster.processes(primary).postmaster
    assert before is not None
    secret = cluster.layout.secrets / "application"
    secret.write_text(f"{PLANTED}-application-2")
    target = f"host=127.0.0.1 port={cluster.plan.member(primary).postgres_port} dbname=app user=app"
    eventually(
        cluster,
        lambda: psql(f"{target} password={PLANTED}-application-2", "SELECT 1").out == "1",
        within_s=WITHIN_S,
        what="the new password lets in",
    )
    assert "password authentication failed" in psql(f"{target} password={PLANTED}-application", "SELECT 1").err
    after = cluster.processes(primary).postmaster
    assert after is not None
    assert after.pid == before.pid
    cluster.layout.password_file.write_text(f"*:*:app:app:{PLANTED}-application-2\n")


def test_a_failover_by_tls_is_as_any_other(cluster: LocalCluster) -> None:
    old = cluster.wait_primary()
    other = cluster.standbys()[0]
    told = command(cluster, old, "switchover", "--to", other, "--socket", str(cluster.layout.control_socket(old)))
    assert told.returncode == 0, told.stdout + told.stderr
    cluster.wait_redundant(WITHIN_S)
    assert cluster.wait_primary() == other
    eventually(
        cluster,
        lambda: (s := cluster.status(other)) is not None and [m.state for m in s.managed] == ["as declared"] * 3,
        within_s=WITHIN_S,
        what="the new primary keeps what is declared",
    )
