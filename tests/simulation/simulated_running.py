"""What the rules of Postgres ask of a running server, answered from the model: `postgres.running.RunningServer`.

Every question takes a while, and is answered by what is true at its end. A server that cannot answer (a postmaster that
stands still takes no connection) lets it run into its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from simulated_recovery import Startup
from simulated_syncrep import Outcome
from simulated_wal import Entry

from instance_manager.config import Configuration
from instance_manager.core.types import Lsn, Timeline
from instance_manager.postgres.deadlines import Deadline
from instance_manager.postgres.running import (
    BLOCK_DIRECTORY,
    ChildKind,
    ProcessSession,
    ReplicationSession,
    Sender,
    SettingsFile,
)
from instance_manager.postgres.server import DeadlinePassed
from instance_manager.postgres.sql import SqlUnavailable

if TYPE_CHECKING:
    from simulated_server import PostgresServer
    from simulated_time import Host, Process
    from simulated_volume import DataDirectory, DataVolume

BLOCK = f"/simulated/state/{BLOCK_DIRECTORY}"
ASKS_AGAIN_S = 0.02
CANARY_LOOK_S = 0.004


class Instance(Protocol):
    """What the port needs of `simulated_instance.SimulatedInstance`."""

    name: str
    host: Host
    volume: DataVolume
    server: PostgresServer | None
    configuration: Configuration


class Access:
    """How the agent in `process` reaches the server and the disk of its instance."""

    def __init__(self, instance: Instance, process: Process) -> None:
        self.instance = instance
        self.process = process

    @property
    def volume(self) -> DataVolume:
        return self.instance.volume

    async def latency(self) -> None:
        await asyncio.sleep(self._latency_s())

    def _latency_s(self) -> float:
        cluster = self.volume.cluster
        behaviour = cluster.behaviour
        if cluster.world.random.random() < behaviour.slow_call:
            return cluster.draw(behaviour.slow_call_s)
        return cluster.draw(behaviour.call_s)

    # The server.

    def live(self) -> PostgresServer:
        """The server that takes connections now, SqlUnavailable otherwise."""
        server = self.instance.server
        if server is None or not server.postmaster.alive or not server.process.alive:
            raise SqlUnavailable("connection refused")
        if not server.ready:
            raise SqlUnavailable("the database system is starting up", "57P03")
        if server.stopping:
            raise SqlUnavailable("the database system is shutting down", "57P03")
        return server

    async def connect(self, deadline_s: float, what: str) -> PostgresServer:
        """A new connection: the postmaster has to fork for it."""
        until_s = self._until_s(deadline_s)
        latency_s = self._latency_s()
        await asyncio.sleep(min(latency_s, deadline_s))
        while True:
            server = self.instance.server
            standing = server is not None and (server.postmaster.paused or server.process.held)
            if not standing and latency_s <= deadline_s:
                return self.live()
            await self._wait(until_s, what, deadline_s)

    async def ask(self, server: PostgresServer, deadline_s: float, what: str) -> None:
        """A question in a session that exists already."""
        until_s = self._until_s(deadline_s)
        latency_s = self._latency_s()
        await asyncio.sleep(min(latency_s, deadline_s))
        while True:
            if not server.process.alive:
                raise SqlUnavailable("the connection was lost")
            if server.stopping:
                raise SqlUnavailable("terminating connection due to administrator command", "57P01")
            if not server.process.held and latency_s <= deadline_s:
                return
            await self._wait(until_s, what, deadline_s)

    async def done(self, begin: Callable[[Callable[[], object]], object], deadline_s: float, what: str) -> None:
        """`begin` starts something in the server that calls back at its end."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        server = self.live()
        server.on_exit(lambda _: self.process.call_soon(end))
        begin(lambda: self.process.call_soon(end))
        try:
            async with asyncio.timeout(deadline_s):
                await ended
        except TimeoutError:
            raise DeadlinePassed(what, deadline_s) from None
        if not server.process.alive:
            raise SqlUnavailable("the connection was lost")

    def _until_s(self, deadline_s: float) -> float:
        return asyncio.get_running_loop().time() + deadline_s

    async def _wait(self, until_s: float, what: str, deadline_s: float) -> None:
        left_s = until_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise DeadlinePassed(what, deadline_s)
        await asyncio.sleep(min(ASKS_AGAIN_S, left_s))

    # The disk.

    async def read_file(self) -> None:
        """Comes back when the disk does; whoever waits has a deadline or is patient."""
        await self.latency()
        while self.volume.stalled:  # noqa: ASYNC110 - a model of a disk, asked in virtual time
            await asyncio.sleep(ASKS_AGAIN_S)

    async def write_file(self) -> None:
        await self.read_file()
        if self.volume.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def fsync(self) -> None:
        flushed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done() -> None:
            if not flushed.done():
                flushed.set_result(None)

        self.volume.flush(self.process, done)
        await flushed

    def data(self) -> DataDirectory:
        if self.volume.data is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "the data directory")
        return self.volume.data


class SimulatedSettingsFile:
    def __init__(self, access: Access, reload: Callable[[], Awaitable[None]]) -> None:
        self._access = access
        self._reload = reload

    async def read(self) -> dict[str, str]:
        await self._access.read_file()
        return dict(self._access.data().settings or {})

    async def write(self, settings: Mapping[str, str]) -> None:
        await self._access.write_file()
        self._access.data().settings = dict(settings)

    async def reload(self) -> None:
        await self._reload()

    async def shown(self, names: Iterable[str], deadline: Deadline) -> dict[str, str | None]:
        server = await self._access.connect(deadline.left_s, "a new connection")
        return {name: server.loaded.get(name, "$libdir" if name == "dynamic_library_path" else None) for name in names}


