"""How long renewals of the Lease take, and how far apart they are, while the archiver beside them works off a backlog, and while it rests.

    python lease_benchmark.py [--segments 100]

A cluster of three as `make demo` runs it, its archive a directory. The backlog is made while the archive is away; the first look is
at the cluster that waits with it, the second at the same one while all of it is archived. Nothing else is asked of either.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("cluster", "postgres", "archive")]

from cluster_harness import running_cluster  # noqa: E402
from cluster_tools import http_get, record, superuser_sql  # noqa: E402
from measure import peak_resident_mib  # noqa: E402

from instance_manager.demo.cluster import LocalCluster  # noqa: E402
from instance_manager.demo.plan import ArchivePlan  # noqa: E402

REST_S = 20.0
DEADLINE_S = 500.0
FILL = (
    "SELECT pg_logical_emit_message(false, 'filler', string_agg(md5((random() * 20000)::int::text), '')) "
    "FROM generate_series(1, 524288)"
)
"""16 MiB that compress about as well as much WAL does."""


@dataclass
class Look:
    """Of the renewals in some seconds: the time between two, as anybody sees them; how long the holder says that each took."""

    intervals_s: list[float] = field(default_factory=list)
    took_s: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{len(self.intervals_s)} renewals in {self.seconds:.0f} s, {statistics.median(self.intervals_s):.2f} s apart "
            f"(longest {max(self.intervals_s):.2f}), each took {self.took_s * 1000:.1f} ms"
        )


def told(cluster: LocalCluster, primary: str) -> tuple[float, float]:
    """(sum, count) of the seconds that renewals took, by its metrics."""
    prefix = "instance_manager_lease_renewal_seconds_"
    lines = [line for line in http_get(cluster, primary, "/metrics").body.splitlines() if line.startswith(prefix)]
    values = {line.partition(" ")[0].removeprefix(prefix): float(line.rpartition(" ")[2]) for line in lines}
    return values["sum"], values["count"]


def waiting(cluster: LocalCluster, primary: str) -> int:
    status = cluster.layout.data(primary) / "pg_wal/archive_status"
    return sum(path.suffix == ".ready" for path in status.iterdir())


def look(cluster: LocalCluster, primary: str, *, until_archived: bool) -> Look:
    found, begin_s = Look(), time.monotonic()
    sum_before_s, count_before = told(cluster, primary)
    last, last_s = record(cluster).renewals, None
    while True:
        passed_s = time.monotonic() - begin_s
        if until_archived:
            assert passed_s < DEADLINE_S, f"{waiting(cluster, primary)} still wait"
            if waiting(cluster, primary) == 0 and len(found.intervals_s) > 1:
                break
        elif passed_s > REST_S:
            break
        time.sleep(0.02)
        renewals = record(cluster).renewals
        if renewals != last:
            now_s = time.monotonic()
            if last_s is not None:
                found.intervals_s.append(now_s - last_s)
            last, last_s = renewals, now_s
    sum_after_s, count_after = told(cluster, primary)
    found.took_s = (sum_after_s - sum_before_s) / max(1.0, count_after - count_before)
    found.seconds = time.monotonic() - begin_s
    return found


def measure(segments: int) -> None:
    with running_cluster(archive=ArchivePlan(), below=None) as cluster:
        primary = cluster.wait_primary()
        archiver = cluster.processes(primary).archiver
        assert archiver is not None
        place = cluster.layout.archive
        away = place.rename(place.with_name("archive-is-away"))
        for _ in range(segments):
            superuser_sql(cluster, primary, FILL)
        print(f"{waiting(cluster, primary)} segments wait")
        print("waiting:  ", look(cluster, primary, until_archived=False), flush=True)
        away.rename(place)
        print("archiving:", look(cluster, primary, until_archived=True), flush=True)
        print("waiting:  ", look(cluster, primary, until_archived=False), flush=True)
        print(f"archiver's peak: {peak_resident_mib(archiver.pid):.0f} MiB")
        assert cluster.wait_primary() == primary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=100)
    measure(parser.parse_args().segments)


if __name__ == "__main__":
    main()
