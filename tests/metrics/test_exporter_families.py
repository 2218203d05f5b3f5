"""The families of a real postgres_exporter beside ours, on the same server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import Cluster, wait_until
from metrics_servers import collecting, monitored_primary
from monitoring_tools import fetch, free_port, promtool, serving, tool

from instance_manager.metrics import process
from instance_manager.metrics.exposition import render
from instance_manager.metrics.postgres import Options
from instance_manager.postgres.host_based_access import MONITORING_ROLE

DOCUMENT = Path(__file__).parents[2] / "docs/metrics.md"
Families = dict[str, tuple[str, frozenset[frozenset[str]]]]
"""By name: its type, and the sets of label names of its samples."""


def families(text: str) -> Families:
    kinds: dict[str, str] = {}
    labels: dict[str, set[frozenset[str]]] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            kinds[name], labels[name] = kind, set()
        elif not line.startswith("#"):
            match = re.match(r"([a-zA-Z0-9_]+)(\{.*\})? ", line)
            assert match is not None, line
            name = match[1] if match[1] in kinds else re.sub(r"_(bucket|sum|count)$", "", match[1])
            labels[name].add(frozenset(re.findall(r'[{,]([a-z_]+)="', match[2] or "")))
    return {name: (kind, frozenset(labels[name])) for name, kind in kinds.items()}


def left_out() -> dict[str, str]:
    """Families (or patterns with `*`) that the document lists as not served, with the reason."""
    section = DOCUMENT.read_text().partition("## Left out of postgres_exporter")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+`) \| (.+) \|$", section, re.MULTILINE)
    return {name: reason for names, reason in rows for name in re.findall(r"`([^`]+)`", names)}


def is_left_out(name: str) -> bool:
    return any(re.fullmatch(pattern.replace("*", ".*"), name) for pattern in left_out())


EXAMPLE_QUERIES = (
    Path(tool("prometheus-postgres-exporter")).parents[1]
    / "share/doc/prometheus-postgres-exporter/examples/queries.yaml"
)


@pytest.fixture
async def both(cluster: Cluster, tmp_path: Path) -> tuple[Families, str]:
    """The exporter's families, with the queries that its package brings, and our text, of one primary with a standby."""
    primary = await monitored_primary(cluster, "s")
    await primary.execute("CREATE TABLE public.orders (id int PRIMARY KEY)")
    await primary.execute("SELECT pg_create_physical_replication_slot('kept', true)")

    async def streams() -> object:
        return await primary.fetchval("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'")

    await wait_until(streams, what="the standby streams")
    port = free_port()
    argv = [
        tool("prometheus-postgres-exporter"),
        f"--web.listen-address=127.0.0.1:{port}",
        f"--extend.query-path={EXAMPLE_QUERIES}",
    ]
    source = f"postgresql://{MONITORING_ROLE}@127.0.0.1:{primary.port}/postgres?sslmode=disable"
    url = f"http://127.0.0.1:{port}/metrics"
    with serving(argv, url, log=tmp_path / "exporter.log", env={"DATA_SOURCE_NAME": source}):
        theirs = families(fetch(url))
    async with collecting(primary, Options(f"127.0.0.1:{primary.port}")) as statistics:
        await statistics.collect(running=True, budget_s=20)
        ours = render([*await statistics.collect(running=True, budget_s=20), *process.own_process()]).decode()
    return theirs, ours


async def test_every_family_of_postgres_exporter_is_served_alike_or_listed_with_the_reason(
    both: tuple[Families, str],
) -> None:
    theirs, text = both
    ours = families(text)
    wrong = []
    for name, (kind, labels) in theirs.items():
        if name not in ours:
            if not is_left_out(name):
                wrong.append(f"{name} ({kind}) is not served, nor listed in {DOCUMENT.name}")
        elif is_left_out(name):
            wrong.append(f"{name} is served, and listed as left out")
        elif ours[name][0] != kind:
            wrong.append(f"{name} is a {ours[name][0]}, theirs a {kind}")
        elif labels and not labels <= ours[name][1]:
            wrong.append(f"{name} has the labels {ours[name][1]}, theirs {labels}")
    assert not wrong, "\n".join(wrong)
    assert len([name for name in theirs if name.startswith("pg_")]) > 300


async def test_promtool_finds_nothing_wrong_but_names_that_are_postgres_exporters(both: tuple[Families, str]) -> None:
    theirs, text = both
    _, report = promtool("check", "metrics", stdin=text.encode())
    own = [line for line in report.splitlines() if line.split(" ")[0] not in theirs and line.strip()]
    # Names of the exporter's before 0.11, and of those after Debian's.
    own = [line for line in own if not re.match(r"pg_(stat_bgwriter|database_wraparound|replication)_", line)]
    assert not own, "\n".join(own)
    assert "error while linting" not in report
