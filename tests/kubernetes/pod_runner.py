"""Stands in for scheduler and kubelets, so that tests run the pods of the shipped manifests on one machine.

It binds pods to Nodes that are names only, and runs each pod's container as processes in namespaces of its own: network,
PID (the command is PID 1), mounts, IPC and hostname. It does what the cluster sees of a kubelet: volumes, environment,
probes, restarts, statuses, grace, deletion.

What it is not: no control groups (limits are not enforced), no seccomp, no images (`pod_image.py` stands in), no
kube-proxy and no NetworkPolicy (every pod reaches every pod; names of Services lead to their endpoints), no attach and
detach of disks (a claim is a directory that one living pod has at a time), no eviction, no node life cycle (a Node stays
Ready until a test says otherwise), no preemption, no affinity: pods are spread evenly. Volumes are refreshed and tokens
exchanged at once, and the back-off of a crashing container is at most 5 s.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster_dns import DOMAIN, PORT, NameServer, names_of, resolver_file
from control_plane import ISSUER, ControlPlane
from kube_api import ApiError, Object
from kube_mirror import Mirror
from kube_processes import wait_for
from pod_image import Image
from pod_network import SWITCH_ADDRESS, PodNetwork
from pod_volumes import NotThereYet
from pod_worker import Node, PodWorker

END_DEADLINE_S = 60.0
_READY = {"type": "Ready", "status": "True", "reason": "TestRunner", "message": "a name only"}


class PodRunner:
    """One for all tests of a session; use it as a context manager. Pods of all namespaces are run."""

    def __init__(
        self,
        control_plane: ControlPlane,
        network: PodNetwork,
        directory: Path,
        images: Mapping[str, Callable[[], Image]],
        *,
        nodes: int = 3,
    ) -> None:
        """`images`: how the stand-in of an image is made, by the image's name without its tag."""
        self.api = control_plane.admin
        self.network = network
        self.nodes = {f"node-{number}": Node(f"node-{number}", f"10.78.255.{number}") for number in range(1, nodes + 1)}
        self._control_plane = control_plane
        self._directory = directory
        self._images = images
        self._made_images: dict[str, Image] = {}
        self._workers: dict[str, PodWorker] = {}
        self._claims: dict[str, str] = {}
        """The uid of the pod that has a claim, by the claim's uid."""
        self._bound: dict[str, str] = {}
        """The node of each pod, by the pod's uid."""
        self._lock = threading.RLock()
        self._closing = False
        self._pods = Mirror(self.api, "/api/v1/pods", self._pod_changed)
        self._config_maps = Mirror(self.api, "/api/v1/configmaps", self._content_changed)
        self._secrets = Mirror(self.api, "/api/v1/secrets", self._content_changed)
        self._claim_objects = Mirror(self.api, "/api/v1/persistentvolumeclaims", self._claim_changed)
        self._slices = Mirror(self.api, "/apis/discovery.k8s.io/v1/endpointslices")
        self._name_server = NameServer(network.datagrams(PORT), self._addresses_of)

    def __enter__(self) -> PodRunner:
        for node in self.nodes.values():
            self._add_node(node)
        self._name_server.start()
        for mirror in self._mirrors():
            mirror.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        for mirror in self._mirrors():
            mirror.close()
        self._name_server.close()
        self.drop(self.workers())

    # --- for tests ---

    def workers(self, namespace: str | None = None) -> list[PodWorker]:
        """Those with anything left on their node, also such as the API no longer knows."""
        with self._lock:
            found = [worker for worker in self._workers.values() if not worker.finished.is_set()]
        return [worker for worker in found if namespace in (None, worker.namespace)]

    def worker(self, namespace: str, name: str, *, within_s: float = 20.0) -> PodWorker:
        """Of the pod that the API has now under this name, once its container runs. NotInTime."""

        def running() -> PodWorker | None:
            pod = self._pods.find(namespace, name)
            worker = None if pod is None else self._workers.get(pod["metadata"]["uid"])
            return worker if worker is not None and worker.container is not None and worker.container.pid else None

        return wait_for(running, within_s, f"the container of pod {namespace}/{name}")

    def cut_off(self, node: Node, *, clients_stay: bool = False) -> None:
        """The machine lives on, and nobody reaches it or hears from it, except the clients if they stay."""
        node.cut = True
        for worker in self._on(node):
            if worker.link is not None:
                self.network.cut(worker.link, clients_stay=clients_stay)

    def rejoin(self, node: Node) -> None:
        for worker in self._on(node):
            if worker.link is not None:
                self.network.join(worker.link)
        node.cut = False
        for worker in self._on(node):
            worker.catch_up()
        self._bind_waiting()

    def lose(self, node: Node) -> None:
        """The machine is gone with all its processes, and nobody tells the API."""
        node.cut = True
        self.drop(self._on(node))

    def drop(self, workers: list[PodWorker]) -> None:
        """End these at once, whatever the API says."""
        for worker in workers:
            worker.drop()
        for worker in workers:
            assert worker.wait_finished(END_DEADLINE_S), f"{worker.name} does not end"

    def remove_namespace(self, namespace: str) -> None:
        """With everything in it, at once."""
        try:
            self.api.delete(f"/api/v1/namespaces/{namespace}")
        except ApiError as error:
            if error.code != 404:
                raise
        self.drop(self.workers(namespace))

    def command_in(self, worker: PodWorker, *argv: str) -> list[str]:
        """The command line that runs `argv` in the worker's container, as `kubectl exec` would."""
        entering = ["nsenter", f"--target={worker.pid}", "--mount", "--net", "--pid", "--ipc", "--uts"]
        image = self.image(worker.image_name)
        variables = [f"{name}={value}" for name, value in image.environment.items()]
        return [*entering, f"--setuid={image.user}", f"--setgid={image.user}", "--wd=/", "env", "-i", *variables, *argv]

    def run_in(self, worker: PodWorker, *argv: str, deadline_s: float = 20.0) -> subprocess.CompletedProcess[str]:
        return self.run_here(self.command_in(worker, *argv), deadline_s=deadline_s)

    @staticmethod
    def run_here(argv: list[str], *, deadline_s: float = 20.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, capture_output=True, text=True, timeout=deadline_s, check=False)

    def as_client(self, namespace: str) -> list[str]:
        """Before a command: run it in the network where clients are, with the cluster's names."""
        file = self._directory / f"resolv-{namespace}.conf"
        if not file.exists():
            file.write_text(resolver_file(namespace, SWITCH_ADDRESS))
        script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        return [*self.network.enter_clients(), "unshare", "--mount", "sh", "-c", script, str(file)]

    # --- for the workers ---

    def image(self, name: str) -> Image:
        base = name.rpartition("/")[2].partition(":")[0]
        with self._lock:
            if base not in self._made_images:
                if base not in self._images:
                    raise NotThereYet(f"no stand-in for the image {name}")
                self._made_images[base] = self._images[base]()
            return self._made_images[base]

    def service_environment(self) -> dict[str, str]:
        server = self._control_plane.server
        return {
            "KUBERNETES_SERVICE_HOST": server.host,
            "KUBERNETES_SERVICE_PORT": str(server.port),
            "KUBERNETES_SERVICE_PORT_HTTPS": str(server.port),
        }

    def host_files(self, pod: Object, address: str) -> dict[str, str]:
        metadata, spec = pod["metadata"], pod["spec"]
        names = [metadata["name"]]
        if "subdomain" in spec:
            full = f"{spec['hostname']}.{spec['subdomain']}.{metadata['namespace']}.svc.{DOMAIN}"
            names.insert(0, full)
        return {
            "/etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n{address} {' '.join(names)}\n",
            "/etc/hostname": f"{metadata['name']}\n",
            "/etc/resolv.conf": resolver_file(metadata["namespace"], SWITCH_ADDRESS),
        }

    def config_map(self, namespace: str, name: str) -> Object | None:
        return self._config_maps.find(namespace, name)

    def secret(self, namespace: str, name: str) -> Object | None:
        return self._secrets.find(namespace, name)

    def token(self, pod: Object, audience: str | None, seconds: int) -> str:
        metadata = pod["metadata"]
        account = pod["spec"].get("serviceAccountName", "default")
        try:
            return self._control_plane.token(
                metadata["namespace"], account, pod=pod, audience=audience or ISSUER, seconds=seconds
            )
        except (ApiError, OSError) as error:
            raise NotThereYet(f"token of {account}: {error}") from error

    def claim(self, pod: Object, name: str) -> Path:
        found = self._claim_objects.find(pod["metadata"]["namespace"], name)
        if found is None:
            raise NotThereYet(f"persistentvolumeclaim {name!r} not found")
        uid = found["metadata"]["uid"]
        with self._lock:
            holder = self._claims.setdefault(uid, pod["metadata"]["uid"])
        if holder != pod["metadata"]["uid"]:
            raise NotThereYet(f"volume of claim {name!r} is still attached for another pod")
        path = self._claim_directory(uid)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def ended(self, worker: PodWorker) -> None:
        with self._lock:
            self._claims = {claim: pod for claim, pod in self._claims.items() if pod != worker.uid}

    # --- changes in the API ---

    def _pod_changed(self, before: Object | None, pod: Object | None) -> None:
        if self._closing:
            return
        if pod is None:
            assert before is not None
            worker = self._workers.get(before["metadata"]["uid"])
            if worker is not None:
                worker.observe(None)
            return
        worker = self._workers.get(pod["metadata"]["uid"])
        node = self.nodes.get(pod["spec"].get("nodeName", ""))
        if worker is not None:
            worker.observe(pod)
        elif node is not None:
            worker = PodWorker(pod, node, self._directory / "pods" / pod["metadata"]["uid"], self)
            with self._lock:
                self._workers[worker.uid] = worker
            worker.start()
            worker.observe(pod)
        elif "nodeName" not in pod["spec"]:
            self._bind(pod)

    def _bind(self, pod: Object) -> None:
        """To the node with the fewest pods of its owner, then of all; it waits if there is none."""
        owner = owner_of(pod)

        def burden(node: Node) -> tuple[int, int]:
            # What was bound a moment ago is not in the mirror yet.
            here = [each for each in self._pods.all() if self._bound.get(each["metadata"]["uid"]) == node.name]
            same = [each for each in here if owner_of(each) == owner]
            return len(same), len(here)

        open_nodes = [node for node in self.nodes.values() if not node.cut and not node.cordoned]
        if not open_nodes:
            return
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        node = self._bound[pod["metadata"]["uid"]] = min(open_nodes, key=burden).name
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        metadata = {"name": name, "uid": pod["metadata"]["uid"]}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": target}
        try:
            self.api.create(f"/api/v1/namespaces/{namespace}/pods/{name}/binding", binding)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    def _bind_waiting(self) -> None:
        for pod in self._pods.all():
            if "nodeName" not in pod["spec"]:
                self._bind(pod)

    def _content_changed(self, before: Object | None, item: Object | None) -> None:
        if before is not None and item is not None:
            for worker in self.workers(item["metadata"]["namespace"]):
                worker.refresh_volumes()

    def _claim_changed(self, before: Object | None, claim: Object | None) -> None:
        if claim is None and before is not None:
            shutil.rmtree(self._claim_directory(before["metadata"]["uid"]), ignore_errors=True)

    def _claim_directory(self, uid: str) -> Path:
        return self._directory / "claims" / uid

    def _addresses_of(self, name: str) -> list[str] | None:
        if name == f"kubernetes.default.svc.{DOMAIN}":
            return [SWITCH_ADDRESS]
        return names_of(self._slices.all()).get(name)

    def _on(self, node: Node) -> list[PodWorker]:
        return [worker for worker in self.workers() if worker.node is node]

    def _mirrors(self) -> tuple[Mirror, ...]:
        return self._config_maps, self._secrets, self._claim_objects, self._slices, self._pods

    def _add_node(self, node: Node) -> None:
        labels = {
            "kubernetes.io/hostname": node.name,
            "kubernetes.io/os": "linux",
            "topology.kubernetes.io/zone": node.name,
        }
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name, "labels": labels}}
        self.api.create("/api/v1/nodes", body)
        status = {"conditions": [_READY], "addresses": [{"type": "InternalIP", "address": node.address}]}
        self.api.patch(f"/api/v1/nodes/{node.name}/status", {"status": status})
        # A new Node is tainted until its kubelet says that it is ready.
        self.api.patch(f"/api/v1/nodes/{node.name}", {"spec": {"taints": None}})


def owner_of(pod: Object) -> list[str]:
    """The uid of the StatefulSet that made it."""
    return [reference["uid"] for reference in pod["metadata"].get("ownerReferences", ())]
