"""A real Prometheus over a cluster of this machine, and what is asked of it."""

from __future__ import annotations

import contextlib
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from monitoring_tools import fetch, free_port, serving, tool

from instance_manager.demo.cluster import LocalCluster

SCRAPE_S = 1


class Prometheus:
    """Every answer is the `data` of Prometheus's own HTTP interface; AssertionError: it refused the question."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """The samples of now."""
        return list(self._get("query", query=expr)["result"])

    def ask_range(self, expr: str, *, start_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]:
        """The series between two moments of `now_s`."""
        told = self._get("query_range", query=expr, start=f"{start_s:.3f}", end=f"{end_s:.3f}", step=f"{step_s:g}")
        return list(told["result"])

    def label_values(self, selector: str, label: str) -> list[str]:
        return list(self._get(f"label/{label}/values", **{"match[]": selector}))

    def now_s(self) -> float:
        """Its clock, Unix time."""
        return float(self._get("query", query="time()")["result"][1])

    def _get(self, path: str, **parameters: str) -> Any:
        answer = json.loads(fetch(f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success", parameters
        return answer["data"]


@contextlib.contextmanager
def prometheus_of(cluster: LocalCluster, directory: Path, *, namespace: str, name: str) -> Iterator[Prometheus]:
    """Scrapes every instance each second, with the labels that the PodMonitor gives; its data are kept in `directory`."""
    targets = []
    for member in cluster.plan.members:
        labels = {"pod": member.name, "namespace": namespace, "cluster": name}
        targets.append({"targets": [f"{member.host}:{member.http_port}"], "labels": labels})
    (directory / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"},
                "scrape_configs": [{"job_name": f"{namespace}/instance-manager", "static_configs": targets}],
            }
        )
    )
    port = free_port()
    argv = [
        tool("prometheus"),
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with serving(argv, f"http://127.0.0.1:{port}/-/ready", log=directory / "prometheus.log"):
        yield Prometheus(port)
