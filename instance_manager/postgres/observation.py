"""One look at the local server: a single statement, the same for Postgres 14 to 18.

Positions and times of other processes are what those processes last showed, not facts about now. Ages are by the
server's wall clock, which may be stepped: whoever decides by silence watches the raw text of a time *change* over its
own CLOCK_BOOTTIME instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import asyncpg

from instance_manager.core.types import Lsn, Timeline, parse_lsn
from instance_manager.postgres import one_question
from instance_manager.postgres.control_data import HotStandbySettings
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.sql import SqlUnavailable

OBJECT_NOT_IN_PREREQUISITE_STATE = "55000"


class Sql(Protocol):
    """What is needed of `sql.Session` and `sql.LocalSql`."""

    async def fetchrow(self, query: str, *args: object, deadline_s: float = ...) -> asyncpg.Record | None: ...

    async def fetchval(self, query: str, *args: object, deadline_s: float = ...) -> Any: ...

    async def fetch(self, query: str, *args: object, deadline_s: float = ...) -> list[asyncpg.Record]: ...

    async def execute(self, query: str, *args: object, deadline_s: float = ...) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Walreceiver:
    pid: int
    status: str
    """`streaming` once it is; `starting`, `waiting`, `restarting`, `stopping`."""
    sender_host: str | None
    sender_port: int | None
    slot: str | None
    received_timeline: Timeline | None
    silent_for_s: float
    """Since its last message, by the wall clock, never negative; infinite before the first."""
    last_message: str | None
    """Raw time of receipt of the last message: only whether it changes means something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Walsender:
    pid: int
    application_name: str
    state: str
    sync_priority: int
    """0 also while there is no flush position yet, whatever configuration the process has (see synchronous.py)."""
    sync_state: str
    sent_lsn: Lsn | None
    write_lsn: Lsn | None
    flush_lsn: Lsn | None
    replay_lsn: Lsn | None
    reply_time: str | None
    """Raw, of the standby's clock: only whether it changes means something."""
    backend_start: str
    """Raw: with the pid, the identity of the process."""
    slot: str | None
    """The slot it streams through."""
    user: str | None = None
    client_address: str | None = None
    """None: over the Unix socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    name: str
    physical: bool
    temporary: bool
    active_pid: int | None
    wal_status: str | None
    """`reserved`, `extended`, `unreserved` or `lost`; None: never used."""
    restart_lsn: Lsn | None
    safe_wal_bytes: int | None
    """Before it may be lost; None: no limit, or lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresObservation:
    version_number: int
    in_recovery: bool
    system_identifier: int
    timeline: Timeline
    """A primary's own. A standby's is a hint: what is received, else the newest in pg_control, which lags (P11)."""
    postmaster_start: str
    """Raw: the identity of this life of the server."""
    up_for_s: float
    insert_lsn: Lsn | None
    flush_lsn: Lsn | None
    """A primary's; None on a standby."""
    receive_lsn: Lsn | None
    """None after a restart, then a segment's start: no position to vote with (P3)."""
    replay_lsn: Lsn | None
    replay_pause: str | None
    """`not paused`, `pause requested` or `paused`; None on a primary."""
    startup_wait: str | None
    """What the startup process waits for, such as `IPC/RecoveryConflictSnapshot`; None: it works, or there is none."""
    walreceiver: Walreceiver | None
    walsenders: tuple[Walsender, ...]
    slots: tuple[Slot, ...]
    synchronous_standby_names: str
    """As this connection, which may be an old one, has it."""
    configuration_errors: tuple[str, ...]
    """What Postgres could not take from its configuration files."""
    pending_restart: tuple[str, ...]
    """Settings that were changed and take effect at a restart."""
    checkpointer_pid: int | None
    hot_standby: HotStandbySettings
    checksum_failures: int
    replayed_timestamp: str | None = None
    """When the last transaction that a standby replayed was committed, by the primary's wall clock: for people."""

    @property
    def is_receiving(self) -> bool:
        return self.walreceiver is not None and self.walreceiver.status == "streaming"

    @property
    def startup_is_held_up(self) -> bool:
        """Does replay wait for a standby's query or for a delay, with WAL at hand?"""
        wait = self.startup_wait or ""
        return "RecoveryConflict" in wait or wait.startswith(("Lock/", "BufferPin/")) or "RecoveryApplyDelay" in wait


