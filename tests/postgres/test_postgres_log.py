"""Postgres's own log on its way to standard output, with a real server and a pipe that is read, or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import wait_until
from own_fixtures import own_template, servers
from own_server import MAJOR, OwnServer, Servers

from instance_manager.agent.installed_postgres import INTO_START_FILE
from instance_manager.postgres.configuration import POSTGRESQL_CONF, CollectedLog
from instance_manager.postgres.files import make_directory
from instance_manager.postgres.sql import session
from instance_manager.postgres_log import files as log_files
from instance_manager.postgres_log.files import FILE_BYTES, LOG_FILENAME, LogFiles, start_file
from instance_manager.postgres_log.relay import Relay

__all__ = ["own_template", "servers"]

SCHEMA = ["time", "level", "instance", "process", "message", "fields"]
FORMS = ["jsonlog", "csvlog"] if MAJOR >= 15 else ["csvlog"]
SECRET = "hunter2-Xq9"


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Reader:
    """The other end of standard output: a thread that reads while it is let."""

    def __init__(self) -> None:
        self._fd, self.write_fd = os.pipe()
        self._goes = threading.Event()
        self._content = bytearray()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            self._goes.wait()
            try:
                chunk = os.read(self._fd, 65536)
            except OSError:
                return
            if not chunk:
                return
            self._content += chunk

    def go(self) -> None:
        self._goes.set()

    def lines(self) -> list[dict[str, Any]]:
        """Every whole line, which must be an object of the schema."""
        found = [json.loads(line) for line in bytes(self._content).split(b"\n")[:-1]]
        for line in found:
            assert list(line) == SCHEMA, line
            assert line["process"] == "postgres"
        return found

    def close(self) -> None:
        self._goes.set()
        os.close(self.write_fd)


class Relayed:
    """A server whose log is relayed to a reader."""

    def __init__(self, server: OwnServer, reader: Reader) -> None:
        self.server = server
        self.reader = reader
        self.directory = server.root / "log-files"
        self.relay = Relay("a", self.files(), human=False, descriptor=reader.write_fd)
        self._thread = threading.Thread(target=self.relay.run, daemon=True)

    def files(self) -> LogFiles:
        return LogFiles(self.directory, self.server.data, now_s)

    def configure(self, form: str) -> None:
        self.server.configure(log=CollectedLog(self.directory, LOG_FILENAME, FILE_BYTES))
        path = self.server.data / POSTGRESQL_CONF
        text = path.read_text()
        assert "log_destination = 'jsonlog'" in text or MAJOR < 15
        path.write_text(text.replace("log_destination = 'jsonlog'", f"log_destination = '{form}'"))

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self.relay.close()
        if self._thread.is_alive():
            self._thread.join(5)
        assert not self._thread.is_alive()

    async def told(self, message: str, *, deadline_s: float = 15.0) -> dict[str, Any]:
        """The first line whose message begins so."""

        async def found() -> dict[str, Any] | None:
            return next((line for line in self.reader.lines() if line["message"].startswith(message)), None)

        line = await wait_until(found, deadline_s=deadline_s, what=f"a line {message!r}")
        assert line is not None
        return line


@pytest.fixture
def reader() -> Iterator[Reader]:
    with contextlib.closing(Reader()) as made:
        yield made


@pytest.fixture(params=FORMS)
async def relayed(
    request: pytest.FixtureRequest, servers: Servers, reader: Reader, own_template: Path
) -> AsyncIterator[Relayed]:
    """Running, and not relayed yet."""
    server = servers.new("a")
    subprocess.run(["cp", "-a", "--reflink=auto", own_template, server.data], check=True)  # noqa: ASYNC221
    made = Relayed(server, reader)
    make_directory(made.directory, run_as=server.server.run_as)
    made.configure(request.param)
    await server.start()
    try:
        yield made
    finally:
        made.relay.close()


async def connected(relayed: Relayed, database: str = "postgres", user: str = "postgres") -> asyncpg.Connection:
    """As a client, with Postgres's own settings for what it logs."""
    server = relayed.server.server
    return await asyncpg.connect(host=str(server.socket_directory), port=server.port, user=user, database=database)


