"""What things are called on Kubernetes: pods, hosts, labels and annotations, as the manifests of `deploy/` have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

PREFIX = "instance-manager.dev/"
CLUSTER_LABEL = f"{PREFIX}cluster"
ROLE_LABEL = f"{PREFIX}role"
CONTAINER = "postgres"
POSTGRES_PORT = 5432
HTTP_PORT = 8008
PEER_PORT = 8009
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

NAME_PATTERN = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")
"""A cluster's name: with `-99` after it, it is a member's."""
_ORDINAL_PATTERN = re.compile(r"0|[1-9][0-9]?")


def ordinal_of(pod_name: str, cluster_name: str) -> int | None:
    """2 for `orders-2` of the cluster `orders`; None if the StatefulSet of that cluster has no such pod."""
    text = pod_name.removeprefix(f"{cluster_name}-")
    if text == pod_name or _ORDINAL_PATTERN.fullmatch(text) is None:
        return None
    return int(text)


def host_of(pod_name: str, service: str, namespace: str) -> str:
    """The stable name of a pod of a StatefulSet under its headless Service; it stays when the pod is replaced."""
    return f"{pod_name}.{service}.{namespace}.svc"


def own_namespace(environment: Mapping[str, str], kubeconfig: Path | None) -> str:
    """Of this pod; empty if nothing tells. A kubeconfig's own is read only where a kubeconfig is used."""
    if from_environment := environment.get("POD_NAMESPACE", ""):
        return from_environment
    if kubeconfig is not None:
        return _namespace_of_kubeconfig(kubeconfig)
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _namespace_of_kubeconfig(path: Path) -> str:
    """Of its current context; empty if that names none or the file is not readable: whoever connects by it will tell."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        contexts = {each["name"]: each["context"] for each in content["contexts"]}
        return str(contexts[content["current-context"]].get("namespace", ""))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        return ""
