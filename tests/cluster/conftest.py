"""The cluster of these tests: one for each file, because it takes seconds to start; each test leaves it whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_harness import logs, running_cluster

from instance_manager.demo.cluster import LocalCluster


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[LocalCluster]:
    with running_cluster() as made:
        yield made


@pytest.fixture
def cluster(shared_cluster: LocalCluster, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """Fully redundant at the beginning of each test; its logs are shown when the test fails."""
    failed_before = request.session.testsfailed
    for name in shared_cluster.names:
        if shared_cluster.supervisor_pid(name) is None:
            shared_cluster.start(name)
    shared_cluster.wait_redundant(60)
    yield shared_cluster
    if request.session.testsfailed > failed_before:
        print(logs(shared_cluster))
