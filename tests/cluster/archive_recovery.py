"""What the archive of a cluster alone gives back: a base backup that was taken before, and Postgres's own recovery."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from cluster_tools import psql

from instance_manager.archive import commands
from instance_manager.archive.orders import Orders
from instance_manager.codec import to_json
from instance_manager.core.record import ClusterRecord
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.ports import choose_base_port
from instance_manager.demo.processes import now_s
from instance_manager.postgres.binaries import find_bin_directory
from instance_manager.postgres.host_based_access import REPLICATION_ROLE
from instance_manager.postgres.server import RunAs

SEGMENT_BYTES = 16 << 20
DEADLINE_S = 60.0


def base_backup(cluster: LocalCluster, name: str, target: Path) -> None:
    """Of a running instance, without any WAL: that is the archive's part."""
    member = cluster.plan.member(name)
    password = (cluster.layout.secrets / "replication").read_text(encoding="utf-8")
    target.mkdir()
    subprocess.run(
        [
            *(find_bin_directory() / "pg_basebackup", f"--pgdata={target}", "--wal-method=none", "--checkpoint=fast"),
            f"--host={member.host}",
            f"--port={member.postgres_port}",
            f"--username={REPLICATION_ROLE}",
        ],
        check=True,
        capture_output=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PGPASSWORD": password},
    )


class Recovered:
    """A server that recovers from the archive alone, in a directory of its own."""

    def __init__(self, cluster: LocalCluster, record: ClusterRecord, root: Path, data: Path) -> None:
        self._record = record
        self._root = root
        self._port = choose_base_port(1, None, spread=True)
        self._run_as = RunAs.of_user("postgres") if os.geteuid() == 0 else None
        for directory in ("socket", "state"):
            (root / directory).mkdir()
        shutil.move(data, root / "data")
        content = yaml.safe_load(cluster.layout.config(cluster.names[0]).read_text())
        content["instance"]["directory"] = str(root)
        self._configuration = root / "archiver.yaml"
        self._configuration.write_text(yaml.safe_dump(content))
        self._archive_socket = root / "archive.sock"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Until it is open: the archive is at its end."""
        self._start_archiver()
        data = self._root / "data"
        client = commands.install_client(self._root / "state", self._run_as)
        python = commands.interpreter(self._run_as)
        restore = commands.restore_command(python, client, self._archive_socket, "recovery").replace("'", "''")
        # The last file that the copied configuration includes.
        (data / "instance-manager.replication.conf").write_text(
            f"restore_command = '{restore}'\nport = {self._port}\narchive_mode = off\nlisten_addresses = ''\n"
            f"unix_socket_directories = '{self._root / 'socket'}'\nsynchronous_standby_names = ''\n"
            "logging_collector = off\nlog_destination = stderr\n"
        )
        (data / "recovery.signal").touch()
        if self._run_as is not None:
            subprocess.run(["chown", "-R", "postgres:postgres", self._root], check=True)
        data.chmod(0o700)
        self._spawn([str(find_bin_directory() / "postgres"), "-D", str(data)], as_postgres=True)
        self._until_open()

    def rows(self, table: str) -> set[int]:
        told = self._sql(f"SELECT id FROM {table}", database="app")  # noqa: S608
        return {int(line) for line in told.splitlines()}

    def close(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self) -> str:
        return (self._root / "log").read_text(errors="replace")[-4000:]

    def _start_archiver(self) -> None:
        self._spawn([sys.executable, "-m", "instance_manager.archive", "--config", str(self._configuration)])
        assert self._record.system_identifier is not None
        orders = Orders(
            role="standby",
            epoch=self._record.epoch,
            cluster_uid=self._record.cluster_uid,
            system_identifier=self._record.system_identifier,
            wal_segment_bytes=SEGMENT_BYTES,
        )
        ends_s = now_s() + DEADLINE_S
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self._archive_socket))
                connection.sendall(b"orders\t" + to_json(orders) + b"\n")
                assert connection.recv(65536).startswith(b"done")
                return
            assert now_s() < ends_s, self.log()
            time.sleep(0.05)

    def _spawn(self, argv: list[str], *, as_postgres: bool = False) -> None:
        user = self._run_as if as_postgres else None
        with (self._root / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    user=None if user is None else user.uid,
                    group=None if user is None else user.gid,
                    extra_groups=None if user is None else [],
                )
            )

    def _until_open(self) -> None:
        ends_s = now_s() + DEADLINE_S
        while True:
            assert self._processes[-1].poll() is None, self.log()
            with contextlib.suppress(AssertionError):
                if self._sql("SELECT pg_is_in_recovery()") == "f":
                    return
            assert now_s() < ends_s, self.log()
            time.sleep(0.1)

    def _sql(self, statement: str, *, database: str = "postgres") -> str:
        target = f"host={self._root / 'socket'} port={self._port} dbname={database} user=postgres"
        told = psql(target, statement)
        assert told.code == 0, str(told)
        return told.out


@contextlib.contextmanager
def recovered(cluster: LocalCluster, record: ClusterRecord, root: Path, data: Path) -> Iterator[Recovered]:
    """`data`: the base backup, which is moved. Everything is ended with the block."""
    made = Recovered(cluster, record, root, data)
    try:
        made.start()
        yield made
    finally:
        made.close()