async def run(relayed: Relayed, *statements: str) -> None:
    """As superuser, each on its own; errors are what the tests want."""
    connection = await connected(relayed)
    for each in statements:
        with contextlib.suppress(asyncpg.PostgresError):
            await connection.execute(each)
    await connection.close()


async def test_a_line_of_each_severity_is_an_object_of_the_schema(relayed: Relayed) -> None:
    relayed.reader.go()
    relayed.begin()
    await run(
        relayed,
        "SET client_min_messages = error; SET log_min_messages = debug1; DO $$ BEGIN "
        "RAISE DEBUG 'one debug'; RAISE LOG 'one log'; RAISE INFO 'one info'; RAISE NOTICE 'one notice'; "
        "RAISE WARNING 'one warning' USING HINT = 'a hint', DETAIL = 'a detail'; RAISE EXCEPTION 'one error'; END $$",
    )
    levels = {"debug": "debug", "log": "info", "notice": "info", "warning": "warning", "error": "error"}
    for severity, level in levels.items():
        line = await relayed.told(f"one {severity}")
        assert line["level"] == level
        assert line["fields"]["user"] == "postgres"
        assert isinstance(line["fields"]["pid"], int)
    warning = await relayed.told("one warning")
    assert (warning["fields"]["hint"], warning["fields"]["detail"]) == ("a hint", "a detail")
    assert (await relayed.told("one error"))["fields"]["statement"].startswith("SET client_min_messages")
    with contextlib.suppress(asyncpg.PostgresError):
        await connected(relayed, user="nobody")

    async def fatal() -> bool:
        return any(line["fields"].get("error_severity") == "FATAL" for line in relayed.reader.lines())

    await wait_until(fatal, what="the refused login")


