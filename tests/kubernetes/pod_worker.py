"""The life of one pod on its node: volumes, containers one after the other, probes, statuses, deletion.

Three threads, because none may wait for another: one for the container, one for the probes, one for the API.
"""

from __future__ import annotations

import http.client
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kube_api import Api, ApiError, Object
from pod_container import RunningContainer, only_container, specification_of
from pod_image import Image
from pod_network import PodLink, PodNetwork
from pod_probes import Probes
from pod_status import PodStatus
from pod_volumes import NotThereYet, PodVolumes, Sources, UnsupportedPod, environment_of

from instance_manager.demo.processes import now_s

TICK_S = 0.02
RETRY_S = 0.1
FORCED_GRACE_S = 1.0
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 5.0
GOOD_RUN_S = 10.0


@dataclass(slots=True)
class Node:
    """A machine of the cluster, by name only. While it is cut off, its kubelet neither learns nor tells anything."""

    name: str
    address: str
    cut: bool = False
    cordoned: bool = False


class Surroundings(Sources, Protocol):
    """What a pod needs of the runner."""

    api: Api
    network: PodNetwork

    def image(self, name: str) -> Image: ...
    def host_files(self, pod: Object, address: str) -> dict[str, str]:
        """Text by path of what the kubelet itself writes: /etc/hosts, /etc/resolv.conf."""
        ...

    def service_environment(self) -> dict[str, str]: ...
    def ended(self, worker: PodWorker) -> None: ...


