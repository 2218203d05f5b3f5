"""The sampler: what each member is, and how new what it shows is, every 50 ms, in a session that is kept while it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg

from instance_manager.demo.processes import now_s
from instance_manager.drill.history import HistoryWriter, Sample, Seen
from instance_manager.drill.sql import TABLE, TIMELINE, MemberAddress
from instance_manager.drill.write_probe import Session

SAMPLE_INTERVAL_S = 0.05
ANSWER_TIMEOUT_S = 1.0
_QUERY = (
    f"SELECT r, CASE WHEN NOT r THEN {TIMELINE} END, "  # noqa: S608
    f"(SELECT begun_s FROM {TABLE} ORDER BY id DESC LIMIT 1) FROM (SELECT pg_is_in_recovery() AS r) AS s"
)


class Sampler:
    """Reads every member on its own, so that a silent one does not hold up the others."""

    def __init__(self, members: Sequence[MemberAddress], history: HistoryWriter) -> None:
        self._members = members
        self._history = history

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            for member in self._members:
                session = Session(member)
                tasks.create_task(session.keep_open(stop))
                tasks.create_task(self._sample(session, stop))

    async def _sample(self, session: Session, stop: asyncio.Event) -> None:
        while not stop.is_set():
            begin_s = now_s()
            seen, timeline, newest_s = Seen.NONE, None, None
            if session.connection is not None:
                try:
                    recovering, timeline, newest_s = await session.answer(_QUERY, deadline_s=ANSWER_TIMEOUT_S)
                    seen = Seen.STANDBY if recovering else Seen.PRIMARY
                except (
                    OSError,
                    asyncpg.PostgresError,
                    asyncpg.InterfaceError,
                    asyncpg.InternalClientError,
                    TimeoutError,
                ):
                    session.drop()
            self._history.add(Sample(session.member.name, begin_s, now_s(), seen, timeline, newest_s))
            await asyncio.sleep(max(0.0, begin_s + SAMPLE_INTERVAL_S - now_s()))
