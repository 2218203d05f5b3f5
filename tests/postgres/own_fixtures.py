"""Fixtures over `own_server`: imported by the test files that use them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from own_server import Servers, servers_for_test, template_directory


@pytest.fixture(scope="session")
def own_template() -> Iterator[Path]:
    with template_directory() as template:
        yield template


@pytest.fixture
def servers(own_template: Path) -> Iterator[Servers]:
    with servers_for_test(own_template) as made:
        yield made