async def test_messages_of_many_lines_and_odd_bytes_come_whole(relayed: Relayed) -> None:
    relayed.reader.go()
    relayed.begin()
    await run(relayed, "CREATE DATABASE bytes ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    connection = await connected(relayed, "bytes")
    await connection.execute(
        "SET client_min_messages = error; DO $$ BEGIN RAISE WARNING E'first\\nsecond \"quoted\", and\\r\\n\\tthird\\n'; "
        "RAISE WARNING E'latin caf\\xe9 \\x01 end'; RAISE WARNING 'plain end'; RAISE WARNING '%', 'long ' || repeat('x', 300000); END $$"
    )
    await connection.close()
    assert (await relayed.told("first"))["message"] == 'first\nsecond "quoted", and\r\n\tthird\n'
    assert (await relayed.told("latin"))["message"] == "latin caf\\xe9 \x01 end"
    assert (await relayed.told("plain end"))["level"] == "warning"
    assert (await relayed.told("long xxx"))["fields"]["shortened"] is True


async def test_planted_passwords_are_in_no_line(relayed: Relayed) -> None:
    relayed.reader.go()
    relayed.begin()
    for statement in (
        f"ALTER ROLE nobody PASSWORD '{SECRET}'",
        f"ALTER ROLE nobody PASSWORD {SECRET}",
        f'ALTER ROLE nobody PASSWORD "{SECRET}"',
        f"ALTER ROLE nobody PASSWORD '{SECRET}",
        f"ALTER ROLE nobody PASSWORD $a${SECRET}$a$",
        f"CREATE ROLE postgres LOGIN PASSWORD E'{SECRET}'",
        f"DO $$ BEGIN EXECUTE 'ALTER ROLE nobody PASSWORD ''{SECRET}'''; END $$",
        f"CREATE SUBSCRIPTION s CONNECTION 'host=127.0.0.1 port=1 password={SECRET}' PUBLICATION p",
        f"SET log_statement = 'all'; SET log_min_duration_statement = 0; ALTER ROLE postgres PASSWORD '{SECRET}'",
        "SET client_min_messages = error; DO $$ BEGIN RAISE WARNING 'all planted'; END $$",
    ):
        await run(relayed, statement)
        await run(relayed, "SET log_min_error_statement = panic", statement)
    await relayed.told("all planted")
    assert not [line for line in relayed.reader.lines() if SECRET in json.dumps(line)]
    assert len([line for line in relayed.reader.lines() if "***" in json.dumps(line)]) >= 8
    written = b"".join(path.read_bytes() for path in relayed.directory.iterdir() if path.is_file())
    assert SECRET.encode() in written, "Postgres itself did write them, into files that only its user may read"
    assert all(path.stat().st_mode & 0o077 == 0 for path in relayed.directory.glob("postgres-*"))


async def test_a_reader_that_stopped_holds_up_no_commit_and_what_is_dropped_is_counted(
    relayed: Relayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "WAITING_MAX_BYTES", 1024 * 1024)
    relayed.begin()
    count = 5000
    async with session(relayed.server.server) as opened:
        await opened.execute("CREATE TABLE public.numbers (n int); SET client_min_messages = error")
        begun_s = now_s()
        for first in range(0, count, 100):
            # Each a commit, with a line of a kilobyte: five times what may wait, and far more than a pipe holds.
            await opened.execute(
                f"DO $$ BEGIN FOR n IN {first}..{first + 99} LOOP INSERT INTO public.numbers VALUES (n); "  # noqa: S608
                "RAISE WARNING 'number % %', n, repeat('x', 1000); COMMIT; END LOOP; END $$",
                deadline_s=30,
            )
        took_s = now_s() - begun_s
        assert await opened.fetchval("SELECT count(*) FROM public.numbers") == count
    assert took_s < 60

    async def dropped() -> bool:
        return relayed.relay.counts.dropped > 1000

    await wait_until(dropped, deadline_s=30, what="the oldest is given up")
    assert relayed.relay.counts.waiting_bytes <= 1024 * 1024
    relayed.reader.go()
    await relayed.told(f"number {count - 1} ", deadline_s=60)
    relayed.end()
    lines = relayed.reader.lines()
    seen = [int(line["message"].split()[1]) for line in lines if line["message"].startswith("number ")]
    assert seen == sorted(set(seen)), "no line twice, none out of order"
    said = sum(line["fields"].get("dropped_lines", 0) for line in lines)
    assert said == relayed.relay.counts.dropped
    # Those of the server's start may be among the dropped.
    assert 0 <= said - (count - len(seen)) < 50


RELAY_ALONE = """
import sys, time
from pathlib import Path
from instance_manager.postgres_log.files import LogFiles
from instance_manager.postgres_log.relay import Relay
clock = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
Relay("a", LogFiles(Path(sys.argv[1]), Path(sys.argv[2]), clock), human=False).run()
"""


async def test_a_relay_that_is_killed_leaves_out_no_line(relayed: Relayed) -> None:
    """Killed again and again while lines come; the next one goes on, and repeats a batch at most."""
    count, kills = 4000, 4
    relayed.reader.go()

    async def write() -> None:
        async with session(relayed.server.server) as opened:
            await opened.execute("SET client_min_messages = error")
            for first in range(0, count, 50):
                await opened.execute(
                    f"DO $$ BEGIN FOR n IN {first}..{first + 49} LOOP RAISE WARNING 'number % %', n, repeat('x', 500); "
                    "END LOOP; END $$"
                )
                await asyncio.sleep(0.02)

    writing = asyncio.create_task(write())
    argv = [sys.executable, "-c", RELAY_ALONE, str(relayed.directory), str(relayed.server.data)]
    for _ in range(kills):
        process = subprocess.Popen(argv, stdout=relayed.reader.write_fd)  # noqa: ASYNC220
        before = len(relayed.reader.lines())

        async def more(before: int = before) -> bool:
            return len(relayed.reader.lines()) > before + 100

        await wait_until(more, deadline_s=30, what="it relays")
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    relayed.begin()
    await writing
    await relayed.told(f"number {count - 1} ", deadline_s=30)
    relayed.end()
    seen = [int(line["message"].split()[1]) for line in relayed.reader.lines() if line["message"].startswith("number ")]
    assert set(seen) == set(range(count))
    assert len(seen) - count <= kills * 300, "a batch of 128 KiB each time"


async def test_a_relay_that_is_killed_before_a_reader_that_stopped_has_kept_nothing_to_itself(relayed: Relayed) -> None:
    count = 300
    await run(
        relayed,
        f"SET client_min_messages = error; DO $$ BEGIN FOR n IN 0..{count - 1} LOOP "
        "RAISE WARNING 'number % %', n, repeat('x', 1000); END LOOP; END $$",
    )
    argv = [sys.executable, "-c", RELAY_ALONE, str(relayed.directory), str(relayed.server.data)]
    process = subprocess.Popen(argv, stdout=relayed.reader.write_fd)  # noqa: ASYNC220

    async def pipe_is_full() -> bool:
        return not select.select([], [relayed.reader.write_fd], [], 0)[1]

    await wait_until(pipe_is_full, deadline_s=30, what="it cannot write any more")
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    relayed.reader.go()
    relayed.begin()
    await relayed.told(f"number {count - 1} ", deadline_s=30)
    relayed.end()
    lines = relayed.reader.lines()
    seen = {int(line["message"].split()[1]) for line in lines if line["message"].startswith("number ")}
    assert seen == set(range(count))


async def test_what_a_server_says_before_its_collector_runs_is_told_too(relayed: Relayed) -> None:
    relayed.reader.go()
    relayed.begin()
    await relayed.server.stop()
    server = relayed.server.server
    with (relayed.server.data / POSTGRESQL_CONF).open("a") as file:
        file.write("shared_buffers = 'many'\n")
    path = start_file(relayed.directory)
    argv = ["/bin/sh", "-c", INTO_START_FILE, str(path), server.program("postgres"), "-D", str(server.data_directory)]
    run_as = server.run_as
    done = subprocess.run(  # noqa: ASYNC221
        argv,
        capture_output=True,
        check=False,
        timeout=30,
        cwd="/",
        env={"LC_ALL": "C"},
        user=None if run_as is None else run_as.uid,
        group=None if run_as is None else run_as.gid,
        extra_groups=None if run_as is None else [],
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    line = await relayed.told("invalid value for parameter")
    assert line["level"] in ("info", "error")
    assert '"shared_buffers": "many"' in line["message"]
    line = await relayed.told("configuration file")
    assert (line["level"], line["fields"]["error_severity"]) == ("error", "FATAL")


def test_without_a_place_for_the_start_file_postgres_starts_all_the_same(tmp_path: Path) -> None:
    argv = ["/bin/sh", "-c", INTO_START_FILE, str(tmp_path / "missing" / "start"), "/bin/echo", "it", "runs"]
    done = subprocess.run(argv, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"it runs\n", b"")


async def test_files_that_were_told_are_deleted_while_postgres_writes_on(relayed: Relayed) -> None:
    path = relayed.server.data / POSTGRESQL_CONF
    text = path.read_text()
    path.write_text(text.replace(f"log_rotation_size = '{FILE_BYTES // 1024}kB'", "log_rotation_size = '64kB'"))
    assert path.read_text() != text
    await relayed.server.stop()
    await relayed.server.start()
    relayed.reader.go()
    relayed.begin()
    count = 0
    most = 0
    while count < 60:
        await run(
            relayed,
            "SET client_min_messages = error; DO $$ BEGIN FOR n IN 1..20 LOOP "
            f"RAISE WARNING 'round {count} %', repeat('x', 1000); END LOOP; END $$",
        )
        count += 1
        most = max(most, len(list(relayed.directory.glob("postgres-*"))))
        await asyncio.sleep(0.1)  # names have seconds: over six of them, there would be a file for each
    await relayed.told(f"round {count - 1} ")

    async def few() -> bool:
        return len([path for path in relayed.directory.glob("postgres-*") if path.suffix != ".log"]) == 1

    await wait_until(few, deadline_s=20, what="only the file that is written is left")
    relayed.end()
    messages = [line["message"] for line in relayed.reader.lines() if line["message"].startswith("round ")]
    assert len(messages) == 20 * count


async def test_a_relay_with_nothing_to_do_sleeps(relayed: Relayed) -> None:
    relayed.reader.go()
    argv = [sys.executable, "-c", RELAY_ALONE, str(relayed.directory), str(relayed.server.data)]
    await run(relayed, "SET client_min_messages = error; DO $$ BEGIN RAISE WARNING 'awake'; END $$")
    process = subprocess.Popen(argv, stdout=relayed.reader.write_fd)  # noqa: ASYNC220
    try:
        await relayed.told("awake")

        def switches() -> int:
            found = 0
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                status = (task / "status").read_text()
                found += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
            return found

        async def quiet() -> bool:
            before = switches()
            await asyncio.sleep(3)
            return switches() - before <= 1

        await wait_until(quiet, deadline_s=30, what="three seconds without a wake-up")
    finally:
        process.kill()
        process.wait(10)
