"""What the tests of a real cluster ask of it from outside: commands, HTTP, SQL, the record, the volumes and the logs."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import asyncpg
from asyncpg.connect_utils import SessionAttribute
from cluster_harness import PSQL

from instance_manager.codec import from_json, to_json
from instance_manager.coordination.local import LocalCoordination
from instance_manager.core.record import ClusterRecord
from instance_manager.core.voting import VolumeState
from instance_manager.demo import plan, processes, status_client
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import APPLICATION
from instance_manager.demo.processes import now_s
from instance_manager.supervisor.fence import Process

COMMAND_TIMEOUT_S = 100.0
REDUNDANT_WITHIN_S = 75.0


@dataclass(frozen=True, slots=True)
class Told:
    """How a command ended."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def cli(*arguments: str, stdin: str = "") -> Told:
    """`instance-manager ...` as a process of its own, on a wide terminal."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("INSTANCE_MANAGER_SOCKET", "XDG_RUNTIME_DIR")
    }
    done = subprocess.run(
        [sys.executable, "-m", "instance_manager", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
        env={**environment, "COLUMNS": "200", "LINES": "100"},
    )
    return Told(done.returncode, done.stdout, done.stderr)


def ask(cluster: LocalCluster, name: str, *arguments: str, stdin: str = "") -> Told:
    """A command to the instance `name`."""
    return cli(*arguments, "--socket", str(cluster.layout.control_socket(name)), stdin=stdin)


def done(cluster: LocalCluster, name: str, *arguments: str) -> str:
    """A command that must succeed; its output."""
    told = ask(cluster, name, *arguments)
    assert told.code == 0, str(told)
    return told.out


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str
    took_s: float


def http_get(cluster: LocalCluster, name: str, path: str, *, timeout_s: float = 5.0) -> Answer:
    return _http(cluster, name, "GET", path, b"", {}, timeout_s)


def peer_call(
    cluster: LocalCluster, name: str, call: str, question: object, *, token: str | None = None, timeout_s: float = 10.0
) -> Answer:
    """A call between agents, with the cluster's own token unless another is given."""
    if token is None:
        token = (cluster.layout.secrets / "peer-token").read_text(encoding="ascii").strip()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    return _http(cluster, name, "POST", f"/peer/{call}", to_json(question), headers, timeout_s)


def _http(
    cluster: LocalCluster, name: str, method: str, path: str, body: bytes, headers: dict[str, str], timeout_s: float
) -> Answer:
    member = cluster.plan.member(name)
    connection = http.client.HTTPConnection(member.host, member.http_port, timeout=timeout_s)
    began_s = now_s()
    try:
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        text = response.read().decode()
        return Answer(response.status, text, now_s() - began_s)
    finally:
        connection.close()


def record(cluster: LocalCluster) -> ClusterRecord:
    """From the store itself."""
    stored = asyncio.run(LocalCoordination(cluster.layout.store, cluster.layout.locks).read(deadline_s=5.0))
    assert stored is not None
    return stored.record


def volume(cluster: LocalCluster, name: str) -> VolumeState:
    """What the instance never forgets, from its disk."""
    return from_json((cluster.layout.instance(name) / "state" / "volume.json").read_bytes(), VolumeState)


def target_of(cluster: LocalCluster, name: str, *, user: str = APPLICATION, database: str = APPLICATION) -> str:
    """libpq's string for one member."""
    member = cluster.plan.member(name)
    return (
        f"host={member.client_host} port={member.postgres_port} dbname={database} user={user} "
        f"passfile={cluster.layout.password_file} connect_timeout=3"
    )


