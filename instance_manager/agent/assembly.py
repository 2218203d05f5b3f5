"""One agent put together over its ports: the same for a real instance and for a simulated one."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from instance_manager.agent.agent import Agent
from instance_manager.agent.archiver_port import Archiver, NoArchiver
from instance_manager.agent.beat import Beat
from instance_manager.agent.context import Context, Journal
from instance_manager.agent.database import Database
from instance_manager.agent.health import DiskHealth, Health
from instance_manager.agent.lease_keeper import LeaseKeeper
from instance_manager.agent.peering import Peers
from instance_manager.agent.postgres_port import LocalPostgres
from instance_manager.agent.publishing import Unpublished, publish_note
from instance_manager.agent.supervisor_link import Datagrams, SupervisorLink
from instance_manager.agent.volume import Volume, VolumeStorage
from instance_manager.config import Configuration
from instance_manager.core.types import Epoch, MemberName
from instance_manager.metrics.measures import Measures
from instance_manager.ports import Clock, Coordination, PeerCaller, Publication

HEALTH_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The world of one agent."""

    clock: Clock
    chance: random.Random
    boot_id: str
    datagrams: Datagrams
    storage: VolumeStorage
    disk: DiskHealth
    coordination: Coordination
    caller: PeerCaller
    make_postgres: Callable[[Callable[[], Awaitable[None]]], LocalPostgres]
    """For a server that is reloaded by the given function."""
    publication: Publication = field(default_factory=Unpublished)
    make_archiver: Callable[[Callable[[], None]], Archiver] = lambda _: NoArchiver()
    """For an agent that looks again when the given function is called."""


class _Late:
    """Callbacks between parts that are made before the agent that ties them together."""

    def __init__(self) -> None:
        self.made: Agent | None = None

    @property
    def agent(self) -> Agent:
        assert self.made is not None  # noqa: S101 - nothing runs before the agent is made
        return self.made

    def wake(self, _: str = "") -> None:
        if self.made is not None:
            self.made.context.wake.set()

    def look(self, _: str = "") -> None:
        """What happened may be seen in Postgres too: a peer that dies leaves its connections to it."""
        if self.made is not None:
            self.made.context.database.look_soon()
        self.wake()


def assemble(configuration: Configuration, ports: Ports) -> Agent:
    """VolumeUnusable, and OSError where the directory cannot be looked at. Nothing runs before `Agent.run`."""
    clock = ports.clock
    measures = Measures()
    late = _Late()
    beat = Beat(clock)
    link = SupervisorLink(ports.datagrams, now_s=clock.now_s, on_event=late.look)
    postgres = ports.make_postgres(lambda: link.signal("HUP"))
    database = Database(configuration, postgres, link, clock, beat, on_change=late.wake)
    volume = Volume(ports.storage, boot_id=ports.boot_id, chance=ports.chance)
    volume.load(now_s=clock.now_s(), lease_duration_s=configuration.timings.lease_duration_s)
    health = Health(
        clock,
        beat,
        ports.disk,
        database.answers_new_connection,
        timeout_s=configuration.timings.health_timeout_s,
        interval_s=HEALTH_INTERVAL_S,
        minimum_free_bytes=configuration.instance.minimum_free_bytes,
    )
    keeper = LeaseKeeper(
        ports.coordination,
        clock,
        configuration.timings,
        cluster_uid=configuration.cluster.uid,
        facts=lambda: late.agent.renewal_facts(),
        volume=lambda: volume.state,
        grant=link.extend,
        on_change=late.wake,
        chance=ports.chance,
        measured=measures.renewed,
    )
    peers = Peers(
        ports.caller,
        tuple(MemberName(member.name) for member in configuration.peers),
        clock,
        interval_s=configuration.timings.peer_interval_s,
        record_epoch=lambda: keeper.record.epoch if keeper.record is not None else Epoch(0),
        on_change=late.look,
        on_later_epoch=keeper.hint,
    )
    context = Context(
        configuration=configuration,
        clock=clock,
        coordination=ports.coordination,
        link=link,
        volume=volume,
        keeper=keeper,
        peers=peers,
        database=database,
        health=health,
        journal=Journal(clock, lambda what, why, decided: publish_note(ports.publication, what, why, decided=decided)),
        started_s=clock.now_s(),
        boot_id=ports.boot_id,
        beat=beat,
        chance=ports.chance,
        publication=ports.publication,
        measures=measures,
        archiver=ports.make_archiver(late.wake),
    )
    late.made = Agent(context)
    return late.made
