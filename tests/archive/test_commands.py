"""archive_command and restore_command as Postgres runs them: what it sees, whatever becomes of client and archiver."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from archive_harness import Desk, until
from wal_builders import SYSTEM, history_content, make_ready, segment_content

from instance_manager.archive import client, commands
from instance_manager.archive.fetch import Mode
from instance_manager.codec import to_json
from instance_manager.postgres.server import RunAs

A, B = "000000010000000000000005", "000000010000000000000006"
PYTHON = Path(os.path.realpath(sys.executable))


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: a Unix socket's may have 107 bytes. With what a shell would take apart."""
    with tempfile.TemporaryDirectory(prefix="im ar'$ %") as directory:
        yield Path(directory)


@pytest.fixture(params=["perl", "python"])
def program(request: pytest.FixtureRequest) -> Path:
    """What runs the client: each of the two must do the same."""
    return commands.PERL if request.param == "perl" else PYTHON


@pytest.fixture
def client_file(place: Path) -> Path:
    return commands.install_client(place, None)


async def shell(command: str, name: str, path: str = "pg_wal/RECOVERYXLOG", cwd: Path | None = None) -> tuple[int, str]:
    """As Postgres: `%f`, `%p` and `%%` replaced, then `sh -c`."""
    text = command.replace("%%", "\0").replace("%f", name).replace("%p", path).replace("\0", "%")
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", text, cwd=cwd, stderr=asyncio.subprocess.PIPE, env={"PATH": os.environ["PATH"]}
    )
    async with asyncio.timeout(30):
        _, told = await process.communicate()
    assert process.returncode is not None
    return process.returncode, told.decode()


class Line:
    """The command lines over one socket."""

    def __init__(self, desk: Desk, program: Path, client_file: Path, path: Path) -> None:
        self.desk, self.program, self.client_file, self.path = desk, program, client_file, path

    async def push(self, name: str) -> tuple[int, str]:
        return await shell(commands.archive_command(self.program, self.client_file, self.path), name)

    async def fetch(self, name: str, mode: Mode = "recovery") -> tuple[int, str]:
        command = commands.restore_command(self.program, self.client_file, self.path, mode)
        return await shell(command, name, cwd=self.desk.wal.parent)


@pytest.fixture
async def line(local_desk: Desk, program: Path, client_file: Path, place: Path) -> AsyncIterator[Line]:
    """A running archiver behind its socket."""
    settings = local_desk.archiver._settings
    path = place / "a.sock"
    object.__setattr__(settings, "socket", path)
    task = asyncio.create_task(local_desk.archiver.run())
    await until(path.exists)
    yield Line(local_desk, program, client_file, path)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def ask(path: Path, request: str) -> str:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(request.encode() + b"\n")
    answer = await reader.read()
    writer.close()
    return answer.decode()


async def test_push_and_fetch_by_their_command_lines(line: Line) -> None:
    line.desk.ready(A)
    assert await line.push(A) == (0, "")
    (line.desk.wal / A).unlink()
    for mode in ("standby", "recovery", "rewind"):
        assert await line.fetch(A, mode) == (0, "")
        assert (line.desk.wal / "RECOVERYXLOG").read_bytes() == segment_content(A)
        assert await line.fetch(B, mode) == (1, "")


async def test_a_failure_is_told_in_postgres_log_and_is_1_for_archiving(line: Line) -> None:
    make_ready(line.desk.wal, A, segment_content(B))
    code, told = await line.push(A)
    assert code == 1
    assert told.startswith(f"archive: {A} is not what its name says: it begins at")


async def test_a_failure_stops_recovery_and_rewind_but_not_a_standby(line: Line, tmp_path: Path) -> None:
    (tmp_path / "archive").rename(tmp_path / "not mounted")
    codes = {}
    for mode in ("standby", "recovery", "rewind"):
        codes[mode], told = await line.fetch(A, mode)
        assert "is not there: mount it" in told
    assert codes == {"standby": 1, "recovery": 126, "rewind": 126}


