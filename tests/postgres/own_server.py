"""A real server made only with the modules under test: initdb, rendered configuration, roles, clone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from harness import FAST_DIRECTORY, free_port

from instance_manager.core.types import Lsn, parse_lsn
from instance_manager.postgres.binaries import find_bin_directory, server_version
from instance_manager.postgres.bootstrap import RoleOptions, create_roles, initialise, write_passfile
from instance_manager.postgres.clone import SourceServer, clone
from instance_manager.postgres.configuration import (
    NOTHING_SYNCHRONOUS,
    POSTGRESQL_CONF,
    REPLICATION_CONF,
    ClientTls,
    CollectedLog,
    ParameterValue,
    ReplicationSettings,
    StaticSettings,
    TlsFiles,
    render_postgresql_conf,
    render_replication_conf,
    replication_conninfo,
)
from instance_manager.postgres.control_data import read_control_data
from instance_manager.postgres.directory import (
    create_standby_signal,
    require_startable,
    strip_auto_conf_file,
    write_configuration_file,
)
from instance_manager.postgres.files import make_directory
from instance_manager.postgres.host_based_access import (
    REPLICATION_ROLE,
    Access,
    AccessSettings,
    render_hba,
    render_ident,
)
from instance_manager.postgres.server import LocalPostgresError, LocalServer, RunAs
from instance_manager.postgres.sql import Session, session

_EXPLICIT = os.environ.get("POSTGRES_BIN_DIRECTORY")
BIN_DIRECTORY = find_bin_directory(explicit=Path(_EXPLICIT) if _EXPLICIT else None)
MAJOR = int(
    subprocess.run([BIN_DIRECTORY / "postgres", "--version"], capture_output=True, check=True)
    .stdout.split()[2]
    .split(b".")[0]
)
REPLICATION_PASSWORD = "replication:secret\\'1"
APPLICATION_PASSWORD = "application secret"
MONITORING_PASSWORD = "monitoring-secret"
ROLES = RoleOptions(
    replication_password=REPLICATION_PASSWORD,
    monitoring_password=MONITORING_PASSWORD,
    application_password=APPLICATION_PASSWORD,
)


class OwnServer:
    """One instance under a temporary root; `close` ends its processes and deletes it."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        run_as = RunAs.of_user("postgres") if os.geteuid() == 0 else None
        self.root = root / name
        for path in (self.root, self.root / "state", self.root / "socket"):
            make_directory(path, mode=0o755, run_as=run_as)
        self.server = LocalServer(
            data_directory=self.root / "data",
            socket_directory=self.root / "socket",
            state_directory=self.root / "state",
            listen_address="127.0.0.1",
            port=free_port(),
            bin_directory=BIN_DIRECTORY,
            run_as=run_as,
        )
        self.passfile = self.root / "passfile"
        write_passfile(self.server, self.passfile, password=REPLICATION_PASSWORD)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.server.data_directory

    def source(self, user: str = REPLICATION_ROLE) -> SourceServer:
        return SourceServer("127.0.0.1", self.server.port, self.passfile, user=user, tls=ClientTls("disable"))

    def configure(
        self,
        *,
        replication: ReplicationSettings | None = None,
        access: Access = Access.OPEN,
        parameters: Mapping[str, ParameterValue] | None = None,
        tls: TlsFiles | None = None,
        settings: AccessSettings | None = None,
        log: CollectedLog | None = None,
    ) -> None:
        static = StaticSettings(
            major=MAJOR,
            cluster_name=f"{self.name}_01234567",
            listen_address="127.0.0.1",
            port=self.server.port,
            socket_directory=self.server.socket_directory,
            instances=3,
            parameters={"shared_buffers": "16MB", "max_connections": 20, **(parameters or {})},
            tls=tls,
            log=log,
        )
        replication = replication or ReplicationSettings(synchronous_standby_names=NOTHING_SYNCHRONOUS)
        hba = render_hba(settings or AccessSettings(application_networks=("127.0.0.1/32",)), access)
        for file, text in (
            (POSTGRESQL_CONF, render_postgresql_conf(static)),
            (REPLICATION_CONF, render_replication_conf(replication)),
            ("pg_hba.conf", hba),
            ("pg_ident.conf", render_ident(agent_os_user=self.server.agent_os_user)),
        ):
            write_configuration_file(self.server, file, text)
        strip_auto_conf_file(self.server)

    def follow(self, primary: OwnServer, **parameters: ParameterValue) -> None:
        """Configure as a standby of `primary`."""
        conninfo = replication_conninfo(
            host="127.0.0.1",
            port=primary.server.port,
            user=REPLICATION_ROLE,
            passfile=self.passfile,
            application_name=f"{self.name}_01234567",
        )
        self.configure(replication=ReplicationSettings(primary_conninfo=conninfo), parameters=parameters)
        create_standby_signal(self.server)

    async def start(self, *, deadline_s: float = 20.0) -> None:
        require_startable(self.server)
        run_as = self.server.run_as
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220
                [self.server.program("postgres"), "-D", str(self.data)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
                user=None if run_as is None else run_as.uid,
                group=None if run_as is None else run_as.gid,
                extra_groups=None if run_as is None else [],
            )
        end_s = asyncio.get_running_loop().time() + deadline_s
        while True:
            try:
                await self.fetchval("select 1")
            except LocalPostgresError:
                if self.process.poll() is not None or asyncio.get_running_loop().time() > end_s:
                    raise AssertionError(f"{self.name} did not start:\n{self.log()[-3000:]}") from None
                await asyncio.sleep(0.03)
            else:
                return

    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")

    async def fetchval(self, query: str, *args: object) -> object:
        async with session(self.server) as opened:
            return await opened.fetchval(query, *args)

    async def lsn(self, function: str) -> Lsn:
        return parse_lsn(str(await self.fetchval(f"select {function}()::text")))

    async def wait_for(self, query: str, *, deadline_s: float = 15.0) -> None:
        """Until the query is true."""
        end_s = asyncio.get_running_loop().time() + deadline_s
        while not await self.fetchval(query):
            assert asyncio.get_running_loop().time() < end_s, f"{query}\n{self.log()[-2000:]}"
            await asyncio.sleep(0.03)

    async def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        await asyncio.to_thread(self.process.wait, 15)
        self.process = None

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its children: a crash."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGSTOP)
        children = _children(self.process.pid)
        self.process.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        self.process = None
        self._free_shared_memory()

    def close(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(5)
                self.process = None
            except subprocess.TimeoutExpired:
                self.kill()

    def _free_shared_memory(self) -> None:
        with contextlib.suppress(OSError, IndexError):
            identifier = (self.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
            subprocess.run(["ipcrm", "-m", identifier], check=False, capture_output=True)


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(path.name))
    return found


class Servers:
    """The servers of one test."""

    def __init__(self, template: Path) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="im-own-", dir=FAST_DIRECTORY))
        self.root.chmod(0o755)
        self._template = template
        self._all: list[OwnServer] = []

    def new(self, name: str) -> OwnServer:
        """An instance without a data directory."""
        made = OwnServer(self.root, name)
        self._all.append(made)
        return made

    async def primary(self, name: str = "a", **parameters: ParameterValue) -> OwnServer:
        """A running primary with all roles."""
        made = self.new(name)
        subprocess.run(["cp", "-a", "--reflink=auto", self._template, made.data], check=True)  # noqa: ASYNC221
        made.configure(parameters=parameters)
        await made.start()
        return made

    async def standby(self, primary: OwnServer, name: str = "b") -> OwnServer:
        """A running standby, cloned from `primary`."""
        made = self.new(name)
        await clone(made.server, primary.source(), system_identifier=None)
        made.follow(primary)
        await made.start()
        await made.wait_for("select exists(select from pg_stat_wal_receiver where status = 'streaming')")
        return made

    def close(self) -> None:
        for each in self._all:
            each.close()
        shutil.rmtree(self.root, ignore_errors=True)


async def make_template(root: Path) -> Path:
    """A stopped directory with all roles, made once per session."""
    made = OwnServer(root, "template")
    try:
        await initialise(made.server, major=MAJOR)
        made.configure()
        await made.start()
        async with session(made.server, statement_timeout_s=60) as opened:
            await create_roles(opened, ROLES)
        await made.stop()
    finally:
        made.close()
    assert (await read_control_data(made.server)).shut_down_cleanly
    assert (await server_version(made.server)).major == MAJOR
    return made.data


@contextlib.contextmanager
def template_directory() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="im-own-template-", dir=FAST_DIRECTORY))
    root.chmod(0o755)
    try:
        yield asyncio.run(make_template(root))
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def servers_for_test(template: Path) -> Iterator[Servers]:
    made = Servers(template)
    try:
        yield made
    finally:
        made.close()


__all__ = ["APPLICATION_PASSWORD", "MAJOR", "OwnServer", "Servers", "Session", "servers_for_test", "template_directory"]
