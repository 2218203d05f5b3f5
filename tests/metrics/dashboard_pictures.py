"""Pictures of every panel of deploy/monitoring/dashboard.json, from a real cluster by way of a real Prometheus; not by Grafana.

    make dashboard-pictures                                       # writes docs/images/dashboard-*.png; about five minutes
    python tests/metrics/dashboard_pictures.py --to DIRECTORY

A cluster of three with TLS and an archive is under pgbench; a switchover is asked for, later the primary is killed
with all its processes and comes back. Exit code 1: a query gave nothing that should have given something (its panel is named),
or the dashboard uses what is not drawn here. The pictures are written all the same where they can be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/metrics"), str(ROOT / "tests/cluster")]

from cluster_tools import done, wait_other_primary  # noqa: E402
from dashboard_drawing import draw  # noqa: E402
from dashboard_panels import UnknownPart, Window, empty_queries, filled, sections, variables  # noqa: E402
from prometheus_server import SCRAPE_S, Prometheus, prometheus_of  # noqa: E402

from instance_manager.demo.cluster import LocalCluster  # noqa: E402
from instance_manager.demo.plan import ArchivePlan, loopback_plan, ports_needed  # noqa: E402
from instance_manager.demo.ports import choose_base_port  # noqa: E402

DASHBOARD = ROOT / "deploy/monitoring/dashboard.json"
PARAMETERS = (("shared_buffers", "64MB"),)
PGBENCH_SCALE, CLIENTS, TRANSACTIONS_PER_S = 5, 4, 150
BEFORE_SWITCHOVER_S, BEFORE_KILL_S, AWAY_S, AFTER_S = 45, 45, 20, 45
BACKUP_WITHIN_S, REDUNDANT_WITHIN_S = 240, 120

EMPTY_BY_NATURE = {
    "instance_manager_collector_success": "no collector failed",
}
"""Parts of queries that give nothing where nothing is wrong, and why."""


@contextlib.contextmanager
def load(cluster: LocalCluster) -> Iterator[None]:
    """pgbench at a steady rate; begun again whenever a failover has ended it."""
    target = cluster.connection_string()
    subprocess.run(
        ["pgbench", "--initialize", "--quiet", f"--scale={PGBENCH_SCALE}", target],
        check=True,
        capture_output=True,
        timeout=120,
    )
    ended = threading.Event()
    running: list[subprocess.Popen[bytes]] = []
    argv = ["pgbench", "--no-vacuum", f"--client={CLIENTS}", f"--rate={TRANSACTIONS_PER_S}", "--time=3600", target]

    def run() -> None:
        while not ended.is_set():
            running[:] = [subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
            while running[0].poll() is None and not ended.wait(0.1):
                pass
            ended.wait(0.5)

    thread = threading.Thread(target=run, name="pgbench")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for process in running:
            process.kill()
            process.wait()


def tell(text: str) -> None:
    print(text, flush=True)


def lived_through(cluster: LocalCluster, prometheus: Prometheus) -> tuple[Window, list[str]]:
    """A few minutes of the cluster's life, and what was done to it when."""
    begun_s = prometheus.now_s()
    events: list[str] = []

    def happened(text: str) -> None:
        after_s = int(prometheus.now_s() - begun_s)
        events.append(f"{after_s // 60}:{after_s % 60:02} {text}")
        tell(events[-1])

    def pass_by(seconds: float) -> None:
        ends_s = prometheus.now_s() + seconds
        cluster.wait(lambda: prometheus.now_s() >= ends_s, seconds + 30, "time passes by Prometheus's clock", poll_s=1)

    pass_by(BEFORE_SWITCHOVER_S)
    first = cluster.wait_primary()
    happened(f"switchover from {first}")
    done(cluster, first, "switchover")
    second = wait_other_primary(cluster, first)
    cluster.wait_redundant(REDUNDANT_WITHIN_S)
    pass_by(BEFORE_KILL_S)
    happened(f"SIGKILL to all of {second}")
    cluster.kill(second)
    wait_other_primary(cluster, second)
    pass_by(AWAY_S)
    happened(f"{second} started again")
    cluster.start(second)
    cluster.wait_redundant(REDUNDANT_WITHIN_S)
    pass_by(AFTER_S)
    return Window(begun_s, prometheus.now_s(), SCRAPE_S, SCRAPE_S), events


def wait_for_backup(cluster: LocalCluster, prometheus: Prometheus) -> None:
    """Else the panels of backups would be empty."""
    told = "max(instance_manager_archive_recoverable_from_timestamp_seconds)"
    cluster.wait(lambda: prometheus.ask(told), BACKUP_WITHIN_S, "the first backup is told of", poll_s=1)


def pictures(to: Path, prometheus: Prometheus, window: Window, events: list[str]) -> int:
    """Every section drawn into `to`; the exit code."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    values = variables(dashboard, prometheus, window)
    footing = [
        "Drawn by `make dashboard-pictures` from dashboard.json and its queries, not by Grafana. "
        f"A real cluster of three under pgbench, {SCRAPE_S} s between scrapes.",
        f"In minutes:seconds: {'; '.join(events)}.",
    ]
    bad: list[str] = []
    for section in sections(dashboard):
        panels = [filled(panel, prometheus, window, values) for panel in section.panels]
        file = to / f"dashboard-{section.title.lower().replace(' ', '-')}.png"
        draw(section, panels, window, file, heading=section.title, footing=footing)
        tell(f"{file}: {len(panels)} panels, {file.stat().st_size // 1024} KiB")
        wrong, fine = empty_queries(panels, EMPTY_BY_NATURE)
        for line in fine:
            tell(f"  empty: {line}")
        bad += wrong
    for line in bad:
        print(f"should not be empty: {line}", file=sys.stderr)
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="pictures of the dashboard's panels, from a real cluster")
    parser.add_argument("--to", type=Path, default=ROOT / "docs/images", metavar="DIRECTORY")
    to = parser.parse_args(arguments).to
    if shutil.which("pgbench") is None:
        print("pgbench is missing: it comes with Debian's postgresql", file=sys.stderr)
        return 1
    plan = loopback_plan(
        instances=3,
        base_port=choose_base_port(ports_needed(3, tls=True), None, spread=True),
        parameters=PARAMETERS,
        tls=True,
        archive=ArchivePlan(),
    )
    with tempfile.TemporaryDirectory(prefix="dashboard-") as directory, LocalCluster.create(plan) as cluster:
        cluster.start_all()
        cluster.wait_redundant(REDUNDANT_WITHIN_S)
        with (
            prometheus_of(cluster, Path(directory), namespace="databases", name="pg") as prometheus,
            load(cluster),
        ):
            wait_for_backup(cluster, prometheus)
            window, events = lived_through(cluster, prometheus)
            try:
                return pictures(to, prometheus, window, events)
            except UnknownPart as error:
                print(f"not drawn here: {error}", file=sys.stderr)
                return 1


if __name__ == "__main__":
    sys.exit(main())
