"""`python -m instance_manager.agent --config FILE`: started by the supervisor, never by hand."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import random
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

import instance_manager.agent.small_aiohttp  # noqa: F401 - before whatever else imports aiohttp
from instance_manager.agent.agent import Agent
from instance_manager.agent.archiver_client import ArchiverClient
from instance_manager.agent.archiver_port import Archiver, NoArchiver
from instance_manager.agent.archiver_status import ask_archiver
from instance_manager.agent.assembly import HEALTH_INTERVAL_S, Ports, assemble
from instance_manager.agent.beside import certificates_of, running_beside
from instance_manager.agent.configuration_file import Signature, keep_reading, signature
from instance_manager.agent.health import DiskProbe
from instance_manager.agent.installed_postgres import InstalledPostgres, local_server
from instance_manager.agent.instance_metrics import InstanceMetrics, statistics_options
from instance_manager.agent.supervisor_link import SeqpacketSocket, SupervisorError
from instance_manager.agent.surroundings import surroundings_of
from instance_manager.agent.volume import VolumeDirectory, VolumeUnusable, boot_id
from instance_manager.certificate_sets import Certificates
from instance_manager.config import Configuration, ConfigurationError, load_configuration
from instance_manager.config_sections import MemberSection
from instance_manager.heap import use_one_heap
from instance_manager.http.peers import PeerClient, PeerTls
from instance_manager.http.server import ListenError, serve
from instance_manager.http.token import TokenUnusable
from instance_manager.launch import postgres_problems
from instance_manager.logs import logging_to, set_level
from instance_manager.metrics.custom import QueriesUnusable
from instance_manager.metrics.postgres import Options, PostgresMetrics
from instance_manager.postgres.binaries import server_version
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.postgres_log.relay import relaying
from instance_manager.tls import CertificateUnusable

log = logging.getLogger("instance_manager.agent")


class BootTime:
    """The real Clock."""

    def now_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def run(configuration: Configuration, configuration_file: Path, seen: Signature | None = None) -> None:
    """`seen`: what the file was when `configuration` was read from it."""
    clock = BootTime()
    server = local_server(configuration)
    version = await server_version(server)
    disk = DiskProbe((configuration.state_directory,), clock, HEALTH_INTERVAL_S)
    around = surroundings_of(configuration)
    members = _Members(configuration)
    certificates = await asyncio.to_thread(certificates_of, configuration, server)
    async with contextlib.AsyncExitStack() as ending:
        relayed = ending.enter_context(
            relaying(configuration.instance.name, configuration.log_directory, configuration.data_directory)
        )
        ending.push_async_callback(around.coordination.close)
        caller = await ending.enter_async_context(
            PeerClient(
                members.find,
                configuration.secrets.peer_token,
                address=around.address,
                tls=_peer_tls(configuration, certificates),
            )
        )
        made: list[InstalledPostgres] = []

        def make_postgres(reload: Callable[[], Awaitable[None]]) -> InstalledPostgres:
            made.append(InstalledPostgres(configuration, server, version, reload, configuration_file))
            return made[-1]

        agent = assemble(
            configuration,
            Ports(
                clock=clock,
                chance=random.SystemRandom(),
                boot_id=boot_id(),
                datagrams=SeqpacketSocket.from_environment(),
                storage=VolumeDirectory(configuration.state_directory, server.run_as),
                disk=disk,
                coordination=around.coordination,
                publication=around.publication,
                caller=caller,
                make_postgres=make_postgres,
                make_archiver=lambda wake: _archiver(configuration, clock, wake),
            ),
        )
        statistics = PostgresMetrics(server, version.major, _usable_options(configuration))
        ending.push_async_callback(statistics.close)
        agent.reload_configuration = _reloader(agent, configuration_file, members, statistics)
        asked = partial(ask_archiver, configuration.archive_socket) if configuration.archive is not None else None
        agent.exposition = InstanceMetrics(
            agent.context,
            statistics,
            disk,
            archiver=asked,
            archive=agent.archiving.state,
            postgres_log=relayed,
        ).exposition
        disk.start()
        async with (
            serve(agent, configuration, certificates) as listeners,
            _watched(agent, configuration_file, seen),
            running_beside(agent, made[-1], server, listeners, certificates),
        ):
            # What was imported and built stays: later collections need not look at it again.
            gc.freeze()
            await agent.run()


def _peer_tls(configuration: Configuration, certificates: Certificates | None) -> PeerTls | None:
    tls = configuration.tls
    if tls is None or certificates is None or certificates.peers_client is None:
        return None
    used = certificates

    def context() -> ssl.SSLContext:
        assert used.peers_client is not None  # noqa: S101 - once made, it is only replaced
        return used.peers_client

    return PeerTls(context, required=tls.required)


def _archiver(configuration: Configuration, clock: BootTime, wake: Callable[[], None]) -> Archiver:
    if configuration.archive is None:
        return NoArchiver()
    return ArchiverClient(configuration.archive_socket, clock, on_answer=wake)


class _Members:
    """Who is reached where, by the configuration of the moment."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration

    def find(self, name: str) -> MemberSection | None:
        return self.configuration.member(name)


