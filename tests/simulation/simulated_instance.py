"""One simulated instance: a machine with a volume, a container that comes and goes on it, and the real agent inside."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
from simulated_network import Network, SimulatedPeers
from simulated_postgres import SimulatedPostgres
from simulated_server import PostgresServer
from simulated_store import SimulatedStore, StoreClient
from simulated_supervisor import SimulatedDatagrams, SimulatedSupervisor
from simulated_time import Host, HostClock, Process, World
from simulated_volume import DataDirectory, DataVolume, PostgresCluster

from instance_manager.agent.agent import Agent
from instance_manager.agent.assembly import Ports, assemble
from instance_manager.agent.context import Context
from instance_manager.codec import to_json
from instance_manager.config import Configuration
from instance_manager.config_sections import (
    ClusterSection,
    CoordinationSection,
    Durability,
    InstanceSection,
    LocalCoordinationSection,
    MemberSection,
    SecretsSection,
)
from instance_manager.core.roles import TRANSITIONS, Role
from instance_manager.core.timing import Timings
from instance_manager.core.types import MemberName, make_member_id
from instance_manager.core.voting import VolumeState

CLUSTER_UID = "simulated-cluster"
PROBE_INTERVAL_S = 1.0
PLENTY_BYTES = 1 << 30
_NOWHERE = Path("/simulated")


def configuration_of(
    name: str, names: tuple[str, ...], durability: Durability, timings: Timings, maximum_lag_bytes: int
) -> Configuration:
    return Configuration(
        cluster=ClusterSection(
            name="simulated",
            uid=CLUSTER_UID,
            durability=durability,
            maximum_lag_on_failover_bytes=maximum_lag_bytes,
        ),
        instance=InstanceSection(name=name, directory=_NOWHERE / name, run_as="postgres"),
        members=tuple(MemberSection(name=each, host=each, postgres_port=5432, http_port=8008) for each in names),
        coordination=CoordinationSection(
            local=LocalCoordinationSection(directory=_NOWHERE, locks_directory=_NOWHERE / "locks")
        ),
        secrets=SecretsSection(
            peer_token=_NOWHERE,
            replication_password=_NOWHERE,
            application_password=_NOWHERE,
            monitoring_password=_NOWHERE,
        ),
        timings=timings,
    )


class RoleBroken(Exception):
    """An agent took a role that the table of roles does not allow after the one before."""


class CheckedContext(Context):
    """The agent only complains in its log; here it is a defect that ends the seed."""

    __slots__ = ()

    def take_role(self, role: Role, reason: str) -> None:
        if role is not self.role and role not in TRANSITIONS[self.role]:
            raise RoleBroken(f"{self.configuration.name}: {role} does not follow {self.role}: {reason}")
        super().take_role(role, reason)


class SimulatedStorage:
    """The volume's memory (P6): one small file beside the data directory, on the same disk."""

    def __init__(self, instance: SimulatedInstance) -> None:
        self._instance = instance
        self.content: bytes | None = None
        self.on_written: Callable[[bytes], object] | None = None
        self.broken = False
        """Every write fails at once, here only."""
        self.reserve = True
        """Space that is given up for a promise when the disk is full."""
        self._identity = f"{instance.world.random.getrandbits(32):08x}"
        self.name = f"{instance.name}/state/volume.json"

    def identity(self) -> str:
        return self._identity

    def read(self) -> bytes | None:
        return self.content

    async def write(self, content: bytes) -> None:
        """Lands at one moment, if its process lives until then; a stalled disk holds it up."""
        instance = self._instance
        while True:
            await asyncio.sleep(instance.world.random.uniform(0.0005, 0.004))
            if not instance.volume.stalled:
                break
            await asyncio.sleep(0.05)
        if self.broken:
            raise OSError(errno.EIO, "Input/output error", self.name)
        if instance.volume.full:
            if not self.reserve:
                raise OSError(errno.ENOSPC, "No space left on device", self.name)
            self.reserve = False
            instance.world.counters["volume: the reserve was given up"] += 1
        else:
            self.reserve = True
        self.content = content
        if self.on_written is not None:
            self.on_written(content)


class SimulatedDisk:
    """What the agent's disk probe finds: a round a second, in a thread that stands still with its process."""

    def __init__(self, instance: SimulatedInstance, process: Process) -> None:
        self._instance = instance
        self._process = process
        self.last_good_s = instance.host.boottime_s()
        self.last_error: str | None = None
        self._began_s = self.last_good_s
        self._hanging = False
        process.call_later(PROBE_INTERVAL_S, self._probe)

    def _probe(self) -> None:
        if not self._hanging:
            self._began_s = self._instance.host.boottime_s()
        self._hanging = self._instance.volume.stalled
        if not self._hanging:
            self.last_good_s = self._began_s
        self._process.call_later(0.05 if self._hanging else PROBE_INTERVAL_S, self._probe)

    @property
    def free_bytes(self) -> int | None:
        return 0 if self._instance.volume.full else PLENTY_BYTES


