"""The real `LocalPostgres`: the modules of `instance_manager/postgres/` put together for one instance."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import asyncpg

from instance_manager.agent.postgres_port import StartCommand, Upstream
from instance_manager.agent.recovering import NotMade, make_replica, recover
from instance_manager.agent.server_files import ServerFiles
from instance_manager.archive.recovery.origin import ORIGIN_FILE, parse_origin
from instance_manager.archive.recovery.replica_request import ReplicaRequest
from instance_manager.config import Configuration
from instance_manager.core.quorum import SynchronousSet
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Lsn, MemberId, Timeline, TimelineChain, WalEnd
from instance_manager.postgres import (
    archive_commands,
    bootstrap,
    directory,
    observation,
    one_question,
    promotion,
    rewind,
    slots,
    sql,
    voting,
)
from instance_manager.postgres.archive_commands import Allowed
from instance_manager.postgres.binaries import ServerVersion, find_bin_directory
from instance_manager.postgres.clone import CloneProgress
from instance_manager.postgres.clone import clone as clone_directory
from instance_manager.postgres.control_data import ControlData, HotStandbySettings, read_control_data
from instance_manager.postgres.deadlines import Deadline
from instance_manager.postgres.files import make_directory, remove_if_present
from instance_manager.postgres.histories import history_of_chain, timelines_with_history
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.running import SqlServer
from instance_manager.postgres.server import LocalPostgresError, LocalServer, RunAs
from instance_manager.postgres.source_questions import ancestry
from instance_manager.postgres.wal_dump import end_of_stopped_directory
from instance_manager.postgres_log.files import start_file
from instance_manager.threads import InOrder, Threads

log = logging.getLogger("instance_manager.agent.installed_postgres")

STATEMENTS_KEPT = 8
"""Of those that are run again and again: the look, and what slots there are."""
INTO_START_FILE = 'if { true >>"$0"; } 2>/dev/null; then exec "$@" >>"$0" 2>&1; fi; exec "$@"'
"""What Postgres says before its log collector runs goes to a file of the log too, so that no reader can hold up its start; if
there can be no file, to standard error. The shell becomes Postgres: no process is between it and the supervisor."""
STOPPED_END_DEADLINE_S = 60.0
SHUTDOWN_END_DEADLINE_S = 10.0


class SqlFailed(LocalPostgresError):
    """Postgres answered with an error; the text is its own."""


class InstalledPostgres:
    def __init__(
        self,
        configuration: Configuration,
        server: LocalServer,
        version: ServerVersion,
        reload: Callable[[], Awaitable[None]],
        configuration_file: Path | None = None,
    ) -> None:
        self._server = server
        self._configuration_file = configuration_file
        self._was_recovered = configuration.bootstrap.recovery is not None
        self._files = ServerFiles(configuration, server, version)
        self._sql = sql.LocalSql(server, statements_kept=STATEMENTS_KEPT)
        self._archives = configuration.archive is not None
        self._log_directory = configuration.log_directory
        self._threads = Threads("what the archive's commands may do")
        self._words = InOrder()
        self.major = version.major
        self.running = SqlServer(server, reload, self._files.writes)

    # The running server.

    async def observe(self, *, deadline_s: float) -> observation.PostgresObservation:
        try:
            return await observation.observe(self._sql, deadline_s=deadline_s)
        except asyncpg.PostgresError as error:
            raise SqlFailed(str(error)) from error

    def forget(self) -> None:
        self._sql.close()

    async def answers_new_connection(self, *, deadline_s: float) -> None:
        await one_question.ask(
            self._server, "SELECT 1", application_name="instance-manager: health", deadline_s=deadline_s
        )

    async def keep_slots(self, members: Collection[MemberId]) -> None:
        try:
            await slots.reconcile(self._sql, members)
        except asyncpg.PostgresError as error:
            raise SqlFailed(str(error)) from error

    async def emit_message(self, *, deadline_s: float) -> None:
        await self._sql.execute(
            "SELECT pg_logical_emit_message(true, 'instance-manager', 'set')", deadline_s=deadline_s
        )

    async def create_roles(self) -> tuple[str, ...]:
        """In a session of its own: a user's open transaction may hold a role, and no look at the server waits for that."""
        options = await asyncio.to_thread(self._files.role_options)
        try:
            async with sql.session(self._server) as session:
                return await bootstrap.create_roles(session, options)
        except asyncpg.PostgresError as error:
            raise SqlFailed(str(error)) from error

    def write_passfile(self) -> None:
        """Of replication, with the secret as it is now. Blocks on the disk."""
        self._files.write_passfile()

    async def checkpoint(self, *, deadline_s: float) -> None:
        await promotion.checkpoint(self._server, deadline_s=deadline_s)

    async def position(self, chain: TimelineChain, *, deadline_s: float) -> WalEnd:
        return await voting.position(self._server, chain, deadline_s=deadline_s)

    async def promote(
        self, chain: TimelineChain, relay: Callable[[], Awaitable[None]], *, deadline_s: float
    ) -> Timeline:
        promoted = await promotion.promote(self._server, chain, relay, deadline_s=deadline_s)
        return promoted.timeline

    async def histories(self) -> tuple[Timeline, ...]:
        return await asyncio.to_thread(timelines_with_history, self._server.data_directory / "pg_wal")

    async def forget_dead_ends(self, chain: TimelineChain) -> None:
        await asyncio.to_thread(promotion.forget_dead_ends, self._server, chain)

    async def fill_gaps(self, chain: TimelineChain) -> None:
        for switch in chain.switches:
            await asyncio.to_thread(promotion.fill_gap, self._server, switch.parent, switch.timeline)

    # The archive's commands.

    async def allow_archive(self, what: Allowed | None, *, deadline_s: float) -> None:
        if self._archives:
            with self._words.one(lambda: archive_commands.allow(self._server, what)) as write:
                await self._threads.call(write, deadline_s=deadline_s)

    async def ask_to_archive_again(self, since: Lsn | None, *, deadline_s: float) -> None:
        if self._archives:
            found = await self._threads.call(
                lambda: archive_commands.ask_again(self._server, since), deadline_s=deadline_s
            )
            log.info("%d segments of the log before are asked for again by the archive", found)

    async def nothing_is_restored(self, postmaster_pid: int, *, deadline_s: float) -> None:
        if self._archives:
            await archive_commands.nothing_is_restored(self._server, postmaster_pid, Deadline(deadline_s))

    # Files.

    async def inspect(self) -> directory.DirectoryReport:
        return await asyncio.to_thread(self.inspect_at_start)

    def inspect_at_start(self) -> directory.DirectoryReport:
        return directory.inspect_directory(self._server)

    async def control_data(self) -> ControlData:
        return await read_control_data(self._server)

    async def write_files(
        self, synchronous: SynchronousSet, access: Access, *, standby: bool, upstream: Upstream | None = None
    ) -> None:
        await self._files.write(synchronous, access, standby=standby, upstream=upstream)

    async def write_access(self, access: Access) -> None:
        with self._files.writes.one(lambda: self._files.write_access(access)) as write:
            await asyncio.to_thread(write)

    async def written_access(self) -> Access | None:
        return await asyncio.to_thread(self._files.written_access)

    async def set_standby_signal(self, standby: bool) -> None:
        change = directory.create_standby_signal if standby else directory.remove_standby_signal
        with self._files.writes.one(lambda: change(self._server)) as write:
            await asyncio.to_thread(write)

    async def prepare_start(self) -> StartCommand:
        await asyncio.to_thread(_prepare_start, self._server, self._log_directory)
        environment = {
            "LC_ALL": "C",
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "PGDATA": str(self._server.data_directory),
        }
        argv = (self._server.program("postgres"), "-D", str(self._server.data_directory))
        return StartCommand(
            ("/bin/sh", "-c", INTO_START_FILE, str(start_file(self._log_directory)), *argv), environment
        )

    def primary_settings(self, upstream: Upstream) -> str:
        return self._files.conninfo(upstream)

    async def replace_static(self, configuration: Configuration) -> tuple[str, ...]:
        return await asyncio.to_thread(self._files.replace_static, configuration)

    def wanted_hot_standby(self) -> HotStandbySettings:
        return self._files.wanted_hot_standby()

    # Stopped directories.

    async def initialise(self, on_progress: Callable[[str], None]) -> None:
        if self._was_recovered and self._configuration_file is not None:
            await recover(self._server, self._configuration_file, on_progress)
        else:
            await bootstrap.initialise(self._server, major=self.major)

    async def end_of_stopped(self, control: ControlData, chain: TimelineChain) -> WalEnd:
        return await end_of_stopped_directory(
            self._server,
            control,
            newest=chain.current,
            history=history_of_chain(chain),
            deadline_s=STOPPED_END_DEADLINE_S,
        )

    async def shutdown_end(self, control: ControlData, chain: TimelineChain) -> WalEnd | str:
        end = await promotion.shutdown_end(self._server, control, chain, deadline_s=SHUTDOWN_END_DEADLINE_S)
        return end.reason if isinstance(end, promotion.NotHandedOver) else end

    async def require_source(self, host: str, port: int, system_identifier: int, timeline: Timeline) -> None:
        await rewind.require_ready(self._files.source(host, port), system_identifier, timeline)

    async def clone(self, host: str, port: int, system_identifier: int, on_progress: Callable[[str], None]) -> None:
        await asyncio.to_thread(directory.remove_leftovers, self._server)

        def progress(done: CloneProgress) -> None:
            percent = 100 * done.done_bytes // max(1, done.total_bytes)
            on_progress(f"cloning from {host}:{port}: {percent} % of {done.total_bytes >> 20} MiB")

        await clone_directory(
            self._server, self._files.source(host, port), system_identifier=system_identifier, on_progress=progress
        )

    async def make_from_archive(
        self, host: str, port: int, record: ClusterRecord, on_progress: Callable[[str], None]
    ) -> str:
        chain, file = record.chain, self._configuration_file
        if chain is None or file is None:
            raise NotMade("the cluster's history or the configuration's file is not known", is_choice=True)
        await asyncio.to_thread(directory.remove_leftovers, self._server)
        source = self._files.source(host, port)
        before = await ancestry(source, chain.first, ORIGIN_FILE)
        request = ReplicaRequest(
            system_identifier=record.system_identifier or "",
            cluster_uid=record.cluster_uid,
            major=self.major,
            chain=chain,
            position=None if record.position is None else record.position.lsn,
            primary_conninfo=source.conninfo(application_name="instance-manager replica"),
            history=before.history,
            origin=parse_origin(before.note),
            keeps_fork=before.keeps_fork,
            tablespaces=tuple(sorted(before.tablespaces.items())),
        )
        return await make_replica(self._server, file, request, on_progress)

    async def rewind(self, host: str, port: int, timeline: Timeline) -> str:
        outcome = await rewind.rewind(
            self._server,
            self._files.source(host, port),
            timeline=timeline,
            use_restore_command=await self._files.write_rewind_command(),
        )
        return outcome.value

    async def set_aside(self) -> str:
        return str(await asyncio.to_thread(directory.set_aside, self._server))


def _prepare_start(server: LocalServer, log_directory: Path) -> None:
    promotion.clear_claim(server)
    # The supervisor starts nothing while a process of Postgres is left, so whoever this file names is somebody else: in
    # a container process numbers repeat, and Postgres would refuse to start.
    remove_if_present(server.data_directory / "postmaster.pid")
    directory.secure_directory(server)
    directory.require_startable(server)
    make_directory(server.socket_directory, mode=0o755, run_as=server.run_as)
    make_directory(log_directory, run_as=server.run_as)


def local_server(configuration: Configuration) -> LocalServer:
    """Where this instance's Postgres lives. BinariesNotFound says what to install."""
    return LocalServer(
        data_directory=configuration.data_directory,
        socket_directory=configuration.socket_directory,
        state_directory=configuration.state_directory,
        listen_address=configuration.listen_host,
        port=configuration.me.postgres_port,
        bin_directory=find_bin_directory(explicit=configuration.postgres.bin_directory),
        run_as=RunAs.of_user(configuration.instance.run_as) if os.geteuid() == 0 else None,
    )
