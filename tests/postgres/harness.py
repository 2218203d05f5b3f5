"""Real Postgres servers for tests: made in milliseconds from a cached template, killed and deleted whatever happens.

Layout of each server: `<root>/<name>/{data,state,socket}`, log in `<root>/<name>/log`. `POSTGRES_BIN_DIRECTORY` selects
the binaries (default: Debian's 15). Standbys are copies of the stopped template, so they need no base backup.

    cluster = Cluster(root)                    # the fixture `cluster` does this, and closes it
    primary, standby = await cluster.primary_with_standbys(1)
    await primary.execute("INSERT ...")

Run as root, Postgres runs as `postgres`; otherwise as the current user.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

from instance_manager.core.types import Lsn, parse_lsn
from instance_manager.postgres.running import SqlServer
from instance_manager.postgres.server import LocalServer, RunAs

BIN_DIRECTORY = Path(os.environ.get("POSTGRES_BIN_DIRECTORY", "/usr/lib/postgresql/15/bin"))
REPLICATION_FILE = "instance-manager.replication.conf"
NOBODY = "ANY 1 (nobody)"
"""A list that no standby can satisfy: every commit waits."""
_MEMORY = Path("/dev/shm")
FAST_DIRECTORY = _MEMORY if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 6 << 30 else None
"""Memory where there is enough of it: the tests flush a lot, and four clusters at a time take 4 GiB. None: where temporary files are."""

_T = TypeVar("_T")
_PR_SET_PDEATHSIG = 1
_TEMPLATE_SETTINGS = {
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    # In the directory, which is deleted: of a server that is killed a POSIX segment stays.
    "dynamic_shared_memory_type": "mmap",
    "hot_standby": "on",
    "listen_addresses": "127.0.0.1",
    "log_line_prefix": "%m [%p] %b ",
    "logging_collector": "off",
    "max_connections": "40",
    "max_prepared_transactions": "5",
    "max_wal_senders": "10",
    "max_wal_size": "2GB",
    "restart_after_crash": "off",
    "shared_buffers": "16MB",
    "wal_keep_size": "512MB",
    "wal_log_hints": "on",
    "wal_retrieve_retry_interval": "1s",
    "wal_receiver_status_interval": "1s",
}


def run_as() -> RunAs | None:
    """Postgres's user where the tests are root, who may not run it."""
    return RunAs.of_user("postgres") if os.geteuid() == 0 else None


