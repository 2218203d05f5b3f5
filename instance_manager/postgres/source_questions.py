"""What a member is asked over SQL before it is copied or rewound from, as the role of replication with the rights of pg_rewind."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import asyncpg

from instance_manager.core.types import Timeline
from instance_manager.postgres.bootstrap import read_passfile
from instance_manager.postgres.clone import SourceServer
from instance_manager.postgres.histories import HistoryInvalid, history_file_name, parse_history
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.postgres.wal_dump import segment_file_name

DEADLINE_S = 10.0
_FILE_LIMIT_BYTES = 1 << 20


class SourceNotReady(LocalPostgresError):
    """The source cannot be reached, or has not checkpointed on the timeline yet. The directory was not touched."""


@dataclass(frozen=True, slots=True)
class Ancestry:
    """What a primary's directory tells of the time before its cluster, and of what lies outside of it."""

    history: str
    """Of the cluster's first timeline, as the file has it; empty: nothing was before."""
    note: str | None
    """The content of the named file; None: there is none."""
    keeps_fork: bool
    """Is the first segment of that timeline still in its pg_wal?"""
    tablespaces: dict[int, str]
    """Where they are, by oid."""


async def ask(
    source: SourceServer, query: str, *args: object, application_name: str, deadline_s: float = DEADLINE_S
) -> asyncpg.Record:
    """The first row of the answer. SourceNotReady: there is none."""
    try:
        password = await asyncio.to_thread(read_passfile, source.passfile, user=source.user)
        async with asyncio.timeout(deadline_s):
            connection = await asyncpg.connect(
                host=source.host,
                port=source.port,
                user=source.user,
                password=password,
                database="postgres",
                ssl=source.tls.for_asyncpg(),
                timeout=deadline_s,
                statement_cache_size=0,
                server_settings={"search_path": "pg_catalog,pg_temp", "application_name": application_name},
            )
            try:
                row = await connection.fetchrow(query, *args)
            finally:
                connection.terminate()
    except TimeoutError:
        raise SourceNotReady(f"{source.host}:{source.port}: no answer within {deadline_s:g} s") from None
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        raise SourceNotReady(f"{source.host}:{source.port}: {str(error) or type(error).__name__}") from error
    if row is None:
        raise SourceNotReady(f"{source.host}:{source.port} has no answer")
    return row


async def ancestry(source: SourceServer, first: Timeline, note_file: str) -> Ancestry:
    """Of the cluster whose first timeline is `first`. SourceNotReady."""
    name = "instance-manager origin"
    row = await ask(
        source,
        "select pg_read_binary_file($1::text, 0, $3::bigint, true) as history, "
        "pg_read_binary_file($2::text, 0, $3::bigint, true) as note, "
        "pg_size_bytes(current_setting('wal_segment_size')) as segment_bytes, "
        "(select json_object_agg(oid, pg_tablespace_location(oid)) from pg_tablespace "
        "where pg_tablespace_location(oid) like '/%')::text as tablespaces",
        f"pg_wal/{history_file_name(first)}",
        note_file,
        _FILE_LIMIT_BYTES,
        application_name=name,
    )
    history = (row["history"] or b"").decode(errors="replace")
    note = None if row["note"] is None else row["note"].decode(errors="replace")
    tablespaces = {int(oid): place for oid, place in json.loads(row["tablespaces"] or "{}").items()}
    try:
        parents = parse_history(first, history)
    except HistoryInvalid:
        return Ancestry(history, note, keeps_fork=False, tablespaces=tablespaces)
    if not parents:
        return Ancestry("", note, keeps_fork=False, tablespaces=tablespaces)
    segment_bytes = row["segment_bytes"]
    segment = segment_file_name(first, parents[-1][1] // segment_bytes, segment_bytes)
    row = await ask(
        source,
        "select (pg_stat_file($1::text, true)).size is not null as is_there",
        f"pg_wal/{segment}",
        application_name=name,
    )
    return Ancestry(history, note, keeps_fork=row["is_there"], tablespaces=tablespaces)