async def test_without_an_archiver_nothing_is_archived_and_nothing_is_absent(
    local_desk: Desk, program: Path, client_file: Path, place: Path
) -> None:
    line = Line(local_desk, program, client_file, place / "nobody.sock")
    code, told = await line.push(A)
    assert code == 1
    assert "no answer of the archiver" in told
    assert [(await line.fetch(A, mode))[0] for mode in ("standby", "recovery", "rewind")] == [1, 126, 126]


async def test_an_archiver_that_ends_before_its_answer_is_a_failure(
    local_desk: Desk, program: Path, client_file: Path, place: Path
) -> None:
    path = place / "ends.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        stop = threading.Event()

        def end_each() -> None:
            listener.settimeout(0.1)
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                connection.recv(100)
                connection.send(b"don")
                connection.close()

        thread = threading.Thread(target=end_each)
        thread.start()
        line = Line(local_desk, program, client_file, path)
        codes = [(await line.push(A))[0], (await line.fetch(A))[0], (await line.fetch(A, "standby"))[0]]
        stop.set()
        thread.join()
    assert codes == [1, 126, 1]


@pytest.mark.parametrize("broken", ["no interpreter", "no client", "broken client"])
async def test_a_client_that_cannot_start_never_ends_a_recovery(
    local_desk: Desk, program: Path, place: Path, broken: str
) -> None:
    file = place / "client.py"
    broken_client(file, "(", "(")
    python = place / "no-python" if broken == "no interpreter" else program
    client_file = place / "missing.py" if broken == "no client" else file
    codes = []
    for mode in ("standby", "recovery", "rewind"):
        command = commands.restore_command(python, client_file, place / "a.sock", mode)
        codes.append((await shell(command, A))[0])
    assert codes == [1, 126, 126]
    assert (await shell(commands.archive_command(python, client_file, place / "a.sock"), A))[0] == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_client_that_is_killed_never_ends_a_recovery(
    local_desk: Desk, program: Path, place: Path, number: signal.Signals
) -> None:
    file = place / "client.py"
    broken_client(file, f"import os\nos.kill(os.getpid(), {int(number)})\n", f"kill {int(number)}, $$;\n")
    line = Line(local_desk, program, file, place / "a.sock")
    assert (await line.push(A))[0] == 1
    assert [(await line.fetch(A, mode))[0] for mode in ("standby", "recovery", "rewind")] == [1, 126, 126]


async def test_an_uncaught_error_of_the_client_is_not_its_exit_code_1(
    local_desk: Desk, program: Path, place: Path
) -> None:
    """Python ends with 1 for any exception, Perl with errno: to Postgres that would be "absent"."""
    file = place / "client.py"
    broken_client(file, "raise RuntimeError\n", "$! = 1; die;\n")
    assert (await Line(local_desk, program, file, place / "a.sock").fetch(A))[0] == 126


async def test_what_the_environment_says_to_an_interpreter_is_nothing_to_the_client(line: Line, tmp_path: Path) -> None:
    (tmp_path / "strict.pm").write_text("exit 0; 1;\n")
    line.desk.ready(A)
    command = commands.archive_command(line.program, line.client_file, line.path.with_name("nobody"))
    assert (await shell(f"PERL5LIB={tmp_path} PYTHONPATH={tmp_path} {command}", A))[0] == 1


