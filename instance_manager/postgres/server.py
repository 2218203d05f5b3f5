"""The local Postgres server: where it lives, who it runs as, and how one of its programs is run.

Postgres refuses to run as root. When the agent is root, every program of Postgres is started as `RunAs`; in a container
both are one unprivileged user and `run_as` is None.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import pwd
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_INHERITED_VARIABLES = ("PATH", "TZ", "TZDIR", "LD_LIBRARY_PATH", "TMPDIR")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_CHUNK_BYTES = 64 * 1024
_KEPT_STDERR_BYTES = 64 * 1024
_LINE_END = re.compile(rb"[\r\n]+")


class LocalPostgresError(Exception):
    """Base of what can go wrong with the local server and its programs."""


class ProgramFailed(LocalPostgresError):
    """A program of Postgres ended with something other than 0; `stderr` is the last 64 KiB of what it said."""

    def __init__(self, argv: Sequence[str], exit_code: int, stderr: str) -> None:
        super().__init__(f"{Path(argv[0]).name} ended with {exit_code}: {stderr.strip()[-2000:]}")
        self.argv = tuple(argv)
        self.exit_code = exit_code
        self.stderr = stderr


class DeadlinePassed(LocalPostgresError):
    """`what` did not come to an end within `deadline_s`. A program was killed and reaped, a connection closed."""

    def __init__(self, what: str, deadline_s: float) -> None:
        super().__init__(f"{what}: no end within {deadline_s:g} s")
        self.what = what
        self.deadline_s = deadline_s


class OutputTooLong(LocalPostgresError):
    """A program wrote more to its standard output than the caller was ready to hold."""

    def __init__(self, argv: Sequence[str], limit_bytes: int) -> None:
        super().__init__(f"{Path(argv[0]).name} wrote more than {limit_bytes} bytes")
        self.argv = tuple(argv)
        self.limit_bytes = limit_bytes


@dataclass(frozen=True, slots=True)
class RunAs:
    """Operating system user of Postgres, where it is not the agent's own."""

    user_name: str
    uid: int
    gid: int

    @classmethod
    def of_user(cls, user_name: str) -> RunAs:
        """From the password database; KeyError: there is no such user."""
        entry = pwd.getpwnam(user_name)
        return cls(user_name, entry.pw_uid, entry.pw_gid)


@dataclass(frozen=True, slots=True)
class LocalServer:
    """The one Postgres server that this agent manages."""

    data_directory: Path
    socket_directory: Path
    """Directory of the Unix socket, the only way in for the superuser."""
    state_directory: Path
    """On the same volume, outside the data directory, so that no rewind or clone touches it (P6)."""
    listen_address: str
    port: int
    bin_directory: Path
    run_as: RunAs | None
    """None: Postgres runs as the agent's own user."""
    superuser: str = "postgres"
    kept_open: tuple[int, ...] = ()
    """Descriptors that its programs inherit: a lock that holds until the last of them has ended."""

    def program(self, name: str) -> str:
        """Full path of one of Postgres's programs."""
        return str(self.bin_directory / name)

    @property
    def agent_os_user(self) -> str:
        """Operating system user that peer authentication sees when the agent connects."""
        return pwd.getpwuid(os.geteuid()).pw_name


async def run_program(
    server: LocalServer,
    argv: Sequence[str],
    *,
    deadline_s: float,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
    on_line: Callable[[str], None] | None = None,
    limit_bytes: int = 16 * 1024 * 1024,
    ends_with_parent: bool = False,
) -> str:
    """Run a program as Postgres's user and return its standard output.

    `argv[0]` is a full path. The environment holds only a few harmless variables, `LC_ALL=C` and `env`. `on_line` sees
    each line of standard error as it comes; a carriage return ends a line too (progress). Whatever happens, a
    cancellation included, the program has been reaped when this returns. With `ends_with_parent` it is killed when this process is.

    ProgramFailed: exit code other than 0 (negative: signal). DeadlinePassed. OutputTooLong: more than `limit_bytes` on
    standard output. LocalPostgresError: it cannot be started.
    """
    environment = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
    environment |= {"LC_ALL": "C", "PGCONNECT_TIMEOUT": "10"}
    environment |= env or {}
    run_as = server.run_as
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if input is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd="/",
            user=None if run_as is None else run_as.uid,
            group=None if run_as is None else run_as.gid,
            extra_groups=None if run_as is None else [],
            # pg_basebackup has a child that streams WAL: it must not outlive a kill.
            process_group=0,
            pass_fds=server.kept_open,
            preexec_fn=_killed_with_parent if ends_with_parent else None,
        )
    except OSError as error:
        raise LocalPostgresError(f"{argv[0]} cannot be started: {error.strerror}") from error
    finished = False
    try:
        async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as tasks:
            stdout = tasks.create_task(_collect(process.stdout, argv, limit_bytes))
            stderr = tasks.create_task(_follow(process.stderr, on_line))
            if input is not None:
                tasks.create_task(_feed(process.stdin, input))
            exit_code = await process.wait()
        finished = True
    except TimeoutError:
        raise DeadlinePassed(Path(argv[0]).name, deadline_s) from None
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        if not finished:
            await _kill_and_reap(process)
    if exit_code != 0:
        raise ProgramFailed(argv, exit_code, stderr.result())
    return stdout.result().decode(errors="replace")


def _killed_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def _collect(stream: asyncio.StreamReader | None, argv: Sequence[str], limit_bytes: int) -> bytes:
    assert stream is not None  # noqa: S101
    collected = bytearray()
    while chunk := await stream.read(_CHUNK_BYTES):
        collected += chunk
        if len(collected) > limit_bytes:
            raise OutputTooLong(argv, limit_bytes)
    return bytes(collected)


async def _follow(stream: asyncio.StreamReader | None, on_line: Callable[[str], None] | None) -> str:
    assert stream is not None  # noqa: S101
    kept = bytearray()
    line = b""
    while chunk := await stream.read(_CHUNK_BYTES):
        kept += chunk
        del kept[:-_KEPT_STDERR_BYTES]
        if on_line is not None:
            *lines, line = _LINE_END.split(line + chunk)
            for each in lines:
                if each.strip():
                    on_line(each.decode(errors="replace"))
            line = line[-_CHUNK_BYTES:]
    if on_line is not None and line.strip():
        on_line(line.decode(errors="replace"))
    return kept.decode(errors="replace")


async def _feed(stream: asyncio.StreamWriter | None, data: bytes) -> None:
    assert stream is not None  # noqa: S101
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.write(data)
        await stream.drain()
    stream.close()


async def _kill_and_reap(process: asyncio.subprocess.Process) -> None:
    """SIGKILL to its group, then wait: only uninterruptible sleep can outlast this, and then asyncio reaps it later."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(process.wait()), 5)
    # Pipes that a grandchild inherited would otherwise stay open with the transport.
    process._transport.close()  # type: ignore[attr-defined]
