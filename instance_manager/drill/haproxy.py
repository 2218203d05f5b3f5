"""HAProxy in front of a drill's cluster, as Patroni's documentation configures it: how soon does it follow a new primary?

What is opened for writes is told by the instances themselves, what traffic goes to by HAProxy's own statistics, over its
Unix socket: it runs where the clients stand, which may be another network.
"""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from instance_manager.demo.processes import now_s
from instance_manager.drill.environment import Environment

INTERVAL_S = 1.0
"""Of its checks, of which one decides."""
SLACK_S = 0.7
"""How late a look at either may be on a busy machine of two cores, and how long a check may take."""
_LOOK_S = 0.05
_SOCKET_TIMEOUT_S = 2.0
_STATUS_TIMEOUT_S = 0.3
_START_WITHIN_S = 20.0
_BACKEND = "primary"
_PATH = "/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin"

_CONFIGURATION = """\
global
    maxconn 100
    stats socket {socket} mode 600 level user

defaults
    mode tcp
    retries 2
    timeout client 30m
    timeout connect 4s
    timeout server 30m
    timeout check 5s

listen {backend}
    bind {directory}/traffic.sock
    option httpchk HEAD /primary
    http-check expect status 200
    default-server inter {interval_ms}ms fall 1 rise 1 on-marked-down shutdown-sessions
{servers}
"""


class ProxyUnavailable(Exception):
    """HAProxy cannot be run here; the text says why."""


def why_unavailable() -> str | None:
    return None if shutil.which("haproxy", path=_PATH) else "haproxy is not installed (package haproxy)"


@dataclass(frozen=True, slots=True)
class Look:
    """What was so at one time."""

    at_s: float
    opened: str | None
    """Who says of itself that it is the primary and lets clients write."""
    traffic: tuple[str, ...]
    """Where HAProxy leads writers."""


def late_moves(looks: Sequence[Look], *, within_s: float) -> tuple[str, ...]:
    """Each primary to which no traffic went in time since it was seen open. One that closed again before owes nothing.

    A former primary that is cut off from its peers, and not from the clients, is led to as well until it stops itself: what
    it acknowledges is the judge's business.
    """
    found = []
    opened: str | None = None
    since_s = 0.0
    told = False
    for look in looks:
        if look.opened != opened:
            opened, since_s, told = look.opened, look.at_s, False
        if opened is None or told:
            continue
        if opened in look.traffic:
            told = True
        elif look.at_s - since_s > within_s:
            where = ", ".join(look.traffic) or "nobody"
            found.append(f"HAProxy led writers to {where} {look.at_s - since_s:.1f} s after {opened} had opened")
            told = True
    return tuple(found)


class ProxyWatch:
    def __init__(self, environment: Environment, statistics: Path) -> None:
        self._environment = environment
        self._statistics = statistics
        self._looks: list[Look] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="haproxy watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ends.set()
        self._thread.join(_SOCKET_TIMEOUT_S * 4)

    def late_moves(self) -> tuple[str, ...]:
        return late_moves(self._looks, within_s=INTERVAL_S + SLACK_S)

    def traffic(self) -> tuple[str, ...]:
        """OSError when it does not answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SOCKET_TIMEOUT_S)
            connection.connect(str(self._statistics))
            connection.sendall(b"show stat\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        rows = csv.DictReader(io.StringIO(answer.decode().removeprefix("# ")))
        return tuple(
            row["svname"]
            for row in rows
            if row["pxname"] == _BACKEND
            and row["svname"] not in ("FRONTEND", "BACKEND")
            and row["status"].startswith("UP")
        )

    def _run(self) -> None:
        while not self._ends.wait(_LOOK_S):
            opened = self._opened()
            # The later look of the two is HAProxy's: what it does in between speaks for it.
            with contextlib.suppress(OSError):
                traffic = self.traffic()
                self._looks.append(Look(now_s(), opened, traffic))

    def _opened(self) -> str | None:
        cluster = self._environment.cluster
        told = [cluster.status(name, timeout_s=_STATUS_TIMEOUT_S) for name in cluster.names]
        open_ones = [
            each for each in told if each is not None and each.primary == each.told_by and each.accepts_clients
        ]
        latest = max(open_ones, key=lambda each: each.epoch or 0, default=None)
        return None if latest is None else latest.primary


@contextlib.contextmanager
def watched_proxy(environment: Environment) -> Iterator[ProxyWatch]:
    """Runs until the end of the block. ProxyUnavailable."""
    if (why := why_unavailable()) is not None:
        raise ProxyUnavailable(why)
    program = shutil.which("haproxy", path=_PATH) or "haproxy"
    directory = environment.work / "haproxy"
    directory.mkdir(exist_ok=True)
    statistics = directory / "stats.sock"
    servers = "\n".join(
        f"    server {member.name} {member.client_host}:{member.postgres_port} maxconn 100 check port {member.http_port}"
        for member in environment.cluster.plan.members
    )
    file = directory / "haproxy.cfg"
    file.write_text(
        _CONFIGURATION.format(
            socket=statistics,
            directory=directory,
            backend=_BACKEND,
            interval_ms=int(INTERVAL_S * 1000),
            servers=servers,
        )
    )
    enter = [] if environment.network is None else [*environment.network.enter_clients()]
    process = subprocess.Popen(
        [*enter, program, "-db", "-f", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    watch = ProxyWatch(environment, statistics)
    try:
        ends_s = now_s() + _START_WITHIN_S
        while True:
            with contextlib.suppress(OSError):
                watch.traffic()
                break
            if process.poll() is not None or now_s() >= ends_s:
                raise ProxyUnavailable(f"haproxy did not start with {file}")
            time.sleep(_LOOK_S)
        watch.start()
        yield watch
    finally:
        watch.stop()
        process.terminate()
        process.wait(10)
