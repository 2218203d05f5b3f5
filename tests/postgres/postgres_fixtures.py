"""Fixtures of servers from one template; other folders with tests on real Postgres use them too."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import FAST_DIRECTORY, Cluster, make_template


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[Path]:
    """A stopped data directory with segments of 1 MiB, made by initdb once per session."""
    directory = Path(tempfile.mkdtemp(prefix="im-pg-template-", dir=FAST_DIRECTORY))
    try:
        yield make_template(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def cluster(postgres_template: Path) -> Iterator[Cluster]:
    """Servers of one test; all are killed and deleted at its end."""
    made = Cluster(postgres_template)
    try:
        yield made
    finally:
        made.close()
