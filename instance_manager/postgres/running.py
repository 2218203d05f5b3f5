"""What the rules of Postgres (P1, P2, P5, P7, P10) ask of a running server and do to it: a port, and the real one.

`dynamic_settings`, `synchronous` and `voting` hold the rules and know no SQL; here are the questions, each a fact about
processes of one server at one moment. The simulation answers them from a model of those processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from instance_manager.core.types import Lsn, Timeline, parse_lsn
from instance_manager.postgres import sql
from instance_manager.postgres.configuration import HEADER, REPLICATION_CONF, parse_settings, render_settings
from instance_manager.postgres.deadlines import Deadline, Pause
from instance_manager.postgres.files import make_directory, read_if_present, write_atomically
from instance_manager.postgres.server import DeadlinePassed, LocalServer
from instance_manager.threads import InOrder

Reload = Callable[[], Awaitable[None]]
"""SIGHUP to the postmaster, by whoever owns it (the supervisor)."""

ChildKind = Literal["walreceiver", "other", "unclassified"]

Process = tuple[int, str]
"""Pid and start time of a walsender: its identity."""

BLOCK_DIRECTORY = "no-walreceiver"
CANARY_NAME = "instance-manager: canary"
_LIBRARY = "libpqwalreceiver"


@dataclass(frozen=True, slots=True)
class Sender:
    """One row of pg_stat_replication."""

    pid: int
    backend_start: str
    name: str
    """In lower case: Postgres compares names so."""
    state: str
    sync_priority: int
    sent_lsn: Lsn
    flush_lsn: Lsn | None
    slot: str | None

    @property
    def process(self) -> Process:
        return self.pid, self.backend_start

    def has_flushed(self, mark: Lsn) -> bool:
        """`sent` as well: a fresh connection's flush may be its replay position (P10)."""
        return self.sent_lsn >= mark and self.flush_lsn is not None and self.flush_lsn >= mark


class SettingsFile(Protocol):
    """`instance-manager.replication.conf`, and what the server has loaded of it."""

    async def read(self) -> dict[str, str]:
        """What the file holds now; nothing is said about what Postgres has loaded."""
        ...

    async def write(self, settings: Mapping[str, str]) -> None:
        """The whole file, durable. OSError: not written."""
        ...

    async def reload(self) -> None: ...

    async def shown(self, names: Iterable[str], deadline: Deadline) -> dict[str, str | None]:
        """What a *new* connection shows: what the postmaster has loaded, and every process that it forks from now on."""
        ...


class ReplicationSession(Protocol):
    """One session of the superuser on a primary. DeadlinePassed, SqlUnavailable, asyncpg.PostgresError."""

    async def primary_since(self, deadline: Deadline) -> str | None:
        """Start of this postmaster, its identity; None while it is in recovery."""
        ...

    async def senders(self, deadline: Deadline) -> list[Sender]: ...

    async def terminate_senders(self, pids: Collection[int], deadline: Deadline) -> None:
        """SIGTERM; whether they are gone is seen by `senders`."""
        ...

    async def write_mark(self, deadline: Deadline) -> tuple[Timeline, Lsn]:
        """A position behind everything that the log held, flushed here, and the timeline that it is on (P10)."""
        ...

    async def canary_waits(self, deadline: Deadline) -> bool:
        """One commit of our own: True, it was seen waiting for standbys (and was ended); False, it came back without.

        DeadlinePassed: neither was seen. SqlUnavailable.
        """
        ...


class ProcessSession(Protocol):
    """One session of the superuser on a standby, and its sight of the postmaster's children."""

    @property
    def postmaster(self) -> int: ...

    async def children(self, deadline: Deadline) -> dict[int, ChildKind]:
        """Each child that lived throughout the look is in it."""
        ...

    def terminate(self, pid: int) -> bool:
        """SIGTERM to a child; False: it is gone. pg_terminate_backend refuses a walreceiver."""
        ...

    async def resume_replay(self, deadline: Deadline) -> None: ...

    async def pause_replay(self, deadline: Deadline) -> None:
        """Asked for; whether it is, `replay_is_paused` tells."""
        ...

    async def replay_is_paused(self, deadline: Deadline) -> bool: ...


class NoProcesses(Exception):
    """The processes cannot be looked at: another PID namespace."""


class RunningServer(Protocol):
    @property
    def settings_file(self) -> SettingsFile: ...

    def replication(self, deadline: Deadline) -> AbstractAsyncContextManager[ReplicationSession]: ...

    def processes(self, deadline: Deadline) -> AbstractAsyncContextManager[ProcessSession]:
        """NoProcesses."""
        ...

    async def block_directory(self) -> str:
        """A directory at whose head in `dynamic_library_path` no walreceiver can be loaded (P2). OSError: none can be."""
        ...


