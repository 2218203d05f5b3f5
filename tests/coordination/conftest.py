"""Each store that the contract of `ports.Coordination` is checked on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from coordination_stores import PlainAccess, StoreUnderTest, fake_store, lease_store, local_store
from fake_api_server import FakeApiServer

from instance_manager.coordination.kubernetes import KubernetesCoordination
from instance_manager.coordination.kubernetes_api import ApiServer


@pytest.fixture
async def api_server() -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer() as server:
        yield server


@pytest.fixture
async def access(api_server: FakeApiServer) -> PlainAccess:
    return PlainAccess(api_server.url)


@pytest.fixture
async def api(access: PlainAccess) -> AsyncIterator[ApiServer]:
    api = ApiServer(access)
    yield api
    await api.close()


@pytest.fixture
async def lease(api: ApiServer) -> KubernetesCoordination:
    return lease_store(api)


@pytest.fixture(params=["local", "fake API server"])
async def tested(
    request: pytest.FixtureRequest, tmp_path: Path, api_server: FakeApiServer
) -> AsyncIterator[StoreUnderTest]:
    clients: list[ApiServer] = []
    yield local_store(tmp_path) if request.param == "local" else fake_store(api_server, clients)
    for client in clients:
        await client.close()
