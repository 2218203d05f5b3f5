"""One control plane and one pod runner for the session; a namespace, with the restricted policy, for each test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pod_network
import pytest
from control_plane import ControlPlane, Ports
from custom_resources import define
from kube_binaries import Programs, Unavailable, find
from kubernetes_cluster import KubernetesCluster
from pod_image import instance_manager_image
from pod_network import SWITCH_ADDRESS, PodNetwork
from pod_runner import PodRunner
from simple_pods import SIMPLE_IMAGE, simple_image

LOG_LINES_SHOWN = 80
_numbers = itertools.count(1)


def not_run(reason: str) -> NoReturn:
    """What this machine cannot do fails in CI; a user is told."""
    if os.environ.get("CI"):
        pytest.fail(f"not run: {reason}", pytrace=False)
    pytest.skip(f"NOT RUN: {reason}")


@pytest.fixture(scope="session")
def programs() -> Programs:
    try:
        return find()
    except Unavailable as missing:
        not_run(str(missing))


@pytest.fixture(scope="session")
def network() -> Iterator[PodNetwork]:
    reason = pod_network.why_unavailable()
    if reason is not None:
        not_run(reason)
    made = PodNetwork()
    made.open()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def control_plane(
    programs: Programs, network: PodNetwork, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """In the network of the pods, so that they reach it as they would in a cluster."""
    with ControlPlane(
        programs,
        tmp_path_factory.mktemp("control-plane"),
        enter=network.enter(),
        address=SWITCH_ADDRESS,
        ports=Ports(),
        connect=network.connect,
    ) as made:
        yield made


@pytest.fixture(scope="session")
def custom_resources(control_plane: ControlPlane) -> None:
    """The server takes the kinds of cert-manager and of the Prometheus operator."""
    define(control_plane)


@pytest.fixture(scope="session")
def runner(
    control_plane: ControlPlane, network: PodNetwork, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PodRunner]:
    directory = tmp_path_factory.mktemp("nodes")
    for path in (directory, *directory.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o111)  # pods run as another user
    images = {"instance-manager": instance_manager_image, SIMPLE_IMAGE: simple_image}
    with PodRunner(control_plane, network, directory, images) as made:
        yield made


@pytest.fixture
def namespace(control_plane: ControlPlane) -> str:
    """New, without a pod runner: nothing runs in it."""
    name = f"test-{next(_numbers)}"
    control_plane.make_namespace(name)
    return name


@pytest.fixture
def running_namespace(namespace: str, runner: PodRunner, request: pytest.FixtureRequest) -> Iterator[str]:
    """New; its pods run, and end with the test. Their logs are shown when it fails."""
    failed_before = request.session.testsfailed
    yield namespace
    if request.session.testsfailed > failed_before:
        for worker in runner.workers(namespace):
            print(worker.story(LOG_LINES_SHOWN))
    problems = [worker.problem for worker in runner.workers(namespace) if worker.problem]
    runner.remove_namespace(namespace)
    assert not problems


@pytest.fixture(scope="module")
def shared_cluster(
    control_plane: ControlPlane, runner: PodRunner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KubernetesCluster]:
    """The shipped manifests, installed once for a file of tests; its own namespace enforces the restricted policy."""
    name = f"cluster-{next(_numbers)}"
    control_plane.make_namespace(name)
    made = KubernetesCluster(control_plane, runner, name, tmp_path_factory.mktemp(name))
    try:
        made.install()
        made.wait_redundant()
        yield made
    except BaseException:
        print(made.story(LOG_LINES_SHOWN))
        raise
    finally:
        runner.remove_namespace(name)


@pytest.fixture
def cluster(shared_cluster: KubernetesCluster, request: pytest.FixtureRequest) -> Iterator[KubernetesCluster]:
    """Fully redundant at the beginning of each test; its pods' logs are shown when the test fails."""
    failed_before = request.session.testsfailed
    shared_cluster.wait_redundant()
    yield shared_cluster
    if request.session.testsfailed > failed_before:
        print(shared_cluster.story(LOG_LINES_SHOWN))
