"""A cluster that archives to S3 as overlays/production does, and takes its standbys from there, with a tablespace on the pods' volumes."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster_load import ClusterLoad
from control_plane import ControlPlane
from kube_processes import Program, wait_for
from kubernetes_cluster import CLUSTER, DEPLOY, KubernetesCluster
from pod_network import SWITCH_ADDRESS, PodNetwork
from pod_runner import PodRunner

from instance_manager.demo.processes import now_s

LOG_LINES_SHOWN = 80
BUCKET = "archive"
PORT = 9000
REGION = "us-east-1"
SPACE = "/var/lib/postgresql/space"
VERB = ("sh", "-c", 'POD_NAME="$(hostname)" exec instance-manager "$@"', "-")
CONFIGURATION = "/etc/instance-manager/instance-manager.yaml"
CHANGE_DEADLINE_S = 120.0
CREDENTIALS = "[default]\naws_access_key_id = testing\naws_secret_access_key = testing\n"

pytestmark = pytest.mark.timeout(400)


class ArchiveCluster(KubernetesCluster):
    """The base with the archive of overlays/production, its Secret, and standbys from there."""

    def install(self, *, instances: int = 3) -> None:
        credentials = self.directory / "credentials"
        credentials.write_text(CREDENTIALS)
        self.kubectl("create", "secret", "generic", "pg-archive", f"--from-file={credentials}")
        super().install(instances=instances)

    def write_overlay(self) -> Path:
        overlay = super().write_overlay()
        production = DEPLOY / "overlays/production"
        shown = yaml.safe_load((production / "instance-manager.yaml").read_text())["archive"]
        where = {"endpoint": f"http://{SWITCH_ADDRESS}:{PORT}", "bucket": BUCKET, "path_style": True, "region": REGION}
        written = yaml.safe_load((overlay / "instance-manager.yaml").read_text())
        written["archive"] = {**shown, "s3": {**shown["s3"], **where}}
        written["bootstrap"] = {"replicas_from": "archive"}
        (overlay / "instance-manager.yaml").write_text(yaml.safe_dump(written))
        patch = yaml.safe_load((production / "statefulset.yaml").read_text())
        pod = patch["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        (overlay / "statefulset.yaml").write_text(
            yaml.safe_dump(
                {
                    **{key: patch[key] for key in ("apiVersion", "kind", "metadata")},
                    "spec": {
                        "template": {
                            "spec": {
                                "containers": [{key: container[key] for key in ("name", "volumeMounts")}],
                                "volumes": [each for each in pod["volumes"] if each["name"] == "archive"],
                            }
                        }
                    },
                }
            )
        )
        kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
        kustomization["patches"] = [{"path": "statefulset.yaml"}]
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return overlay

    def run_in(self, name: str, *argv: str, deadline_s: float = 20.0) -> str:
        done = self.runner.run_in(self.worker(name), *argv, deadline_s=deadline_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def superuser_sql(self, name: str, statement: str) -> str:
        argv = (
            "psql",
            "--no-psqlrc",
            "--quiet",
            "--tuples-only",
            "--no-align",
            "--dbname=app",
            f"--command={statement}",
        )
        return self.run_in(name, *argv)

    def wait_told(self, reason: str, name: str, words: str = "") -> str:
        """An Event of the instance with these words in it; they come in the background, and in no order."""

        def told() -> str | None:
            found = [each for each in self.events(reason) if each["involvedObject"]["name"] == name]
            return next((each["message"] for each in found if words in each["message"]), None)

        return wait_for(told, CHANGE_DEADLINE_S, f"{reason} of {name}: {words}")


@pytest.fixture(scope="module")
def store(control_plane: ControlPlane, network: PodNetwork, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """moto's S3 server where the pods reach it, with a bucket."""
    argv = [sys.executable, "-m", "moto.server", f"--host={SWITCH_ADDRESS}", f"--port={PORT}"]
    server = Program([*network.enter(), *argv], tmp_path_factory.mktemp("s3") / "log")
    server.start()
    try:
        wait_for(lambda: answers(network), 30, f"the store: {server.tail()}")
        yield
    finally:
        server.stop()