class SqlServer:
    """The real one: SQL over the local socket, and /proc."""

    def __init__(self, server: LocalServer, reload: Reload, writes: InOrder | None = None) -> None:
        """`writes`: the turns that whoever else writes these files takes."""
        self._server = server
        self.settings_file = _ConfFile(server, reload, writes if writes is not None else InOrder())

    @contextlib.asynccontextmanager
    async def replication(self, deadline: Deadline) -> AsyncIterator[ReplicationSession]:
        async with sql.session(self._server, deadline_s=deadline.left_s) as fresh:
            yield _SqlReplication(self._server, fresh)

    @contextlib.asynccontextmanager
    async def processes(self, deadline: Deadline) -> AsyncIterator[ProcessSession]:
        async with sql.session(self._server, deadline_s=deadline.left_s) as fresh:
            yield await _SqlProcesses.of(fresh, deadline)

    async def block_directory(self) -> str:
        return str(await asyncio.to_thread(_make_block, self._server))


class _ConfFile:
    def __init__(self, server: LocalServer, reload: Reload, writes: InOrder) -> None:
        self._path = server.data_directory / REPLICATION_CONF
        self._server = server
        self._reload = reload
        self._writes = writes
        """Of whom to follow: what a cut off start or `follow` writes late must not come after a vote (P2)."""

    async def read(self) -> dict[str, str]:
        content = await asyncio.to_thread(read_if_present, self._path)
        return {} if content is None else parse_settings(content.decode())

    async def write(self, settings: Mapping[str, str]) -> None:
        text = HEADER + render_settings(settings)
        run_as = self._server.run_as
        with self._writes.one(lambda: write_atomically(self._path, text.encode(), mode=0o600, run_as=run_as)) as write:
            await asyncio.to_thread(write)

    async def reload(self) -> None:
        await self._reload()

    async def shown(self, names: Iterable[str], deadline: Deadline) -> dict[str, str | None]:
        async with sql.session(self._server, deadline_s=deadline.left_s) as fresh:
            rows = await fresh.fetch(
                "SELECT name, current_setting(name, true) AS value FROM unnest($1::text[]) AS name",
                list(names),
                deadline_s=deadline.left_s,
            )
        return {row["name"]: row["value"] for row in rows}


class _SqlReplication:
    def __init__(self, server: LocalServer, session: sql.Session) -> None:
        self._server = server
        self._session = session

    async def primary_since(self, deadline: Deadline) -> str | None:
        row = await self._session.fetchrow(
            "SELECT pg_is_in_recovery() AS recovery, pg_postmaster_start_time()::text AS start",
            deadline_s=deadline.left_s,
        )
        return None if row is None or row["recovery"] else str(row["start"])

    async def senders(self, deadline: Deadline) -> list[Sender]:
        rows = await self._session.fetch(
            "SELECT w.pid, w.backend_start::text AS start, w.application_name, w.state, w.sync_priority, "
            "w.sent_lsn::text AS sent, w.flush_lsn::text AS flush, s.slot_name FROM pg_stat_replication w "
            "LEFT JOIN pg_get_replication_slots() s ON s.active_pid = w.pid",
            deadline_s=deadline.left_s,
        )
        return [
            Sender(
                pid=row["pid"],
                backend_start=row["start"],
                name=row["application_name"].lower(),
                state=row["state"] or "",
                sync_priority=row["sync_priority"] or 0,
                sent_lsn=Lsn(0) if row["sent"] is None else parse_lsn(row["sent"]),
                flush_lsn=None if row["flush"] is None else parse_lsn(row["flush"]),
                slot=row["slot_name"],
            )
            for row in rows
        ]

    async def terminate_senders(self, pids: Collection[int], deadline: Deadline) -> None:
        await self._session.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_replication WHERE pid = ANY($1::int[])",
            sorted(pids),
            deadline_s=deadline.left_s,
        )

    async def write_mark(self, deadline: Deadline) -> tuple[Timeline, Lsn]:
        """The session commits with `synchronous_commit = local`, so the record is flushed here when this returns.

        An insert position would not do: at a page's start it counts a header that nobody has written.
        """
        await self._session.execute(
            "SET synchronous_commit = local; SELECT pg_logical_emit_message(true, 'instance-manager', 'barrier')",
            deadline_s=deadline.left_s,
        )
        row = await self._session.fetchrow(
            "SELECT pg_current_wal_flush_lsn()::text AS mark, "
            "('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int AS timeline",
            deadline_s=deadline.left_s,
        )
        assert row is not None  # noqa: S101
        return Timeline(row["timeline"]), parse_lsn(row["mark"])

    async def canary_waits(self, deadline: Deadline) -> bool:
        async with sql.session(self._server, deadline_s=deadline.left_s, statement_timeout_s=3600) as canary:
            await canary.execute(
                f"SET application_name = '{CANARY_NAME}'; SET synchronous_commit = on", deadline_s=deadline.left_s
            )
            pid = canary.connection.get_server_pid()
            warnings: list[object] = []
            canary.connection.add_log_listener(lambda _, message: warnings.append(message))
            commit = asyncio.ensure_future(
                canary.execute(
                    "SELECT pg_logical_emit_message(true, 'instance-manager', 'canary')", deadline_s=deadline.left_s + 5
                )
            )
            seen = False
            pause = Pause(0.01)
            try:
                while not commit.done() and not seen:
                    # What has no outcome yet proves nothing: taken for a commit that came back, it would let the next list begin (P1).
                    if deadline.passed:
                        raise DeadlinePassed("a commit that is neither over nor seen waiting", deadline.whole_s)
                    seen = bool(
                        await self._session.fetchval(
                            "SELECT count(*) > 0 FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'SyncRep'",
                            pid,
                            deadline_s=deadline.left_s,
                        )
                    )
                    if not seen:
                        await pause(deadline)
                if not seen:
                    await commit
                # Somebody may have cancelled its wait: then it comes back with a warning.
                return seen or bool(warnings)
            finally:
                if not commit.done():
                    canary.terminate()
                    await asyncio.wait({commit}, timeout=1)
                    if self._session.is_open:
                        await self._session.execute(f"SELECT pg_terminate_backend({pid})", deadline_s=1.0)
                if commit.done() and not commit.cancelled():
                    commit.exception()