_QUERY = """
SELECT json_build_object(
  'version', current_setting('server_version_num')::int,
  'recovery', r.recovery,
  'system', (SELECT system_identifier::text FROM pg_control_system()),
  'timeline', CASE WHEN r.recovery
     THEN coalesce((SELECT received_tli FROM pg_stat_get_wal_receiver()),
                   greatest((SELECT timeline_id FROM pg_control_checkpoint()),
                            (SELECT min_recovery_end_timeline FROM pg_control_recovery())))
     ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END,
  'started', pg_postmaster_start_time()::text,
  'up', extract(epoch FROM clock_timestamp() - pg_postmaster_start_time()),
  'insert', CASE WHEN NOT r.recovery THEN pg_current_wal_insert_lsn()::text END,
  'flush', CASE WHEN NOT r.recovery THEN pg_current_wal_flush_lsn()::text END,
  'receive', CASE WHEN r.recovery THEN pg_last_wal_receive_lsn()::text END,
  'replay', CASE WHEN r.recovery THEN pg_last_wal_replay_lsn()::text END,
  'replayed', CASE WHEN r.recovery THEN pg_last_xact_replay_timestamp()::text END,
  'pause', CASE WHEN r.recovery THEN pg_get_wal_replay_pause_state() END,
  'processes', (SELECT json_object_agg(backend_type, json_build_array(pid, wait_event_type, wait_event))
     FROM pg_stat_activity WHERE backend_type IN ('startup', 'checkpointer')),
  'walreceiver', (SELECT json_build_object('pid', pid, 'status', status, 'host', sender_host, 'port', sender_port,
       'slot', slot_name, 'timeline', received_tli, 'message', last_msg_receipt_time::text,
       'silent', extract(epoch FROM clock_timestamp() - last_msg_receipt_time))
     FROM pg_stat_get_wal_receiver() WHERE pid IS NOT NULL),
  'walsenders', (SELECT json_agg(json_build_array(w.pid, w.application_name, w.state, w.sync_priority, w.sync_state,
       w.sent_lsn::text, w.write_lsn::text, w.flush_lsn::text, w.replay_lsn::text, w.reply_time::text,
       w.backend_start::text, s.slot_name, w.usename, host(w.client_addr)) ORDER BY w.backend_start, w.pid)
     FROM pg_stat_replication w LEFT JOIN pg_get_replication_slots() s ON s.active_pid = w.pid),
  'slots', (SELECT json_agg(json_build_array(slot_name, slot_type = 'physical', temporary, active_pid, wal_status,
       restart_lsn::text, safe_wal_size) ORDER BY slot_name) FROM pg_get_replication_slots()),
  'names', current_setting('synchronous_standby_names'),
  'errors', (SELECT json_agg(format('%s:%s: %s: %s', sourcefile, sourceline, name, error))
     FROM pg_file_settings WHERE error IS NOT NULL),
  'settings', (SELECT json_object_agg(name, setting) FROM pg_settings WHERE name IN ('max_connections',
     'max_worker_processes', 'max_wal_senders', 'max_prepared_transactions', 'max_locks_per_transaction')),
  'pending', (SELECT json_agg(name ORDER BY name) FROM pg_settings WHERE pending_restart),
  'checksums', (SELECT coalesce(sum(checksum_failures), 0) FROM pg_stat_database)
)::text AS seen FROM (SELECT pg_is_in_recovery() AS recovery) r
"""


async def observe(sql: Sql, *, deadline_s: float = 2.0) -> PostgresObservation:
    """One round trip. DeadlinePassed, SqlUnavailable, or asyncpg.PostgresError."""
    try:
        text = await sql.fetchval(_QUERY, deadline_s=deadline_s)
    except asyncpg.PostgresError as error:
        # It was promoted between two functions of the statement; it will not be again.
        if error.sqlstate != OBJECT_NOT_IN_PREREQUISITE_STATE:
            raise
        text = await sql.fetchval(_QUERY, deadline_s=deadline_s)
    return _parse(json.loads(text))


