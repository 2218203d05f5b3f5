"""A real supervisor process under test, with the test itself playing the agent.

The agent's process (`agent_process.py`) hands its end of the socket pair to the test, and from then on only ticks. So a
test says word by word what the agent says, while pausing, killing or silencing the process has its true effect.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

FOLDER = Path(__file__).parent
DEADLINE_S = 10.0
MARKER = "SUPERVISOR_TEST_RUN"
PYTHON = "/usr/bin/python3"  # unlike the venv's, one that the user postgres may execute
POSTGRES_USER = pwd.getpwnam("postgres")


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def until(what: str, condition: Callable[[], T | None], deadline_s: float = DEADLINE_S) -> T:
    """Wait until the condition returns something, and return that."""
    end_s = now_s() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert now_s() < end_s, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """The state letter of /proc/PID/stat; X if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return state_of(pid) not in "ZX"


def processes_of_run(run: str) -> list[int]:
    """All living processes that were started, however indirectly, by one run of the harness."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{MARKER}={run}".encode() in (folder / "environ").read_bytes() and is_alive(int(folder.name)):
                    found.append(int(folder.name))
    return found


class FakeAgent:
    """One life of the agent, as the test plays it."""

    def __init__(self, listener: socket.socket) -> None:
        listener.settimeout(DEADLINE_S)
        self._process, _ = listener.accept()
        self._process.settimeout(DEADLINE_S)
        text, fds, _, _ = socket.recv_fds(self._process, 100, 1)
        self.pid = int(text)
        self.socket = socket.socket(fileno=fds[0])
        self.socket.settimeout(DEADLINE_S)
        self._next_id = 0
        self._unread: list[dict[str, Any]] = []
        self.hello = self.expect("hello")

    def command(self, text: str) -> None:
        """Have the agent's process do something."""
        self._process.send(text.encode())
        assert self._process.recv(100) == b"done"

    def send(self, **message: object) -> None:
        self.socket.send(json.dumps(message).encode())

    def expect(self, kind: str, **fields: object) -> dict[str, Any]:
        """The next message of that type and with those fields; others are kept for later."""
        end_s = now_s() + DEADLINE_S
        wanted = {"type": kind, **fields}
        while True:
            for index, message in enumerate(self._unread):
                if wanted.items() <= message.items():
                    return self._unread.pop(index)
            assert now_s() < end_s, f"no {wanted}, only {self._unread}"
            self._unread.append(json.loads(self.socket.recv(65536)))

    def has(self, kind: str, **fields: object) -> bool:
        """Whether such a message came among those read so far."""
        return any({"type": kind, **fields}.items() <= message.items() for message in self._unread)

    def request(self, kind: str, **fields: object) -> dict[str, Any]:
        """Send a message and return the reply to it."""
        self._next_id += 1
        self.send(type=kind, id=self._next_id, **fields)
        return self.expect("reply", id=self._next_id)

    def do(self, kind: str, **fields: object) -> None:
        """Send a message that must be granted."""
        reply = self.request(kind, **fields)
        assert reply["ok"], reply

    def refused(self, kind: str, **fields: object) -> str:
        """Send a message that must be refused; returns why."""
        reply = self.request(kind, **fields)
        assert not reply["ok"], reply
        return str(reply["error"])

    def permit(self, epoch: int, hard_s: float, soft_s: float | None = None) -> float:
        """Have a permit for so many seconds from now; returns the hard deadline."""
        at_s = now_s()
        self.do("permit", epoch=epoch, soft=at_s + (hard_s if soft_s is None else soft_s), hard=at_s + hard_s)
        return at_s + hard_s

    def close(self) -> None:
        self.socket.close()
        self._process.close()


