"""The few statements and sessions that the drill's clients use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import asyncpg

from instance_manager.drill.history import Span
from instance_manager.drill.runs import NO_END

TABLE = "drill_write"
TIMELINE = "('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int"
"""The timeline that this server writes on; only while it is not in recovery."""
MAKE_TABLE = f"""
DROP TABLE IF EXISTS {TABLE};
CREATE TABLE {TABLE} (id bigserial PRIMARY KEY, client int NOT NULL, number bigint NOT NULL, begun_s float8 NOT NULL);
CREATE INDEX ON {TABLE} (client, number)
"""
"""The index is not unique: a row that is there twice is for the judge to find. It bounds the cost of CONTENTS."""
CONTENTS = f"""
SELECT asked.client, asked.first, asked.last, shown.runs, shown.twice
FROM unnest($1::int[], $2::bigint[], $3::bigint[]) AS asked (client, first, last)
CROSS JOIN LATERAL (
  SELECT range_agg(int8range(number, number, '[]')) AS runs, array_agg(number) FILTER (WHERE copies > 1) AS twice
  FROM (
    SELECT number, count(*) AS copies FROM {TABLE} AS row
    WHERE row.client = asked.client AND row.number BETWEEN asked.first AND coalesce(asked.last, {NO_END})
    GROUP BY number
  ) AS each
) AS shown
"""  # noqa: S608
"""What there is in some stretches of numbers, each of one client, in one snapshot: as runs, so that it stays small."""


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


def span_of(row: asyncpg.Record) -> Span:
    """Of a row of CONTENTS."""
    # Ranges of integers come with their upper end excluded.
    runs = tuple((run.lower, run.upper - 1) for run in row["runs"] or ())
    return Span(row["client"], row["first"], row["last"], runs, tuple(sorted(row["twice"] or ())))
