"""The replay of a restored directory by a Postgres that nobody can reach, until its target was reached, and only then the
opening.

It runs as a standby, so it never opens by itself: neither at the end of the archive, nor at an error. Where the store fails it
stops (126 of restore_command), and is started again until the patience is over.

Most of the time it reads pg_wal alone (`serving`): its restore_command is then empty, which is changed by a reload.
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
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg

from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.recovery.target import Target, with_header
from instance_manager.core.types import Lsn, Timeline, TimelineChain, format_lsn, parse_lsn
from instance_manager.postgres.configuration import render_settings
from instance_manager.postgres.control_data import ClusterState, read_control_data
from instance_manager.postgres.directory import disable_in_auto_conf
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.sql import session

log = logging.getLogger("instance_manager.archive.recovery")

POLL_S = 0.2
MOVING_POLL_S = 1.0
"""While replay goes on: each look is a connection, which costs as much as replay of a few MiB."""
UNREACHABLE_POLL_S = 0.5
RESTART_PAUSE_S = 2.0
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
ENDS_TO_BELIEVE = 2
"""So often Postgres must have come to the end of the archive without replaying anything in between."""
LOG_TAIL_BYTES = 64 << 10

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_PROGRESS = """
    SELECT pg_last_wal_replay_lsn()::text AS lsn, pg_get_wal_replay_pause_state() AS pause,
           pg_last_xact_replay_timestamp() AS time, pg_is_in_recovery() AS in_recovery
"""
_STOPPING = re.compile(r"LOG:\s+recovery stopping (before|after|at) ")
_TOO_LOW = re.compile(r"(max_\w+) = \d+ is a lower setting than on the primary server, where its value was (\d+)")
_FATAL = re.compile(r"(?:FATAL|PANIC):\s+(.*)")
_FROM_THE_STORE = re.compile(r"FATAL:\s+could not restore file .* from archive")


def _end_with_parent() -> None:
    """Nobody could say any more whether it may open: an immediate shutdown, after which the replay resumes."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


class RecoveryStopped(Exception):
    """It has not opened. What was replayed stays: the same command goes on from there, once the cause is mended."""


