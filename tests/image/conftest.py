"""The image is built once, before the first test's deadline runs. Without an engine its tests are reported as not run; in CI they fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from image_container import Container, started
from image_engine import Engine, EngineMissing, find_engine, forget_image


def pytest_collection_finish(session: pytest.Session) -> None:
    """Here, because a build takes longer than a test may."""
    wanted = any("engine" in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or session.testsfailed or session.config.option.collectonly:
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        try:
            find_engine()
        except EngineMissing as missing:
            print(f"\nthe image is not tested: {missing}", file=sys.stderr)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    try:
        found = find_engine()
    except EngineMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(f"CI must test the image: {missing}")
        pytest.skip(f"not run: {missing}")
    yield found
    forget_image()


@pytest.fixture(scope="module")
def ready(engine: Engine) -> Iterator[Container]:
    """A ready instance for the tests that only look at it."""
    with started(engine) as container:
        container.wait_ready()
        yield container


@pytest.fixture
def fresh(engine: Engine) -> Iterator[Container]:
    """A ready instance for a test that stops or kills it."""
    with started(engine) as container:
        container.wait_ready()
        yield container