class Harness:
    """A supervisor, a folder that Postgres's user owns, and the agents that come one after the other."""

    def __init__(self, *options: str, wrapper: tuple[str, ...] = (), start: bool = True, **environment: str) -> None:
        self.run = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="supervisor-test-"))
        os.chown(self.folder, POSTGRES_USER.pw_uid, POSTGRES_USER.pw_gid)
        for name in ("agent_process.py", "fake_postmaster.py"):
            shutil.copy(FOLDER / name, self.folder / name)
        self.lock_file = self.folder / "lock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.folder / "agents"))
        self.listener.listen()
        self.environment = {**os.environ, MARKER: self.run, **environment}
        self.options = options
        self.wrapper = wrapper
        self.python = (sys.executable, "-I")
        self._log_path = self.folder / "log"
        self._agents: list[FakeAgent] = []
        self.supervisors: list[subprocess.Popen[bytes]] = []
        if start:
            self.start()

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        for agent in self._agents:
            agent.close()
        self.listener.close()
        for process in self.supervisors:
            process.kill()
            process.wait()
        # What the fence left would be a bug; here it only must not outlive the test.
        until("all gone", self._kill_all)
        if kind is not None:
            sys.stderr.write(self._log_path.read_text())
        shutil.rmtree(self.folder)

    def _kill_all(self) -> bool:
        left = self.living()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    @property
    def supervisor(self) -> subprocess.Popen[bytes]:
        return self.supervisors[-1]

    def start(
        self,
        *agent_argv: str,
        program: tuple[str, ...] = ("-m", "instance_manager.supervisor"),
        stderr: int | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        """Start one more supervisor over the same lock file."""
        agent = agent_argv or (PYTHON, "-I", "-S", str(self.folder / "agent_process.py"), str(self.folder / "agents"))
        command = [*self.wrapper, *self.python, *program, "--name", "test", "--lock-file", str(self.lock_file)]
        with self._log_path.open("ab") as log:
            self.supervisors.append(
                subprocess.Popen(
                    [*command, *self.options, "--", *agent],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log if stderr is None else stderr,
                    stderr=log if stderr is None else stderr,
                    pass_fds=pass_fds,
                )
            )

    def agent(self) -> FakeAgent:
        """The next agent that the supervisor starts."""
        agent = FakeAgent(self.listener)
        self._agents.append(agent)
        return agent

    def log(self, event: str) -> list[dict[str, Any]]:
        """The supervisor's log lines of one event."""
        lines = [line for line in self._log_path.read_text().splitlines() if line.startswith('{"time"')]
        records = [json.loads(line) for line in lines]
        return [{**record, **record["fields"]} for record in records if record["message"] == event]

    def living(self) -> list[int]:
        """Everything that this run started and that still lives."""
        return processes_of_run(self.run)

    def children_of_supervisor(self, state: str) -> list[int]:
        """Its children in one state of /proc/PID/stat."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                    if fields[0] == state and int(fields[1]) == self.supervisor.pid:
                        found.append(int(folder.name))
        return found

    def pid_1_of_namespace(self) -> int | None:
        """The process that is PID 1 in the namespace that `unshare` made."""
        for pid in self.living():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = Path(f"/proc/{pid}/status").read_text()
                numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
                if len(numbers) > 1 and numbers[-1] == "1":
                    return pid
        return None

    def catches(self, pid: int, number: signal.Signals) -> bool:
        """Whether that process has a handler for a signal."""
        status = Path(f"/proc/{pid}/status").read_text()
        mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(mask & 1 << (number - 1))

    def exit_code(self, deadline_s: float = DEADLINE_S) -> int:
        return self.supervisor.wait(deadline_s)

    def start_postgres(self, agent: FakeAgent, mode: str, *children: str, epoch: int | None = None) -> FakePostgres:
        """Start a fake Postgres with those children, and wait until all of them are there."""
        postgres = FakePostgres(self.folder / uuid.uuid4().hex[:8])
        agent.do("start", mode=mode, epoch=epoch, env={MARKER: self.run}, argv=postgres.argv(self.folder, *children))
        postgres.pid = agent.expect("postgres_started")["pid"]
        until("Postgres runs", (postgres.folder / "ready").exists)
        return postgres


class FakePostgres:
    """A running `fake_postmaster.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = 0
        folder.mkdir()
        os.chown(folder, POSTGRES_USER.pw_uid, POSTGRES_USER.pw_gid)

    def argv(self, scripts: Path, *children: str) -> list[str]:
        return [PYTHON, "-I", "-S", str(scripts / "fake_postmaster.py"), str(self.folder), *children]

    @property
    def children(self) -> list[int]:
        path = self.folder / "children"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def alive(self) -> list[int]:
        return [pid for pid in (self.pid, *self.children) if is_alive(pid)]

    def commits(self) -> list[float]:
        """When its busy children committed."""
        return [float(line) for line in (self.folder / "commits").read_text().splitlines()]


def lock_is_free(path: Path) -> bool:
    """Whether nobody holds the lock; tries by taking and dropping it."""
    return subprocess.run(["flock", "--nonblock", str(path), "true"], check=False).returncode == 0


@contextlib.contextmanager
def agent_and_harness(*options: str) -> Iterator[tuple[Harness, FakeAgent]]:
    """A running supervisor with its first agent."""
    with Harness(*options) as harness:
        yield harness, harness.agent()
