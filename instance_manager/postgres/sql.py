"""SQL on the local server, as superuser (or, read-only, as the monitoring role), over the Unix socket.

Every session pins `search_path`, so that operators which a database owner plants in `public` are never run by us, and
has two limits: the server's `statement_timeout`, and a deadline of our own that also holds when the postmaster or the
backend is stopped. A deadline that passes *terminates* the connection; no cancel request is ever sent, for that would
need an answer of the very server that gives none.

asyncpg's statement cache is off, but for the session that looks at the server again and again: an unnamed statement leaves
nothing behind in the server. A kept one saves a round trip and the planning of each look; what it reads are functions and
views of the catalog, which no promotion changes, and with a restart the session is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from instance_manager.postgres.host_based_access import MONITORING_ROLE
from instance_manager.postgres.server import DeadlinePassed, LocalPostgresError, LocalServer

CONNECT_DEADLINE_S = 2.0
STATEMENT_TIMEOUT_S = 5.0
QUERY_DEADLINE_S = 5.0
APPLICATION_NAME = "instance-manager"

_T = TypeVar("_T")
_GONE_SQLSTATES = frozenset({"57P01", "57P02", "57P03", "57P05", "08000", "08003", "08006"})
_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]{0,62}")


class SqlUnavailable(LocalPostgresError):
    """No session: refused, starting up, shutting down, or the connection was lost. `sqlstate` where the server said it."""

    def __init__(self, reason: str, sqlstate: str | None = None) -> None:
        super().__init__(f"no SQL session: {reason}")
        self.sqlstate = sqlstate


async def connect(
    server: LocalServer,
    *,
    database: str = "postgres",
    deadline_s: float = CONNECT_DEADLINE_S,
    statement_timeout_s: float = STATEMENT_TIMEOUT_S,
    as_monitor: bool = False,
    schemas: Sequence[str] = (),
    statements_kept: int = 0,
) -> asyncpg.Connection:
    """A new superuser connection over the Unix socket; `as_monitor`: one of the monitoring role, read-only, with
    `schemas` behind pg_catalog in its search path.

    SqlUnavailable: refused or broken off. DeadlinePassed: no answer, for instance of a stopped postmaster; the socket
    is closed. Prefer `session`, which also closes it.
    """
    if schemas and not as_monitor:
        raise ValueError("a superuser looks nowhere but in pg_catalog")
    settings = {
        "application_name": APPLICATION_NAME,
        "search_path": ",".join(["pg_catalog", *map(quote_identifier, schemas), "pg_temp"]),
        "statement_timeout": f"{max(1, round(statement_timeout_s * 1000))}ms",
        # Our own writes never wait for a standby; a barrier waits by looking, with a deadline.
        "synchronous_commit": "local",
        "default_transaction_read_only": "on" if as_monitor else "off",
        "idle_in_transaction_session_timeout": "60s",
        # A backend that we abandoned notices while its statement still runs.
        "client_connection_check_interval": "1s",
        # Verifiers of passwords are in some statements; whatever a user lets the server log, ours are not logged.
        "log_statement": "none",
        "log_min_duration_statement": "-1",
        "log_min_error_statement": "panic",
    }
    if as_monitor:
        settings["jit"] = "off"
    try:
        async with asyncio.timeout(deadline_s):
            connection: asyncpg.Connection = await asyncpg.connect(
                host=str(server.socket_directory),
                port=server.port,
                user=MONITORING_ROLE if as_monitor else server.superuser,
                # Not None: asyncpg would look into PGPASSWORD and ~/.pgpass.
                password="",
                database=database,
                ssl=False,
                # Our own deadline rules: asyncpg's would only add a second one.
                timeout=deadline_s + 1,
                statement_cache_size=statements_kept,
                target_session_attrs=SessionAttribute.any,
                server_settings=settings,
            )
    except TimeoutError:
        raise DeadlinePassed("connecting over the Unix socket", deadline_s) from None
    except asyncpg.PostgresError as error:
        raise SqlUnavailable(str(error), error.sqlstate) from error
    except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        raise SqlUnavailable(str(error) or type(error).__name__) from error
    return connection


class Session:
    """One connection. A deadline that passes, or a cancellation, terminates it; then every call is SqlUnavailable.

    `asyncpg.PostgresError` (with its `sqlstate`) is raised for what the server refuses; DeadlinePassed and
    SqlUnavailable otherwise. Not for use by several tasks at once.
    """

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    @property
    def connection(self) -> asyncpg.Connection:
        """The connection below, for what is not here. Whoever uses it owns the deadline."""
        return self._connection

    @property
    def is_open(self) -> bool:
        return not self._connection.is_closed()

    async def fetch(self, query: str, *args: object, deadline_s: float = QUERY_DEADLINE_S) -> list[asyncpg.Record]:
        """All rows."""
        return await self._run(lambda connection: connection.fetch(query, *args), deadline_s)

    async def fetchrow(self, query: str, *args: object, deadline_s: float = QUERY_DEADLINE_S) -> asyncpg.Record | None:
        """The first row; None: no row."""
        return await self._run(lambda connection: connection.fetchrow(query, *args), deadline_s)

    async def fetchval(self, query: str, *args: object, deadline_s: float = QUERY_DEADLINE_S) -> Any:
        """The first column of the first row; None: no row, or null."""
        return await self._run(lambda connection: connection.fetchval(query, *args), deadline_s)

    async def execute(self, query: str, *args: object, deadline_s: float = QUERY_DEADLINE_S) -> str:
        """The command tag, such as `CHECKPOINT` or `DELETE 3`. Without `args` several statements may be given."""
        return await self._run(lambda connection: connection.execute(query, *args), deadline_s)

    def terminate(self) -> None:
        """Close the socket now, without a word to the server. May be called at any time, and twice."""
        self._connection.terminate()

    async def _run(self, call: Callable[[asyncpg.Connection], Awaitable[_T]], deadline_s: float) -> _T:
        if self._connection.is_closed():
            raise SqlUnavailable("the connection is closed")
        # The query is a task of its own and is never cancelled: a cancelled asyncpg query sends a cancel request
        # over a new connection. Terminating the connection first ends the query with an error instead.
        query = asyncio.ensure_future(call(self._connection))
        try:
            await asyncio.wait({query}, timeout=deadline_s)
        finally:
            if not query.done():
                self.terminate()
                query.add_done_callback(_retrieve)
        if not query.done():
            await asyncio.wait({query}, timeout=1)
            raise DeadlinePassed("a query", deadline_s)
        try:
            return query.result()
        except asyncpg.PostgresError as error:
            if error.sqlstate in _GONE_SQLSTATES:
                self.terminate()
                raise SqlUnavailable(str(error), error.sqlstate) from error
            raise
        except (OSError, asyncpg.InternalClientError) as error:
            self.terminate()
            raise SqlUnavailable(str(error) or type(error).__name__) from error
        except asyncpg.InterfaceError as error:
            # Also what a wrong argument raises: that leaves the connection open, and is the caller's mistake.
            if self._connection.is_closed():
                raise SqlUnavailable(str(error) or type(error).__name__) from error
            raise


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Look at the outcome, so that asyncio does not log it as never retrieved."""
    if not future.cancelled():
        future.exception()