@contextlib.asynccontextmanager
async def _watched(agent: Agent, configuration_file: Path, seen: Signature | None) -> AsyncIterator[None]:
    """On Kubernetes a changed ConfigMap is taken over as it comes; elsewhere by `reload`."""
    c = agent.context
    if c.configuration.coordination.kubernetes is None:
        yield
        return
    watching = asyncio.create_task(keep_reading(configuration_file, seen, agent.reload, c.journal, c.clock))
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def _usable_options(configuration: Configuration) -> Options:
    """A broken file of queries costs its own metrics, and never the start of an instance."""
    try:
        return statistics_options(configuration)
    except QueriesUnusable as error:
        log.error("no custom queries: %s", error)  # noqa: TRY400 - the text says it all
        without = msgspec.structs.replace(configuration.metrics, queries=())
        options = statistics_options(msgspec.structs.replace(configuration, metrics=without))
        return replace(options, custom_unusable=True)


def _reloader(
    agent: Agent, configuration_file: Path, members: _Members, statistics: PostgresMetrics
) -> Callable[[], Awaitable[str]]:
    async def reload() -> str:
        configuration = await asyncio.to_thread(load_configuration, configuration_file)
        if problems := postgres_problems(configuration):
            raise ConfigurationError("\n".join(f"{configuration_file}: {problem}" for problem in problems))
        before = agent.context.configuration
        if _fixed(configuration) != _fixed(before):
            raise ConfigurationError(
                f"{configuration_file}: instance, coordination, tls, control, archive, the cluster's name and uid (and members, "
                "where they are listed) change at a restart of the instance only"
            )
        try:
            options = await asyncio.to_thread(statistics_options, configuration)
        except QueriesUnusable as error:
            raise ConfigurationError(str(error)) from error
        statistics.replace_options(options)
        set_level(configuration.log_level)
        agent.context.configuration = members.configuration = configuration
        agent.context.wake.set()
        restart = await agent.context.database.reload_configuration(configuration)
        if restart:
            order = agent.context.database.restart_order().value
            return f"reloaded; these need a restart of Postgres ({order}): {', '.join(restart)}"
        return "reloaded"

    return reload


def _fixed(configuration: Configuration) -> tuple[object, ...]:
    """What does not change while the instance runs. On Kubernetes members come and go."""
    listed = configuration.members if configuration.coordination.local is not None else ()
    cluster = configuration.cluster
    return (
        configuration.instance,
        configuration.coordination,
        configuration.tls,
        configuration.control,
        configuration.archive,
        cluster.name,
        cluster.uid,
        listed,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="instance_manager.agent", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the instance's configuration file")
    arguments = parser.parse_args()
    use_one_heap()
    # Before it is read: what comes into its place meanwhile is read again.
    seen = signature(arguments.config)
    try:
        configuration = load_configuration(arguments.config)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    with logging_to(configuration.instance.name, configuration.log_level):
        try:
            asyncio.run(run(configuration, arguments.config, seen))
        except KeyError:
            log.exception("the agent is started by its supervisor: use `instance-manager run`")
            return 2
        except (
            ListenError,
            TokenUnusable,
            CertificateUnusable,
            VolumeUnusable,
            LocalPostgresError,
            SupervisorError,
        ) as error:
            log.error("the agent cannot run: %s", error)  # noqa: TRY400 - the text says it all
            return 1
        except BaseExceptionGroup as group:
            with contextlib.suppress(BaseException):
                log.critical("the agent failed", exc_info=group)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
