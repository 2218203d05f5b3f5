"""The write probe and the sampler against a plain Postgres: what they take for an acknowledgement, and what not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from instance_manager.demo.processes import now_s
from instance_manager.drill.checker import describe, judge
from instance_manager.drill.client import prepare, rows_of, run
from instance_manager.drill.findings import Rule
from instance_manager.drill.history import HistoryReader, Outcome, Seen, Span, whole_read
from instance_manager.drill.sampler import NEWEST, STRETCH, Windows
from instance_manager.drill.sql import CONTENTS, TABLE, MemberAddress, connect, span_of
from instance_manager.postgres.binaries import find_bin_directory


class Plain:
    """One Postgres on a free port that trusts everybody, with the database `app`."""

    def __init__(self, root: Path, standby_names: str = "") -> None:
        self.data = root / "data"
        self.port = _free_port()
        self.address = MemberAddress("plain", "127.0.0.1", self.port, "app", "app", None)
        self._programs = find_bin_directory()
        self._process: subprocess.Popen[bytes] | None = None
        self._identity = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        if self._identity is not None:
            os.chown(root, self._identity.pw_uid, self._identity.pw_gid)
        self._call("initdb", "--no-sync", "--auth=trust", "--username=app", "-D", str(self.data))
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(f"port = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\n")
            file.write(f"fsync = off\nsynchronous_standby_names = '{standby_names}'\n")

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._as_postgres("postgres", "-D", str(self.data)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(20)
            self._process = None

    async def ready(self) -> None:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(Exception):
                    (await connect(self.superuser, timeout_s=1)).terminate()
                    return
                await asyncio.sleep(0.05)

    @property
    def superuser(self) -> MemberAddress:
        return MemberAddress("plain", "127.0.0.1", self.port, "app", "postgres", None)

    async def execute(self, statement: str) -> None:
        connection = await connect(self.superuser, timeout_s=2)
        try:
            await connection.execute("SET synchronous_commit = local")
            await connection.execute(statement, timeout=5)
        finally:
            connection.terminate()

    def _as_postgres(self, program: str, *arguments: str) -> list[str]:
        argv = [str(self._programs / program), *arguments]
        if self._identity is None:
            return argv
        # It changes the user before it sets the parent-death signal, which a change would clear.
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig=KILL", *argv]

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(self._as_postgres(program, *arguments), check=True, capture_output=True, cwd="/")


@pytest.fixture
def server() -> Iterator[Plain]:
    root = Path(tempfile.mkdtemp(prefix="im-drill-"))
    root.chmod(0o755)
    made = None
    try:
        made = Plain(root)
        made.start()
        yield made
    finally:
        if made is not None:
            made.kill()
        shutil.rmtree(root, ignore_errors=True)


@contextlib.asynccontextmanager
async def probing(server: Plain, history: Path) -> AsyncIterator[HistoryReader]:
    """The probe, ended by its own signal handler as in a drill."""
    task = asyncio.create_task(run((server.address,), history, 2, 0.005))
    reader = HistoryReader(history)
    try:
        await until(reader, lambda: count(reader, Outcome.ACKNOWLEDGED) > 10)
        yield reader
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 10)
        reader.read_on()


def count(reader: HistoryReader, outcome: Outcome) -> int:
    return sum(write.outcome is outcome for write in reader.writes)


async def until(reader: HistoryReader, condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.05)
            reader.read_on()


async def _prepared(server: Plain) -> None:
    await server.ready()
    await server.execute("CREATE DATABASE app")
    await prepare((server.address,))


async def test_rows_survive_a_crash_of_the_server_and_the_probe_goes_on(server: Plain, tmp_path: Path) -> None:
    await _prepared(server)
    began_s = now_s()
    async with probing(server, tmp_path / "history") as reader:
        server.kill()
        await asyncio.sleep(1.0)
        server.start()
        before = count(reader, Outcome.ACKNOWLEDGED)
        await until(reader, lambda: count(reader, Outcome.ACKNOWLEDGED) > before + 20)
        again_s = now_s()
        await until(reader, lambda: any(read.begin_s > again_s for read in reader.reads))
    to_s = now_s()
    rows = await rows_of(server.address)
    closing = whole_read("plain", to_s, now_s(), Seen.PRIMARY, None, rows.elements())
    findings = judge(reader.writes, reader.samples, [*reader.reads, closing], from_s=began_s, to_s=to_s)
    assert describe(findings.contradictions) == ""
    assert findings.closed
    assert 1.0 <= findings.longest_outage_s < 10.0
    assert findings.timelines == (1,)
    assert {Seen.PRIMARY, Seen.NONE} <= {sample.seen for sample in reader.samples}


async def test_a_cancelled_wait_for_the_standbys_is_no_acknowledgement(server: Plain, tmp_path: Path) -> None:
    await _prepared(server)
    async with probing(server, tmp_path / "history") as reader:
        await server.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        await server.execute("SELECT pg_reload_conf()")
        # Empty to a list is switched on by the checkpointer alone (P1).
        await server.execute("CHECKPOINT")
        await asyncio.sleep(0.3)
        for _ in range(5):
            await server.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            await asyncio.sleep(0.3)
        await until(reader, lambda: count(reader, Outcome.CANCELLED_WAIT) > 0)
        await until(reader, lambda: count(reader, Outcome.UNKNOWN) > 0)
    cancelled = [write for write in reader.writes if write.outcome is Outcome.CANCELLED_WAIT]
    rows = await rows_of(server.address)
    assert all((write.client, write.number) in rows for write in cancelled)


async def test_a_read_only_server_is_a_certain_failure(server: Plain, tmp_path: Path) -> None:
    await _prepared(server)
    async with probing(server, tmp_path / "history") as reader:
        await server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await server.execute("SELECT pg_reload_conf()")
        await until(reader, lambda: count(reader, Outcome.FAILED) > 5)
    assert count(reader, Outcome.UNKNOWN) == 0


async def test_a_row_that_is_taken_away_for_a_while_is_missing_in_a_read(server: Plain, tmp_path: Path) -> None:
    """The probe's own reads notice what the closing read alone could not."""
    await _prepared(server)
    async with probing(server, tmp_path / "history") as reader:
        victim = reader.writes[0]
        condition = f"client = {victim.client} AND number = {victim.number}"
        connection = await connect(server.address, timeout_s=2)
        try:
            row = await connection.fetchrow(f"DELETE FROM {TABLE} WHERE {condition} RETURNING *")  # noqa: S608
            assert row is not None
            at_s = now_s()
            await until(reader, lambda: any(read.begin_s > at_s for read in reader.reads))
            await connection.execute(f"INSERT INTO {TABLE} VALUES ($1, $2, $3, $4)", *row)  # noqa: S608
        finally:
            connection.terminate()
    rows = await rows_of(server.address)
    closing = whole_read("plain", now_s(), now_s(), Seen.PRIMARY, None, rows.elements())
    findings = judge(reader.writes, reader.samples, [*reader.reads, closing])
    assert findings.lost == ()
    assert [(each.rule, each.client, each.runs) for each in findings.contradictions] == [
        (Rule.MISSING, victim.client, ((victim.number, victim.number),))
    ]


