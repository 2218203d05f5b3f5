"""A real control plane for tests: etcd, kube-apiserver with RBAC and audit, kube-controller-manager.

All of it stands at one address: on loopback with free ports, or, with `enter`, in a network namespace where pods reach it.
It is not a cluster: there is no scheduler, no kubelet and no kube-proxy (see pod_runner.py).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from kube_api import Api, ApiError, Identity, Object, Server, connect_directly
from kube_binaries import Programs
from kube_certificates import Authority, service_account_key
from kube_processes import NotInTime, Program, wait_for

START_DEADLINE_S = 60.0
KUBECTL_DEADLINE_S = 60.0
ISSUER = "https://kubernetes.default.svc.cluster.local"
SERVICE_NETWORK = "10.79.0.0/24"
SERVICE_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
CONTROLLERS = (
    "statefulset-controller",
    "endpointslice-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "disruption-controller",
    "namespace-controller",
    "garbage-collector-controller",
    "persistentvolumeclaim-protection-controller",
)
_AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"""


@dataclass(frozen=True, slots=True)
class Ports:
    api: int = 6443
    etcd: int = 2379
    etcd_peers: int = 2380

    @classmethod
    def free(cls) -> Ports:
        """Such as nobody listens on now on loopback."""
        held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        numbers = [one.getsockname()[1] for one in held]
        for one in held:
            one.close()
        return cls(*numbers)


