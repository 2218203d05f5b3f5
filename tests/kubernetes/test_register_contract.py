"""The contract of the register, which tests/coordination checks on a fake, on a real API server: the same tests.

This server stands on loopback, needs no root, and is reached by a kubeconfig, as in development.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import ControlPlane
from kube_api import ApiError
from kube_binaries import Programs

from instance_manager.coordination.kubernetes_access import KubeconfigAccess
from instance_manager.coordination.kubernetes_api import ApiServer
from instance_manager.ports import Conflict

NAMESPACE, LEASE = "test", "demo"
"""As the contract's tests name them."""
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"

sys.path.append(str(Path(__file__).resolve().parents[1] / "coordination"))
pytest.register_assert_rewrite("test_coordination_contract")
stores: Any = importlib.import_module("coordination_stores")
contract: Any = importlib.import_module("test_coordination_contract")
globals().update({name: found for name, found in vars(contract).items() if name.startswith("test_")})


async def test_a_write_on_a_record_that_is_gone_is_a_conflict(tested: Any) -> None:
    """In place of the contract's, which asks for a word in the error: a real server answers here that the uid is another."""
    created = await tested.store.create(contract.FIRST, deadline_s=2)
    tested.remove()
    with pytest.raises(Conflict):
        await tested.store.replace(contract.FIRST, version=created.version, deadline_s=2)
    assert await tested.store.read(deadline_s=2) is None


@pytest.fixture(scope="module")
def loopback(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(programs, tmp_path_factory.mktemp("loopback")) as made:
        made.make_namespace(NAMESPACE)
        yield made


@pytest.fixture
async def tested(loopback: ControlPlane) -> AsyncIterator[Any]:
    clients: list[ApiServer] = []

    def another() -> Any:
        clients.append(ApiServer(KubeconfigAccess(loopback.kubeconfig)))
        return stores.lease_store(clients[-1])

    def damage() -> None:
        annotations = {"instance-manager.dev/quorum": "many"}
        loopback.admin.patch(f"{LEASES}/{LEASE}", {"metadata": {"annotations": annotations}})

    def remove() -> None:
        loopback.admin.delete(f"{LEASES}/{LEASE}")

    yield stores.StoreUnderTest(another(), another, damage, remove)
    for client in clients:
        await client.close()
    try:
        remove()
    except ApiError as error:
        if error.code != 404:
            raise
