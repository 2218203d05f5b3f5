"""Statistics of the local Postgres for scrapes: never more than two connections, and no scrape waits for a hung server.

Only scrapes cause work. Each asks the cheap queries anew over one lasting session in the database postgres, and waits for
them up to its budget. What looks at every table or file, and users' own queries, is asked in the background over a second
connection, one database after another, when the last round is older than `refresh_s`; scrapes show its last answer, for
`STALE_S` at most. Every session is the monitoring role's, read-only, with pg_catalog as its search path: never a
superuser's in the database of a tenant.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import asyncpg

from instance_manager.metrics import catalogue, settings
from instance_manager.metrics.custom import CustomQuery
from instance_manager.metrics.exposition import Block, Family, gauge
from instance_manager.metrics.queries import MetricQuery
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.sql import Session, connect

log = logging.getLogger("instance_manager.metrics")

T = TypeVar("T")

SCRAPE_BUDGET_S = 0.7
"""How long a scrape waits for Postgres; what has not come by then is told as failed."""
QUERY_DEADLINE_S = 2.0
"""Of one built-in query, on both ends: a session that exceeds it is closed."""
ROUND_DEADLINE_S = 120.0
STATEMENTS_KEPT = 50
"""More than there are cheap queries: each is parsed and planned once in the life of the lasting session."""
STALE_S = 600.0
DATABASES_MAX = 500
DATABASES_SQL = (
    "SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate AND datconnlimit <> -2 "
    "AND has_database_privilege(oid, 'CONNECT') ORDER BY datname"
)

SUCCESS = Family(
    "instance_manager_collector_success",
    "gauge",
    "1: the collector's last run succeeded; 0: it failed, or was not done in time.",
    ("collector", "database"),
)
DURATION = Family(
    "instance_manager_collector_duration_seconds",
    "gauge",
    "How long the collector's last run took, in seconds.",
    ("collector", "database"),
)
AGE = Family(
    "instance_manager_collector_age_seconds",
    "gauge",
    "How old the shown result of the collector is, in seconds.",
    ("collector", "database"),
)
EXPORTER_SUCCESS = Family("pg_scrape_collector_success", "gauge", "1: the collector succeeded.", ("collector",))
EXPORTER_DURATION = Family(
    "pg_scrape_collector_duration_seconds", "gauge", "How long the collector took, in seconds.", ("collector",)
)
EXPORTER_COLLECTORS = {"pg_stat_bgwriter": "bgwriter", "pg_database": "database"}
"""The two collectors whose success postgres_exporter tells, by our names."""


@dataclass(slots=True)
class _Result:
    """The last run of one collector on one database."""

    collector: str
    database: str
    succeeded: bool = False
    error: str = ""
    took_s: float = 0.0
    at_s: float = 0.0
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Options:
    server_label: str
    """`host:port`, for the label `server` that postgres_exporter's families have."""
    tables: bool = True
    """Also one series for each table and statistic."""
    refresh_s: float = 30.0
    custom: tuple[CustomQuery, ...] = ()
    custom_unusable: bool = False
    """There should be custom queries, and their files cannot be used."""


