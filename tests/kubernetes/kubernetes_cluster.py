"""The cluster of the shipped manifests on the real API server: installed by kubectl, looked at as its users do."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import subprocess
from pathlib import Path

import msgspec
import yaml
from control_plane import ControlPlane
from kube_api import Object
from kube_processes import NotInTime, wait_for
from pod_image import ROOT
from pod_runner import PodRunner
from pod_worker import PodWorker

from instance_manager.demo.cluster import why_not_redundant
from instance_manager.demo.processes import InstanceProcesses, look
from instance_manager.status import ClusterStatus

DEPLOY = ROOT / "deploy"
STATUS_DEADLINE_S = 2.0
START_DEADLINE_S = 90.0
CLUSTER = "pg"
ROLE = "instance-manager.dev/role"


class KubernetesCluster:
    """One installation in a namespace of its own."""

    def __init__(self, control_plane: ControlPlane, runner: PodRunner, namespace: str, directory: Path) -> None:
        self.control_plane = control_plane
        self.runner = runner
        self.namespace = namespace
        self.directory = directory
        self.api = control_plane.admin
        self.instances = 3
        self.parameters: dict[str, str] = {}
        """Of Postgres, on top of a test's own."""

    # --- installation ---

    def install(self, *, instances: int = 3) -> None:
        """The secret by the shipped script, then `kubectl apply -k` of an overlay as a user writes it."""
        self.instances = instances
        script = subprocess.run([DEPLOY / "make-secret.sh"], capture_output=True, text=True, check=True)
        self.control_plane.kubectl(f"--namespace={self.namespace}", "create", "-f", "-", stdin=script.stdout)
        self.apply()

    def apply(self) -> None:
        """The overlay as it should be now; running pods take over what is changed in the configuration."""
        self.kubectl("apply", "-k", str(self.write_overlay()))

    def write_overlay(self) -> Path:
        """It names the base, the namespace, and what differs: less memory, the number of instances."""
        overlay = self.directory / "overlay"
        overlay.mkdir(parents=True, exist_ok=True)
        base = DEPLOY / "base"
        configuration = yaml.safe_load((base / "instance-manager.yaml").read_text())
        configuration["cluster"]["instances"] = self.instances
        configuration["postgres"]["parameters"] |= {"shared_buffers": "32MB", **self.parameters}
        kustomization = {
            "namespace": self.namespace,
            "resources": [relative(base, overlay)],
            "replicas": [{"name": CLUSTER, "count": self.instances}],
            "configMapGenerator": [{"name": CLUSTER, "behavior": "replace", "files": ["instance-manager.yaml"]}],
            "generatorOptions": {"disableNameSuffixHash": True},
        }
        (overlay / "instance-manager.yaml").write_text(yaml.safe_dump(configuration))
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return overlay

    def kubectl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.control_plane.kubectl(f"--namespace={self.namespace}", *arguments, check=check)

    # --- what there is ---

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{CLUSTER}-{number}" for number in range(self.instances))

    def path(self, kind: str, name: str = "") -> str:
        return f"/api/v1/namespaces/{self.namespace}/{kind}/{name}".rstrip("/")

    @property
    def lease_path(self) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/{CLUSTER}"

    def worker(self, name: str) -> PodWorker:
        return self.runner.worker(self.namespace, name)

    def processes(self, name: str) -> InstanceProcesses:
        """Of the pod's container, as the machine sees them."""
        worker = self.worker(name)
        return look(worker.pid, worker.volume("data") / "instance" / "data")

    def status(self, name: str) -> ClusterStatus | None:
        """What the instance itself says; None if it does not answer."""
        workers = [worker for worker in self.runner.workers(self.namespace) if worker.name == name]
        for worker in workers:
            if worker.link is not None:
                with contextlib.suppress(OSError, http.client.HTTPException, msgspec.MsgspecError):
                    return self._ask(worker)
        return None

    def _ask(self, worker: PodWorker) -> ClusterStatus:
        connection = http.client.HTTPConnection(worker.address, 8008)
        try:
            connection.sock = self.runner.network.connect(worker.address, 8008, STATUS_DEADLINE_S)
            connection.request("GET", "/status")
            return msgspec.convert(json.loads(connection.getresponse().read()), ClusterStatus)
        finally:
            connection.close()

    def primary_status(self) -> ClusterStatus | None:
        """What the primary itself says, if one says that it is and no other says so of a later epoch."""
        told = [status for name in self.names if (status := self.status(name)) is not None]
        own = [status for status in told if status.primary == status.told_by]
        return max(own, key=lambda status: status.epoch or 0, default=None)

    def labelled(self, role: str) -> list[str]:
        """Names of the pods that carry this role."""
        found = self.api.list(self.path("pods"), labelSelector=f"{ROLE}={role}")
        return sorted(pod["metadata"]["name"] for pod in found)

    def labelled_all(self) -> list[str]:
        """Names of the cluster's pods."""
        found = self.api.list(self.path("pods"), labelSelector=f"instance-manager.dev/cluster={CLUSTER}")
        return sorted(pod["metadata"]["name"] for pod in found)

    def events(self, reason: str | None = None) -> list[Object]:
        """Of the instances."""
        found = self.api.list(self.path("events"))
        own = [event for event in found if event.get("source", {}).get("component") == "instance-manager"]
        return [event for event in own if reason in (None, event["reason"])]

    def story(self, lines: int) -> str:
        """What a failing test should show of it."""
        seen = self.kubectl("get", "pods,statefulsets,leases,events", "-L", ROLE, "-o", "wide", check=False).stdout
        return "\n".join((seen, *(worker.story(lines) for worker in self.runner.workers(self.namespace))))

    # --- waiting ---

    def why_not_redundant(self) -> str | None:
        """What is missing to full redundancy, in words; None when every instance and every label is as it should be."""
        status = self.primary_status()
        if (missing := why_not_redundant(status, standbys=self.instances - 1)) is not None:
            return missing
        assert status is not None
        labels = self.labelled("primary"), self.labelled("replica")
        if labels != ([status.primary], sorted(set(self.names) - {status.primary})):
            return f"labelled primary and replica are {labels}"
        return None

    def wait_redundant(self, deadline_s: float = START_DEADLINE_S) -> str:
        """The primary's name. NotInTime says what was missing."""
        reason: str | None = ""

        def whole() -> bool:
            nonlocal reason
            reason = self.why_not_redundant()
            return reason is None

        try:
            wait_for(whole, deadline_s, "full redundancy")
        except NotInTime as late:
            raise NotInTime(f"{late}: {reason}") from None
        (primary,) = self.labelled("primary")
        return primary

    def wait_other_primary(self, than: str, deadline_s: float = 60.0) -> str:
        """Until another instance is the primary and lets clients in."""

        def other() -> str | None:
            status = self.primary_status()
            named = status is not None and status.accepts_clients and status.primary != than
            return status.primary if status is not None and named else None

        return wait_for(other, deadline_s, f"another primary than {than}")

    # --- clients ---

    def host(self, name: str) -> str:
        return f"{name}.{CLUSTER}.{self.namespace}.svc.cluster.local"

    def psql(self, statement: str, *, host: str = f"{CLUSTER}-rw", options: str = "", deadline_s: float = 20.0) -> str:
        """As the application, by a Service's or a pod's name; `options` of libpq besides."""
        target = (
            f"host={host} port=5432 dbname=app user=app passfile={self.password_file()} connect_timeout=3 {options}"
        )
        argv = ["psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", f"--command={statement}", target]
        done = self.runner.run_here([*self.runner.as_client(self.namespace), *argv], deadline_s=deadline_s)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def password_file(self) -> Path:
        path = self.directory / "passwords"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(f"*:*:*:*:{self.secret('application_password')}\n")
        return path

    def secret(self, key: str) -> str:
        for found in self.api.list(self.path("secrets")):
            if key in found.get("data", {}):
                return base64.b64decode(found["data"][key]).decode()
        raise AssertionError(f"no secret has the key {key}")


def relative(path: Path, start: Path) -> str:
    """kustomize takes relative folders only."""
    ups = [".."] * len(start.resolve().relative_to("/").parts)
    return "/".join([*ups, *path.resolve().relative_to("/").parts])
