"""The manifests as `kubectl kustomize` renders them, and what tests ask of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from instance_manager.config import Configuration, load_configuration

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUSTOMIZATIONS = ("base", "overlays/small", "overlays/production", "overlays/tls")

Plain = dict[str, Any]


def require_kubectl() -> str:
    """Reported as not run where there is no kubectl; in CI that is a failure."""
    found = shutil.which("kubectl")
    if found is not None:
        return found
    if os.environ.get("CI"):
        pytest.fail("CI must render the manifests: install kubectl")
    pytest.skip("not run: there is no kubectl to render the manifests with")


@cache
def rendered(directory: Path) -> Manifests:
    kubectl = require_kubectl()
    result = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return Manifests(tuple(yaml.safe_load_all(result.stdout)))


@dataclass(frozen=True, slots=True)
class Manifests:
    objects: tuple[Plain, ...]

    def of_kind(self, kind: str) -> Iterator[Plain]:
        return (each for each in self.objects if each["kind"] == kind)

    def one(self, kind: str, name: str | None = None) -> Plain:
        (found,) = [each for each in self.of_kind(kind) if name is None or each["metadata"]["name"] == name]
        return found

    @property
    def name(self) -> str:
        """The cluster's."""
        return str(self.stateful_set["metadata"]["name"])

    @property
    def stateful_set(self) -> Plain:
        return self.one("StatefulSet")

    @property
    def pod(self) -> Plain:
        """Its template's spec."""
        spec: Plain = self.stateful_set["spec"]["template"]["spec"]
        return spec

    @property
    def pod_labels(self) -> Mapping[str, str]:
        labels: Mapping[str, str] = self.stateful_set["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def container(self) -> Plain:
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def mounts(self) -> dict[str, str]:
        """Path by the volume's name."""
        return {mount["name"]: mount["mountPath"] for mount in self.container["volumeMounts"]}

    def volume(self, name: str) -> Plain:
        (found,) = [volume for volume in self.pod["volumes"] if volume["name"] == name]
        return dict(found)

    def configuration(self, directory: Path, ordinal: int = 0) -> Configuration:
        """As the agent in that pod reads it; the file is written into `directory`."""
        (text,) = self.one("ConfigMap")["data"].values()
        path = directory / "instance-manager.yaml"
        path.write_text(text, encoding="utf-8")
        environment = {
            "POD_NAME": f"{self.name}-{ordinal}",
            "POD_UID": "2f6f2f9e-0000-4000-8000-000000000000",
            "POD_NAMESPACE": "somewhere",
            "POD_IP": "10.1.2.3",
        }
        return load_configuration(path, environment)


def size_bytes(text: str) -> int:
    """Of Kubernetes (`1Gi`) and of Postgres (`64MB`), both of which count in 1024."""
    units = {"Ki": 10, "Mi": 20, "Gi": 30, "kB": 10, "MB": 20, "GB": 30}
    return int(text[:-2]) << units[text[-2:]]
