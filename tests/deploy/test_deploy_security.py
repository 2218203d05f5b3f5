"""What is shipped passes the `restricted` Pod Security Standard, and holds no password."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import yaml
from deploy_manifests import DEPLOY, Manifests, rendered

MAKE_SECRET = DEPLOY / "make-secret.sh"
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def test_the_pod_is_as_the_restricted_standard_demands(manifests: Manifests) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    pod, container = manifests.pod, manifests.container
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 999
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & pod.keys()
    assert "sysctls" not in pod["securityContext"]
    assert all("hostPort" not in port for port in container["ports"])
    for volume in pod["volumes"]:
        assert volume.keys() - {"name"} <= RESTRICTED_VOLUMES


def test_the_root_filesystem_is_read_only_and_what_must_be_writable_is_mounted(manifests: Manifests) -> None:
    assert manifests.container["securityContext"]["readOnlyRootFilesystem"] is True
    writable = {mount["mountPath"] for mount in manifests.container["volumeMounts"] if not mount.get("readOnly", False)}
    assert writable == {"/var/lib/postgresql", "/tmp", "/run", "/dev/shm"}


def test_the_volume_is_not_opened_to_the_group_at_each_start(manifests: Manifests) -> None:
    context = manifests.pod["securityContext"]
    assert context["fsGroup"] == 999
    assert context["fsGroupChangePolicy"] == "OnRootMismatch"


def test_no_password_is_shipped_and_pods_wait_for_the_users(manifests: Manifests) -> None:
    assert not list(manifests.of_kind("Secret"))
    secret = manifests.volume("secrets")["secret"]
    assert not secret.get("optional", False)
    # As the agent demands: nobody but the group reads it.
    assert secret["defaultMode"] == 0o440


def test_a_new_secret_has_every_key_and_no_two_values_alike(manifests: Manifests, tmp_path: Path) -> None:
    made = [yaml.safe_load(subprocess.check_output([MAKE_SECRET], timeout=30)) for _ in range(2)]
    wanted = set(manifests.configuration(tmp_path).secrets.files)
    for secret in made:
        assert secret["metadata"]["name"] == manifests.volume("secrets")["secret"]["secretName"]
        assert secret["stringData"].keys() == wanted
    values = [value for secret in made for value in secret["stringData"].values()]
    assert len(set(values)) == 2 * len(wanted)
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in values)


def test_a_secret_is_not_shown_on_a_terminal() -> None:
    controller, terminal = pty.openpty()
    try:
        result = subprocess.run(
            [MAKE_SECRET], stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=30, check=False
        )
    finally:
        os.close(controller)
        os.close(terminal)
    assert result.returncode == 2
    assert "kubectl create" in result.stderr


def test_the_production_namespace_enforces_the_restricted_standard() -> None:
    production = rendered(DEPLOY / "overlays/production")
    labels = production.one("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert production.one("Namespace")["metadata"]["name"] == production.stateful_set["metadata"]["namespace"]
