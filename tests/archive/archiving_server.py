"""A real Postgres with a real archiver process beside it, as the supervisor will run them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from archive_harness import until
from harness import Cluster, PostgresProcess, run_as
from s3_server import CREDENTIALS, REGION

from instance_manager.archive import commands
from instance_manager.archive.fetch import Mode
from instance_manager.archive.orders import Orders
from instance_manager.archive.receipts import RECEIPTS
from instance_manager.codec import to_json
from instance_manager.core.types import Epoch, TimelineChain
from instance_manager.postgres.archive_commands import ALLOWS, allow

SEGMENT_BYTES = 1 << 20
REPOSITORY = Path(__file__).parent.parent.parent


def ask(path: Path, request: bytes) -> str:
    """One request over the archiver's socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        connection.sendall(request + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            received = connection.recv(65536)
            if not received:
                raise ConnectionError("no answer")
            answer += received
    return answer.decode().rstrip("\n")


class ArchivingServer:
    """One instance: `server` and its archiver, whose store is given as the section `archive` of a configuration."""

    def __init__(self, server: PostgresProcess, archive: dict[str, Any], segment_bytes: int = SEGMENT_BYTES) -> None:
        self.server = server
        self.segment_bytes = segment_bytes
        self.archive = archive
        self.socket = server.root / "archive.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.client = commands.install_client(server.state, run_as())
        self.python = commands.interpreter(run_as())

    def archive_settings(self) -> dict[str, str]:
        """As an agent's, which allows pushing."""
        allow(self.server.server, "push")
        places = (self.socket, self.server.state / ALLOWS, self.server.state / RECEIPTS)
        return {"archive_mode": "on", "archive_command": commands.archive_command(self.python, self.client, *places)}

    def restore_settings(self, mode: Mode) -> dict[str, str]:
        return {"restore_command": commands.restore_command(self.python, self.client, self.socket, mode)}

    async def start_archiver(self) -> None:
        """Until it listens."""
        self.socket.unlink(missing_ok=True)
        file = self.server.root / "instance.yaml"
        file.write_text(yaml.safe_dump(self._configuration()))
        with (self.server.root / "archiver.log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-m", "instance_manager.archive", "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **CREDENTIALS, "PYTHONPATH": str(REPOSITORY)},
                start_new_session=True,
            )
        process = self.process
        await until(lambda: self._answers() or process.poll() is not None, deadline_s=30)
        assert process.poll() is None, self.archiver_log()

    def _answers(self) -> bool:
        try:
            return ask(self.socket, b"status") != ""
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    def kill_archiver(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill_archiver()

    def archiver_log(self) -> str:
        return (self.server.root / "archiver.log").read_text(errors="replace")[-4000:]

    def order(
        self, role: str, system_identifier: int, *, epoch: int = 1, chain: TimelineChain | None = None, **flags: bool
    ) -> None:
        """As the agent: tell the role; a primary's permit holds for ten minutes."""
        orders = Orders(
            role="primary" if role == "primary" else "standby",
            epoch=Epoch(epoch),
            cluster_uid="0123456789abcdef",
            permit_until_s=time.clock_gettime(time.CLOCK_BOOTTIME) + 600 if role == "primary" else 0.0,
            system_identifier=str(system_identifier),
            wal_segment_bytes=self.segment_bytes,
            chain=chain,
            **flags,
        )
        assert ask(self.socket, b"orders\t" + to_json(orders)).startswith("done ")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(ask(self.socket, b"status"))
        return found

    def _configuration(self) -> dict[str, Any]:
        root = self.server.root
        return {
            "cluster": {"name": "orders", "uid": "0123456789abcdef"},
            "instance": {"name": "orders-1", "directory": str(root)},
            "members": [
                {"name": "orders-1", "host": "127.0.0.1", "postgres_port": self.server.port, "http_port": 1},
                # Nobody is asked anything of it here: where there are standbys, a primary leaves backups to them.
                {"name": "orders-2", "host": "127.0.0.1", "postgres_port": 2, "http_port": 3},
            ],
            "coordination": {"local": {"directory": str(root / "store"), "locks_directory": str(root / "locks")}},
            "secrets": {
                key: str(root / "secret")
                for key in ("peer_token", "replication_password", "application_password", "monitoring_password")
            },
            "archive": self.archive,
        }


@contextlib.contextmanager
def archiving(server: PostgresProcess, archive: dict[str, Any]) -> Iterator[ArchivingServer]:
    """The archiver is ended with the block; the server is the cluster's to end."""
    made = ArchivingServer(server, archive)
    try:
        yield made
    finally:
        made.close()


async def system_identifier(server: PostgresProcess) -> int:
    return int(await server.fetchval("SELECT system_identifier FROM pg_control_system()"))


async def archiving_primary(cluster: Cluster, made: ArchivingServer, **settings: str | int) -> int:
    """Start it with its archiver; its system identifier."""
    made.server.set_dynamic(synchronous_standby_names="")
    made.server.configure(**made.archive_settings(), **settings)
    await made.start_archiver()
    await made.server.start()
    system = await system_identifier(made.server)
    made.order("primary", system)
    return system


async def all_archived(server: PostgresProcess, *, deadline_s: float = 60.0) -> str:
    """Finish the segment, and wait until Postgres says that it is archived; its name."""
    # A switch of an empty segment returns the boundary, which Postgres 17 and later count to the segment behind it.
    name = str(await server.fetchval("SELECT pg_walfile_name(pg_switch_wal() - 1)"))
    # What was archived last may be a backup's label that came behind it.
    done = server.data / "pg_wal/archive_status" / f"{name}.done"
    end_s = time.monotonic() + deadline_s
    while True:
        row = (await server.fetch("SELECT * FROM pg_stat_archiver"))[0]
        if (row["last_archived_wal"] or "")[:24] >= name or done.exists():
            return name
        assert time.monotonic() < end_s, (dict(row), server.log_text()[-2000:])
        await asyncio.sleep(0.05)


async def cold_copy(cluster: Cluster, source: PostgresProcess) -> Path:
    """The directory of a server that is not running, to recover from."""
    copy = cluster.root / "cold"
    await asyncio.to_thread(subprocess.run, ["cp", "-a", str(source.data), str(copy)], check=True)
    return copy


async def insert(server: PostgresProcess, first: int, count: int) -> None:
    await server.fetchval(INSERT, first, first + count - 1)


INSERT = "INSERT INTO t SELECT n, repeat(md5(n::text), 8) FROM generate_series($1::int, $2::int) n"


async def prepared(cluster: Cluster, made: ArchivingServer, **settings: str | int) -> int:
    """A primary with a table, archiving, and a cold copy of it from before."""
    system = await archiving_primary(cluster, made, **settings)
    await made.server.execute("CREATE TABLE t (n int PRIMARY KEY, filler text)")
    return system


async def run(argv: list[Any], *, as_postgres: bool = False) -> subprocess.CompletedProcess[str]:
    user = run_as() if as_postgres else None
    return await asyncio.to_thread(
        lambda: subprocess.run(
            argv,
            env={**os.environ, "AWS_DEFAULT_REGION": REGION},
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            user=None if user is None else user.uid,
            group=None if user is None else user.gid,
            extra_groups=None if user is None else [],
        )
    )