def ask(network: PodNetwork, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
    """The store; OSError."""
    connection = http.client.HTTPConnection(SWITCH_ADDRESS, PORT)
    try:
        connection.sock = network.connect(SWITCH_ADDRESS, PORT, 5.0)
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def answers(network: PodNetwork) -> bool:
    """It does, and has the bucket."""
    with contextlib.suppress(OSError):
        return ask(network, "PUT", f"/{BUCKET}")[0] == 200
    return False


def damage_backups(network: PodNetwork) -> None:
    """Of each the files of the data directory."""
    _, listed = ask(network, "GET", f"/{BUCKET}?list-type=2")
    tars = re.findall(r"<Key>([^<]*/base/[^<]*/data[^<]*\.tar[^<]*)</Key>", listed)
    assert tars, listed
    for name in tars:
        assert ask(network, "PUT", f"/{BUCKET}/{name}", b"damaged") == (200, "")


@pytest.fixture(scope="module")
def cluster(
    control_plane: ControlPlane, runner: PodRunner, store: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ArchiveCluster]:
    name = f"archive-{os.getpid()}"
    control_plane.make_namespace(name)
    made = ArchiveCluster(control_plane, runner, name, tmp_path_factory.mktemp(name))
    made.parameters = {"log_replication_commands": "on"}
    try:
        made.install(instances=2)
        made.wait_redundant()
        yield made
    except BaseException:
        print(made.story(LOG_LINES_SHOWN))
        raise
    finally:
        runner.remove_namespace(name)


def test_a_pod_more_takes_its_data_from_the_archive_with_its_tablespace_and_becomes_a_voter(
    cluster: ArchiveCluster,
) -> None:
    primary = cluster.wait_redundant()
    for name in cluster.names:
        cluster.run_in(name, "mkdir", SPACE)
    cluster.superuser_sql(primary, f"CREATE TABLESPACE space LOCATION '{SPACE}'")
    cluster.superuser_sql(primary, "CREATE TABLE elsewhere TABLESPACE space AS SELECT generate_series(1, 500) n")
    cluster.run_in(primary, *VERB, "backup", "--wait", "--config", CONFIGURATION, deadline_s=120)
    cluster.superuser_sql(primary, "INSERT INTO elsewhere VALUES (501)")
    copies = base_backups(cluster, primary)
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        cluster.instances = 3
        cluster.apply()
        wait_for(lambda: len(cluster.labelled_all()) == 3, CHANGE_DEADLINE_S, "three pods")
        assert cluster.wait_redundant(CHANGE_DEADLINE_S) == primary
        load.wait_writes()
        ended_s = now_s()
    found = load.judge(from_s=began_s, to_s=ended_s)
    assert not found.lost
    new = f"{CLUSTER}-2"
    cluster.wait_told("Cloned", new, "of this cluster's archive")
    assert not cluster.events("ArchiveCopyFailed")
    assert base_backups(cluster, primary) == copies, "the primary was read by nobody"
    status = cluster.status(primary)
    assert status is not None
    (member,) = (each for each in status.instances if each.name == new)
    assert member.receiving
    assert member.member_id in status.voters
    assert rows(cluster, new) == "501|/var/lib/postgresql/space"


def test_where_the_archive_fails_its_tablespace_makes_room_for_that_of_a_copy_of_the_primary_and_an_event_says_why(
    cluster: ArchiveCluster,
) -> None:
    primary = cluster.wait_redundant()
    damage_backups(cluster.runner.network)
    standby = next(name for name in cluster.names if name != primary)
    old = cluster.worker(standby).volume("data")
    cluster.kubectl("delete", "persistentvolumeclaim", f"data-{standby}", "--wait=false")
    cluster.kubectl("delete", "pod", standby, "--wait=false")
    wait_for(lambda: cluster.worker(standby).volume("data") != old, 60, "a new volume")
    cluster.wait_redundant()
    failed = cluster.wait_told("ArchiveCopyFailed", standby, f"{primary} is copied instead")
    assert "other content than was stored" in failed or "not lz4" in failed, failed
    cluster.wait_told("Cloned", standby, f"from {primary}: ")
    assert rows(cluster, standby) == "501|/var/lib/postgresql/space"


def test_a_directory_that_is_set_aside_leaves_its_place_to_a_copy_and_so_does_its_tablespace(
    cluster: ArchiveCluster,
) -> None:
    primary = cluster.wait_redundant()
    standby = next(name for name in cluster.names if name != primary)
    worker = cluster.worker(standby)
    volume = worker.volume("data")
    # Nobody can tell any more where its log ends, and it cannot be rewound.
    for segment in (volume / "instance" / "data" / "pg_wal").glob("0000*"):
        segment.unlink()
    os.kill(worker.pid, signal.SIGKILL)
    cluster.wait_told("SetAsideAndCloned", standby)
    cluster.wait_redundant()
    assert rows(cluster, standby) == "501|/var/lib/postgresql/space"
    link = next((volume / "instance" / "data.set-aside-1" / "pg_tblspc").iterdir())
    assert str(link.readlink()) == f"{SPACE}.set-aside-1"
    assert any((volume / "space.set-aside-1").iterdir())


def base_backups(cluster: ArchiveCluster, name: str) -> int:
    return cluster.worker(name).log().count("received replication command: BASE_BACKUP")


def rows(cluster: ArchiveCluster, name: str) -> str:
    """Of the table in the tablespace, and where that is."""
    return cluster.superuser_sql(
        name,
        "SELECT (SELECT count(*) FROM elsewhere), (SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'space')",
    )
