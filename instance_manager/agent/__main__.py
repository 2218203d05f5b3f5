"""`python -m instance_manager.agent --config FILE`: started by the supervisor, never by hand."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from instance_manager.agent.agent import Agent
from instance_manager.agent.context import Context, Journal
from instance_manager.agent.database import Database
from instance_manager.agent.health import DiskProbe, Health
from instance_manager.agent.installed_postgres import InstalledPostgres, local_server
from instance_manager.agent.lease_keeper import LeaseKeeper
from instance_manager.agent.peering import Peers
from instance_manager.agent.supervisor_link import SeqpacketSocket, SupervisorError, SupervisorLink
from instance_manager.agent.volume import Volume, VolumeDirectory, VolumeUnusable, boot_id
from instance_manager.config import Configuration, ConfigurationError, load_configuration
from instance_manager.coordination.local import LocalCoordination
from instance_manager.core.lease import Permit
from instance_manager.core.types import Epoch, MemberName
from instance_manager.http.peers import PeerClient
from instance_manager.http.server import ListenError, serve
from instance_manager.http.token import TokenUnusable
from instance_manager.logs import logging_to
from instance_manager.postgres.binaries import server_version
from instance_manager.postgres.server import LocalPostgresError

log = logging.getLogger("instance_manager.agent")

HEALTH_INTERVAL_S = 1.0


class BootTime:
    """The real Clock."""

    def now_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Late:
    """Callbacks between parts that are made before the agent that ties them together."""

    def __init__(self) -> None:
        self.agent: Agent | None = None

    def wake(self, _: str = "") -> None:
        if self.agent is not None:
            self.agent.context.wake.set()

    def supervisor_event(self, event: str) -> None:
        if self.agent is not None:
            self.agent.context.database.look_soon()
        self.wake(event)


async def run(configuration: Configuration, configuration_file: Path) -> None:
    clock = BootTime()
    late = _Late()
    chance = random.SystemRandom()
    link = SupervisorLink(SeqpacketSocket.from_environment(), now_s=clock.now_s, on_event=late.supervisor_event)
    server = local_server(configuration)
    postgres = InstalledPostgres(configuration, server, await server_version(server), lambda: link.signal("HUP"))
    database = Database(configuration, postgres, link, clock, on_change=late.wake)
    volume = Volume(VolumeDirectory(configuration.state_directory, server.run_as), boot_id=boot_id(), chance=chance)
    volume.load(now_s=clock.now_s(), lease_duration_s=configuration.timings.lease_duration_s)
    coordination = LocalCoordination(
        configuration.coordination.local.directory, configuration.coordination.local.locks_directory
    )
    disk = DiskProbe((configuration.state_directory,), clock, HEALTH_INTERVAL_S)
    health = Health(
        clock,
        disk,
        database.answers_new_connection,
        timeout_s=configuration.timings.health_timeout_s,
        interval_s=HEALTH_INTERVAL_S,
        minimum_free_bytes=configuration.instance.minimum_free_bytes,
    )

    def with_agent() -> Agent:
        assert late.agent is not None  # noqa: S101 - nothing runs before the agent is made
        return late.agent

    def grant(permit: Permit) -> None:
        link.extend(permit)

    keeper = LeaseKeeper(
        coordination,
        clock,
        configuration.timings,
        cluster_uid=configuration.cluster.uid,
        facts=lambda: with_agent().renewal_facts(),
        volume=lambda: volume.state,
        grant=grant,
        on_change=late.wake,
        chance=chance,
    )
    async with PeerClient(configuration.members, configuration.secrets.peer_token) as caller:
        peers = Peers(
            caller,
            tuple(MemberName(member.name) for member in configuration.peers),
            clock,
            interval_s=configuration.timings.peer_interval_s,
            record_epoch=lambda: keeper.record.epoch if keeper.record is not None else Epoch(0),
            on_change=late.wake,
            on_later_epoch=keeper.hint,
        )
        context = Context(
            configuration=configuration,
            clock=clock,
            coordination=coordination,
            link=link,
            volume=volume,
            keeper=keeper,
            peers=peers,
            database=database,
            health=health,
            journal=Journal(clock),
            started_s=clock.now_s(),
            boot_id=boot_id(),
            chance=chance,
        )
        agent = late.agent = Agent(context)
        agent.reload_configuration = _reloader(agent, configuration_file)
        disk.start()
        async with serve(agent, configuration):
            # What was imported and built stays: later collections need not look at it again.
            gc.freeze()
            await agent.run()


def _reloader(agent: Agent, configuration_file: Path) -> Callable[[], Awaitable[str]]:
    async def reload() -> str:
        configuration = await asyncio.to_thread(load_configuration, configuration_file)
        before = agent.context.configuration
        if (configuration.instance, configuration.members, configuration.cluster.uid) != (
            before.instance,
            before.members,
            before.cluster.uid,
        ):
            raise ConfigurationError("instance, members and the cluster's uid change at a restart of the instance only")
        agent.context.configuration = configuration
        restart = await agent.context.database.reload_configuration(configuration)
        if restart:
            order = agent.context.database.restart_order().value
            return f"reloaded; these need a restart of Postgres ({order}): {', '.join(restart)}"
        return "reloaded"

    return reload


def main() -> int:
    parser = argparse.ArgumentParser(prog="instance_manager.agent", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the instance's configuration file")
    arguments = parser.parse_args()
    try:
        configuration = load_configuration(arguments.config)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    with logging_to(configuration.instance.name, configuration.log_level):
        try:
            asyncio.run(run(configuration, arguments.config))
        except KeyError:
            log.exception("the agent is started by its supervisor: use `instance-manager run`")
            return 2
        except (ListenError, TokenUnusable, VolumeUnusable, LocalPostgresError, SupervisorError) as error:
            log.error("the agent cannot run: %s", error)  # noqa: TRY400 - the text says it all
            return 1
        except BaseExceptionGroup as group:
            with contextlib.suppress(BaseException):
                log.critical("the agent failed", exc_info=group)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
