"""The way in: the service account with its rotated token, a kubeconfig, and what the client costs in memory."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from coordination_stores import eventually
from fake_api_server import FakeApiServer

from instance_manager.coordination import kubernetes_access
from instance_manager.coordination.kubernetes import KubernetesCoordination
from instance_manager.coordination.kubernetes_access import AccessUnusable, KubeconfigAccess, ServiceAccountAccess
from instance_manager.coordination.kubernetes_api import ApiServer, NotSent

ENVIRONMENT = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
MEMORY_KIB_MAX = 6 * 1024
"""On top of aiohttp, which the agent has loaded anyway: kubernetes-asyncio's whole client costs 36 MiB more."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("authority")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=test",
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    return directory / "ca.crt"


@pytest.fixture
def account(tmp_path: Path, authority: Path) -> Path:
    """As the kubelet mounts it: the files are links into a folder that is replaced as a whole."""
    shutil.copy(authority, tmp_path / "ca.crt")
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "token").write_text("first\n")
    (tmp_path / "token").symlink_to("..data/token")
    return tmp_path


async def test_a_pod_is_let_in_by_its_service_account(account: Path) -> None:
    access = ServiceAccountAccess(ENVIRONMENT, account)
    context = await access.open()
    assert access.server == "https://10.96.0.1:443"
    assert access.authorization() == "Bearer first"
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1


async def test_an_address_of_ipv6_is_bracketed(account: Path) -> None:
    access = ServiceAccountAccess({**ENVIRONMENT, "KUBERNETES_SERVICE_HOST": "fd00::1"}, account)
    assert access.server == "https://[fd00::1]:443"


async def test_a_rotated_token_is_in_use_a_minute_later_and_at_once_when_the_old_was_refused(
    account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(kubernetes_access, "monotonic_s", lambda: now_s)
    access = ServiceAccountAccess(ENVIRONMENT, account)
    await access.open()
    (account / "..data" / "token").write_text("second")
    assert access.authorization() == "Bearer first"
    now_s += 61
    access.authorization()
    await eventually(lambda: access.authorization() == "Bearer second")
    (account / "..data" / "token").write_text("third")
    await access.was_refused()
    assert access.authorization() == "Bearer third"
    (account / "..data" / "token").write_text("")
    await access.was_refused()
    assert access.authorization() == "Bearer third"


async def test_outside_of_a_pod_the_mend_is_told(account: Path) -> None:
    with pytest.raises(AccessUnusable, match=r"this is no pod; set coordination\.kubernetes\.kubeconfig"):
        await ServiceAccountAccess({}, account).open()
    (account / "token").unlink()
    with pytest.raises(AccessUnusable, match="is automountServiceAccountToken off"):
        await ServiceAccountAccess(ENVIRONMENT, account).open()
    api = ApiServer(ServiceAccountAccess(ENVIRONMENT, account))
    with pytest.raises(NotSent, match="automountServiceAccountToken"):
        await api.request("GET", "/", deadline_s=1)


async def test_a_kubeconfig_leads_to_its_server_with_its_token(tmp_path: Path, api_server: FakeApiServer) -> None:
    path = tmp_path / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "fake", "user": "me", "namespace": "test"}}],
        "clusters": [{"name": "fake", "cluster": {"server": api_server.url}}],
        "users": [{"name": "me", "user": {"token": "from the file"}}],
    }
    path.write_text(yaml.safe_dump(content))
    api_server.token = "from the file"
    # Loads a library that takes seconds of a busy processor, which is no part of what a request may take.
    await KubeconfigAccess(path).open()
    api = ApiServer(KubeconfigAccess(path))
    assert await KubernetesCoordination(api, namespace="test", lease="demo").read(deadline_s=5) is None
    await api.close()
    path.write_text("{}")
    with pytest.raises(AccessUnusable, match="kubeconfig"):
        await KubeconfigAccess(path).open()


def resident_kib(code: str) -> int:
    code += "\nprint(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_the_client_costs_little_memory_and_the_whole_library_is_not_loaded() -> None:
    floor = resident_kib("import aiohttp, instance_manager.ports, instance_manager.threads")
    client = """
import asyncio, sys
from instance_manager.coordination.kubernetes import KubernetesCoordination
from instance_manager.coordination.kubernetes_access import ServiceAccountAccess
from instance_manager.coordination.kubernetes_api import ApiServer
from instance_manager.coordination.kubernetes_publication import KubernetesPublication
assert "kubernetes_asyncio" not in sys.modules
"""
    assert resident_kib(client) - floor < MEMORY_KIB_MAX
    library = resident_kib(
        "import aiohttp, instance_manager.ports, instance_manager.threads, kubernetes_asyncio.client"
    )
    # The measure can tell: what is avoided would not pass.
    assert library - floor > 3 * MEMORY_KIB_MAX