class TargetNotReached(RecoveryStopped):
    """The archive ends before the target, or Postgres came to another end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """Of the Postgres that replays."""

    parameters: Mapping[str, str | int] | None = None
    """Besides ours, such as shared_buffers."""
    accept_end: bool = False
    """Open at the end of the archive where that is before the target."""
    outage_patience_s: float = 3600.0
    """How long without progress the store may fail."""
    start_deadline_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Reached:
    """Where the recovery ended, and that it opened."""

    lsn: Lsn
    time: str
    """Of the last transaction in it, as Postgres tells; empty: none was replayed."""
    timeline: Timeline
    """The new one."""
    by: str


@dataclass(slots=True)
class _Seen:
    """What the last looks at the server have shown."""

    lsn: Lsn = Lsn(0)
    time: str = ""
    ends_at: int = 0
    highest: Lsn = Lsn(0)
    moved_s: float = 0.0
    """When the highest position rose last."""


class Replay:
    """One recovery of one directory. `work_directory` holds its socket, its configuration and its log."""

    def __init__(
        self,
        server: LocalServer,
        archive: RecoveryArchive,
        target: Target,
        chain: TimelineChain,
        settings: ReplaySettings,
        *,
        work_directory: Path,
        last_known: Lsn | None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._server = replace(server, socket_directory=work_directory, port=5432)
        self._archive = archive
        self._target = target
        self._chain = chain
        self._settings = settings
        self._work = work_directory
        self._last_known = last_known
        self._say = on_progress
        self._process: asyncio.subprocess.Process | None = None
        self._is_paused = False
        self._cut: Lsn | None = None
        """Where the archive ended, and will be opened although the target was not met there."""
        self._why = ""
        self._raised: dict[str, int] = {}
        self._was_raised = False
        self._log_start = 0
        self.log_file = work_directory / "postgres.log"

    async def run(self) -> Reached:
        """Reached and opened, then shut down cleanly. RecoveryStopped: it has not opened. LocalPostgresError; OSError."""
        self._write_ways()
        await self._write_configuration()
        self._archive.on_change = self._change_way
        seen = _Seen(moved_s=asyncio.get_running_loop().time())
        try:
            while True:
                await self._start()
                by = await self._watch(seen)
                if by is not None and (self._target.kind == "latest" or self._is_paused or self._cut is not None):
                    return await self._open(seen, by)
                if by is not None:
                    # With a target that it has not met Postgres does not promote: once more without one, and to here only.
                    await self._stop()
                    self._cut, self._why = seen.lsn, by
                    self._archive.cut_at(seen.lsn)
                    await self._write_configuration()
                elif self._was_raised:
                    self._was_raised = False
                    await self._write_configuration()
                else:
                    await self._after_a_stop(seen)
        finally:
            await asyncio.shield(self._stop())

    async def _write_configuration(self) -> None:
        control = await read_control_data(self._server)
        settings: dict[str, str | int | float | bool] = {
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
            "log_min_messages": "log" if log.isEnabledFor(logging.DEBUG) else "warning",
            **(self._target if self._cut is None else Target()).settings(self._chain.current),
            **(self._settings.parameters or {}),
            **self._raised,
        }
        run_as = self._server.run_as
        text = f"{render_settings(settings)}include '{WAY}'\n"
        write_atomically(self._work / "postgresql.conf", text.encode(), run_as=run_as)
        # The directory is closed to all but this user and Postgres's.
        write_atomically(self._work / "hba.conf", b"local all postgres trust\n", run_as=run_as)

    def _write_ways(self) -> None:
        commands = {ASKING: self._archive.restore_command(), READING: ""}
        for name, command in commands.items():
            settings = {"restore_command": command, "wal_retrieve_retry_interval": _RETRIES[name]}
            write_atomically(self._work / name, render_settings(settings).encode(), run_as=self._server.run_as)
        self._change_way()

    def _change_way(self) -> None:
        """A Postgres that runs learns of it within milliseconds, also where it waits."""
        new = self._work / f"{WAY}.new"
        new.symlink_to(READING if self._archive.reads_alone else ASKING)
        new.replace(self._work / WAY)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGHUP)

    async def _start(self) -> None:
        await self._archive.before_postgres_starts()
        run_as = self._server.run_as
        # What the source wrote with ALTER SYSTEM must not turn any of these: the command line is above it. What a reload changes, or
        # is not always set, cannot be there.
        disable_in_auto_conf(self._server, NOT_THE_SOURCES)
        above = {
            **{"archive_mode": "off", "wal_recycle": "off", "recovery_min_apply_delay": "0"},
            **{"primary_conninfo": "", "synchronous_standby_names": "", "listen_addresses": ""},
        }
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
                preexec_fn=_end_with_parent,
            )

    async def _watch(self, seen: _Seen) -> str | None:
        """Until it is where it should be: what says so. None: Postgres has ended. TargetNotReached."""
        loop = asyncio.get_running_loop()
        assert self._process is not None  # noqa: S101
        while self._process.returncode is None:
            self._archive.look()
            unreadable = self._archive.unreadable
            if unreadable is not None:
                raise TargetNotReached(
                    f"replay stopped at {format_lsn(seen.lsn)}: a record in {unreadable}, or one that begins right before it, cannot be "
                    f"read, although the segment is the one that was archived. Nothing was opened; see {self.log_file}"
                )
            row = await self._look()
            if row is None:
                # Each look is a line in its log.
                await asyncio.sleep(UNREACHABLE_POLL_S)
                continue
            lsn = parse_lsn(row["lsn"]) if row["lsn"] else Lsn(0)
            is_moving = lsn != seen.lsn
            if is_moving:
                seen.lsn, seen.ends_at = lsn, self._archive.ends_seen
                if lsn > seen.highest:
                    seen.highest, seen.moved_s = lsn, loop.time()
                seen.time = "" if row["time"] is None else row["time"].isoformat(sep=" ")
                self._say(f"replayed to {format_lsn(lsn)}" + (f", {seen.time}" if seen.time else ""))
            if not row["in_recovery"]:
                raise RecoveryStopped("Postgres has opened although nobody asked it to: do not use this directory")
            if row["pause"] == "paused":
                log_text = self._log_text()
                if _STOPPING.search(log_text):
                    self._is_paused = True
                    return f"Postgres stopped at the target, {self._target}"
                if self._raise_settings(log_text):
                    await self._stop()
                    self._say("settings of the source have risen since the backup: starting with them")
                    return None
                raise RecoveryStopped(f"Postgres has paused for a reason of its own: see {self.log_file}")
            if self._archive.ends_seen - seen.ends_at >= ENDS_TO_BELIEVE and lsn:
                return self._at_the_end(seen)
            await asyncio.sleep(MOVING_POLL_S if is_moving else POLL_S)
        return None

    def _at_the_end(self, seen: _Seen) -> str:
        """The archive has no more: is that what was asked for? TargetNotReached."""
        if self._cut is not None:
            if seen.lsn != self._cut:
                raise TargetNotReached(
                    f"replay ended at {format_lsn(seen.lsn)}, and the time before at {format_lsn(self._cut)}: see {self.log_file}"
                )
            return self._why
        where = f"the archive ends at {format_lsn(seen.lsn)}" + (
            f", after the transaction of {seen.time}" if seen.time else ""
        )
        if self._last_known is not None and seen.lsn <= self._last_known:
            raise TargetNotReached(
                f"replay stopped at {format_lsn(seen.lsn)}, although the archive goes on to {format_lsn(self._last_known)} "
                f"and beyond: a record there cannot be read. Nothing was opened; see {self.log_file}"
            )
        target_lsn = self._target.lsn
        if target_lsn is not None and with_header(seen.lsn, self._archive.segment_bytes) >= target_lsn:
            return f"the log is replayed to {format_lsn(target_lsn)}"
        if self._target.kind == "latest" or self._settings.accept_end:
            return where
        raise TargetNotReached(
            f"{where}, which is before the target, {self._target}. Nothing was opened. If that is the state that you want (nothing "
            "was committed between them), give --accept-end; else choose a target before it"
        )

    async def _after_a_stop(self, seen: _Seen) -> None:
        """Postgres has ended by itself: a store that fails is waited for, anything else is told."""
        text, said = self._log_text(), self._last_fatal()
        if "requested recovery stop point is before consistent recovery point" in text:
            raise TargetNotReached(
                f"the target, {self._target}, is before the backup is consistent: choose an earlier one with --backup"
            )
        failed = self._archive.status.fetch.last_error
        if not _FROM_THE_STORE.search(text):
            raise RecoveryStopped(f"Postgres ended: {said or 'without a word'}; see {self.log_file}")
        loop = asyncio.get_running_loop()
        if loop.time() - seen.moved_s > self._settings.outage_patience_s:
            raise RecoveryStopped(
                f"the archive could not be read for {self._settings.outage_patience_s:g} s: {failed}. Nothing was opened: "
                "give the same command again, and it goes on from here"
            )
        self._say(f"waiting for the archive: {failed}")
        await asyncio.sleep(RESTART_PAUSE_S)

    async def _open(self, seen: _Seen, by: str) -> Reached:
        """The only place where it becomes a primary."""
        self._say(f"{by}: opening")
        await self._archive.before_it_opens()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + STOP_DEADLINE_S
        while await self._is_in_recovery():
            if loop.time() > end_s or (self._process is not None and self._process.returncode is not None):
                raise RecoveryStopped(f"it was to open, and has not: {self._last_fatal()}; see {self.log_file}")
            await asyncio.sleep(POLL_S)
        await self._stop()
        control = await read_control_data(self._server)
        if control.state is not ClusterState.SHUT_DOWN or control.timeline <= self._chain.current:
            raise RecoveryStopped(
                f"after the promotion it is {control.state.value} on timeline {control.timeline}; see {self.log_file}"
            )
        return Reached(seen.lsn, seen.time, control.timeline, by)

    async def _is_in_recovery(self) -> bool:
        """False: it is a primary. Where it is none yet it is told to become one: once more does no harm."""
        try:
            async with session(self._server) as sql:
                if not await sql.fetchval("SELECT pg_is_in_recovery()"):
                    return False
                if await sql.fetchval("SELECT pg_get_wal_replay_pause_state() = 'paused'"):
                    await sql.execute("SELECT pg_wal_replay_resume()")
                else:
                    await sql.execute("SELECT pg_promote(false)")
        except (LocalPostgresError, asyncpg.PostgresError) as error:
            log.debug("while it opens: %s", error)
        return True

    async def _look(self) -> asyncpg.Record | None:
        """None: it does not answer (yet)."""
        try:
            async with session(self._server) as sql:
                return await sql.fetchrow(_PROGRESS)
        except (LocalPostgresError, asyncpg.PostgresError):
            return None

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        for number, deadline_s in ((signal.SIGINT, STOP_DEADLINE_S), (signal.SIGQUIT, 15.0), (signal.SIGKILL, 15.0)):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), deadline_s)
                return

    def _raise_settings(self, log_text: str) -> bool:
        """The log holds a change of settings that a standby must have too: they only ever rise. False: no such change."""
        for name, value in _TOO_LOW.findall(log_text):
            if int(value) > self._raised.get(name, 0):
                self._raised[name] = int(value)
                self._was_raised = True
        return self._was_raised

    def _last_fatal(self) -> str:
        found = _FATAL.findall(self._log_text())
        return found[-1] if found else ""

    def _log_text(self) -> str:
        """Of this start of Postgres, its end."""
        with self.log_file.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