def psql(target: str, statement: str, *, timeout_s: float = 15.0) -> Told:
    ended = subprocess.run(
        [PSQL, "--no-psqlrc", "--no-password", "--quiet", "--tuples-only", "--no-align", "-c", statement, target],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Told(ended.returncode, ended.stdout.strip(), ended.stderr.strip())


def superuser_sql(cluster: LocalCluster, name: str, statement: str) -> str:
    """Over the instance's own socket, as the agent does it; the tests run as the same user as the agents."""
    member = cluster.plan.member(name)
    target = (
        f"host={cluster.layout.instance(name) / 'socket'} port={member.postgres_port} dbname=postgres user=postgres"
    )
    told = psql(target, statement)
    assert told.code == 0, str(told)
    return told.out


def is_writable(cluster: LocalCluster, name: str) -> bool:
    """Does it take a write of an application within its time? Wait for nobody: the write is rolled back."""
    try:
        told = psql(target_of(cluster, name), "BEGIN; CREATE TABLE only_a_try (id int); ROLLBACK", timeout_s=3.0)
    except subprocess.TimeoutExpired:
        return False
    return told.code == 0


def messages(cluster: LocalCluster, name: str, *, offset: int = 0) -> list[str]:
    """Of the instance manager's processes, in the instance's log from the byte `offset` on."""
    content = cluster.layout.log(name).read_bytes()[offset:].decode(errors="replace")
    found = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "message" in entry and entry.get("process") != "postgres":
                found.append(str(entry["message"]))
    return found


def log_end(cluster: LocalCluster, name: str) -> int:
    return cluster.layout.log(name).stat().st_size


def other_primary(cluster: LocalCluster, old: str) -> str | None:
    """Another than `old` that lets clients in."""
    status = cluster.primary_status()
    return status.primary if status is not None and status.accepts_clients and status.primary != old else None


def wait_other_primary(cluster: LocalCluster, old: str, *, within_s: float = 40.0) -> str:
    found = cluster.wait(lambda: other_primary(cluster, old), within_s, f"another primary than {old}")
    assert found is not None
    return found


@contextlib.contextmanager
def stopped(*frozen: Process) -> Iterator[None]:
    """SIGSTOP to those processes for the block."""
    processes.send(frozen, signal.SIGSTOP)
    try:
        yield
    finally:
        processes.send(frozen, signal.SIGCONT)


class Writer:
    """Inserts 1, 2, 3, ... into a table from a thread, each in its own transaction, and remembers what was acknowledged."""

    def __init__(self, cluster: LocalCluster, table: str) -> None:
        self._cluster = cluster
        self._table = table
        self._stop = threading.Event()
        self.acknowledged: list[int] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="writer", daemon=True)

    def __enter__(self) -> Writer:
        told = psql(
            self._cluster.connection_string(),
            f"DROP TABLE IF EXISTS {self._table}; CREATE TABLE {self._table} (id int)",
        )
        assert told.code == 0, str(told)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def wait_for_more(self, count: int = 5, *, within_s: float = 40.0) -> None:
        """Until so many more rows are acknowledged."""
        wanted = len(self.acknowledged) + count
        self._cluster.wait(lambda: len(self.acknowledged) >= wanted, within_s, f"{count} more rows acknowledged")

    def missing(self) -> set[int]:
        """Acknowledged, and not there."""
        told = psql(self._cluster.connection_string(), f"SELECT id FROM {self._table}")  # noqa: S608
        assert told.code == 0, str(told)
        return set(self.acknowledged) - {int(line) for line in told.out.splitlines()}

    async def _run(self) -> None:
        members = self._cluster.plan.members
        password = (self._cluster.layout.secrets / "application").read_text(encoding="utf-8")
        number = 0
        while not self._stop.is_set():
            connection = None
            with contextlib.suppress(
                OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError
            ):
                connection = await asyncpg.connect(
                    host=[member.client_host for member in members],
                    port=[member.postgres_port for member in members],
                    user=APPLICATION,
                    database=APPLICATION,
                    password=password,
                    target_session_attrs=SessionAttribute.read_write,
                    timeout=2,
                )
                while not self._stop.is_set():
                    number += 1
                    await connection.execute(f"INSERT INTO {self._table} VALUES ({number})", timeout=2)  # noqa: S608
                    self.acknowledged.append(number)
                    await asyncio.sleep(0.01)
            if connection is not None:
                connection.terminate()
            await asyncio.sleep(0.05)


def everything_of(cluster: LocalCluster, name: str) -> tuple[Process, ...]:
    return cluster.processes(name).everything


def make_whole(cluster: LocalCluster) -> str:
    """Take back what a test may have left, and wait; the primary's name."""
    for name in cluster.names:
        plan.connect_store(cluster.layout, name)
        processes.send(everything_of(cluster, name), signal.SIGCONT)
        if cluster.supervisor_pid(name) is None:
            cluster.start(name)
    now = record(cluster)
    for verb, arguments in [("unfence", {"name": name}) for name in now.fenced] + (
        [("resume", {})] if now.paused else []
    ):
        status_client.control(cluster.layout.control_socket(cluster.names[0]), verb, dict(arguments), timeout_s=70)
    return cluster.wait_redundant(REDUNDANT_WITHIN_S)


def story(cluster: LocalCluster, lines: int = 60) -> str:
    """For a failure's report: what the managers said last, without Postgres's own lines, and what Postgres now runs with."""
    parts = []
    for name in cluster.names:
        parts += [f"--- {name}", *(line[:300] for line in messages(cluster, name)[-lines:])]
        with contextlib.suppress(OSError, AssertionError, subprocess.TimeoutExpired):
            state = volume(cluster, name)
            parts.append(f"promised epoch {state.promised_epoch} to {state.promised_to}")
            parts.append(
                superuser_sql(
                    cluster,
                    name,
                    "SELECT pg_is_in_recovery(), name, setting FROM pg_settings WHERE name IN "
                    "('primary_conninfo', 'primary_slot_name', 'dynamic_library_path', 'synchronous_standby_names')",
                )
            )
    return "\n".join(parts)
