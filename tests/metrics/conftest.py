"""Tests of metrics; they use the servers of tests/postgres."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "postgres")]

from postgres_fixtures import cluster, postgres_template  # noqa: E402, F401 - fixtures
