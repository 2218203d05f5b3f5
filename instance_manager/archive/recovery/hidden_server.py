"""A Postgres on a restored directory that nobody can reach but this process: without an address, its socket in a directory that is closed.

It runs as a standby, so it never opens by itself. It ends with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import asyncpg

from instance_manager.archive.recovery.sizes import replay_sizes
from instance_manager.postgres.configuration import render_settings
from instance_manager.postgres.control_data import ControlData, read_control_data
from instance_manager.postgres.directory import disable_in_auto_conf
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.sql import session

log = logging.getLogger("instance_manager.archive.recovery")

Settings = Mapping[str, str | int]

STOP_DEADLINE_S = 600.0
ASKING, READING = "asking.conf", "reading.conf"
WAY = "way.conf"
"""Which of the two holds: a link, so that the change needs no write that could hang."""
_RETRIES = {ASKING: "200ms", READING: "10ms"}
"""How long Postgres waits before it asks, or looks into pg_wal, again; the latter costs it two system calls."""
_TARGETS = {f"recovery_target_{what}" for what in ("action", "inclusive", "lsn", "name", "time", "timeline", "xid")}
NOT_THE_SOURCES = frozenset(
    {"restore_command", "wal_retrieve_retry_interval", "promote_trigger_file", "recovery_target"} | _TARGETS
)
"""Where the log comes from, and where it ends. An agent would refuse each of them too (`parameters.FIXED`)."""
NEUTRAL: Settings = {
    **{
        "primary_slot_name": "",
        "synchronous_standby_names": "",
        "recovery_min_apply_delay": "0",
        "ssl": "off",
        "huge_pages": "try",
    },
    **{"logging_collector": "off", "log_destination": "stderr", "log_error_verbosity": "default", "lc_messages": "C"},
    **{
        "session_preload_libraries": "",
        "local_preload_libraries": "",
        "unix_socket_group": "",
        "external_pid_file": "",
    },
}
"""Postgres's defaults, of what would keep it from starting here, from being asked, or from saying in its log where it is."""
LOG_TAIL_BYTES = 64 << 10

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_PROGRESS = """
    SELECT pg_last_wal_replay_lsn()::text AS lsn, pg_get_wal_replay_pause_state() AS pause,
           pg_last_xact_replay_timestamp() AS time, pg_is_in_recovery() AS in_recovery
"""
_TOO_LOW = re.compile(r"(max_\w+) = \d+ is a lower setting than on the primary server, where its value was (\d+)")
_FATAL = re.compile(r"(?:FATAL|PANIC):\s+(.*)")