class PodWorker:
    """One pod, by its uid. `pod` is as it was when it was bound."""

    def __init__(self, pod: Object, node: Node, directory: Path, surroundings: Surroundings) -> None:
        self.namespace: str = pod["metadata"]["namespace"]
        self.name: str = pod["metadata"]["name"]
        self.uid: str = pod["metadata"]["uid"]
        self.node = node
        self.link: PodLink | None = None
        self.container: RunningContainer | None = None
        self.probes: Probes | None = None
        self.may_start = threading.Event()
        """Cleared by a test that wants the next container to wait."""
        self.may_start.set()
        self.problem: str | None = None
        """Why this runner could not do what the pod asks for."""
        self.finished = threading.Event()
        """Nothing of the pod is left on the node."""
        self._pod = pod
        self._directory = directory
        self._surroundings = surroundings
        self._volumes = PodVolumes(pod, directory / "volumes", surroundings)
        self._status = PodStatus(node.address)
        self._grace_s: float | None = None
        """Set when the pod is to end."""
        self._is_gone = False
        """The object is no longer in the API: there is nobody to report to."""
        self._unseen: list[Object | None] = []
        """What a cut-off node does not know yet."""
        self._changed = threading.Event()
        self._dropped = threading.Event()
        self._logs: list[Path] = []
        self._threads = [
            threading.Thread(target=body, name=f"{self.name} {body.__name__}", daemon=True)
            for body in (self._live, self._probe, self._report)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def observe(self, pod: Object | None) -> None:
        """The object changed, or is gone."""
        if self.node.cut:
            self._unseen.append(pod)
        elif pod is None:
            self._is_gone = True
            self._end_within(FORCED_GRACE_S)
        elif "deletionTimestamp" in pod["metadata"]:
            self._end_within(float(pod["metadata"].get("deletionGracePeriodSeconds", 30)))

    def catch_up(self) -> None:
        """The node is no longer cut off."""
        unseen, self._unseen = self._unseen, []
        for pod in unseen:
            self.observe(pod)
        self.refresh_volumes()
        self._changed.set()

    def refresh_volumes(self) -> None:
        if not self.node.cut and not self.finished.is_set():
            self._volumes.refresh()

    def rotate_tokens(self) -> None:
        self._volumes.rotate_tokens()

    def drop(self) -> None:
        """End everything at once and tell nobody: the tests are over, or the machine is lost."""
        self._is_gone = True
        self._dropped.set()
        self._end_within(0.0)
        self.may_start.set()

    def wait_finished(self, deadline_s: float) -> bool:
        return self.finished.wait(deadline_s)

    @property
    def pid(self) -> int:
        """Of the container's first process, as the machine sees it."""
        assert self.container is not None
        assert self.container.pid is not None
        return self.container.pid

    @property
    def image_name(self) -> str:
        return str(self._pod["spec"]["containers"][0]["image"])

    @property
    def address(self) -> str:
        assert self.link is not None
        return self.link.address

    @property
    def restarts(self) -> int:
        return self._status.restarts

    def volume(self, name: str) -> Path:
        """Where a volume of the pod lies on the machine."""
        return self._volumes.path(name)

    def story(self, lines: int) -> str:
        """What a failing test should show of it."""
        answers = {} if self.probes is None else self.probes.answers
        known = (self.problem or "", f"ended: {self._status.last_end}", f"probes: {answers}")
        return "\n".join((f"--- {self.name} on {self.node.name}", *known, *self.log().splitlines()[-lines:]))

    def log(self) -> str:
        """Of all its containers."""
        return "".join(path.read_text(errors="replace") for path in self._logs if path.exists())

    # --- the container ---

    def _live(self) -> None:
        try:
            if self._set_up():
                self._run_containers()
        except UnsupportedPod as unsupported:
            self.problem = str(unsupported)
            self._status.waiting = ("UnsupportedByTestRunner", self.problem)
        except OSError as error:
            if not self._dropped.is_set():
                self.problem = f"{type(error).__name__}: {error}"
        finally:
            self._tear_down()

    def _set_up(self) -> bool:
        """False: the pod is to end before it began."""
        only_container(self._pod)
        while self._grace_s is None:
            try:
                self._volumes.set_up()
            except NotThereYet as missing:
                self._wait_with("ContainerCreating", str(missing))
                continue
            self.link = self._surroundings.network.add_pod()
            self._pod = {**self._pod, "status": {"podIP": self.link.address, "hostIP": self.node.address}}
            self._status.pod_address = self.link.address
            return True
        return False

    def _run_containers(self) -> None:
        backoff_s = 0.0
        policy = self._pod["spec"].get("restartPolicy", "Always")
        while self._grace_s is None:
            began_s = now_s()
            code = self._run_one()
            if policy == "Never" or (policy == "OnFailure" and code == 0):
                self._status.phase = "Failed" if code else "Succeeded"
                self._status.stays_ended = True
                self._changed.set()
                return
            if now_s() - began_s >= GOOD_RUN_S:
                backoff_s = 0.0
            self._status.waiting = ("CrashLoopBackOff", f"back-off {backoff_s:g}s restarting failed container")
            self._changed.set()
            self._pause(backoff_s)
            backoff_s = min(max(2 * backoff_s, FIRST_BACKOFF_S), LONGEST_BACKOFF_S)
            while not self.may_start.is_set() and self._grace_s is None:
                self.may_start.wait(TICK_S)
            if self._grace_s is None:
                self._status.restarts += 1

    def _run_one(self) -> int:
        """The container's exit code."""
        container = self._start_container()
        kill_at_s: float | None = None
        while container.end is None:
            now = now_s()
            grace_s = self._grace_s
            if grace_s is None and self.probes is not None and (failure := self.probes.failure) is not None:
                grace_s = float(self._pod["spec"].get("terminationGracePeriodSeconds", 30))
                self._status.waiting = ("ProbeFailed", failure)
            if grace_s is not None and kill_at_s is None:
                container.terminate()
                kill_at_s = now + grace_s
            elif grace_s is not None and kill_at_s is not None:
                kill_at_s = min(kill_at_s, now + grace_s)
            if kill_at_s is not None and now >= kill_at_s:
                container.kill()
            self._update_readiness()
            container.wait(TICK_S)
        self.probes = None
        status = self._status
        status.running = status.ready = status.started = False
        status.last_end, status.last_id = container.end, container.id
        self._changed.set()
        return container.end.exit_code

    def _start_container(self) -> RunningContainer:
        assert self.link is not None
        specification = only_container(self._pod)
        image = self._surroundings.image(specification["image"])
        number = len(self._logs)
        directory = self._directory / f"container-{number}"
        directory.mkdir(parents=True)
        host_files = {}
        for path, text in self._surroundings.host_files(self._pod, self.link.address).items():
            file = self._directory / Path(path).name
            file.write_text(text)
            host_files[path] = str(file)
        environment = {
            **self._surroundings.service_environment(),
            "HOSTNAME": self.name,
            **environment_of(self._pod, specification, self._surroundings),
        }
        container = RunningContainer(
            specification_of(
                self._pod,
                image,
                self.link,
                directory,
                environment=environment,
                mounts=self._volumes.mounts(specification),
                host_files=host_files,
            ),
            directory,
        )
        self._logs.append(container.log)
        self.probes = Probes(specification, now_s())
        status = self._status
        status.running, status.phase = True, "Running"
        status.container_id, status.started_at = container.id, container.started_at
        self.container = container
        self._changed.set()
        return container

    def _update_readiness(self) -> None:
        probes, status = self.probes, self._status
        if probes is not None and (probes.started, probes.ready) != (status.started, status.ready):
            status.started, status.ready = probes.started, probes.ready
            self._changed.set()

    def _tear_down(self) -> None:
        if self.container is not None and self.container.end is None:
            self.container.kill()
            self.container.wait_end()
        if self.link is not None:
            self._surroundings.network.remove_pod(self.link)
        if self._grace_s is not None and self._status.last_end is not None:
            self._status.stays_ended = True
            if self._status.phase == "Running":
                self._status.phase = "Failed" if self._status.last_end.exit_code else "Succeeded"
        self._surroundings.ended(self)
        shutil.rmtree(self._directory / "volumes", ignore_errors=True)
        self.finished.set()
        self._changed.set()

    def _end_within(self, grace_s: float) -> None:
        self._grace_s = grace_s if self._grace_s is None else min(self._grace_s, grace_s)
        self._changed.set()

    def _wait_with(self, reason: str, message: str) -> None:
        if self._status.waiting != (reason, message):
            self._status.waiting = (reason, message)
            self._changed.set()
        self._pause(RETRY_S)

    def _pause(self, seconds: float) -> None:
        ends_s = now_s() + seconds
        while now_s() < ends_s and self._grace_s is None:
            time.sleep(TICK_S)

    # --- probes and statuses ---

    def _probe(self) -> None:
        while not self.finished.wait(TICK_S):
            probes, link = self.probes, self.link
            if probes is not None and link is not None:
                probes.call_due(now_s(), link.connect, terminating=self._grace_s is not None)

    def _report(self) -> None:
        """Until the object is gone, whoever deleted it."""
        last: Object | None = None
        path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        while not self._is_gone:
            self._changed.wait(RETRY_S)
            self._changed.clear()
            if self.node.cut:
                continue
            finished = self.finished.is_set() and self._grace_s is not None
            container = self._pod["spec"]["containers"][0]
            status = self._status.report(container, f"test://{container['image']}")
            try:
                if status != last:
                    self._surroundings.api.patch(f"{path}/status", {"metadata": {"uid": self.uid}, "status": status})
                    last = status
                if finished:
                    self._surroundings.api.delete(path, grace_s=0, uid=self.uid)
                    return
            except ApiError as error:
                # Another pod of this name has another uid; whatever else was refused is tried again.
                self._is_gone = error.code == 404 or (error.code == 409 and "uid" in error.message.lower())
                time.sleep(RETRY_S)
            except (OSError, http.client.HTTPException):
                # The server is away: the same again, in a moment.
                self._changed.set()
                time.sleep(RETRY_S)
