"""The contract of the register, which tests/coordination checks on a fake, on a real API server: the same tests.

This server stands on loopback, needs no root, and is reached by a kubeconfig, as in development.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import ControlPlane, audited
from kube_api import ApiError
from kube_binaries import Programs

from instance_manager.coordination.kubernetes_access import KubeconfigAccess
from instance_manager.coordination.kubernetes_api import ApiServer

NAMESPACE, LEASE = "test", "demo"
"""As the contract's tests name them."""
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"

sys.path.append(str(Path(__file__).resolve().parents[1] / "coordination"))
pytest.register_assert_rewrite("test_coordination_contract")
stores: Any = importlib.import_module("coordination_stores")
contract: Any = importlib.import_module("test_coordination_contract")
globals().update({name: found for name, found in vars(contract).items() if name.startswith("test_")})


@pytest.fixture(scope="module")
def loopback(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(programs, tmp_path_factory.mktemp("loopback")) as made:
        made.make_namespace(NAMESPACE)
        yield made


async def test_the_watch_stays_open_and_tells_of_a_deletion(loopback: ControlPlane, tested: Any) -> None:
    """A watch that the server ends at once would hint at everything too, but late, and ask again and again."""
    await tested.store.create(contract.FIRST, deadline_s=2)
    hints = aiter(tested.store.changes())
    before = watches(loopback)
    try:
        await anext(hints)  # at once, for what is there already
        async with asyncio.timeout(2):
            await anext(hints)  # of the watch: what there is
            remove = asyncio.create_task(asyncio.to_thread(tested.remove))
            await anext(hints)
            await remove
    finally:
        await hints.aclose()
    assert watches(loopback) - before == 1


def watches(control_plane: ControlPlane) -> int:
    """How many watches on Leases somebody who is no part of the server has begun so far."""
    found = audited(control_plane.audit_log, user="admin", stage="ResponseStarted")
    return sum(request.verb == "watch" and request.resource == "leases" for request in found)


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
