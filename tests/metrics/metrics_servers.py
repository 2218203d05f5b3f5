"""Real servers with the monitoring role, and what was collected of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from harness import Cluster, PostgresProcess
from prometheus_client.parser import text_string_to_metric_families

from instance_manager.metrics.exposition import Block, render
from instance_manager.metrics.postgres import Options, PostgresMetrics
from instance_manager.postgres.host_based_access import MONITORING_ROLE

SERVER = "127.0.0.1:5432"


async def monitored_primary(cluster: Cluster, *standbys: str) -> PostgresProcess:
    primary, *_ = await cluster.primary_with_standbys(*standbys)
    await primary.execute(f"CREATE ROLE {MONITORING_ROLE} LOGIN IN ROLE pg_monitor")
    return primary


@contextlib.asynccontextmanager
async def collecting(server: PostgresProcess, options: Options | None = None) -> AsyncIterator[PostgresMetrics]:
    statistics = PostgresMetrics(server.server, 15, options or Options(SERVER))
    try:
        yield statistics
    finally:
        await statistics.close()


class Scrape:
    """One answer, read by the library of Prometheus."""

    def __init__(self, blocks: list[Block]) -> None:
        self.text = render(blocks).decode()
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        named = {line.split(" ")[2] for line in self.text.splitlines() if line.startswith("# TYPE ")}
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                name = sample.name
                if name.endswith("_total") and name not in named:
                    # The library's own ending, which the exporter's counters do not have.
                    name = name.removesuffix("_total")
                self.samples[name, frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> float | None:
        """Of the only sample with (at least) these labels; None: there is none."""
        found = [v for (n, ls), v in self.samples.items() if n == name and labels.items() <= dict(ls).items()]
        assert len(found) <= 1, f"{len(found)} samples of {name} {labels}"
        return found[0] if found else None

    def success(self, collector: str, database: str = "postgres") -> float | None:
        return self.value("instance_manager_collector_success", collector=collector, database=database)


async def scrape(statistics: PostgresMetrics) -> Scrape:
    """With all the time that a loaded machine may need."""
    return Scrape(await statistics.collect(running=True, budget_s=20))