@contextlib.asynccontextmanager
async def session(
    server: LocalServer,
    *,
    database: str = "postgres",
    deadline_s: float = CONNECT_DEADLINE_S,
    statement_timeout_s: float = STATEMENT_TIMEOUT_S,
) -> AsyncIterator[Session]:
    """A new connection for the block: also the way to see what "a new connection sees" after a reload (P1, P5).

    `deadline_s` is for connecting; each query has its own.
    """
    connection = await connect(
        server, database=database, deadline_s=deadline_s, statement_timeout_s=statement_timeout_s
    )
    opened = Session(connection)
    try:
        yield opened
    finally:
        # A polite goodbye (Terminate message) would wait for the server's answer: closing the socket says the same.
        opened.terminate()


class LocalSql:
    """One long-lived superuser session that is opened again when it was lost; calls of several tasks take turns.

    A call's deadline includes its turn and the connecting. Nothing is retried: a query that broke off may have run.
    """

    def __init__(
        self,
        server: LocalServer,
        *,
        database: str = "postgres",
        statement_timeout_s: float = STATEMENT_TIMEOUT_S,
        statements_kept: int = 0,
    ) -> None:
        self._server = server
        self._database = database
        self._statement_timeout_s = statement_timeout_s
        self._statements_kept = statements_kept
        self._session: Session | None = None
        self._turn = asyncio.Lock()

    async def fetch(self, query: str, *args: object, deadline_s: float = QUERY_DEADLINE_S) -> list[asyncpg.Record]:
        """All rows."""
        return await self._with_session(lambda s, left_s: s.fetch(query, *args, deadline_s=left_s), deadline_s)

    async def fetchrow(self, query: str, *args: object, deadline_s: float = QUERY_DEADLINE_S) -> asyncpg.Record | None:
        """The first row; None: no row."""
        return await self._with_session(lambda s, left_s: s.fetchrow(query, *args, deadline_s=left_s), deadline_s)

    async def fetchval(self, query: str, *args: object, deadline_s: float = QUERY_DEADLINE_S) -> Any:
        """The first column of the first row; None: no row, or null."""
        return await self._with_session(lambda s, left_s: s.fetchval(query, *args, deadline_s=left_s), deadline_s)

    async def execute(self, query: str, *args: object, deadline_s: float = QUERY_DEADLINE_S) -> str:
        """The command tag. Without `args` several statements may be given."""
        return await self._with_session(lambda s, left_s: s.execute(query, *args, deadline_s=left_s), deadline_s)

    def close(self) -> None:
        """Close the long-lived connection; the next call opens one again."""
        if self._session is not None:
            self._session.terminate()
            self._session = None

    async def _with_session(self, call: Callable[[Session, float], Awaitable[_T]], deadline_s: float) -> _T:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await self._turn.acquire()
        except TimeoutError:
            raise DeadlinePassed("waiting for the SQL session", deadline_s) from None
        try:
            if self._session is None or not self._session.is_open:
                self._session = Session(
                    await connect(
                        self._server,
                        database=self._database,
                        deadline_s=max(0.001, end_s - loop.time()),
                        statement_timeout_s=self._statement_timeout_s,
                        statements_kept=self._statements_kept,
                    )
                )
            return await call(self._session, max(0.001, end_s - loop.time()))
        finally:
            self._turn.release()


def quote_identifier(name: str) -> str:
    """`name` in double quotes, for SQL text. Only lower-case names of letters, digits and `_`, 63 at most.

    ValueError for anything else: what we create is ours to name, so nothing more is ever needed.
    """
    if _IDENTIFIER.fullmatch(name) is None:
        raise ValueError(f"not a name for a database object: {name!r} (lower-case letters, digits and _, 63 at most)")
    return f'"{name}"'


def quote_literal(text: str) -> str:
    """`text` as an SQL string literal, safe with any `standard_conforming_strings`. ValueError: a zero byte."""
    if "\0" in text:
        raise ValueError("a zero byte cannot be in SQL text")
    quoted = text.replace("'", "''")
    return " E'" + quoted.replace("\\", "\\\\") + "'" if "\\" in quoted else f"'{quoted}'"
