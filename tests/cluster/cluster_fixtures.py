"""One three-instance cluster for all files that ask for it, because a start costs seconds. A plugin, not a conftest:
a fixture that several files import would be made once for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from cluster_harness import logs, running_cluster
from cluster_tools import make_whole, story

from instance_manager.demo.cluster import LocalCluster, NotInTime


class _Lasting:
    """The cluster, made at the first use, and made anew after a test that left it beyond its own healing."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._cluster: LocalCluster | None = None

    def cluster(self) -> LocalCluster:
        if self._cluster is None:
            self._cluster = self._stack.enter_context(running_cluster())
        return self._cluster

    def discard(self) -> None:
        self._cluster = None
        self._stack.close()


@pytest.fixture(scope="session")
def _lasting() -> Iterator[_Lasting]:
    made = _Lasting()
    try:
        yield made
    finally:
        made.discard()


@pytest.fixture
def lasting_cluster(_lasting: _Lasting, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """Fully redundant before and after each test; its logs are shown when the test fails."""
    failed_before = request.session.testsfailed
    cluster = _lasting.cluster()
    try:
        yield cluster
        failed = request.session.testsfailed > failed_before
        if failed:
            print(story(cluster))
        make_whole(cluster)
    except NotInTime:
        print(logs(cluster))
        _lasting.discard()
        raise
