"""The sampler: what each member is and how new what it shows is, every 50 ms, and every 300 ms which rows it shows.

Each member has a session of its own that is kept while it lives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import asyncpg

from instance_manager.demo.processes import now_s
from instance_manager.drill.history import HistoryWriter, Read, Sample, Seen, Span
from instance_manager.drill.sql import CONTENTS, TABLE, TIMELINE, MemberAddress, span_of
from instance_manager.drill.write_probe import Session

SAMPLE_INTERVAL_S = 0.05
READ_INTERVAL_S = 0.3
ANSWER_TIMEOUT_S = 1.0
NEWEST = 500
"""So many numbers of each client every read asks for: some seconds of writing, which is what a failover could lose."""
STRETCH = 500
"""And so many older ones, further on in every read, so that in time the whole table is read: 400,000 rows in a minute."""
_QUERY = (
    f"SELECT r, CASE WHEN NOT r THEN {TIMELINE} END, "  # noqa: S608
    f"(SELECT begun_s FROM {TABLE} ORDER BY id DESC LIMIT 1) FROM (SELECT pg_is_in_recovery() AS r) AS s"
)
_NO_ANSWER = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)
Asked = tuple[int, int, int | None]
"""(client, first number, last number or None for the newest)."""


class Sampler:
    """Reads every member on its own, so that a silent one does not hold up the others."""

    def __init__(self, members: Sequence[MemberAddress], history: HistoryWriter, *, clients: int) -> None:
        self._members = members
        self._history = history
        self._clients = clients

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            for member in self._members:
                session = Session(member)
                tasks.create_task(session.keep_open(stop))
                tasks.create_task(self._watch(session, stop))

    async def _watch(self, session: Session, stop: asyncio.Event) -> None:
        windows = Windows(self._clients)
        next_read_s = now_s()
        while not stop.is_set():
            begin_s = now_s()
            connection = session.connection
            sample = await self._sample(session)
            same = connection is not None and session.connection is connection
            if begin_s >= next_read_s and sample.seen is not Seen.NONE and same:
                next_read_s = begin_s + READ_INTERVAL_S
                await self._read(session, sample, windows)
            await asyncio.sleep(max(0.0, begin_s + SAMPLE_INTERVAL_S - now_s()))

    async def _sample(self, session: Session) -> Sample:
        begin_s = now_s()
        seen, timeline, newest_s = Seen.NONE, None, None
        if session.connection is not None:
            try:
                recovering, timeline, newest_s = await session.answer(_QUERY, deadline_s=ANSWER_TIMEOUT_S)
                seen = Seen.STANDBY if recovering else Seen.PRIMARY
            except _NO_ANSWER:
                session.drop()
        sample = Sample(session.member.name, begin_s, now_s(), seen, timeline, newest_s)
        self._history.add(sample)
        return sample

    async def _read(self, session: Session, known: Sample, windows: Windows) -> None:
        """What the member is was asked before, in the same session: a promotion between the read's own snapshot and the
        look at the role would pass a standby's rows for a primary's. A primary stays one while its sessions live."""
        asked = windows.following()
        begin_s = now_s()
        try:
            rows = await session.rows(CONTENTS, *map(list, zip(*asked, strict=True)), deadline_s=ANSWER_TIMEOUT_S)
        except _NO_ANSWER:
            session.drop()
            return
        end_s = now_s()
        spans = tuple(span_of(row) for row in rows)
        windows.learn(spans)
        self._history.add(Read(session.member.name, begin_s, end_s, known.seen, known.timeline, spans))


class Windows:
    """What the next read of a member asks for: a bounded part of the table, however large that is."""

    def __init__(self, clients: int) -> None:
        self._newest = dict.fromkeys(range(clients), 0)
        self._stretches = dict.fromkeys(range(clients), 0)
        """Where the next older stretch begins."""

    def following(self) -> list[Asked]:
        asked: list[Asked] = []
        for client, newest in self._newest.items():
            first = max(0, newest - NEWEST + 1)
            asked.append((client, first, None))
            if first > 0:
                begin = self._stretches[client] if self._stretches[client] < first else 0
                end = min(begin + STRETCH, first)
                asked.append((client, begin, end - 1))
                self._stretches[client] = end
        return asked

    def learn(self, spans: Iterable[Span]) -> None:
        for span in spans:
            for _, high in span.runs:
                self._newest[span.client] = max(self._newest[span.client], high)
