"""The write probe: clients that insert numbered rows, each its own transaction, and remember every acknowledgement.

Each client keeps a session with every member, opened in the background, and tries the members in turn every 50 ms until
one takes the row; then it stays there. A command without an answer after its deadline is *unknown*: its session is
dropped without a cancel request, because a cancelled wait would be reported as success (P13).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import asyncpg

from instance_manager.demo.processes import now_s
from instance_manager.drill.history import HistoryWriter, Outcome, Write
from instance_manager.drill.sql import TABLE, TIMELINE, MemberAddress, connect

RETRY_INTERVAL_S = 0.05
CONNECT_TIMEOUT_S = 2.0
COMMAND_TIMEOUT_S = 2.0
_INSERT = (
    f"INSERT INTO {TABLE} (client, number, begun_s) VALUES ($1, $2, $3) "  # noqa: S608
    f"RETURNING {TIMELINE}"
)
# Codes after which the commit may have happened: the session was ended under the command.
_UNCERTAIN = (
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InternalServerError,
    asyncpg.PostgresConnectionError,
    asyncpg.QueryCanceledError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)
# Refusals that say nothing against the session: a standby, or a full disk.
_SESSION_STAYS = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.InsufficientResourcesError,
)


class WriteProbe:
    """All clients of one run."""

    def __init__(
        self, members: Sequence[MemberAddress], history: HistoryWriter, *, clients: int = 4, interval_s: float = 0.01
    ) -> None:
        self._clients = [_Client(number, members, history, interval_s) for number in range(clients)]

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; each client ends after the attempt that it is in."""
        async with asyncio.TaskGroup() as tasks:
            for client in self._clients:
                tasks.create_task(client.run(stop))


class Session:
    """A session with one member that is opened again whenever it is lost."""

    def __init__(self, member: MemberAddress) -> None:
        self.member = member
        self.connection: asyncpg.Connection | None = None
        self.warned = False
        """The server sent a warning since this was last set to False."""

    async def keep_open(self, stop: asyncio.Event) -> None:
        try:
            while not stop.is_set():
                if self.connection is None or self.connection.is_closed():
                    self.connection = None
                    with contextlib.suppress(
                        OSError,
                        asyncpg.PostgresError,
                        asyncpg.InterfaceError,
                        asyncpg.InternalClientError,
                        TimeoutError,
                    ):
                        connection = await connect(self.member, timeout_s=CONNECT_TIMEOUT_S)
                        connection.add_log_listener(self._on_log)
                        self.connection = connection
                await asyncio.sleep(RETRY_INTERVAL_S)
        finally:
            self.drop()

    def drop(self) -> None:
        if self.connection is not None:
            self.connection.terminate()
            self.connection = None

    async def answer(self, query: str, *arguments: object, deadline_s: float) -> Any:
        """The only row. TimeoutError: no answer, the session is dropped. Else asyncpg's errors and OSError."""
        (row,) = await self.rows(query, *arguments, deadline_s=deadline_s)
        return row

    async def rows(self, query: str, *arguments: object, deadline_s: float) -> Sequence[Any]:
        """All rows; errors as above."""
        connection = self.connection
        if connection is None or connection.is_closed():
            raise asyncpg.InterfaceError("not connected")
        task = asyncio.ensure_future(connection.fetch(query, *arguments))
        try:
            done, _ = await asyncio.wait({task}, timeout=deadline_s)
        except asyncio.CancelledError:
            self.drop()
            raise
        if not done:
            self.drop()
            await asyncio.wait({task}, timeout=1.0)
            task.cancelled() or task.exception()
            raise TimeoutError
        return task.result()

    def _on_log(self, _: object, message: Any) -> None:
        self.warned = self.warned or message.severity_en == "WARNING"


class _Client:
    def __init__(
        self, number: int, members: Sequence[MemberAddress], history: HistoryWriter, interval_s: float
    ) -> None:
        self._number = number
        # Each begins elsewhere, so that not all of them wait for the same silent member.
        turn = number % len(members)
        self._sessions = [Session(member) for member in (*members[turn:], *members[:turn])]
        self._history = history
        self._interval_s = interval_s
        self._numbers = itertools.count(1)

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            for session in self._sessions:
                tasks.create_task(session.keep_open(stop))
            turn = 0
            while not stop.is_set():
                session = self._sessions[turn % len(self._sessions)]
                if session.connection is None or session.connection.is_closed():
                    turn += 1
                    # A full round without any session is a pause; a single one that is missing is skipped.
                    if turn % len(self._sessions) == 0:
                        await asyncio.sleep(RETRY_INTERVAL_S)
                    continue
                outcome = await self._write(session)
                if outcome is Outcome.ACKNOWLEDGED:
                    await asyncio.sleep(self._interval_s)
                else:
                    turn += 1
                    await asyncio.sleep(RETRY_INTERVAL_S / len(self._sessions))

    async def _write(self, session: Session) -> Outcome:
        number = next(self._numbers)
        session.warned = False
        timeline: int | None = None
        text = ""
        begin_s = now_s()
        try:
            row = await session.answer(_INSERT, self._number, number, begin_s, deadline_s=COMMAND_TIMEOUT_S)
            timeline = row[0]
            outcome = Outcome.CANCELLED_WAIT if session.warned else Outcome.ACKNOWLEDGED
        except _UNCERTAIN as error:
            outcome, text = Outcome.UNKNOWN, f"{type(error).__name__}: {error}"
            session.drop()
        except asyncpg.PostgresError as error:
            outcome, text = Outcome.FAILED, f"{type(error).__name__}: {error}"
            if not isinstance(error, _SESSION_STAYS):
                session.drop()
        # asyncpg's InternalClientError too: a session that dies between two commands confuses its state machine.
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError) as error:
            outcome, text = Outcome.UNKNOWN, f"{type(error).__name__}: {error}"
            session.drop()
        self._history.add(
            Write(self._number, number, session.member.name, begin_s, now_s(), outcome, timeline, text[:200])
        )
        return outcome
