"""The stores that the contract of `ports.Coordination` is checked on, and how a test gets at what lies under them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fake_api_server import FakeApiServer

from instance_manager.coordination.kubernetes import KubernetesCoordination
from instance_manager.coordination.kubernetes_api import ApiServer
from instance_manager.coordination.local import LocalCoordination
from instance_manager.ports import Coordination


class PlainAccess:
    """To the fake, without TLS; with a token that the test sets."""

    def __init__(self, server: str, token: str | None = None) -> None:
        self.server = server
        self.token = token
        self.newer: str | None = None
        """What is found when the token was refused."""
        self.opened = 0

    async def open(self) -> ssl.SSLContext | None:
        self.opened += 1
        return None

    def authorization(self) -> str | None:
        return None if self.token is None else f"Bearer {self.token}"

    async def was_refused(self) -> None:
        self.token = self.newer or self.token


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what somebody else does; three seconds at most."""
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.01)


@dataclass
class StoreUnderTest:
    store: Coordination
    another: Callable[[], Coordination]
    """A second client of the same store."""
    damage: Callable[[], None]
    """What is stored is no record any more."""
    remove: Callable[[], None]
    """Somebody deletes it."""


def lease_store(api: ApiServer) -> KubernetesCoordination:
    return KubernetesCoordination(api, namespace="test", lease="demo", pod_name="demo-1", pod_uid="uid-of-demo-1")


def local_store(directory: Path) -> StoreUnderTest:
    path = directory / "lease"
    path.mkdir()

    def another() -> Coordination:
        return LocalCoordination(path, directory)

    return StoreUnderTest(
        another(), another, lambda: _overwrite(path / "lease.json"), lambda: (path / "lease.json").unlink()
    )


def _overwrite(path: Path) -> None:
    path.write_text("garbage")


def fake_store(server: FakeApiServer, clients: list[ApiServer]) -> StoreUnderTest:
    def another() -> Coordination:
        clients.append(ApiServer(PlainAccess(server.url)))
        return lease_store(clients[-1])

    def damage() -> None:
        found = server.lease()
        found["metadata"]["annotations"]["instance-manager.dev/quorum"] = "many"
        server.put("leases", found)

    return StoreUnderTest(another(), another, damage, lambda: server.delete("leases", "demo"))
