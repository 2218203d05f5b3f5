"""Fixtures of the archive: stores behind the port, and real Postgres by the fixtures of tests/postgres."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from archive_harness import Desk, desk_at
from barman_programs import barman_programs
from s3_server import REGION, FaultProxy, make_bucket, s3_server, settings_for

from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.ports import ObjectStore

# Real servers, as the tests of Postgres use them.
sys.path.append(str(Path(__file__).parent.parent / "postgres"))
from harness import Cluster
from minio_server import Minio, minio_server
from postgres_fixtures import cluster, postgres_template  # noqa: F401 - fixtures

STORES = os.environ.get("ARCHIVE_STORES", "directory s3").split()
"""What the tests of every store run over; `make test-minio` says another, which has to be built."""


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(scope="session")
def session_proxy(s3_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_url).running() as made:
        yield made


@pytest.fixture
def proxy(session_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """Without faults at the beginning of each test."""
    session_proxy.heal()
    session_proxy.requests.clear()
    session_proxy.delay_s = 0
    yield session_proxy
    session_proxy.heal()


@pytest.fixture
def bucket(s3_url: str) -> str:
    return make_bucket(s3_url)


@pytest.fixture
async def s3(proxy: FaultProxy, bucket: str) -> AsyncIterator[S3Store]:
    made = S3Store(settings_for(proxy.url, bucket, page_entries=10))
    yield made
    await made.close()


@pytest.fixture
def directory_store(tmp_path: Path) -> DirectoryStore:
    root = tmp_path / "archive"
    root.mkdir()
    return DirectoryStore(root, page_entries=10)


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Minio]:
    with minio_server(tmp_path_factory.mktemp("minio")) as made:
        yield made


@pytest.fixture
def minio_bucket(minio: Minio) -> str:
    return make_bucket(minio.url, minio.certificate)


@pytest.fixture
async def minio_store(minio: Minio, minio_bucket: str) -> AsyncIterator[S3Store]:
    """Over TLS, and with nothing of ours in between."""
    made = S3Store(settings_for(minio.url, minio_bucket, ca_file=minio.certificate, page_entries=10))
    yield made
    await made.close()


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each, for what every store must do."""
    fixtures = {"directory": "directory_store", "s3": "s3", "minio": "minio_store"}
    made: ObjectStore = request.getfixturevalue(fixtures[request.param])
    return made


@pytest.fixture
async def desk(tmp_path: Path, store: ObjectStore) -> AsyncIterator[Desk]:
    """An archiver's parts over each of the stores."""
    async with desk_at(tmp_path / "instance", store) as made:
        yield made


@pytest.fixture
async def s3_desk(tmp_path: Path, s3: S3Store) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path / "instance", s3) as made:
        yield made


@pytest.fixture
async def local_desk(tmp_path: Path, directory_store: DirectoryStore) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path / "instance", directory_store) as made:
        yield made


@pytest.fixture(scope="session")
def barman() -> Path:
    """Folder of barman-cloud's programs, in a virtual environment of their own: their pins are not ours."""
    return barman_programs()


@pytest.fixture
def s3_section(proxy: FaultProxy, bucket: str) -> dict[str, Any]:
    return {"s3": {"bucket": bucket, "prefix": "pre/fix", "endpoint": proxy.url, "region": REGION, "path_style": True}}


@pytest.fixture
def directory_section(cluster: Cluster) -> dict[str, Any]:  # noqa: F811 - the fixture
    root = cluster.root / "archive"
    root.mkdir()
    return {"directory": str(root)}


@pytest.fixture
def minio_section(minio: Minio, minio_bucket: str) -> dict[str, Any]:
    place = {"bucket": minio_bucket, "prefix": "pre/fix", "endpoint": minio.url, "region": REGION, "path_style": True}
    return {"s3": {**place, "ca_file": str(minio.certificate)}}


@pytest.fixture(params=STORES)
def section(request: pytest.FixtureRequest) -> dict[str, Any]:
    made: dict[str, Any] = request.getfixturevalue(f"{request.param}_section")
    return made