def _parse(seen: dict[str, Any]) -> PostgresObservation:
    processes = seen["processes"] or {}
    startup = processes.get("startup")
    checkpointer = processes.get("checkpointer")
    return PostgresObservation(
        version_number=seen["version"],
        in_recovery=seen["recovery"],
        system_identifier=int(seen["system"]),
        timeline=Timeline(seen["timeline"]),
        postmaster_start=seen["started"],
        up_for_s=max(0.0, seen["up"]),
        insert_lsn=_lsn(seen["insert"]),
        flush_lsn=_lsn(seen["flush"]),
        receive_lsn=_lsn(seen["receive"]),
        replay_lsn=_lsn(seen["replay"]),
        replay_pause=seen["pause"],
        startup_wait=f"{startup[1]}/{startup[2]}" if startup is not None and startup[1] is not None else None,
        walreceiver=_walreceiver(seen["walreceiver"]),
        walsenders=tuple(_walsender(each) for each in seen["walsenders"] or ()),
        slots=tuple(_slot(each) for each in seen["slots"] or ()),
        synchronous_standby_names=seen["names"],
        configuration_errors=tuple(seen["errors"] or ()),
        pending_restart=tuple(seen["pending"] or ()),
        checkpointer_pid=None if checkpointer is None else checkpointer[0],
        hot_standby=HotStandbySettings(**{name: int(value) for name, value in seen["settings"].items()}),
        checksum_failures=int(seen["checksums"]),
        replayed_timestamp=seen["replayed"],
    )


def _walreceiver(seen: dict[str, Any] | None) -> Walreceiver | None:
    if seen is None:
        return None
    return Walreceiver(
        pid=seen["pid"],
        status=seen["status"],
        sender_host=seen["host"] or None,
        sender_port=seen["port"],
        slot=seen["slot"] or None,
        received_timeline=Timeline(seen["timeline"]) if seen["timeline"] else None,
        silent_for_s=float("inf") if seen["silent"] is None else max(0.0, seen["silent"]),
        last_message=seen["message"],
    )


def _walsender(seen: list[Any]) -> Walsender:
    return Walsender(
        pid=seen[0],
        application_name=seen[1],
        state=seen[2],
        sync_priority=seen[3] or 0,
        sync_state=seen[4] or "",
        sent_lsn=_lsn(seen[5]),
        write_lsn=_lsn(seen[6]),
        flush_lsn=_lsn(seen[7]),
        replay_lsn=_lsn(seen[8]),
        reply_time=seen[9],
        backend_start=seen[10],
        slot=seen[11],
        user=seen[12],
        client_address=seen[13],
    )


def _slot(seen: list[Any]) -> Slot:
    return Slot(
        name=seen[0],
        physical=seen[1],
        temporary=seen[2],
        active_pid=seen[3],
        wal_status=seen[4],
        restart_lsn=_lsn(seen[5]),
        safe_wal_bytes=seen[6],
    )


def _lsn(text: str | None) -> Lsn | None:
    return None if text is None else parse_lsn(text)


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    system_identifier: int
    timeline: Timeline
    """A standby's is the timeline of the last record replayed, exactly; no SQL function tells it."""


class IdentifyFailed(LocalPostgresError):
    """IDENTIFY_SYSTEM was refused or not understood."""


async def identify_system(server: LocalServer, *, deadline_s: float = 2.0) -> SystemIdentity:
    """IDENTIFY_SYSTEM of the streaming replication protocol. IdentifyFailed, DeadlinePassed."""
    try:
        row = await one_question.ask(
            server,
            "IDENTIFY_SYSTEM",
            application_name="instance-manager: identify",
            deadline_s=deadline_s,
            replication=True,
        )
        return SystemIdentity(int(row[0] or ""), Timeline(int(row[1] or "")))
    except (SqlUnavailable, IndexError, ValueError) as error:
        raise IdentifyFailed(f"IDENTIFY_SYSTEM: {error}") from error
