from __future__ import annotations

import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from http_harness import FakeService, make_configuration

from instance_manager.config import Configuration
from instance_manager.http.server import serve


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, because a Unix socket's path is limited."""
    with tempfile.TemporaryDirectory(prefix="im-") as path:
        yield Path(path)


@pytest.fixture
def configuration(directory: Path) -> Configuration:
    return make_configuration(directory)


@pytest.fixture
async def service(configuration: Configuration) -> AsyncIterator[FakeService]:
    """Being served."""
    served = FakeService()
    async with serve(served, configuration):
        yield served


@pytest.fixture
async def client(service: FakeService, configuration: Configuration) -> AsyncIterator[aiohttp.ClientSession]:
    base = f"http://127.0.0.1:{configuration.me.http_port}"
    async with aiohttp.ClientSession(base, timeout=aiohttp.ClientTimeout(total=5)) as session:
        yield session


@pytest.fixture
async def control(service: FakeService, configuration: Configuration) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.UnixConnector(str(configuration.control_socket))
    async with aiohttp.ClientSession(
        "http://control", connector=connector, timeout=aiohttp.ClientTimeout(total=5)
    ) as session:
        yield session