def test_the_perl_client_is_strict_although_it_does_not_load_the_module(client_file: Path) -> None:
    done = subprocess.run(
        [commands.PERL, "-f", "-T", "-Mstrict", "-Mwarnings=FATAL,all", "-c", commands.quick(client_file)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def broken_client(file: Path, python: str, perl: str) -> None:
    file.write_text(python)
    commands.quick(file).write_text(perl)


async def test_an_impatient_client_does_not_end_the_upload(line: Line) -> None:
    line.desk.ready(A)
    _, writer = await asyncio.open_unix_connection(str(line.path))
    writer.write(f"push\t{A}\n".encode())
    writer.close()
    await until(lambda: line.desk.push_counters.archived == 1)
    assert await line.push(A) == (0, "")


async def test_a_client_that_goes_ends_its_restore(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hanging(mode: str, name: str) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(line.desk.archiver.fetcher, "_fetch", hanging)
    _, writer = await asyncio.open_unix_connection(str(line.path))
    writer.write(f"fetch\trecovery\t{A}\t{line.desk.wal / 'RECOVERYXLOG'}\n".encode())
    await asyncio.wait_for(begun.wait(), 5)
    writer.close()
    await asyncio.wait_for(ended.wait(), 5)


async def test_whose_archive_it_is_shows_before_the_first_segment(line: Line) -> None:
    status = line.desk.archiver.status
    await until(lambda: status.archive == "ok")
    line.desk.command(line.desk.primary(epoch=2, system=SYSTEM + 1))
    await until(lambda: f"of the system {SYSTEM}" in status.archive)


async def test_orders_and_status_over_the_socket(line: Line) -> None:
    orders = line.desk.primary(epoch=5)
    assert (await ask(line.path, "orders\t" + to_json(orders).decode())).startswith('done {"level":"calm"')
    assert line.desk.archiver.orders.current == orders
    assert (await ask(line.path, "orders\t" + to_json(line.desk.primary(epoch=4)).decode())).startswith(
        "failed epoch 4"
    )
    assert (await ask(line.path, "orders\tnonsense")).startswith("failed not an order")
    make_ready(line.desk.wal, "00000002.history", history_content((1, 0x500100)))
    await line.push("00000002.history")
    status = json.loads(await ask(line.path, "status"))
    assert status["archive"] == "ok"
    assert (status["push"]["archived"], status["push"]["last_archived"]) == (1, "00000002.history")


@pytest.mark.parametrize(
    "request_line", ["", "x", "push", "push\ta\tb", "fetch\tx\ty\tz", "fetch\trecovery", "push\t../x"]
)
async def test_nonsense_is_refused_with_a_reason_and_the_archiver_lives(line: Line, request_line: str) -> None:
    assert (await ask(line.path, request_line)).startswith("failed ")
    line.desk.ready(A)
    assert await line.push(A) == (0, "")


async def test_a_client_that_says_nothing_or_too_much_is_let_go(line: Line) -> None:
    reader, writer = await asyncio.open_unix_connection(str(line.path))
    writer.write(b"x" * (2 << 20))
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    line.desk.ready(A)
    assert await line.push(A) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask as another user")
async def test_other_users_are_not_answered_and_postgres_gives_no_orders(line: Line) -> None:
    line.path.parent.chmod(0o755)
    line.path.chmod(0o666)
    postgres, nobody = RunAs.of_user("postgres").uid, RunAs.of_user("nobody").uid
    program = (
        "import socket, sys; c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[1]); "
        "c.sendall(sys.argv[2].encode() + b'\\n'); print(c.recv(1000).decode(), end='')"
    )

    async def as_user(uid: int, request: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run,
            ["/usr/bin/python3", "-I", "-c", program, str(line.path), request],
            user=uid,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    assert (await as_user(nobody, "status")).startswith(f"failed user {nobody} may not ask")
    assert (await as_user(postgres, "status")).startswith(f"failed user {postgres} may not ask")


def test_the_client_imports_next_to_nothing() -> None:
    code = "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]); import client; print(*sorted(set(sys.modules) - before))"
    folder = str(Path(client.__file__).parent)
    done = subprocess.run([PYTHON, "-I", "-S", "-c", code, folder], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "_socket" in imported
    assert imported.isdisjoint({"socket", "json", "re", "pathlib", "asyncio", "subprocess", "threading", "logging"})


def test_the_interpreter_is_one_that_postgres_may_run() -> None:
    assert commands.python_for(None) == PYTHON
    assert commands.interpreter(None) == (commands.PERL if commands.PERL.exists() else PYTHON)
    if os.geteuid() == 0:
        found = commands.python_for(RunAs.of_user("postgres"))
        done = subprocess.run([found, "-I", "-S", "-c", "print(1)"], user="postgres", capture_output=True, check=True)
        assert done.stdout == b"1\n"