class PostgresMetrics:
    """One local server. `collect` may be called at any time, and by several at once; `close` ends what goes on."""

    def __init__(self, server: LocalServer, major: int, options: Options) -> None:
        self._server = server
        self._major = major
        self.options = options
        self._session: Session | None = None
        self._scrape: asyncio.Task[list[_Result]] | None = None
        self._round: asyncio.Task[None] | None = None
        self._round_began_s = float("-inf")
        self._kept: dict[tuple[str, str], _Result] = {}
        self._is_primary = False
        self._databases: tuple[str, ...] = ()
        self._scrapes = 0
        self._told: set[tuple[str, str]] = set()

    async def collect(self, *, running: bool, budget_s: float = SCRAPE_BUDGET_S) -> list[Block]:
        """Blocks of everything; within `budget_s` and a little, whatever Postgres does. `running`: whether it should answer."""
        began_s = time.monotonic()
        self._scrapes += 1
        results: list[_Result] = []
        if running:
            if self._scrape is None or self._scrape.done():
                self._scrape = _started(self._ask_cheap())
            # Not cancelled: it has its own deadline, and the next scrape that comes before its end waits for the same.
            await asyncio.wait({self._scrape}, timeout=budget_s)
            results = (
                self._scrape.result() if self._scrape.done() else [_Result("connect", "postgres", error="no answer")]
            )
            if results and results[0].succeeded:
                await self._refresh(max(0.0, budget_s - (time.monotonic() - began_s)))
        elif self._session is not None:
            self._session.terminate()
        return self._blocks(results, began_s, running)

    async def close(self) -> None:
        """End the background work and close the connections."""
        tasks = [task for task in (self._scrape, self._round) if task is not None and not task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)
        if self._session is not None:
            self._session.terminate()

    def replace_options(self, options: Options) -> None:
        """After a reload; results of queries that are gone are not shown any more."""
        self.options = options
        names = {each.name for each in (*catalogue.NOW_AND_THEN, *catalogue.EACH_DATABASE)}
        names |= {custom.collector for custom in options.custom}
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] in names}
        self._round_began_s = float("-inf")

    # At each scrape.

    async def _ask_cheap(self) -> list[_Result]:
        connecting = _Result("connect", "postgres")
        began_s = time.monotonic()
        try:
            session = await self._lasting_session()
            rows = await session.fetch(
                f"SELECT pg_is_in_recovery() AS standby, array({DATABASES_SQL}) AS databases",
                deadline_s=QUERY_DEADLINE_S,
            )
        except (LocalPostgresError, asyncpg.PostgresError, OSError) as error:
            connecting.error = str(error)
            return [connecting]
        connecting.succeeded, connecting.took_s = True, time.monotonic() - began_s
        self._is_primary = not rows[0]["standby"]
        self._databases = tuple(rows[0]["databases"])[:DATABASES_MAX]
        results = [connecting]
        for query in catalogue.EACH_SCRAPE:
            if query.is_for(self._major, is_primary=self._is_primary):
                results.append(await self._run(query.name, "postgres", self._reading(session, query)))
        results.append(await self._run("pg_settings", "postgres", self._settings(session)))
        return results

    async def _lasting_session(self) -> Session:
        if self._session is None or not self._session.is_open:
            connection = await self._connect("postgres", QUERY_DEADLINE_S, statements_kept=STATEMENTS_KEPT)
            self._session = Session(connection)
        return self._session

    async def _connect(
        self, database: str, timeout_s: float, schemas: tuple[str, ...] = (), statements_kept: int = 0
    ) -> asyncpg.Connection:
        return await connect(
            self._server,
            database=database,
            statement_timeout_s=timeout_s,
            as_monitor=True,
            schemas=schemas,
            statements_kept=statements_kept,
        )

    def _reading(self, session: Session, query: MetricQuery) -> Callable[[], Awaitable[list[Block]]]:
        async def read() -> list[Block]:
            rows = await session.fetch(query.sql, deadline_s=QUERY_DEADLINE_S)
            return query.read(rows, self.options.server_label)

        return read

    def _settings(self, session: Session) -> Callable[[], Awaitable[list[Block]]]:
        async def read() -> list[Block]:
            return settings.read(
                await session.fetch(settings.SQL, deadline_s=QUERY_DEADLINE_S), self.options.server_label
            )

        return read

    async def _run(self, collector: str, database: str, read: Callable[[], Awaitable[list[Block]]]) -> _Result:
        """One collector's run; what goes wrong is its result, and told in the log once until it has succeeded again."""
        result = _Result(collector, database)
        began_s = time.monotonic()
        try:
            result.blocks = await read()
            result.succeeded = True
        except (LocalPostgresError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            result.error = str(error)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            # A column that is not there, or is no number: what was asked for does not fit this server.
            result.error = f"{type(error).__name__}: {error}"
        result.at_s = time.monotonic()
        result.took_s = result.at_s - began_s
        key = (collector, database)
        if result.succeeded:
            self._told.discard(key)
        elif key not in self._told:
            self._told.add(key)
            log.warning("the collector %s failed on %s: %s", collector, database, result.error)
        return result

    # Beside the scrapes.

    async def _refresh(self, patience_s: float) -> None:
        """Begin a round when it is time; only the very first is waited for."""
        now_s = time.monotonic()
        if (self._round is None or self._round.done()) and now_s - self._round_began_s >= self._shortest_interval_s():
            first = self._round is None
            self._round_began_s = now_s
            self._round = _started(self._go_round())
            if first:
                await asyncio.wait({self._round}, timeout=patience_s)

    def _shortest_interval_s(self) -> float:
        return min([self.options.refresh_s, *(custom.cache_s for custom in self.options.custom)])

    async def _go_round(self) -> None:
        try:
            async with asyncio.timeout(ROUND_DEADLINE_S):
                await self._each_database()
        except TimeoutError:
            log.warning("a round over all databases took longer than %g s and was ended", ROUND_DEADLINE_S)
        now_s = time.monotonic()
        databases = {"postgres", *self._databases}
        self._kept = {
            key: kept for key, kept in self._kept.items() if now_s - kept.at_s < STALE_S and key[1] in databases
        }

    async def _each_database(self) -> None:
        for database in self._databases:
            built_in = self._built_in_due(database)
            if built_in:
                await self._ask_built_in(database, built_in)
            for custom in self.options.custom:
                if self._is_due(custom, database):
                    await self._keep(custom.collector, database, self._custom(custom, database))

    def _built_in_due(self, database: str) -> tuple[MetricQuery, ...]:
        wanted = catalogue.EACH_DATABASE if self.options.tables else ()
        if database == "postgres":
            wanted = (*wanted, *catalogue.NOW_AND_THEN)
        # Less than the interval, because the round that it counts from took its time too.
        return tuple(
            query
            for query in wanted
            if query.is_for(self._major, is_primary=self._is_primary)
            and self._age_s(query.name, database) >= self.options.refresh_s * 0.9
        )

    def _is_due(self, custom: CustomQuery, database: str) -> bool:
        return (
            custom.query.is_for(self._major, is_primary=self._is_primary)
            and database in custom.databases_of(self._databases)
            and self._age_s(custom.collector, database) >= custom.cache_s
        )

    def _age_s(self, collector: str, database: str) -> float:
        kept = self._kept.get((collector, database))
        return time.monotonic() - kept.at_s if kept is not None else float("inf")

    async def _ask_built_in(self, database: str, queries: tuple[MetricQuery, ...]) -> None:
        try:
            session = Session(await self._connect(database, 5 * QUERY_DEADLINE_S))
        except LocalPostgresError as error:
            message = str(error)

            async def unreachable() -> list[Block]:
                raise LocalPostgresError(message)

            for query in queries:
                await self._keep(query.name, database, unreachable)
            return
        try:
            for query in queries:
                await self._keep(query.name, database, self._reading_slowly(session, query))
        finally:
            session.terminate()

    def _reading_slowly(self, session: Session, query: MetricQuery) -> Callable[[], Awaitable[list[Block]]]:
        async def read() -> list[Block]:
            rows = await session.fetch(query.sql, deadline_s=5 * QUERY_DEADLINE_S)
            return query.read(rows, self.options.server_label)

        return read

    async def _keep(self, collector: str, database: str, read: Callable[[], Awaitable[list[Block]]]) -> None:
        result = await self._run(collector, database, read)
        for block in result.blocks:
            # Shown again and again: one text is joined faster than its thousands of lines.
            block.lines = ["".join(block.lines)] if block.lines else []
        self._kept[collector, database] = result

    def _custom(self, custom: CustomQuery, database: str) -> Callable[[], Awaitable[list[Block]]]:
        async def read() -> list[Block]:
            session = Session(await self._connect(database, custom.timeout_s, custom.schemas))
            try:
                # Whatever it sets is undone with the transaction; a second statement has no place in it.
                deadline_s = custom.timeout_s + 0.5
                await session.execute("BEGIN TRANSACTION READ ONLY", deadline_s=deadline_s)
                if custom.predicate is not None and not await session.fetchval(custom.predicate, deadline_s=deadline_s):
                    return []
                rows = await session.fetch(custom.query.sql, deadline_s=deadline_s)
                return custom.read(rows, self.options.server_label, database)
            finally:
                session.terminate()

        return read

    # What is shown.

    def _blocks(self, results: list[_Result], began_s: float, running: bool) -> list[Block]:
        up = bool(results) and results[0].succeeded
        blocks = [
            gauge("pg_up", "1: Postgres answered this scrape.", up),
            gauge(
                "instance_manager_custom_queries_load_error",
                "1: a file of custom queries cannot be used, so none of them runs; the log says why.",
                self.options.custom_unusable,
            ),
        ]
        # From a server that does not answer nothing of before is shown: it would pass for the present.
        shown = [*results, *self._kept.values()] if up else results
        if not up and running and not results:
            shown = [_Result("connect", "postgres")]
        for result in shown:
            blocks += result.blocks
        now_s = time.monotonic()
        success, duration, age = Block(SUCCESS), Block(DURATION), Block(AGE)
        their_success, their_duration = Block(EXPORTER_SUCCESS), Block(EXPORTER_DURATION)
        for result in shown:
            labels = (result.collector, result.database)
            success.add(result.succeeded, *labels)
            duration.add(round(result.took_s, 6), *labels)
            if result.at_s:
                age.add(round(max(0.0, now_s - result.at_s), 3), *labels)
            if (theirs := EXPORTER_COLLECTORS.get(result.collector)) is not None and result.database == "postgres":
                their_success.add(result.succeeded, theirs)
                their_duration.add(round(result.took_s, 6), theirs)
        failed = not up or any(not result.succeeded for result in shown)
        scrapes = Block(Family("pg_exporter_scrapes_total", "counter", "Scrapes of this instance."))
        scrapes.add(self._scrapes)
        return [
            *blocks,
            success,
            duration,
            age,
            their_success,
            their_duration,
            scrapes,
            gauge("pg_exporter_last_scrape_error", "1: a collector failed in this scrape.", failed),
            gauge(
                "pg_exporter_last_scrape_duration_seconds",
                "How long this scrape waited for Postgres, in seconds.",
                round(time.monotonic() - began_s, 6),
            ),
        ]


def _started(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    task = asyncio.create_task(work)
    task.add_done_callback(_look_at)
    return task


def _look_at(task: asyncio.Task[Any]) -> None:
    """An outcome that nobody waits for any more is in the log, not in asyncio's complaint."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("collecting metrics failed", exc_info=error)