class _SqlProcesses:
    def __init__(self, session: sql.Session, postmaster: int, title_prefix: str) -> None:
        self._session = session
        self.postmaster = postmaster
        self._title_prefix = title_prefix

    @classmethod
    async def of(cls, session: sql.Session, deadline: Deadline) -> _SqlProcesses:
        row = await session.fetchrow(
            "SELECT pg_backend_pid() AS pid, current_setting('cluster_name') AS cluster", deadline_s=deadline.left_s
        )
        assert row is not None  # noqa: S101
        # Our own backend's parent is the postmaster, whatever any pid file says.
        postmaster = _parent_of(row["pid"])
        if postmaster is None:
            raise NoProcesses(f"no process {row['pid']} in /proc: another PID namespace")
        return cls(session, postmaster, f"postgres: {row['cluster']}: " if row["cluster"] else "postgres: ")

    async def children(self, deadline: Deadline) -> dict[int, ChildKind]:
        children = await asyncio.to_thread(_children_of, self.postmaster)
        rows = await self._session.fetch("SELECT pid, backend_type FROM pg_stat_activity", deadline_s=deadline.left_s)
        known = {each["pid"]: each["backend_type"] for each in rows}
        return {pid: _kind_of(title, known.get(pid), self._title_prefix) for pid, title in children.items()}

    def terminate(self, pid: int) -> bool:
        """SIGTERM through a pidfd, so that a reused number is never hit."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if _parent_of(pid) != self.postmaster:
                return False
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    async def resume_replay(self, deadline: Deadline) -> None:
        await self._session.execute("SELECT pg_wal_replay_resume()", deadline_s=deadline.left_s)

    async def pause_replay(self, deadline: Deadline) -> None:
        await self._session.execute("SELECT pg_wal_replay_pause()", deadline_s=deadline.left_s)

    async def replay_is_paused(self, deadline: Deadline) -> bool:
        state = await self._session.fetchval("SELECT pg_get_wal_replay_pause_state()", deadline_s=deadline.left_s)
        return bool(state == "paused")


def _make_block(server: LocalServer) -> Path:
    directory = server.state_directory / BLOCK_DIRECTORY
    if ":" in str(directory) or not directory.is_absolute():
        raise OSError(f"{directory} cannot be in dynamic_library_path")
    make_directory(directory, mode=0o755, run_as=server.run_as)
    for name in (_LIBRARY, f"{_LIBRARY}.so"):
        if not (directory / name).exists():
            write_atomically(directory / name, b"", mode=0o644, run_as=server.run_as)
    return directory


def _kind_of(title: str, backend_type: str | None, prefix: str) -> ChildKind:
    if backend_type is not None:
        return "walreceiver" if backend_type == "walreceiver" else "other"
    if not title.startswith(prefix):
        # Forked a moment ago: it has the postmaster's command line still. (An empty title: it is ending, a zombie.)
        return "unclassified" if title else "other"
    return "walreceiver" if title.removeprefix(prefix).startswith("walreceiver") else "other"


def _children_of(postmaster: int) -> dict[int, str]:
    """Pid and title of each child: one that lives throughout the listing of /proc is in it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _parent_of(int(entry.name)) == postmaster:
            with contextlib.suppress(OSError):
                content = (entry / "cmdline").read_bytes()
                found[int(entry.name)] = content.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def _parent_of(pid: int) -> int | None:
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(content.rpartition(")")[2].split()[1])
