"""A cluster that was recovered from the archive of another, and the making of a standby's directory for it, as the agent asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, TypeVar

import yaml
from archiving_server import ArchivingServer, all_archived, insert, system_identifier
from backup_harness import store_of, take
from harness import BIN_DIRECTORY, Cluster, PostgresProcess, conninfo, major_version, run_as
from recovery_harness import SETTINGS, Restoration

from instance_manager.archive.recovery.origin import ORIGIN_FILE, Origin, render_origin
from instance_manager.archive.recovery.replay import ReplaySettings
from instance_manager.archive.recovery.replica import make_replica
from instance_manager.archive.recovery.replica_choice import Choice, choose
from instance_manager.archive.recovery.replica_places import make_places
from instance_manager.archive.recovery.replica_request import ReplicaRequest
from instance_manager.config import Configuration, load_configuration
from instance_manager.core.types import Lsn, Timeline, TimelineChain, WalEnd, parse_lsn
from instance_manager.postgres.control_data import read_control_data
from instance_manager.postgres.histories import history_of_chain, parse_history
from instance_manager.postgres.server import LocalServer
from instance_manager.postgres.wal_dump import end_of_stopped_directory

CONFIGURATION = "configuration.yaml"
UID = "0123456789abcdef"
SOURCE = Origin("orders", UID)
TWO = Timeline(2)
KEPT = set(range(2000))
DEADLINE_S = 90.0
JOIN_PATIENCE_S = 30.0
"""Of these tests: in a cluster it is an hour until the standby takes connections, as it may have much to replay again."""

_T = TypeVar("_T")


async def in_time(making: Awaitable[_T], said: list[str]) -> _T:
    """AssertionError at the deadline, with what it said last."""
    try:
        return await asyncio.wait_for(making, DEADLINE_S)
    except TimeoutError:
        raise AssertionError(f"no directory within {DEADLINE_S:g} s; it said last: {said[-5:]}") from None


async def two_histories(made: ArchivingServer, section: dict[str, Any]) -> str:
    """A backup, what is to be kept, and what the source went on with behind the returned moment."""
    store = store_of(section)
    await insert(made.server, 0, 1000)
    await take(made, store)
    await insert(made.server, 1000, 1000)
    moment: str = await made.server.fetchval("SELECT clock_timestamp()::text")
    await made.server.execute("SELECT pg_sleep(0.05)")  # two commits of one microsecond could not be told apart
    await insert(made.server, 100_000, 3000)
    await all_archived(made.server)
    return moment


async def recovered_primary(cluster: Cluster, section: dict[str, Any], **target: Any) -> PostgresProcess:
    """The new cluster's first instance, open on timeline 2."""
    restoration = Restoration(cluster.add("n"), store_of(section))
    await restoration.run(**target)
    origin = restoration.server.data_directory / ORIGIN_FILE
    origin.write_bytes(render_origin(SOURCE))
    restoration.process.own(origin)
    return await restoration.start()


class Making:
    """One standby's directory, in a place of its own."""

    def __init__(self, cluster: Cluster, name: str, primary: PostgresProcess, archives: dict[str, Any]) -> None:
        """`archives`: the sections `archive` and `bootstrap` of the configuration."""
        self.process = cluster.add(name)
        self.primary = primary
        self.said: list[str] = []
        self.configuration = configuration_of(self.process, archives)
        self.server: LocalServer = replace(self.process.server, data_directory=self.process.root / "made")

    async def request(self, **changes: Any) -> ReplicaRequest:
        """As of an agent whose record begins with timeline 2."""
        history = self.primary.data / "pg_wal" / "00000002.history"
        return replace(
            ReplicaRequest(
                system_identifier=str(await system_identifier(self.primary)),
                cluster_uid=UID,
                major=major_version(),
                chain=TimelineChain(TWO),
                position=parse_lsn(await self.primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")),
                primary_conninfo=conninfo(self.primary, "replica"),
                history=history.read_text() if history.exists() else "",
                origin=SOURCE,
                keeps_fork=True,
            ),
            **changes,
        )

    async def choose(self, **changes: Any) -> Choice:
        async with AsyncExitStack() as stack:
            return await choose(self.configuration, await self.request(**changes), stack)

    async def run(self, **changes: Any) -> Lsn:
        request = await self.request(**changes)
        self.server.data_directory.mkdir(mode=0o700)
        self.process.own(self.server.data_directory)
        async with AsyncExitStack() as stack:
            choice = await choose(self.configuration, request, stack)
            make_places(choice.tablespaces | choice.younger, self.process.server)
            making = make_replica(
                self.server,
                choice,
                request,
                on_progress=self.said.append,
                on_failure=self.said.append,
                settings=replace(SETTINGS, replay=ReplaySettings(outage_patience_s=5)),
            )
            return await in_time(making, self.said)

    async def end(self, chain: TimelineChain) -> WalEnd:
        """Of its log, as a directory is judged by the agent before it follows."""
        control = await read_control_data(self.server)
        return await end_of_stopped_directory(
            self.server, control, newest=chain.current, history=history_of_chain(chain)
        )

    async def follow(self, cluster: Cluster) -> PostgresProcess:
        """In the server's own place, streaming."""
        data = self.process.data
        data.rename(data.with_name("template"))
        self.server.data_directory.rename(data)
        self.process.configure(archive_mode="off")
        self.process.make_standby()
        cluster.follow(self.process, self.primary)
        await self.process.start()
        await cluster.wait_streaming(self.primary, self.process.name)
        return self.process


def configuration_of(server: PostgresProcess, archives: dict[str, Any]) -> Configuration:
    content = ArchivingServer(server, archives.get("archive", {}))._configuration()
    content["instance"]["run_as"] = "root" if run_as() is None else "postgres"
    content["postgres"] = {"bin_directory": str(BIN_DIRECTORY)}
    file = server.root / CONFIGURATION
    file.write_text(
        yaml.safe_dump({**content, **archives} if "archive" in archives else without_archive(content, archives))
    )
    return load_configuration(file)


def without_archive(content: dict[str, Any], archives: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**content, **archives}.items() if key != "archive"}


def fork_of(primary: PostgresProcess) -> Lsn:
    """Where its timeline 2 begins."""
    return parse_history(TWO, (primary.data / "pg_wal" / "00000002.history").read_text())[-1][1]


async def numbers(server: PostgresProcess) -> set[int]:
    return {row["n"] for row in await server.fetch("SELECT n FROM t")}
