"""components/tls in a cluster that runs: Secrets as cert-manager leaves them, clients that verify, and control over the network."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from control_plane import ControlPlane
from kubernetes_cluster import CLUSTER, DEPLOY, KubernetesCluster, relative
from pod_runner import PodRunner

from instance_manager import certificates
from instance_manager.certificates import REPLICATION, Wanted

LOG_LINES_SHOWN = 80
CONTROL_PORT = 8010

pytestmark = pytest.mark.timeout(240)


class TlsCluster(KubernetesCluster):
    """The base with the component, and the sections `tls` and `control` of overlays/tls."""

    @property
    def certificates(self) -> Path:
        return self.directory / "certificates"

    def install(self, *, instances: int = 3) -> None:
        services = [f"{CLUSTER}-{role}.{self.namespace}.svc" for role in ("rw", "ro", "r")]
        wanted = (
            Wanted(path="pg-tls", common_name=CLUSTER, names=(f"*.{CLUSTER}.{self.namespace}.svc", *services)),
            REPLICATION,
            certificates.user("administrator"),
        )
        certificates.make(self.certificates, wanted, cluster=CLUSTER, renew=False)
        for secret, folder in (("pg-tls", "pg-tls"), ("pg-replication-tls", "replication")):
            self.kubectl("create", "secret", "generic", secret, f"--from-file={self.certificates / folder}")
        super().install(instances=instances)

    def write_overlay(self) -> Path:
        overlay = super().write_overlay()
        shown = yaml.safe_load((DEPLOY / "overlays/tls/instance-manager.yaml").read_text())
        for name, changes in (
            ("instance-manager.yaml", {key: shown[key] for key in ("tls", "control")}),
            ("kustomization.yaml", {"components": [relative(DEPLOY / "components/tls", overlay)]}),
        ):
            written = yaml.safe_load((overlay / name).read_text())
            (overlay / name).write_text(yaml.safe_dump({**written, **changes}))
        return overlay

    def control(self, *arguments: str) -> tuple[int, str]:
        """`instance-manager` of a user in a pod; its exit code, and what it said."""
        argv = [sys.executable, "-m", "instance_manager", *arguments]
        done = self.runner.run_here([*self.runner.as_client(self.namespace), *argv], deadline_s=30)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster(
    control_plane: ControlPlane, runner: PodRunner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TlsCluster]:
    name = f"tls-{os.getpid()}"
    control_plane.make_namespace(name)
    made = TlsCluster(control_plane, runner, name, tmp_path_factory.mktemp(name))
    try:
        made.install()
        made.wait_redundant()
        yield made
    except BaseException:
        print(made.story(LOG_LINES_SHOWN))
        raise
    finally:
        runner.remove_namespace(name)


def test_clients_verify_the_services_and_come_by_tls_only(cluster: TlsCluster) -> None:
    authority = cluster.certificates / "pg-tls" / "ca.crt"
    verified = f"sslmode=verify-full sslrootcert={authority}"
    service = f"{CLUSTER}-rw.{cluster.namespace}.svc"
    by_tls = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    assert cluster.psql(by_tls, host=service, options=verified) == "t"
    with pytest.raises(AssertionError, match="no encryption"):
        cluster.psql("SELECT 1", host=service, options="sslmode=disable")


def test_standbys_replicate_by_certificate(cluster: TlsCluster) -> None:
    primary = cluster.wait_redundant()
    lines = (cluster.worker(primary).volume("data") / "instance" / "data" / "pg_hba.conf").read_text().splitlines()
    rules = [line.split() for line in lines if line.startswith("host") and "replication" in line.split()[1].split(",")]
    let_in = [rule for rule in rules if "reject" not in rule]
    assert let_in
    assert all(rule[0] == "hostssl" and rule[-1] == "cert" for rule in let_in)


def test_an_administrator_controls_over_the_network_and_nobody_else(cluster: TlsCluster) -> None:
    host = f"{CLUSTER}-0.{CLUSTER}.{cluster.namespace}.svc:{CONTROL_PORT}"
    code, said = cluster.control(
        "status", "--host", host, "--certificate", str(cluster.certificates / "control/administrator")
    )
    assert (code, f"{CLUSTER}-2" in said) == (0, True), said
    code, said = cluster.control("status", "--host", host, "--certificate", str(cluster.certificates / "replication"))
    assert code != 0, said
