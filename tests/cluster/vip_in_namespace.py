"""A cluster with a vip-manager beside each instance, in a network namespace of its own (`unshare --net`): prints what came of it as JSON.

Of vip-manager nothing is changed: `--dcs-type patroni`, which asks `GET /leader` of its own instance and holds the address while
the answer is 200.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster_harness import eventually, running_cluster
from cluster_tools import done, wait_other_primary

from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.processes import now_s

ADDRESS = "10.66.0.1"
INTERVAL_MS = 200
WITHIN_S = 30.0


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=10).stdout


def interface(name: str) -> str:
    return f"vip{name.rpartition('-')[2]}"


def holders(cluster: LocalCluster) -> list[str]:
    return [
        name for name in cluster.names if f" {ADDRESS}/" in ip("-o", "-4", "address", "show", "dev", interface(name))
    ]


@contextlib.contextmanager
def vip_managers(program: str, cluster: LocalCluster, log: Path) -> Iterator[None]:
    running = []
    with log.open("wb") as told:
        for name in cluster.names:
            own, member = interface(name), cluster.plan.member(name)
            ip("link", "add", own, "type", "veth", "peer", "name", f"{own}p")
            for end in (own, f"{own}p"):
                ip("link", "set", end, "up")
            settings = {
                "dcs-type": "patroni",
                "dcs-endpoints": f"http://{member.host}:{member.http_port}",
                "trigger-key": "/leader",
                "trigger-value": "200",
                "interface": own,
                "ip": ADDRESS,
                "netmask": "24",
                "interval": str(INTERVAL_MS),
            }
            words = [program, *(f"--{key}={value}" for key, value in settings.items())]
            running.append(subprocess.Popen(words, stdout=told, stderr=told))
        try:
            yield
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(10)


def moved(cluster: LocalCluster, primary: str) -> float:
    """Seconds until the address is the primary's, and nobody else's, from now on."""
    began_s = now_s()
    eventually(cluster, lambda: holders(cluster) == [primary], within_s=WITHIN_S, what=f"{primary} has the address")
    return round(now_s() - began_s, 2)


def main() -> int:
    program, log = sys.argv[1], Path(sys.argv[2])
    ip("link", "set", "lo", "up")
    found: dict[str, object] = {}
    with running_cluster() as cluster, vip_managers(program, cluster, log):
        first = cluster.wait_primary()
        found["at first"] = moved(cluster, first)
        done(cluster, first, "switchover")
        second = wait_other_primary(cluster, first)
        found["after a switchover"] = moved(cluster, second)
        cluster.wait_redundant(60)
        cluster.kill(second)
        third = wait_other_primary(cluster, second)
        found["after a kill"] = moved(cluster, third)
        cluster.start(second)
        cluster.wait_redundant(60)
        found["at last"] = holders(cluster) == [cluster.wait_primary()]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
