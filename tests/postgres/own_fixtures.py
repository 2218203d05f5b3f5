"""Fixtures over `own_server`: imported by the test files that use them."""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_server import Servers, servers_for_test, template_directory


@functools.cache
def _template() -> Path:
    """Made once, although pytest sees an imported session fixture as one for each file."""
    cleanup = contextlib.ExitStack()
    atexit.register(cleanup.close)
    return cleanup.enter_context(template_directory())


@pytest.fixture(scope="session")
def own_template() -> Path:
    return _template()


@pytest.fixture
def servers(own_template: Path) -> Iterator[Servers]:
    with servers_for_test(own_template) as made:
        yield made
