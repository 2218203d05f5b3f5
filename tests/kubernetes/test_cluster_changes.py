"""Planned changes of a cluster: a rolling restart, more and fewer instances, a replaced volume, a drained node."""

from __future__ import annotations

import time

import pytest
from cluster_load import ClusterLoad
from kube_processes import wait_for
from kubernetes_cluster import CLUSTER, DEPLOY, KubernetesCluster

from instance_manager.demo.processes import now_s

OUTAGE_S = 1.5
CHANGE_DEADLINE_S = 120.0

pytestmark = pytest.mark.timeout(400)


def test_a_rolling_restart_is_one_switchover(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    before = {name: cluster.worker(name).uid for name in cluster.names}
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        script = [str(DEPLOY / "rolling-restart.sh"), CLUSTER, "--namespace", cluster.namespace]
        done = cluster.control_plane.run(script, deadline_s=CHANGE_DEADLINE_S)
        assert done.returncode == 0, done.stderr
        load.wait_writes()
        cluster.wait_redundant()
        ended_s = now_s()
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s, timelines {found.timelines}")
    assert all(cluster.worker(name).uid != before[name] for name in cluster.names)
    assert cluster.wait_redundant() != primary
    assert len(found.timelines) == 2, "one switchover"
    assert not found.lost
    assert found.longest_outage_s < OUTAGE_S


def test_a_drained_node_costs_a_switchover(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    worker = cluster.worker(primary)
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        # What `kubectl drain` does: no new pods there, and an eviction that the disruption budget may refuse.
        worker.node.cordoned = True
        try:
            eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": primary}}
            cluster.api.create(cluster.path("pods", f"{primary}/eviction"), eviction)
            cluster.wait_other_primary(primary)
            load.wait_writes()
            wait_for(lambda: cluster.worker(primary).node is not worker.node, 60, "the pod on another node")
            cluster.wait_redundant()
        finally:
            worker.node.cordoned = False
        ended_s = now_s()
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s")
    assert not found.lost
    assert found.longest_outage_s < OUTAGE_S


def test_a_replaced_volume_is_filled_again(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    standby = next(name for name in cluster.names if name != primary)
    old = cluster.worker(standby).volume("data")
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        cluster.kubectl("delete", "persistentvolumeclaim", f"data-{standby}", "--wait=false")
        cluster.kubectl("delete", "pod", standby, "--wait=false")
        wait_for(lambda: cluster.worker(standby).volume("data") != old, 60, "a new volume")
        cluster.wait_redundant()
        ended_s = now_s()
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s")
    assert not old.exists()
    assert not found.lost


def test_scaled_from_three_to_five_to_one(cluster: KubernetesCluster) -> None:
    cluster.wait_redundant()
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        for instances in (5, 1, 3):
            cluster.instances = instances
            cluster.apply()
            wait_for(lambda: len(cluster.labelled_all()) == cluster.instances, CHANGE_DEADLINE_S, f"{instances} pods")
            cluster.wait_redundant(CHANGE_DEADLINE_S)
            load.wait_writes()
            time.sleep(1)
        ended_s = now_s()
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s")
    assert not found.lost