class SimulatedReplication:
    def __init__(self, access: Access, server: PostgresServer) -> None:
        self._access = access
        self._server = server

    async def primary_since(self, deadline: Deadline) -> str | None:
        await self._access.ask(self._server, deadline.left_s, "pg_is_in_recovery")
        return None if self._server.in_recovery else self._server.started_text

    async def senders(self, deadline: Deadline) -> list[Sender]:
        await self._access.ask(self._server, deadline.left_s, "pg_stat_replication")
        return [
            Sender(
                pid=each.child.pid,
                backend_start=each.started,
                name=each.name,
                state=each.state,
                sync_priority=each.priority if each.flush is not None else 0,
                sent_lsn=Lsn(each.sent),
                flush_lsn=None if each.flush is None else Lsn(each.flush),
                slot=each.slot if self._server.active_slots.get(each.slot or "") is each else None,
            )
            for each in self._server.senders
        ]

    async def terminate_senders(self, pids: Collection[int], deadline: Deadline) -> None:
        await self._access.ask(self._server, deadline.left_s, "pg_terminate_backend")
        for sender in tuple(self._server.senders):
            if sender.child.pid in pids:
                sender.terminate()

    async def write_mark(self, deadline: Deadline) -> tuple[Timeline, Lsn]:
        server = self._server
        await self._access.ask(server, deadline.left_s, "pg_logical_emit_message")
        await self._access.done(
            lambda end: server.write_record("message", end), deadline.left_s, "pg_logical_emit_message"
        )
        return server.timeline, Lsn(server.data.log.flushed)

    async def canary_waits(self, deadline: Deadline) -> bool:
        server = self._server
        await self._access.ask(server, deadline.left_s, "the canary")
        outcome: Outcome | None = None

        def on_result(result: Outcome, _: Entry) -> None:
            nonlocal outcome
            outcome = result

        commit = server.canary(on_result)
        try:
            while outcome is None and not commit.waiting:
                if deadline.passed:
                    raise DeadlinePassed("a commit that is neither over nor seen waiting", deadline.whole_s)
                await asyncio.sleep(CANARY_LOOK_S)
                await self._access.ask(server, deadline.left_s, "the canary's wait")
            if outcome in ("failed", "unknown"):
                raise SqlUnavailable("the canary's connection was lost")
            return commit.waiting or outcome == "cancelled_wait"
        finally:
            if server.process.alive:
                server.end_canary(commit)


class SimulatedProcesses:
    def __init__(self, access: Access, server: PostgresServer) -> None:
        self._access = access
        self._server = server

    @property
    def postmaster(self) -> int:
        return self._server.pid

    async def children(self, deadline: Deadline) -> dict[int, ChildKind]:
        await self._access.ask(self._server, deadline.left_s, "the children")
        found: dict[int, ChildKind] = {self._server.checkpointer.pid: "other"}
        receiver = self._server.walreceiver
        if receiver is not None:
            titled = self._server.cluster.world.now_s >= receiver.titled_at_s
            found[receiver.child.pid] = "walreceiver" if titled else "unclassified"
        return found

    def terminate(self, pid: int) -> bool:
        receiver = self._server.walreceiver
        if receiver is None or receiver.child.pid != pid:
            return False
        receiver.terminate()
        return True

    async def resume_replay(self, deadline: Deadline) -> None:
        (await self._startup(deadline)).resume()

    async def pause_replay(self, deadline: Deadline) -> None:
        (await self._startup(deadline)).pause()

    async def replay_is_paused(self, deadline: Deadline) -> bool:
        return (await self._startup(deadline)).pause_state == "paused"

    async def _startup(self, deadline: Deadline) -> Startup:
        await self._access.ask(self._server, deadline.left_s, "pausing replay")
        if not self._server.in_recovery:
            raise SqlUnavailable("recovery is not in progress", "55000")
        return self._server.startup


class SimulatedRunning:
    """`RunningServer` for one instance."""

    def __init__(self, access: Access, reload: Callable[[], Awaitable[None]]) -> None:
        self._access = access
        self._file = SimulatedSettingsFile(access, reload)

    @property
    def settings_file(self) -> SettingsFile:
        return self._file

    @contextlib.asynccontextmanager
    async def _replication(self, deadline: Deadline) -> AsyncIterator[ReplicationSession]:
        yield SimulatedReplication(self._access, await self._access.connect(deadline.left_s, "a new connection"))

    def replication(self, deadline: Deadline) -> contextlib.AbstractAsyncContextManager[ReplicationSession]:
        return self._replication(deadline)

    @contextlib.asynccontextmanager
    async def _processes(self, deadline: Deadline) -> AsyncIterator[ProcessSession]:
        yield SimulatedProcesses(self._access, await self._access.connect(deadline.left_s, "a new connection"))

    def processes(self, deadline: Deadline) -> contextlib.AbstractAsyncContextManager[ProcessSession]:
        return self._processes(deadline)

    async def block_directory(self) -> str:
        await self._access.write_file()
        return BLOCK
