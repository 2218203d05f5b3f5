"""`kubectl apply -k` is the whole installation, and the pods do what they may, use what they are given, and cost little."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from pathlib import Path

import pytest
import yaml
from control_plane import ControlPlane, audited
from kube_api import Object
from kube_processes import wait_for
from kube_usage import permissions, writes_counted
from kubernetes_cluster import CLUSTER, DEPLOY, KubernetesCluster, relative

from instance_manager.demo.processes import resident_bytes

IDLE_S = 20.0
CPU_WINDOWS = 5
"""Their median counts: what happens beside the cluster on the machine is not its."""
WRITES_PER_S_MAX = 0.5
MANAGER_BYTES_MAX = 64 * 1024 * 1024
MANAGER_CPU_MAX = 0.005
"""Of one core."""
OVERLAYS = sorted(
    path.parent
    for path in DEPLOY.glob("**/kustomization.yaml")
    if "components" not in path.parts  # which are not whole by themselves; overlays/tls has them
)

pytestmark = pytest.mark.timeout(240)


@pytest.mark.usefixtures("custom_resources")
@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_the_server_takes_every_manifest_under_the_restricted_policy(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, folder: Path
) -> None:
    kustomization = {"namespace": namespace, "resources": [relative(folder, tmp_path)]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = control_plane.kubectl("apply", "--dry-run=server", "-k", str(tmp_path))
    rendered = control_plane.kubectl("kustomize", str(tmp_path)).stdout
    objects = [each["kind"].lower() for each in yaml.safe_load_all(rendered)]
    taken = [
        line.partition("/")[0].partition(".")[0] for line in done.stdout.splitlines() if "(server dry run)" in line
    ]
    assert sorted(taken) == sorted(objects)
    assert "PodSecurity" not in done.stderr


def test_the_services_lead_to_the_primary_and_to_the_standbys(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    standbys = sorted(set(cluster.names) - {primary})
    where = "SELECT split_part(current_setting('cluster_name'), '_', 1), pg_is_in_recovery()"
    wait_for(lambda: cluster.psql(where) == f"{primary}|f", 10, "pg-rw leads to the primary")

    def found() -> str | None:
        # Until the first standby is ready the name has no address.
        with contextlib.suppress(AssertionError):
            return cluster.psql(where, host=f"{CLUSTER}-ro")
        return None

    assert wait_for(found, 10, "pg-ro leads somewhere") in [f"{name}|t" for name in standbys]
    assert cluster.psql("SELECT 1", host=f"{CLUSTER}-r") == "1"


def test_the_lease_shows_the_cluster(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    assert primary in cluster.kubectl("get", "lease", CLUSTER).stdout
    described = cluster.kubectl("describe", "lease", CLUSTER).stdout
    assert f"{primary} is primary" in described
    for name in set(cluster.names) - {primary}:
        assert name in described


def test_pods_use_every_permission_of_the_role_and_need_no_other(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    # A first start, a switchover and a restart are all that needs permissions.
    cluster.kubectl("delete", "pod", primary, "--wait=false")
    cluster.wait_other_primary(primary)
    cluster.wait_redundant()
    user = f"system:serviceaccount:{cluster.namespace}:{CLUSTER}"
    log = cluster.control_plane.audit_log
    requests = [*audited(log, user=user), *audited(log, user=user, stage="ResponseStarted")]  # the open watches too
    forbidden = {(found.verb, found.resource, found.name) for found in requests if found.decision == "forbid"}
    assert not forbidden
    role = cluster.api.get(f"/apis/rbac.authorization.k8s.io/v1/namespaces/{cluster.namespace}/roles/{CLUSTER}")
    granted = [found for found in permissions(role) if found.name in ("", CLUSTER, *cluster.names)]
    unused = [each for each in granted if not any(each.allows(request) for request in requests)]
    assert not unused


def test_an_idle_cluster_writes_twice_in_four_seconds_and_polls_nothing(cluster: KubernetesCluster) -> None:
    cluster.wait_redundant()
    time.sleep(5)  # what a start still has to tell
    user = f"system:serviceaccount:{cluster.namespace}:{CLUSTER}"
    log, admin = cluster.control_plane.audit_log, cluster.api
    before, counted = len(audited(log, user=user)), writes_counted(admin.text("/metrics"), ["leases", "pods", "events"])
    time.sleep(IDLE_S)
    requests = audited(log, user=user)[before:]
    written = writes_counted(admin.text("/metrics"), ["leases", "pods", "events"]) - counted
    writes = [found for found in requests if found.is_write]
    lists = [found for found in requests if found.verb == "list"]
    gets = [found for found in requests if found.verb == "get"]
    print(
        f"{len(writes)} writes, {len(gets)} gets, {len(lists)} lists in {IDLE_S:g} s; all users wrote {dict(written)}"
    )
    assert len(writes) <= WRITES_PER_S_MAX * IDLE_S + 1
    assert {found.resource for found in writes} <= {"leases"}
    assert not lists
    # The server's own count, in which the server's own Lease is too: every 10 s.
    assert sum(written.values()) <= WRITES_PER_S_MAX * IDLE_S + 1 + IDLE_S / 10 + 1
    assert len(gets) <= WRITES_PER_S_MAX * IDLE_S * len(cluster.names) + 3


def test_the_manager_costs_little_beside_postgres(cluster: KubernetesCluster) -> None:
    cluster.wait_redundant()
    managers = {}
    for name in cluster.names:
        found = cluster.processes(name)
        managers[name] = [process.pid for process in (found.supervisor, found.agent) if process is not None]
        assert len(managers[name]) == 2
    shares: dict[str, list[float]] = {name: [] for name in managers}
    for _ in range(CPU_WINDOWS):
        before = {name: sum(map(cpu_s, pids)) for name, pids in managers.items()}
        began_s = time.monotonic()
        time.sleep(IDLE_S)
        for name, pids in managers.items():
            shares[name].append((sum(map(cpu_s, pids)) - before[name]) / (time.monotonic() - began_s))
    print({name: [f"{100 * share:.2f} %" for share in found] for name, found in shares.items()})
    share = {name: statistics.median(found) for name, found in shares.items()}
    resident = {name: sum(map(resident_bytes, pids)) for name, pids in managers.items()}
    print({name: f"{resident[name] / 2**20:.1f} MiB, {100 * share[name]:.2f} % of a core" for name in managers})
    assert max(resident.values()) <= MANAGER_BYTES_MAX
    assert max(share.values()) <= MANAGER_CPU_MAX


def test_a_misconfigured_config_map_is_told_by_an_event_and_changes_nothing(cluster: KubernetesCluster) -> None:
    cluster.wait_redundant()
    path = cluster.path("configmaps", CLUSTER)
    good = cluster.api.get(path)["data"]["instance-manager.yaml"]
    wrong = yaml.safe_dump({**yaml.safe_load(good), "no_such_key": 1})
    cluster.api.patch(path, {"data": {"instance-manager.yaml": wrong}})
    try:

        def told() -> list[Object]:
            return [event for event in cluster.events() if "no_such_key" in event["message"]]

        events = wait_for(told, 60, "an event that names the key")
        assert events[0]["type"] == "Warning"
        cluster.wait_redundant(10)
    finally:
        cluster.api.patch(path, {"data": {"instance-manager.yaml": good}})
    assert all(cluster.worker(name).restarts == 0 for name in cluster.names)


def test_a_changed_parameter_reaches_every_instance_without_a_restart(cluster: KubernetesCluster) -> None:
    cluster.wait_redundant()
    cluster.parameters["work_mem"] = "7MB"
    cluster.apply()

    def taken() -> bool:
        return {cluster.psql("SHOW work_mem", host=cluster.host(name)) for name in cluster.names} == {"7MB"}

    wait_for(taken, 60, "the parameter in every instance")
    assert all(cluster.worker(name).restarts == 0 for name in cluster.names)


def test_rotated_tokens_are_taken_up(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    for name in cluster.names:
        cluster.worker(name).rotate_tokens()
    renewed = cluster.api.get(cluster.lease_path)["spec"]["renewTime"]
    wait_for(lambda: cluster.api.get(cluster.lease_path)["spec"]["renewTime"] != renewed, 10, "a renewal")
    assert cluster.wait_redundant() == primary


def cpu_s(pid: int) -> float:
    """Of a process so far, seconds of one core."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
