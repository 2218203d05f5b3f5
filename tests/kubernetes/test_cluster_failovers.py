"""Nothing that was acknowledged is lost, whatever happens to pods, nodes and the API server, and outages are short."""

from __future__ import annotations

import os
import signal
import time
from statistics import median

import pytest
from cluster_load import ClusterLoad
from kube_processes import wait_for
from kubernetes_cluster import KubernetesCluster

from instance_manager.demo.processes import now_s
from instance_manager.drill.history import Seen

GRACEFUL_OUTAGE_S = 1.5
KILLED_OUTAGE_S = 3.0
NO_OUTAGE_S = 0.5
"""A target of none is judged as this: below it clients and scheduling are measured."""
API_AWAY_S = 60.0 if os.environ.get("KUBERNETES_TESTS") == "long" else 20.0
"""Longer than the Lease and every permit last, in any case."""
STALE_AFTER_S = 9.0
"""A cut-off primary that stands by its permit has stopped Postgres by then: `hard_s`, and a second."""

pytestmark = pytest.mark.timeout(300)


def test_a_primary_whose_pod_is_deleted_hands_over(cluster: KubernetesCluster) -> None:
    """Three times, because one outage is as much the machine's scheduling as ours; what is lost counts each time."""
    outages_s = []
    for _ in range(3):
        primary = cluster.wait_redundant()
        with ClusterLoad(cluster) as load:
            began_s = now_s()
            cluster.kubectl("delete", "pod", primary, "--wait=false")
            cluster.wait_other_primary(primary)
            load.wait_writes()
            cluster.wait_redundant()
            ended_s = now_s()
        found = load.judge(from_s=began_s, to_s=ended_s)
        assert not found.lost
        outages_s.append(found.longest_outage_s)
    print(f"outages {', '.join(f'{outage_s:.2f}' for outage_s in outages_s)} s")
    assert median(outages_s) < GRACEFUL_OUTAGE_S


def test_a_killed_container_is_replaced_as_primary(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    worker = cluster.worker(primary)
    restarts = worker.restarts
    with ClusterLoad(cluster) as load:
        worker.may_start.clear()
        began_s = now_s()
        os.kill(worker.pid, signal.SIGKILL)
        cluster.wait_other_primary(primary)
        load.wait_writes()
        worker.may_start.set()
        cluster.wait_redundant()
        ended_s = now_s()
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s, {found.acknowledged} acknowledged")
    assert worker.restarts == restarts + 1
    assert not found.lost
    assert found.longest_outage_s < KILLED_OUTAGE_S


@pytest.mark.parametrize("way", ["stopped", "frozen"])
def test_writes_go_on_while_the_api_server_is_away(cluster: KubernetesCluster, way: str) -> None:
    primary = cluster.wait_redundant()
    control_plane = cluster.control_plane
    away, back = {
        "stopped": (control_plane.stop_apiserver, control_plane.start_apiserver),
        "frozen": (control_plane.freeze_apiserver, control_plane.thaw_apiserver),
    }[way]
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        away()
        try:
            while now_s() < began_s + API_AWAY_S:
                load.wait_writes()
                time.sleep(1)
        finally:
            back()
        load.wait_writes()
        time.sleep(3)
        ended_s = now_s()
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s, {found.acknowledged} acknowledged")
    assert cluster.wait_redundant() == primary
    assert not found.lost
    assert found.longest_outage_s < NO_OUTAGE_S


def test_a_cut_off_primary_whose_pod_is_force_deleted_acknowledges_nothing_more(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    worker = cluster.worker(primary)
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        cluster.runner.cut_off(worker.node, clients_stay=True)
        try:
            cluster.kubectl("delete", "pod", primary, "--grace-period=0", "--force", "--wait=false")
            cluster.wait_other_primary(primary)
            load.wait_writes()
            # A force-deleted pod's processes live on, and its namesake waits for its volume.
            assert cluster.runner.run_in(worker, "true").returncode == 0
            time.sleep(STALE_AFTER_S)
            assert not worker.finished.is_set()
            ended_s = now_s()
        finally:
            cluster.runner.rejoin(worker.node)
        assert worker.wait_finished(30)
        load.wait_writes()
        cluster.wait_redundant()
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s, stale reads up to {found.longest_stale_read_s:.2f} s")
    assert not found.lost
    assert not found.by_former_primary
    assert found.longest_stale_read_s < STALE_AFTER_S
    still = [sample for sample in load.reader.samples if sample.member == primary and sample.seen is Seen.PRIMARY]
    assert any(began_s + 1 < sample.begin_s for sample in still), "its clients did not reach it any more"
    assert not any(began_s + STALE_AFTER_S < sample.begin_s < ended_s for sample in still), "it had not stopped"


def test_all_pods_at_once_come_back_with_everything(cluster: KubernetesCluster) -> None:
    cluster.wait_redundant()
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        for name in cluster.names:
            os.kill(cluster.worker(name).pid, signal.SIGKILL)
        load.wait_writes(deadline_s=60)
        cluster.wait_redundant()
        ended_s = now_s()
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s, {found.acknowledged} acknowledged")
    assert not found.lost


def test_a_lost_node_costs_one_failover_and_its_pod_comes_back_elsewhere(cluster: KubernetesCluster) -> None:
    primary = cluster.wait_redundant()
    worker = cluster.worker(primary)
    with ClusterLoad(cluster) as load:
        began_s = now_s()
        cluster.runner.lose(worker.node)
        cluster.wait_other_primary(primary)
        load.wait_writes()
        # As the user does when the machine does not come back.
        cluster.kubectl("delete", "pod", primary, "--grace-period=0", "--force", "--wait=false")
        wait_for(lambda: cluster.worker(primary).node is not worker.node, 30, "the pod on another node")
        cluster.wait_redundant()
        ended_s = now_s()
    worker.node.cut = False
    found = load.judge(from_s=began_s, to_s=ended_s)
    print(f"outage {found.longest_outage_s:.2f} s, {found.acknowledged} acknowledged")
    assert not found.lost
