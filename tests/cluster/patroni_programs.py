"""Programs that were made for Patroni, to be tried on our instances: check_patroni from PyPI, HAProxy from Debian."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import http.client
import io
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from instance_manager.demo.cluster import LocalCluster

REQUIREMENT = "check_patroni==2.2.0"
HOME = Path(__file__).parent.parent.parent / ".cache" / "check_patroni"

# The configuration of Patroni's own haproxy.cfg (its `listen batman` and confd's `listen replicas`), with ports of ours,
# every server's own, the interval of checks that a test waits for, and statistics that can be read.
HAPROXY_CONFIGURATION = """\
global
    maxconn 100

defaults
    log global
    mode tcp
    retries 2
    timeout client 30m
    timeout connect 4s
    timeout server 30m
    timeout check 5s

listen stats
    mode http
    bind 127.0.0.1:{stats}
    stats enable
    stats uri /

listen batman
    bind 127.0.0.1:{primary}
    option httpchk
    http-check expect status 200
    default-server inter {interval}s fall 1 rise 1 on-marked-down shutdown-sessions
{servers}

listen replicas
    bind 127.0.0.1:{replicas}
    option httpchk HEAD /replica
    http-check expect status 200
    default-server inter {interval}s fall 1 rise 1 on-marked-down shutdown-sessions
{servers}
"""


def check_patroni() -> Path:
    """The program, installed once under .cache in an environment of its own: its pins are not ours."""
    HOME.parent.mkdir(exist_ok=True)
    with (HOME.parent / "check_patroni.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (HOME / ".made").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
            pip = [str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, REQUIREMENT], check=True)
            (HOME / ".made").touch()
    return HOME / "bin" / "check_patroni"


class HaProxy:
    """A running HAProxy in front of a cluster."""

    def __init__(self, stats: int, primary: int, replicas: int) -> None:
        self.stats_port = stats
        self.primary_port = primary
        self.replicas_port = replicas

    def up(self, proxy: str) -> list[str]:
        """The servers of that name's section that take traffic, by HAProxy's own statistics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.stats_port, timeout=5)
        try:
            connection.request("GET", "/;csv")
            rows = csv.DictReader(io.StringIO(connection.getresponse().read().decode().removeprefix("# ")))
        finally:
            connection.close()
        return [
            row["svname"]
            for row in rows
            if row["pxname"] == proxy
            and row["svname"] not in ("FRONTEND", "BACKEND")
            and row["status"].startswith("UP")
        ]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def running_haproxy(cluster: LocalCluster, directory: Path, *, interval_s: int = 1) -> Iterator[HaProxy]:
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    assert program is not None, "haproxy is missing: tests/install-system.sh python3 test installs it"
    proxy = HaProxy(*_free_ports(3))
    servers = "\n".join(
        f"    server {member.name} {member.host}:{member.postgres_port} maxconn 100 check port {member.http_port}"
        for member in cluster.plan.members
    )
    file = directory / "haproxy.cfg"
    file.write_text(
        HAPROXY_CONFIGURATION.format(
            stats=proxy.stats_port,
            primary=proxy.primary_port,
            replicas=proxy.replicas_port,
            interval=interval_s,
            servers=servers,
        )
    )
    # In the foreground (-db), so that it ends with the test.
    process = subprocess.Popen([program, "-db", "-f", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield proxy
    finally:
        process.terminate()
        process.wait(10)
