"""For tests of the model of Postgres: a few instances without agents, whose servers the test itself starts and signals."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from simulated_network import Network
from simulated_postgres import SimulatedPostgres
from simulated_server import PostgresServer
from simulated_syncrep import Commit, Outcome
from simulated_time import Host, Process, World
from simulated_volume import DataDirectory, DataVolume, PostgresBehaviour, PostgresCluster
from simulated_wal import Entry

from instance_manager.agent.postgres_port import Upstream
from instance_manager.config import Configuration
from instance_manager.core.quorum import NOBODY, SynchronousSet
from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, TimelineSwitch, WalEnd
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.synchronous import SynchronousReplication

T = TypeVar("T")

SYSTEM = 7


class StagedInstance:
    """One machine with its volume; what the port of the real simulation gets of an instance."""

    configuration: Configuration

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.name = name
        self.member_id = MemberId(f"{name}_{stage.world.random.getrandbits(32):08x}")
        self.host = Host(stage.world, name)
        self.volume = DataVolume(stage.cluster, name)
        self.server: PostgresServer | None = None
        self.exits: list[str] = []
        self.agent = Process(self.host, f"{name}/agent")
        self.port = SimulatedPostgres(self, self.agent, self._reload)
        self.settings = DynamicSettings(self.port.running.settings_file)
        self.synchronous = SynchronousReplication(self.port.running, self.settings)

    @property
    def running(self) -> PostgresServer:
        assert self.server is not None
        return self.server

    async def _reload(self) -> None:
        self.running.signal("HUP")

    async def relay(self) -> None:
        self.running.signal("USR1")

    def start(self) -> PostgresServer:
        self.server = PostgresServer(self.stage.cluster, self.host, self.volume)
        self.server.on_exit(self.exits.append)
        return self.server

    def write(self, **settings: str) -> None:
        """Straight into the file, and SIGHUP: by no rule of ours."""
        self.write_quietly(**settings)
        self.running.signal("HUP")

    def write_quietly(self, **settings: str) -> None:
        assert self.volume.data is not None
        self.volume.data.settings = {**(self.volume.data.settings or {}), **settings}

    def upstream(self, primary: StagedInstance) -> Upstream:
        return Upstream(
            holder=primary.member_id, host=primary.name, port=5432, member_id=self.member_id, epoch=Epoch(1)
        )

    def conninfo(self, primary: StagedInstance) -> str:
        return self.port.primary_settings(self.upstream(primary))

    @property
    def end(self) -> int:
        assert self.volume.data is not None
        return self.volume.data.log.end

    def entries(self) -> list[Entry]:
        assert self.volume.data is not None
        return self.volume.data.log.entries


class Stage:
    """The world of one test."""

    def __init__(self, *names: str, seed: int = 1, **behaviour: Any) -> None:
        self.world = World(seed)
        self.network = Network(self.world, self.world.random)
        behaviour = {"torn_send": 0.0, "torn_tail": 0.0, "slow_call": 0.0, **behaviour}
        self.cluster = PostgresCluster(self.world, self.network, PostgresBehaviour(**behaviour))
        self.acknowledged: list[Entry] = []
        self.cluster.on_acknowledged = lambda server, entry: self.acknowledged.append(entry)
        self.instances = [StagedInstance(self, name) for name in names]
        self.results: list[tuple[object, Outcome]] = []

    # Time.

    def run(self, seconds: float) -> None:
        self.world.run(self.world.now_s + seconds)

    def until(self, holds: Callable[[], object], limit_s: float = 30.0) -> None:
        until_s = self.world.now_s + limit_s
        while not holds():
            assert self.world.now_s < until_s, "it never came"
            self.run(0.01)

    def do(self, instance: StagedInstance, awaitable: Awaitable[T], limit_s: float = 60.0) -> T:
        """Run one coroutine as the instance's agent, and the world until it has ended."""
        done: list[T] = []
        failed: list[BaseException] = []

        async def main() -> None:
            try:
                done.append(await awaitable)
            except Exception as error:
                failed.append(error)

        instance.agent.spawn(main())
        self.until(lambda: done or failed, limit_s)
        if failed:
            raise failed[0]
        return done[0]

    # What most tests begin with.

    def primary(self, instance: StagedInstance, names: SynchronousSet | None = None) -> PostgresServer:
        """A new cluster's primary, open to clients, with slots for all others."""
        from instance_manager.agent.server_files import render_set

        data = instance.volume.data = DataDirectory.initdb(SYSTEM)
        data.settings = {
            "synchronous_standby_names": "" if names is None else render_set(names),
            "primary_conninfo": "",
            "primary_slot_name": "",
            "restore_command": "restore_command.sh",
        }
        data.access = Access.OPEN
        data.slots = {each.member_id for each in self.instances if each is not instance}
        server = instance.start()
        self.until(lambda: server.ready)
        return server

    def standby(self, instance: StagedInstance, primary: StagedInstance, *, slot: bool = True) -> PostgresServer:
        """A copy of the primary that streams from it."""
        assert primary.volume.data is not None
        data = instance.volume.data = primary.volume.data.copy_of(primary.volume.data.log.flushed)
        data.access = Access.OPEN
        data.settings = {
            "synchronous_standby_names": 'ANY 1 ("instance-manager: nobody")',
            "primary_conninfo": instance.conninfo(primary),
            "primary_slot_name": instance.member_id if slot else "",
            "restore_command": "restore_command.sh",
        }
        server = instance.start()
        self.until(lambda: server.ready and server.streams_from == primary.name)
        self.until(lambda: any(s.name == instance.member_id and s.flush is not None for s in primary.running.senders))
        return server

    def commit(self, instance: StagedInstance, payload: object, *, synchronous: bool = True) -> Commit:
        def on_result(outcome: Outcome, entry: Entry) -> None:
            self.results.append((entry.payload, outcome))

        return instance.running.commit(payload, synchronous=synchronous, on_result=on_result)

    def outcome(self, payload: object) -> Outcome | None:
        return next((outcome for each, outcome in self.results if each == payload), None)

    def rows(self, instance: StagedInstance) -> tuple[object, ...]:
        seen: list[tuple[object, ...]] = []
        instance.running.read(lambda rows, in_recovery, timeline: seen.append(rows))
        self.run(0.01)
        return seen[0]

    def count(self, what: str) -> int:
        return self.world.counters[f"postgres: {what}"]


@contextlib.contextmanager
def staged(*names: str, **options: Any) -> Iterator[Stage]:
    stage = Stage(*names, **options)
    try:
        yield stage
    finally:
        stage.world.close()


def all_of(*instances: StagedInstance, k: int = 1) -> SynchronousSet:
    return SynchronousSet(k, frozenset(each.member_id for each in instances))


def chain_of(*switches: tuple[int, int, int]) -> TimelineChain:
    """(timeline, parent, switch position) each."""
    return TimelineChain(
        Timeline(1),
        tuple(
            TimelineSwitch(Timeline(timeline), Timeline(parent), Lsn(lsn), Epoch(number + 2))
            for number, (timeline, parent, lsn) in enumerate(switches)
        ),
    )


__all__ = ["NOBODY", "Stage", "StagedInstance", "WalEnd", "all_of", "chain_of", "staged"]
