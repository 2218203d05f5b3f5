"""Fixtures of the tests on real Postgres."""

from __future__ import annotations

from postgres_fixtures import cluster, postgres_template  # noqa: F401 - fixtures