def major_version(bin_directory: Path = BIN_DIRECTORY) -> int:
    output = subprocess.run([bin_directory / "postgres", "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"\) (\d+)", output.stdout)
    assert found is not None, output.stdout
    return int(found[1])


_FIRST_PORT, _PORTS = 26000, 6000
_next_port = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """Of those from which the kernel takes none for outgoing connections: such a one may be gone before a server binds it."""
    while True:
        port = _FIRST_PORT + next(_next_port) % _PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


async def wait_until(
    condition: Callable[[], Awaitable[_T]], *, deadline_s: float = 10.0, what: str = "", interval_s: float = 0.01
) -> _T:
    """Evaluate `condition` until it is true; its value. AssertionError at the deadline."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + deadline_s
    while True:
        value = await condition()
        if value:
            return value
        if loop.time() > until_s:
            raise AssertionError(f"not within {deadline_s:g} s: {what or condition}; last value {value!r}")
        await asyncio.sleep(interval_s)


def owned_directory(place: Path) -> Path:
    """Made, and Postgres's: for a tablespace."""
    place.mkdir(mode=0o700)
    if (user := run_as()) is not None:
        os.chown(place, user.uid, user.gid)
    return place


def freeze(pid: int) -> None:
    """SIGSTOP; `Cluster.close` kills frozen processes too."""
    os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    freeze(pid)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            thaw(pid)


def processes_of(data_directory: Path) -> list[int]:
    """Every process whose working directory is `data_directory`: the postmaster and all its children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "cwd").readlink() == data_directory:
                    found.append(int(entry.name))
    return found


def title_of(pid: int) -> str:
    """The process's title, such as `postgres: walreceiver streaming 0/3000148`; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


class PostgresProcess:
    """One server. Not started by its constructor."""

    def __init__(self, root: Path, name: str, bin_directory: Path = BIN_DIRECTORY) -> None:
        self.name = name
        self.root = root / name
        self.data = self.root / "data"
        self.state = self.root / "state"
        self.socket = self.root / "socket"
        self.log = self.root / "log"
        self.port = free_port()
        self.bin_directory = bin_directory
        self.process: subprocess.Popen[bytes] | None = None
        self.settings: dict[str, str] = {}
        self.dynamic: dict[str, str] = {}

    @property
    def server(self) -> LocalServer:
        return LocalServer(
            data_directory=self.data,
            socket_directory=self.socket,
            state_directory=self.state,
            listen_address="127.0.0.1",
            port=self.port,
            bin_directory=self.bin_directory,
            run_as=run_as(),
        )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def create(self, source: Path) -> None:
        """Copy `source`, a stopped data directory, with everything in it."""
        for directory in (self.root, self.state, self.socket):
            directory.mkdir(mode=0o755)
        subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(self.data)], check=True)
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        self.own(self.state, self.socket)

    def own(self, *paths: Path) -> None:
        owner = run_as()
        if owner is not None:
            for path in paths:
                os.chown(path, owner.uid, owner.gid)

    def make_standby(self) -> None:
        self.write("standby.signal", "")

    def write(self, name: str, content: str) -> None:
        """Replace a file of the data directory."""
        path = self.data / name
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(content)
        self.own(temporary)
        temporary.replace(path)

    def configure(self, **settings: str | int) -> None:
        """Settings of `test.conf`; they hold from the next start or reload."""
        self.settings |= {name: str(value) for name, value in settings.items()}
        self.write("test.conf", _render(self.settings))

    def set_dynamic(self, **settings: str | int) -> None:
        """Write settings into the file that the agent writes in production; no reload."""
        self.dynamic |= {name: str(value) for name, value in settings.items()}
        self.write(REPLICATION_FILE, _render(self.dynamic))

    async def start(self, *, wait: bool = True, deadline_s: float = 20.0) -> None:
        self.configure(port=self.port, unix_socket_directories=str(self.socket))
        if not (self.data / REPLICATION_FILE).exists():
            self.set_dynamic()
        owner = run_as()

        def become_postgres() -> None:
            if owner is not None:
                os.setgroups([])
                os.setgid(owner.gid)
                os.setuid(owner.uid)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220
                [str(self.bin_directory / "postgres"), "-D", str(self.data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=become_postgres,
                start_new_session=True,
                cwd="/",
                env={
                    "PATH": os.environ["PATH"],
                    "LC_ALL": "C",
                    "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
                },
            )
        if wait:
            await self.wait_ready(deadline_s=deadline_s)

    async def wait_ready(self, *, deadline_s: float = 20.0) -> None:
        async def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"{self.name} ended:\n{self.log_text()[-3000:]}"
            try:
                await self.fetchval("SELECT 1")
            except (OSError, asyncpg.PostgresError):
                return False
            return True

        await wait_until(answers, deadline_s=deadline_s, what=f"{self.name} answers", interval_s=0.02)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def running(self) -> SqlServer:
        """The port through which the rules look at this server."""
        return SqlServer(self.server, self.reload)

    async def reload(self) -> None:
        """The port `reload` of the modules under test: SIGHUP to the postmaster."""
        self.send(signal.SIGHUP)

    async def relay(self) -> None:
        """The port `relay` of promotion: SIGUSR1 to the postmaster."""
        self.send(signal.SIGUSR1)

    async def stop(self, number: signal.Signals = signal.SIGINT, *, deadline_s: float = 15.0) -> None:
        """Shut down (SIGINT: fast, SIGQUIT: immediate) and wait for the end."""
        self.send(number)
        await self.wait_ended(deadline_s=deadline_s)

    async def wait_ended(self, *, deadline_s: float = 15.0) -> int:
        process = self.process
        assert process is not None

        async def ended() -> bool:
            return process.poll() is not None

        await wait_until(ended, deadline_s=deadline_s, what=f"{self.name} ends")
        return int(process.returncode)

    def kill(self) -> None:
        """SIGKILL to all of its processes, frozen or not, and reap the postmaster. Does nothing when there is none."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process is not None:
            for _ in range(20):
                left = processes_of(self.data)
                if not left:
                    break
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    async def connect(self, **settings: str) -> asyncpg.Connection:
        """A new client session as superuser, over the Unix socket, with `settings` for the session."""
        return await asyncpg.connect(
            host=str(self.socket),
            port=self.port,
            user="postgres",
            password="",
            database="postgres",
            ssl=False,
            timeout=5,
            statement_cache_size=0,
            server_settings=settings,
        )

    @contextlib.asynccontextmanager
    async def session(self, **settings: str) -> AsyncIterator[asyncpg.Connection]:
        connection = await self.connect(**settings)
        try:
            yield connection
        finally:
            connection.terminate()

    async def execute(self, query: str, **settings: str) -> str:
        """Run in a session of its own, with `synchronous_commit = local` unless given otherwise."""
        async with self.session(**({"synchronous_commit": "local"} | settings)) as connection:
            return str(await connection.execute(query, timeout=10))

    async def fetchval(self, query: str, *args: object) -> Any:
        async with self.session() as connection:
            return await connection.fetchval(query, *args, timeout=10)

    async def fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        async with self.session() as connection:
            return list(await connection.fetch(query, *args, timeout=10))

    async def lsn(self, function: str) -> Lsn | None:
        """A position by the name of its function, such as `pg_last_wal_receive_lsn`."""
        text = await self.fetchval(f"SELECT {function}()::text")
        return None if text is None else parse_lsn(text)

    def child_pids(self, kind: str) -> list[int]:
        """Pids of its processes whose title begins with `postgres: <kind>`."""
        return [pid for pid in processes_of(self.data) if title_of(pid).startswith(f"postgres: {kind}")]

    def child_pid(self, kind: str) -> int:
        (pid,) = self.child_pids(kind)
        return pid

    async def commit_is_acknowledged(self, *, within_s: float) -> bool:
        """Does a commit at `synchronous_commit = on` return in time? If not, its session is terminated."""
        connection = await self.connect(synchronous_commit="on")
        query = asyncio.ensure_future(connection.execute("SELECT pg_logical_emit_message(true, 'test', 'commit')"))
        done, _ = await asyncio.wait({query}, timeout=within_s)
        pid = connection.get_server_pid()
        connection.terminate()
        await asyncio.wait({query}, timeout=5)
        query.cancelled() or query.exception()
        if not done:
            await self.execute(f"SELECT pg_terminate_backend({pid})")
        return bool(done)

    async def walsender_pid(self, application_name: str) -> int | None:
        value = await self.fetchval(
            "SELECT pid FROM pg_stat_replication WHERE application_name = $1 ORDER BY backend_start DESC LIMIT 1",
            application_name,
        )
        return None if value is None else int(value)


class Cluster:
    """The servers of one test, under one directory, in memory if it can be; `close` kills and deletes all of it."""

    def __init__(self, template: Path, bin_directory: Path = BIN_DIRECTORY) -> None:
        self.template = template
        self.bin_directory = bin_directory
        self.root = Path(tempfile.mkdtemp(prefix="im-pg-", dir=FAST_DIRECTORY))
        self.root.chmod(0o755)
        self.servers: dict[str, PostgresProcess] = {}
        atexit.register(self.close)

    def close(self) -> None:
        for server in self.servers.values():
            server.kill()
        shutil.rmtree(self.root, ignore_errors=True)
        atexit.unregister(self.close)

    def add(self, name: str, source: Path | None = None) -> PostgresProcess:
        """A server, not started, from a copy of `source`, or of the template."""
        server = PostgresProcess(self.root, name, self.bin_directory)
        self.servers[name] = server
        server.create(source or self.template)
        return server

    def add_standby(self, name: str, primary: PostgresProcess, source: Path | None = None) -> PostgresProcess:
        """A standby, not started, that will follow `primary` under its own name, without a slot."""
        return self.follow(self.add(name, source), primary)

    def follow(self, standby: PostgresProcess, primary: PostgresProcess) -> PostgresProcess:
        """Make a server that is not started a standby of `primary`, without a slot."""
        standby.make_standby()
        standby.set_dynamic(
            synchronous_standby_names=NOBODY, primary_conninfo=conninfo(primary, standby.name), primary_slot_name=""
        )
        return standby

    async def primary(self, name: str = "p") -> PostgresProcess:
        server = self.add(name)
        server.set_dynamic(synchronous_standby_names="")
        await server.start()
        return server

    async def primary_with_standbys(self, *names: str, slots: bool = False) -> list[PostgresProcess]:
        """A primary `p` with an empty list, and standbys that stream."""
        # Copying takes the most time: all at once.
        await asyncio.gather(*(asyncio.to_thread(self.add, name) for name in ("p", *names)))
        primary = self.servers["p"]
        primary.set_dynamic(synchronous_standby_names="")
        await primary.start()
        for name in names:
            standby = self.follow(self.servers[name], primary)
            if slots:
                await primary.execute(f"SELECT pg_create_physical_replication_slot('{name}', true)")
                standby.set_dynamic(primary_slot_name=name)
            await standby.start(wait=False)
        await asyncio.gather(*(self.servers[name].wait_ready() for name in names))
        for name in names:
            await self.wait_streaming(primary, name)
        return [primary, *(self.servers[name] for name in names)]

    async def wait_streaming(self, primary: PostgresProcess, name: str, *, deadline_s: float = 10.0) -> None:
        """Until `name` streams and has flushed all that `primary` has."""
        await wait_until(
            lambda: primary.fetchval(
                "SELECT count(*) > 0 FROM pg_stat_replication WHERE application_name = $1 AND state = 'streaming' "
                "AND flush_lsn >= pg_current_wal_flush_lsn()",
                name,
            ),
            deadline_s=deadline_s,
            what=f"{name} streams from {primary.name}",
        )


def conninfo(primary: PostgresProcess, name: str) -> str:
    return f"host=127.0.0.1 port={primary.port} user=postgres application_name={name}"


def make_template(directory: Path, bin_directory: Path = BIN_DIRECTORY) -> Path:
    """initdb once: the stopped data directory from which every server is copied."""
    owner = run_as()
    directory.chmod(0o755)
    data = directory / "template"
    data.mkdir(mode=0o700)
    if owner is not None:
        os.chown(data, owner.uid, owner.gid)
    subprocess.run(
        [
            str(bin_directory / "initdb"),
            "--no-sync",
            "--data-checksums",
            # Less to copy for every server, and more ends of segments to meet.
            "--wal-segsize=1",
            "--auth=trust",
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C",
            "-D",
            str(data),
        ],
        check=True,
        capture_output=True,
        cwd="/",
        user=None if owner is None else owner.uid,
        group=None if owner is None else owner.gid,
        extra_groups=None if owner is None else [],
    )
    with (data / "postgresql.conf").open("a") as file:
        file.write(_render(_TEMPLATE_SETTINGS))
        file.write("include_if_exists 'test.conf'\n")
        file.write(f"include_if_exists '{REPLICATION_FILE}'\n")
    # A first start puts the settings into pg_control: a standby may not have less than that says. Without template0
    # there are a third fewer files to copy.
    subprocess.run(
        [str(bin_directory / "postgres"), "--single", "-D", str(data), "postgres"],
        check=True,
        input=b"UPDATE pg_database SET datistemplate = false WHERE datname = 'template0'\nDROP DATABASE template0\n",
        capture_output=True,
        cwd="/",
        user=None if owner is None else owner.uid,
        group=None if owner is None else owner.gid,
        extra_groups=None if owner is None else [],
    )
    return data


def _render(settings: Mapping[str, str]) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace("'", "''")

    return "".join(f"{name} = '{quoted(value)}'\n" for name, value in settings.items())