def _end_with_parent() -> None:
    """Nobody could say any more whether it may open: an immediate shutdown, after which the replay resumes."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


class HiddenServer:
    """One directory's; `work_directory` holds its socket, its configuration and its log."""

    def __init__(
        self,
        server: LocalServer,
        work_directory: Path,
        restore_command: Callable[[], str] = lambda: "",
        *,
        reads_alone: Callable[[], bool] = lambda: False,
        primary_conninfo: str = "",
    ) -> None:
        """`reads_alone`: its restore_command is to be empty now; `change_way` is to be called when that changes."""
        self._server = replace(server, socket_directory=work_directory, port=5432)
        self._work = work_directory
        self._restore_command = restore_command
        self._reads_alone = reads_alone
        self._primary_conninfo = primary_conninfo
        self._process: asyncio.subprocess.Process | None = None
        self._settings: dict[str, str | int] = {}
        self._raised: dict[str, int] = {}
        self._log_start = 0
        self.log_file = work_directory / "postgres.log"

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.returncode is not None

    async def control(self) -> ControlData:
        """LocalPostgresError."""
        return await read_control_data(self._server)

    async def write_configuration(self, more: Settings) -> None:
        """For the next start; `more` is above ours. LocalPostgresError; OSError."""
        control = await self.control()
        self._settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._work),
            "port": self._server.port,
            "hba_file": str(self._work / "hba.conf"),
            "hot_standby": "on",
            "archive_mode": "off",
            "autovacuum": "off",
            "fsync": "on",
            "max_connections": control.hot_standby.max_connections,
            "max_worker_processes": control.hot_standby.max_worker_processes,
            "max_wal_senders": control.hot_standby.max_wal_senders,
            "max_prepared_transactions": control.hot_standby.max_prepared_transactions,
            "max_locks_per_transaction": control.hot_standby.max_locks_per_transaction,
            "wal_level": control.wal_level,
            "wal_recycle": "off",
            **replay_sizes(self._server.data_directory),
            "log_min_messages": "log" if log.isEnabledFor(logging.DEBUG) else "warning",
            **more,
            **self._raised,
        }
        run_as = self._server.run_as
        write_atomically(self._work / "postgresql.conf", f"include '{WAY}'\n".encode(), run_as=run_as)
        # The directory is closed to all but this user and Postgres's.
        write_atomically(self._work / "hba.conf", b"local all postgres trust\n", run_as=run_as)
        for name, command in {ASKING: self._restore_command(), READING: ""}.items():
            way = {"restore_command": command, "wal_retrieve_retry_interval": _RETRIES[name]}
            write_atomically(self._work / name, render_settings(way).encode(), run_as=run_as)
        self.change_way()

    def change_way(self) -> None:
        """A Postgres that runs learns of it within milliseconds, also where it waits."""
        new = self._work / f"{WAY}.new"
        new.symlink_to(READING if self._reads_alone() else ASKING)
        new.replace(self._work / WAY)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGHUP)

    async def start(self) -> None:
        """OSError."""
        run_as = self._server.run_as
        # What the source wrote with ALTER SYSTEM must not turn any of these: the command line is above it. What a reload changes, or
        # is not always set, cannot be there.
        disable_in_auto_conf(self._server, NOT_THE_SOURCES)
        above = {**NEUTRAL, **self._settings, "primary_conninfo": self._primary_conninfo}
        options = [part for name, value in above.items() for part in ("-c", f"{name}={value}")]
        argv = [
            *(self._server.program("postgres"), "-D", str(self._server.data_directory)),
            *("-c", f"config_file={self._work / 'postgresql.conf'}"),
            *options,
        ]
        with self.log_file.open("ab") as file:
            self._log_start = file.tell()
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd="/",
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "PGTZ": "UTC"},
                user=None if run_as is None else run_as.uid,
                group=None if run_as is None else run_as.gid,
                extra_groups=None if run_as is None else [],
                start_new_session=True,
                pass_fds=self._server.kept_open,
                preexec_fn=_end_with_parent,
            )

    async def look(self) -> asyncpg.Record | None:
        """How far replay is; None: it does not answer (yet). Each look is a line in its log."""
        try:
            async with session(self._server) as sql:
                return await sql.fetchrow(_PROGRESS)
        except (LocalPostgresError, asyncpg.PostgresError):
            return None

    async def promote(self) -> bool:
        """True: it is a primary. Where it is none yet it is told to become one: once more does no harm."""
        try:
            async with session(self._server) as sql:
                if not await sql.fetchval("SELECT pg_is_in_recovery()"):
                    return True
                if await sql.fetchval("SELECT pg_get_wal_replay_pause_state() = 'paused'"):
                    await sql.execute("SELECT pg_wal_replay_resume()")
                else:
                    await sql.execute("SELECT pg_promote(false)")
        except (LocalPostgresError, asyncpg.PostgresError) as error:
            log.debug("while it opens: %s", error)
        return False

    async def restart_point(self) -> None:
        """At the last checkpoint that was replayed, if there is a later one than pg_control's. LocalPostgresError."""
        try:
            async with session(self._server, statement_timeout_s=STOP_DEADLINE_S) as sql:
                await sql.execute("CHECKPOINT", deadline_s=STOP_DEADLINE_S)
        except asyncpg.PostgresError as error:
            raise LocalPostgresError(f"CHECKPOINT: {error}") from error

    async def stop(self) -> None:
        """In order, within a long time; then at once."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        for number, deadline_s in ((signal.SIGINT, STOP_DEADLINE_S), (signal.SIGQUIT, 15.0), (signal.SIGKILL, 15.0)):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), deadline_s)
                return

    def raise_settings(self) -> bool:
        """The log holds a change of settings that a standby must have too: they only ever rise, from the next configuration on.
        False: no such change."""
        rose = False
        for name, value in _TOO_LOW.findall(self.log_text()):
            if int(value) > self._raised.get(name, 0):
                self._raised[name] = int(value)
                rose = True
        return rose

    def last_fatal(self) -> str:
        found = _FATAL.findall(self.log_text())
        return found[-1] if found else ""

    def log_text(self) -> str:
        """Of this start of Postgres, its end."""
        with self.log_file.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
