"""The pod runner does what the cluster sees of a kubelet."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from control_plane import ControlPlane
from kube_api import Object
from kube_processes import wait_for
from pod_runner import PodRunner
from pod_worker import PodWorker
from simple_pods import PORT, simple_pod

READY_S = 15.0


@pytest.fixture
def start(control_plane: ControlPlane, runner: PodRunner, running_namespace: str) -> Callable[..., PodWorker]:
    """Create a simple pod and wait until it is ready."""
    config_maps = f"/api/v1/namespaces/{running_namespace}/configmaps"
    control_plane.admin.create(config_maps, {"metadata": {"name": "settings"}, "data": {"colour": "red"}})

    def create(name: str = "pod", **overrides: object) -> PodWorker:
        control_plane.admin.create(pods(running_namespace), simple_pod(name, **overrides))
        wait_for(lambda: is_ready(pod_of(control_plane, running_namespace, name)), READY_S, f"{name} ready")
        return runner.worker(running_namespace, name)

    return create


def pods(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods"


def pod_of(control_plane: ControlPlane, namespace: str, name: str) -> Object | None:
    return control_plane.admin.find(f"{pods(namespace)}/{name}")


def is_ready(pod: Object | None) -> bool:
    conditions = [] if pod is None else pod["status"].get("conditions", ())
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def container_status(pod: Object | None) -> dict[str, Any]:
    assert pod is not None
    found: dict[str, Any] = pod["status"]["containerStatuses"][0]
    return found


def test_a_pod_becomes_ready_by_its_probes(
    control_plane: ControlPlane, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    worker = start()
    pod = pod_of(control_plane, running_namespace, "pod")
    assert pod is not None
    assert pod["status"]["phase"] == "Running"
    assert pod["status"]["podIP"] == worker.address
    assert pod["spec"]["nodeName"] == worker.node.name
    status = container_status(pod)
    assert status["state"]["running"]["startedAt"]
    assert (status["restartCount"], status["started"]) == (0, True)

    (worker.volume("tmp") / "fail-ready").touch()
    wait_for(lambda: not is_ready(pod_of(control_plane, running_namespace, "pod")), READY_S, "not ready any more")
    (worker.volume("tmp") / "fail-ready").unlink()
    wait_for(lambda: is_ready(pod_of(control_plane, running_namespace, "pod")), READY_S, "ready again")
    assert worker.restarts == 0


def test_the_command_is_pid_1_of_an_unprivileged_container(
    runner: PodRunner, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    worker = start()
    done = runner.run_in(
        worker, "sh", "-c", "id -u; id -G; hostname; ls -d /proc/[0-9]*; touch /etc/new || echo refused"
    )
    user, groups, hostname, *rest = done.stdout.split()
    assert (user, groups, hostname) == ("999", "999", "pod"), done.stderr
    assert "/proc/1" in rest
    assert len([word for word in rest if word.startswith("/proc/")]) < 6, "processes of others are seen"
    assert rest[-1] == "refused"


def test_a_killed_container_is_restarted_and_its_end_is_told(
    control_plane: ControlPlane, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    worker = start()
    before = container_status(pod_of(control_plane, running_namespace, "pod"))
    os.kill(worker.pid, signal.SIGKILL)

    def restarted() -> dict[str, Any] | None:
        pod = pod_of(control_plane, running_namespace, "pod")
        return container_status(pod) if is_ready(pod) and container_status(pod)["restartCount"] == 1 else None

    status = wait_for(restarted, READY_S, "restarted and ready")
    ended = status["lastState"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (137, "Error")
    assert ended["message"] == "started as pod"
    assert ended["containerID"] == before["containerID"] != status["containerID"]


def test_a_container_whose_liveness_fails_is_restarted(
    control_plane: ControlPlane, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    worker = start()
    (worker.volume("tmp") / "fail-live").touch()

    def end() -> Object | None:
        status = container_status(pod_of(control_plane, running_namespace, "pod"))
        ended: Object | None = status["lastState"].get("terminated")
        return ended

    assert wait_for(end, READY_S, "an end")["message"] == "told to end"
    (worker.volume("tmp") / "fail-live").unlink()
    wait_for(lambda: is_ready(pod_of(control_plane, running_namespace, "pod")), READY_S, "ready again")
    assert worker.restarts >= 1


def test_a_deleted_pod_ends_by_sigterm_and_goes(
    control_plane: ControlPlane, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    worker = start()
    control_plane.admin.delete(f"{pods(running_namespace)}/pod")
    wait_for(lambda: pod_of(control_plane, running_namespace, "pod") is None, READY_S, "the object gone")
    assert worker.wait_finished(READY_S)
    assert worker.container is not None
    assert worker.container.end is not None
    assert (worker.container.end.exit_code, worker.container.end.message) == (0, "told to end")


def test_a_deleted_pod_that_ignores_sigterm_is_killed_after_its_grace(
    control_plane: ControlPlane, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    environment = [*simple_pod("pod")["spec"]["containers"][0]["env"], {"name": "STUBBORN", "value": "yes"}]
    worker = start(env=environment)
    control_plane.admin.delete(f"{pods(running_namespace)}/pod", grace_s=1)
    assert worker.wait_finished(READY_S)
    assert worker.container is not None
    assert worker.container.end is not None
    assert worker.container.end.exit_code == 137


def test_a_changed_config_map_appears_in_the_mount_at_once_and_whole(
    control_plane: ControlPlane, runner: PodRunner, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    worker = start()
    assert runner.run_in(worker, "cat", "/etc/settings/colour").stdout == "red"
    path = f"/api/v1/namespaces/{running_namespace}/configmaps/settings"
    control_plane.admin.patch(path, {"data": {"colour": "blue", "size": "large"}})
    wait_for(lambda: runner.run_in(worker, "cat", "/etc/settings/size").stdout == "large", READY_S, "the new key")
    assert runner.run_in(worker, "cat", "/etc/settings/colour").stdout == "blue"
    assert runner.run_in(worker, "readlink", "/etc/settings/colour").stdout.strip() == "..data/colour"


def test_a_pod_speaks_with_the_api_by_its_own_token_and_by_name(
    control_plane: ControlPlane, runner: PodRunner, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    worker = start()
    script = (
        "import ssl, urllib.request, urllib.error\n"
        "base = '/var/run/secrets/kubernetes.io/serviceaccount/'\n"
        "context = ssl.create_default_context(cafile=base + 'ca.crt')\n"
        f"request = urllib.request.Request('https://kubernetes.default.svc:{control_plane.server.port}/api/v1/pods')\n"
        "request.add_header('Authorization', 'Bearer ' + open(base + 'token').read())\n"
        "try: urllib.request.urlopen(request, context=context)\n"
        "except urllib.error.HTTPError as error: print(error.code, error.read().decode())\n"
    )
    done = runner.run_in(worker, "python3", "-I", "-c", script)
    assert done.stdout.startswith("403"), done.stderr
    assert f"system:serviceaccount:{running_namespace}:default" in done.stdout


def test_a_pod_of_a_headless_service_has_a_name(
    control_plane: ControlPlane, runner: PodRunner, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    services = f"/api/v1/namespaces/{running_namespace}/services"
    spec = {"clusterIP": "None", "selector": {"app": "pod"}, "ports": [{"port": PORT}]}
    control_plane.admin.create(services, {"metadata": {"name": "all"}, "spec": spec})
    worker = start()
    argv = [*runner.as_client(running_namespace), "getent", "ahostsv4", "all"]

    def address() -> str:
        return runner.run_here(argv).stdout.partition(" ")[0]

    wait_for(lambda: address() == worker.address, READY_S, "the name of the Service")


def test_a_pod_of_a_cut_off_node_lives_on_when_it_is_force_deleted(
    control_plane: ControlPlane, runner: PodRunner, running_namespace: str, start: Callable[..., PodWorker]
) -> None:
    worker = start()
    here = [*runner.as_client(running_namespace), "python3", "-I", "-c"]
    ask = [*here, f"import urllib.request as u; print(u.urlopen('http://{worker.address}:{PORT}/', timeout=1).read())"]
    assert runner.run_here(ask).returncode == 0
    runner.cut_off(worker.node)
    try:
        control_plane.admin.delete(f"{pods(running_namespace)}/pod", grace_s=0)
        assert pod_of(control_plane, running_namespace, "pod") is None
        assert runner.run_here(ask).returncode != 0
        assert runner.run_in(worker, "true").returncode == 0, "its processes ended"
        assert not worker.wait_finished(1)
    finally:
        runner.rejoin(worker.node)
    assert worker.wait_finished(READY_S), "its node learned that it is gone"