class ControlPlane:
    """One run of it, with everything that it writes in `directory`."""

    def __init__(
        self,
        programs: Programs,
        directory: Path,
        *,
        enter: Sequence[str] = (),
        address: str = "127.0.0.1",
        ports: Ports | None = None,
        connect: Callable[[str, int, float], socket.socket] = connect_directly,
    ) -> None:
        self.directory = directory
        self._programs = programs
        self._enter = (*enter,)
        self._ports = ports or Ports.free()
        directory.mkdir(parents=True, exist_ok=True)
        authority = Authority(directory / "certificates")
        self.server = Server(address, self._ports.api, authority.certificate_file, connect)
        self._admin = authority.client("admin", ["system:masters"])
        self.admin = Api(self.server, Identity(certificate=self._admin))
        self.kubeconfig = self._write_kubeconfig("admin", self._admin)
        self.audit_log = directory / "audit.log"
        self.etcd = Program(
            [*self._enter, *self._etcd()],
            directory / "etcd.log",
            {**os.environ, "ETCD_UNSUPPORTED_ARCH": os.uname().machine},
        )
        self.apiserver = Program([*self._enter, *self._apiserver(authority)], directory / "kube-apiserver.log")
        self.controller_manager = Program(
            [*self._enter, *self._controller_manager(authority)], directory / "kube-controller-manager.log"
        )

    def __enter__(self) -> ControlPlane:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """NotInTime, with the ends of the logs."""
        self.etcd.start()
        self.apiserver.start()
        self.wait_ready()
        self.controller_manager.start()
        wait_for(self._has_default_account, START_DEADLINE_S, "the service account of namespace default")

    def close(self) -> None:
        for program in (self.controller_manager, self.apiserver, self.etcd):
            # A frozen one ends by SIGKILL too.
            program.stop()

    def wait_ready(self) -> None:
        """Until the API server says it is. NotInTime."""
        try:
            wait_for(self._is_ready, START_DEADLINE_S, "kube-apiserver ready")
        except NotInTime as late:
            raise NotInTime(f"{late}\n{self.etcd.tail()}\n{self.apiserver.tail()}") from late

    def stop_apiserver(self) -> None:
        """Connections are refused from now on; etcd and the controllers stay."""
        self.apiserver.stop()

    def start_apiserver(self) -> None:
        self.apiserver.start()
        self.wait_ready()

    def freeze_apiserver(self) -> None:
        """Connections are taken and nothing is answered."""
        self.apiserver.send(signal.SIGSTOP)

    def thaw_apiserver(self) -> None:
        self.apiserver.send(signal.SIGCONT)
        self.wait_ready()

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """As the administrator; the caller looks at the exit code if `check` is off."""
        done = self.run([str(self._programs.kubectl), *arguments], stdin=stdin)
        assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done

    def run(
        self, argv: Sequence[str], *, stdin: str | None = None, deadline_s: float = KUBECTL_DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """A program that calls kubectl, where the API server is reached, as the administrator."""
        environment = {
            **os.environ,
            "PATH": f"{self._programs.kubectl.parent}:{os.environ['PATH']}",
            "KUBECONFIG": str(self.kubeconfig),
            "HOME": str(self.directory),
        }
        return subprocess.run(
            [*self._enter, *argv],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
            env=environment,
        )

    def api_as(self, identity: Identity) -> Api:
        return Api(self.server, identity)

    def token(
        self,
        namespace: str,
        service_account: str,
        *,
        pod: Object | None = None,
        audience: str = ISSUER,
        seconds: int = 3607,
    ) -> str:
        """Of a service account, by the TokenRequest API as the kubelet asks for it; valid only while `pod` exists."""
        spec: Object = {"audiences": [audience], "expirationSeconds": seconds}
        if pod is not None:
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{service_account}/token"
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str(self.admin.create(path, request)["status"]["token"])

    def make_namespace(self, name: str, *, pod_security: str = "restricted") -> None:
        """With the pod security standard enforced, and its service account `default` there."""
        labels = {f"pod-security.kubernetes.io/{mode}": pod_security for mode in ("enforce", "warn")}
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        self.admin.create("/api/v1/namespaces", body)
        wait_for(lambda: self._has_default_account(name), START_DEADLINE_S, f"the service account of namespace {name}")

    def _is_ready(self) -> bool:
        for program in (self.etcd, self.apiserver):
            if program.exit_code is not None:
                raise NotInTime(f"{program.log.stem} ended with {program.exit_code}:\n{program.tail()}")
        try:
            return self.admin.text("/readyz") == "ok"
        except (ApiError, OSError):
            return False

    def _has_default_account(self, namespace: str = "default") -> bool:
        return self.admin.find(f"/api/v1/namespaces/{namespace}/serviceaccounts/default") is not None

    # --- command lines ---

    def _etcd(self) -> list[str]:
        client, peers = (f"http://127.0.0.1:{port}" for port in (self._ports.etcd, self._ports.etcd_peers))
        return [
            str(self._programs.etcd),
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            *self._without_fsync(),
        ]

    def _without_fsync(self) -> list[str]:
        """Power loss is not what these tests are about; etcd 3.4 always waits for the disk."""
        told = subprocess.run([self._programs.etcd, "--help"], capture_output=True, text=True, check=False)
        return ["--unsafe-no-fsync"] if "--unsafe-no-fsync" in told.stdout + told.stderr else []

    def _apiserver(self, authority: Authority) -> list[str]:
        address = self.server.host
        certificate, key = authority.server("kube-apiserver", [*SERVICE_NAMES, "localhost"], [address, "127.0.0.1"])
        accounts = service_account_key(self.directory / "certificates")
        policy = self.directory / "audit-policy.yaml"
        policy.write_text(_AUDIT_POLICY)
        return [
            str(self._programs.apiserver),
            f"--etcd-servers=http://127.0.0.1:{self._ports.etcd}",
            f"--bind-address={address}",
            f"--secure-port={self._ports.api}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={authority.certificate_file}",
            "--authorization-mode=RBAC",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-key-file={accounts}",
            f"--service-account-signing-key-file={accounts}",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--endpoint-reconciler-type=none",  # an address on loopback cannot be an endpoint
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.audit_log}",
            "--allow-privileged=true",  # so that the pod security standard decides
            "--profiling=false",
        ]

    def _controller_manager(self, authority: Authority) -> list[str]:
        identity = authority.client("system:kube-controller-manager", ["system:masters"])
        return [
            str(self._programs.controller_manager),
            f"--kubeconfig={self._write_kubeconfig('controller-manager', identity)}",
            f"--controllers={','.join(CONTROLLERS)}",
            f"--root-ca-file={authority.certificate_file}",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        ]

    def _write_kubeconfig(self, name: str, identity: tuple[Path, Path]) -> Path:
        certificate, key = map(str, identity)
        server = {
            "server": f"https://{self.server.host}:{self.server.port}",
            "certificate-authority": str(self.server.authority_file),
        }
        path = self.directory / f"{name}.kubeconfig"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "clusters": [{"name": "tests", "cluster": server}],
            "users": [{"name": name, "user": {"client-certificate": certificate, "client-key": key}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": name}}],
        }
        path.write_text(yaml.safe_dump(content))
        path.chmod(0o600)
        return path


@dataclass(frozen=True, slots=True)
class Audited:
    """One request as the API server's audit log has it."""

    user: str
    verb: str
    group: str
    resource: str
    namespace: str
    name: str
    code: int
    decision: str
    """Of the authorizer: `allow` or `forbid`; empty when it never came to one."""

    @property
    def is_write(self) -> bool:
        return self.verb in ("create", "update", "patch", "delete", "deletecollection")


def audited(log: Path, *, user: str | None = None, stage: str = "ResponseComplete") -> list[Audited]:
    """All requests so far, of one user if named: those that have ended, or watches that have begun (ResponseStarted)."""
    found = []
    for line in log.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        event = json.loads(line)
        if event["stage"] != stage or (user is not None and event["user"].get("username") != user):
            continue
        target = event.get("objectRef", {})
        resource = "/".join(part for part in (target.get("resource"), target.get("subresource")) if part)
        found.append(
            Audited(
                user=event["user"].get("username", ""),
                verb=event["verb"],
                group=target.get("apiGroup", ""),
                resource=resource,
                namespace=target.get("namespace", ""),
                name=target.get("name", ""),
                code=event.get("responseStatus", {}).get("code", 0),
                decision=event.get("annotations", {}).get("authorization.k8s.io/decision", ""),
            )
        )
    return found
