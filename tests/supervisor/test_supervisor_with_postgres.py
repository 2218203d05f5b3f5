"""The same promises with real Postgres under the supervisor."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_harness import (
    MARKER,
    POSTGRES_USER,
    FakeAgent,
    Harness,
    agent_and_harness,
    is_alive,
    lock_is_free,
    now_s,
    until,
)

BIN = Path("/usr/lib/postgresql/15/bin")
# A backend that never waits for a client: it would go on for seconds after the postmaster's death.
BUSY = "DO $$ BEGIN LOOP INSERT INTO commits VALUES (clock_timestamp()); COMMIT; END LOOP; END $$"


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A fresh data directory, to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="supervisor-test-"))
    os.chown(folder, POSTGRES_USER.pw_uid, POSTGRES_USER.pw_gid)
    command = [
        str(BIN / "initdb"),
        "-D",
        str(folder / "data"),
        "-A",
        "trust",
        "-U",
        "postgres",
        "--no-sync",
        "--no-instructions",
    ]
    subprocess.run(
        command, user="postgres", group="postgres", extra_groups=[], check=True, capture_output=True, cwd="/"
    )
    with (folder / "data" / "postgresql.conf").open("a") as configuration:
        configuration.write("fsync = off\nlisten_addresses = ''\nshared_buffers = 8MB\n")
    yield folder / "data"
    shutil.rmtree(folder)


class Server:
    """Real Postgres in a run of the harness."""

    def __init__(self, harness: Harness, template: Path) -> None:
        self.folder = harness.folder
        self.run = harness.run
        self.data = harness.folder / "data"
        shutil.copytree(template, self.data)
        for path in (self.data, *self.data.rglob("*")):
            os.chown(path, POSTGRES_USER.pw_uid, POSTGRES_USER.pw_gid)
        self.pid = 0
        self.clients: list[subprocess.Popen[bytes]] = []

    def start(self, agent: FakeAgent, mode: str, epoch: int | None = None) -> None:
        argv = [str(BIN / "postgres"), "-D", str(self.data), "-k", str(self.folder)]
        agent.do("start", mode=mode, epoch=epoch, argv=argv, env={MARKER: self.run, "LC_ALL": "C"})
        self.pid = agent.expect("postgres_started")["pid"]
        until("it answers", lambda: self.try_sql("SELECT 1") == "1")

    def try_sql(self, query: str) -> str | None:
        done = subprocess.run(self.psql(query), check=False, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else None

    def sql(self, query: str) -> str:
        done = subprocess.run(self.psql(query), check=True, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    def in_background(self, query: str) -> None:
        """Run a query that does not end by itself, and see it active."""
        self.clients.append(
            subprocess.Popen(
                self.psql(query), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.PIPE
            )
        )
        active = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
        until("it runs", lambda: self.sql(active) == str(len(self.clients)))

    def psql(self, query: str) -> list[str]:
        return [str(BIN / "psql"), "-XAtq", "-h", str(self.folder), "-U", "postgres", "-c", query]

    def processes(self) -> list[int]:
        """The postmaster and its children."""
        found = [self.pid]
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == self.pid:
                        found.append(int(folder.name))
        return found


@contextlib.contextmanager
def running(template: Path, *options: str) -> Iterator[tuple[Harness, FakeAgent, Server]]:
    with agent_and_harness(*options) as (harness, agent):
        server = Server(harness, template)
        try:
            yield harness, agent, server
        finally:
            for client in server.clients:
                client.kill()
                client.communicate()


def test_at_hard_a_busy_backend_commits_nothing_more(template: Path) -> None:
    with running(template, "--heartbeat-timeout-s", "30") as (harness, agent, server):
        agent.permit(epoch=1, hard_s=7)
        server.start(agent, "read_write", epoch=1)
        server.sql("CREATE TABLE commits (at timestamptz)")
        server.in_background(BUSY)
        server.in_background(BUSY)
        server.in_background("SELECT pg_sleep(600)")
        until("many commits", lambda: int(server.sql("SELECT count(*) FROM commits")) > 100)
        processes = server.processes()
        stopped = int(server.sql("SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)' LIMIT 1"))
        offset_s = time.clock_gettime(time.CLOCK_REALTIME) - now_s()  # Postgres stamps rows with the time of day
        assert len(processes) >= 8
        os.kill(stopped, signal.SIGSTOP)
        os.kill(agent.pid, signal.SIGSTOP)

        # The deadline is near enough now: a later epoch brings it closer.
        hard_s = now_s() + 0.5
        agent.send(type="permit", epoch=2, soft=hard_s, hard=hard_s)
        until("all are dead", lambda: not any(map(is_alive, processes)))
        dead_s = now_s()
        assert hard_s <= dead_s <= hard_s + 1.0

        os.kill(agent.pid, signal.SIGCONT)
        agent.expect("postgres_exited", reason="fenced")
        took_s = harness.log("postgres_killed")[0]["took_s"]
        print(f"dead {1000 * (dead_s - hard_s):.0f} ms after hard, of which the kill took {1000 * took_s:.0f} ms")
        server.start(agent, "standby")  # only a name here: it reads what was committed
        last_s = float(server.sql("SELECT extract(epoch FROM max(at)) FROM commits")) - offset_s
        assert hard_s - 0.3 < last_s <= dead_s


def test_when_the_postmaster_is_killed_busy_and_stopped_backends_die_with_it(template: Path) -> None:
    with running(template) as (_, agent, server):
        agent.permit(epoch=1, hard_s=7)
        server.start(agent, "read_write", epoch=1)
        server.sql("CREATE TABLE commits (at timestamptz)")
        server.in_background(BUSY)
        server.in_background("SELECT pg_sleep(600)")
        processes = server.processes()
        stopped = int(server.sql("SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)' LIMIT 1"))
        os.kill(stopped, signal.SIGSTOP)
        killed_s = now_s()
        os.kill(server.pid, signal.SIGKILL)
        event = agent.expect("postgres_exited", pid=server.pid)
        assert not any(map(is_alive, processes))
        assert now_s() - killed_s < 1.0
        assert (event["signal"], event["reason"]) == (signal.SIGKILL, "exit")
        assert event["remaining_killed"] >= 2, "the busy and the stopped one; the others may have noticed themselves"


def test_postgres_serves_on_while_agents_come_and_go(template: Path) -> None:
    with running(template) as (harness, agent, server):
        server.start(agent, "standby")
        begun = server.sql("SELECT pg_postmaster_start_time()")
        for _ in range(2):
            os.kill(agent.pid, signal.SIGKILL)
            agent = harness.agent()
            assert agent.hello["postgres"]["pid"] == server.pid
            assert server.sql("SELECT pg_postmaster_start_time()") == begun


def test_a_standby_is_promoted_with_a_permit_and_stops_in_order(template: Path) -> None:
    with running(template) as (harness, agent, server):
        (server.data / "standby.signal").touch()
        server.start(agent, "standby")
        assert server.sql("SELECT pg_is_in_recovery()") == "t"
        agent.permit(epoch=7, hard_s=7)
        (server.data / "promote").touch()
        agent.do("promote", epoch=7)
        until("it is writable", lambda: server.sql("SELECT pg_is_in_recovery()") == "f")
        agent.do("signal", signal="INT")
        event = agent.expect("postgres_exited")
        assert (event["exit_code"], event["mode"], event["reason"]) == (0, "read_write", "exit")
        agent.do("goodbye")
        assert harness.exit_code() == 0


def test_after_a_supervisors_sudden_death_the_lock_is_free_only_when_postgres_is_gone(template: Path) -> None:
    with running(template) as (harness, agent, server):
        agent.permit(epoch=1, hard_s=7)
        server.start(agent, "read_write", epoch=1)
        server.in_background("SELECT pg_sleep(600)")
        stopped = int(server.sql("SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)' LIMIT 1"))
        os.kill(stopped, signal.SIGSTOP)
        processes = server.processes()
        harness.supervisor.kill()
        harness.supervisor.wait()
        until("all but one are gone", lambda: [pid for pid in processes if is_alive(pid)] == [stopped])
        assert not lock_is_free(harness.lock_file)
        os.kill(stopped, signal.SIGKILL)
        until("the lock is free", lambda: lock_is_free(harness.lock_file))
