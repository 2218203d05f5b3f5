"""The few statements and sessions that the drill's clients use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import asyncpg

TABLE = "drill_write"
TIMELINE = "('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int"
"""The timeline that this server writes on; only while it is not in recovery."""


@dataclass(frozen=True, slots=True)
class MemberAddress:
    """A member as applications reach it."""

    name: str
    host: str
    port: int
    user: str
    database: str
    password_file: Path | None


async def connect(member: MemberAddress, *, timeout_s: float) -> asyncpg.Connection:
    """A session as an application's. OSError, asyncpg.PostgresError or TimeoutError."""
    return await asyncpg.connect(
        host=member.host,
        port=member.port,
        user=member.user,
        database=member.database,
        passfile=None if member.password_file is None else str(member.password_file),
        ssl=False,
        timeout=timeout_s,
        server_settings={"application_name": "drill"},
    )


async def is_primary(connection: asyncpg.Connection) -> bool:
    return not await connection.fetchval("SELECT pg_is_in_recovery()", timeout=2.0)
