"""A running three-instance cluster for tests: real supervisors, agents and Postgres, in memory if there is enough of it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from instance_manager.config_sections import Durability, ReplicasFrom
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import APPLICATION, ArchivePlan, RecoveryPlan, loopback_plan
from instance_manager.demo.ports import choose_base_port
from instance_manager.postgres.binaries import find_bin_directory

sys.path.append(str(Path(__file__).parent.parent / "postgres"))
from harness import FAST_DIRECTORY as FAST_DIRECTORY

START_DEADLINE_S = 60.0
LOG_LINES_SHOWN = 60
PSQL = shutil.which("psql", path=find_bin_directory()) or "psql"
"""Debian's own is a wrapper, whose Perl takes longer than the tests' statements."""
FAST = (("shared_buffers", "32MB"),)

T = TypeVar("T")


@contextlib.contextmanager
def running_cluster(
    *,
    instances: int = 3,
    durability: Durability = "preferred",
    archive: ArchivePlan | None = None,
    recovery: RecoveryPlan | None = None,
    replicas_from: ReplicasFrom = "auto",
    parameters: tuple[tuple[str, str], ...] = (),
    below: Path | None = FAST_DIRECTORY,
) -> Iterator[LocalCluster]:
    """Started, fully redundant, and ended with everything of it at the end of the block.

    Loss of power is not what these tests are about; a cluster that never waits for the disk (`below`) starts faster.
    """
    plan = loopback_plan(
        instances=instances,
        base_port=choose_base_port(2 * instances, None, spread=True),
        durability=durability,
        parameters=FAST + parameters,
        archive=archive,
        recovery=recovery,
        replicas_from=replicas_from,
    )
    with LocalCluster.create(plan, below=below) as cluster:
        cluster.start_all()
        try:
            cluster.wait_redundant(START_DEADLINE_S)
            yield cluster
        except BaseException:
            print(logs(cluster))
            raise


def logs(cluster: LocalCluster) -> str:
    """The ends of all logs, for a failure's report."""
    parts = []
    for name in cluster.names:
        with contextlib.suppress(OSError):
            lines = cluster.layout.log(name).read_text(errors="replace").splitlines()
            parts.append("\n".join((f"--- {name}", *lines[-LOG_LINES_SHOWN:])))
    return "\n".join(parts)


def eventually(cluster: LocalCluster, condition: Callable[[], T], *, within_s: float, what: str) -> T:
    """The first true answer; the test fails with `what` at the deadline."""
    return cluster.wait(condition, within_s, what)


def sql(cluster: LocalCluster, statement: str, *, on: str | None = None, timeout_s: float = 15.0) -> str:
    """What psql prints for a statement of the application: on the primary as libpq finds it, or on one instance."""
    target = cluster.connection_string()
    if on is not None:
        member = cluster.plan.member(on)
        target = (
            f"host={member.client_host} port={member.postgres_port} dbname={APPLICATION} user={APPLICATION} "
            f"passfile={cluster.layout.password_file}"
        )
    done = subprocess.run(
        [PSQL, "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", f"--command={statement}", target],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