class SimulatedInstance:
    """`crash` and `start` are the container's; the volume outlives them."""

    def __init__(
        self,
        world: World,
        network: Network,
        store: SimulatedStore,
        postgres: PostgresCluster,
        name: str,
        names: tuple[str, ...],
        *,
        durability: Durability,
        timings: Timings,
        maximum_lag_bytes: int,
        on_agent_error: Callable[[SimulatedInstance, BaseException], None],
    ) -> None:
        self.world = world
        self.network = network
        self.store = store
        self.postgres = postgres
        self.name = name
        self.configuration = configuration_of(name, names, durability, timings, maximum_lag_bytes)
        self.host = Host(world, name, rate=1 + world.random.uniform(-1, 1) * 0.9 * timings.clock_rate_error)
        self._on_agent_error = on_agent_error
        self.boot_id = self._random_id()
        self.volume = DataVolume(postgres, name)
        self.storage = SimulatedStorage(self)
        self.supervisor: SimulatedSupervisor | None = None
        self.server: PostgresServer | None = None
        """The last that was started; perhaps ended."""
        self.agent: Agent | None = None
        self.stays_away_until_s = 0.0
        self.stopped_by_user = False

    def _random_id(self) -> str:
        return f"{self.world.random.getrandbits(48):012x}"

    # The container.

    def start(self) -> None:
        """A new life of the container, unless one runs."""
        if self.supervisor is not None:
            return
        self.supervisor = SimulatedSupervisor(
            self.host,
            self._random_id(),
            hard_s=self.configuration.timings.hard_s,
            run_agent=self._run_agent,
            start_server=self._start_server,
            on_end=self._ended,
        )
        self.supervisor.on_agent_error = lambda error: self._on_agent_error(self, error)  # type: ignore[method-assign]
        self.world.trace.add(self.name, "container starts, incarnation %s", self.supervisor.incarnation)

    def _ended(self, supervisor: SimulatedSupervisor, how: str) -> None:
        if self.supervisor is supervisor:
            self.supervisor = None
            self.world.trace.add(self.name, "container ended: %s", how)

    def crash(self) -> None:
        """PID 1 dies, and with it everything in the container."""
        if self.supervisor is not None:
            self.supervisor.kill("crashed")

    def lose_power(self) -> None:
        """The machine: what was not flushed may be gone, and the clocks begin anew."""
        self.crash()
        self.volume.lose_power()
        self.host.reboot()
        self.boot_id = self._random_id()

    def destroy_volume(self, *, with_memory: bool) -> None:
        self.crash()
        self.volume = DataVolume(self.postgres, self.name)
        if with_memory:
            self.storage = SimulatedStorage(self)

    def mount(self, volume: DataVolume, storage: SimulatedStorage) -> None:
        """In place of what was mounted; the container is to be started anew."""
        self.crash()
        self.volume, self.storage = volume, storage

    def volume_of_another_cluster(self) -> tuple[DataVolume, SimulatedStorage]:
        """As its instance of this name left it, in a state to be started."""
        volume, storage = DataVolume(self.postgres, self.name), SimulatedStorage(self)
        volume.data = DataDirectory.initdb(self.world.random.getrandbits(63))
        storage.content = to_json(
            VolumeState(
                cluster_uid="another-cluster",
                member_id=make_member_id(MemberName(self.name), f"{self.world.random.getrandbits(32):08x}"),
                volume_id=storage.identity(),
            )
        )
        return volume, storage

    def lose_directory(self) -> None:
        """What lies in the data directory's place is gone; Postgres notices and ends, the container lives on."""
        if self.server is not None:
            self.server.crash("its data directory is gone")
        self.volume.data = None

    def is_over(self, incarnation: str) -> bool:
        """Is that life of the container over, its Postgres included (R9)?"""
        if self.supervisor is not None and self.supervisor.incarnation == incarnation:
            return False
        return self.server is None or not self.server.any_process_left

    def processes(self) -> list[Process]:
        found = []
        if self.supervisor is not None:
            found.append(self.supervisor.process)
            if self.supervisor.agent is not None:
                found.append(self.supervisor.agent)
        return found

    # What runs in it.

    def _start_server(self) -> PostgresServer:
        self.server = PostgresServer(self.postgres, self.host, self.volume)
        return self.server

    async def _run_agent(self, process: Process, datagrams: SimulatedDatagrams) -> None:
        process.loop.executor_delay_s = lambda: None if self.volume.stalled else 0.0005
        ports = Ports(
            clock=HostClock(process),
            chance=random.Random(self.world.random.getrandbits(64)),
            boot_id=self.boot_id,
            datagrams=datagrams,
            storage=self.storage,
            disk=SimulatedDisk(self, process),
            coordination=StoreClient(self.store, process),
            caller=SimulatedPeers(self.network, process),
            make_postgres=lambda reload: SimulatedPostgres(self, process, reload),
        )
        agent = self.agent = assemble(self.configuration, ports)
        # This agent's alone: the class itself is also that of other tests' agents.
        agent.context.__class__ = CheckedContext
        agent.reload_configuration = self._reload
        self.network.listen(self.host, process, agent.answer_peer, agent.tell_peer)
        await agent.run()

    async def _reload(self) -> str:
        assert self.agent is not None
        context = self.agent.context
        context.configuration = self.configuration
        await context.database.reload_configuration(self.configuration)
        return "reloaded"

    def change_durability(self, durability: Durability) -> None:
        """The configuration file changes, and the supervisor gets SIGHUP."""
        configuration = self.configuration
        self.configuration = _with_durability(configuration, durability)
        if self.supervisor is not None:
            self.supervisor.reload()


def _with_durability(configuration: Configuration, durability: Durability) -> Configuration:
    return msgspec.structs.replace(
        configuration, cluster=msgspec.structs.replace(configuration.cluster, durability=durability)
    )