async def test_a_read_tells_exactly_which_rows_are_there(server: Plain) -> None:
    await _prepared(server)
    connection = await connect(server.address, timeout_s=2)
    try:
        numbers = [0, 1, 2, 4, 4, 5, 9, 2**40]
        await connection.executemany(
            f"INSERT INTO {TABLE} (client, number, begun_s) VALUES (1, $1, 0)",  # noqa: S608
            [(number,) for number in numbers],
        )
        found = await connection.fetch(CONTENTS, [1, 1, 2], [0, 5, 0], [4, None, None])
    finally:
        connection.terminate()
    assert [span_of(row) for row in found] == [
        Span(1, 0, 4, ((0, 2), (4, 4)), (4,)),
        Span(1, 5, None, ((5, 5), (9, 9), (2**40, 2**40))),
        Span(2, 0, None, ()),
    ]


def test_reads_stay_bounded_and_still_come_to_ask_for_every_number() -> None:
    windows = Windows(clients=1)
    newest, asked = 10_000, set()
    windows.learn([Span(0, 0, None, ((1, newest),))])
    for _ in range(newest // STRETCH):
        spans = windows.following()
        for _, first, last in spans:
            end = newest if last is None else last
            assert end - first < max(NEWEST, STRETCH)
            asked |= set(range(first, end + 1))
        assert len(spans) == 2
    assert asked == set(range(newest + 1))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
