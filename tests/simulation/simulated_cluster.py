"""One seed: a cluster of simulated instances, its clients, what goes wrong, and whether it kept its promise and healed."""

from __future__ import annotations

import hashlib
import logging
import random
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from promise_checker import PromiseBroken, PromiseChecker
from simulated_clients import Clients, HistoryViolation
from simulated_faults import Fault, Mix, Undo, choose_mix
from simulated_instance import SimulatedInstance, SimulatedStorage
from simulated_network import Network, NetworkFaults
from simulated_store import SimulatedStore, StoreFaults
from simulated_time import World
from simulated_volume import HARSH, DataDirectory, DataVolume, PostgresBehaviour, PostgresCluster
from simulation_branches import taken

from instance_manager.agent.supervisor_link import SupervisorError
from instance_manager.codec import from_json
from instance_manager.config_sections import Durability
from instance_manager.core.record import ClusterRecord, Holder, StoredRecord
from instance_manager.core.timing import Timings
from instance_manager.core.types import MemberId, member_name_of
from instance_manager.core.voting import VolumeState
from instance_manager.http.ports import ControlResult, MalformedCall

NAMES = ("alpha", "bravo", "charlie", "delta", "echo")
STARTS_WITHIN_S = 60.0
FAULTS_FROM_THE_START = 0.05
"""Share of seeds that do not wait for a whole cluster before they break it."""
HEALS_WITHIN_S = 120.0
"""From the end of the last fault: one primary, all others streaming and voters, and a write acknowledged."""
LOOK_S = 0.5
USER_LOOKS_S = 5.0
LOSSY_AFTER_S = 30.0
"""A user gives up a lost disk, and what only it held."""
EXCUSE_S = 15.0
"""How long after a pause of its supervisor an asynchronous cluster's machine may still be seen writing."""
SUSPENDED_AT_MOST_S = 20.0


class Stuck(Exception):
    """The cluster did not come back in time after everything was mended; the text says what is missing."""


@dataclass
class Outcome:
    seed: int
    failure: str | None
    virtual_s: float
    cpu_s: float
    events: int
    acknowledged: int
    counters: Counter[str]
    fingerprint: str
    healed_s: float = 0.0
    trace: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a seed does not choose by itself; the default leaves it everything."""

    durability: Durability | None = None
    instances: int | None = None
    faults: tuple[str, ...] = ()
    """Names of the only faults; empty: the seed's own mix."""
    behaviour: PostgresBehaviour | None = None


ANYTHING = Scenario()


class SimulatedCluster:
    def __init__(self, seed: int, scenario: Scenario = ANYTHING, *, traced: bool = False) -> None:
        self.scenario = scenario
        self.world = world = World(seed, trace_limit=None if traced else 400)
        chance = self.chance = world.random
        self.durability: Durability = chance.choices(("preferred", "required", "asynchronous"), (70, 15, 15))[0]
        self.names = NAMES[: chance.choices((1, 2, 3, 5), (2, 25, 60, 13))[0]]
        if scenario.durability is not None:
            self.durability = scenario.durability
        if scenario.instances is not None:
            self.names = NAMES[: scenario.instances]
        self.timings = Timings()
        self.network = Network(world, random.Random(chance.getrandbits(64)))
        self.store = SimulatedStore(
            world, self.network, is_dead=self._is_dead, random=random.Random(chance.getrandbits(64))
        )
        self.postgres = PostgresCluster(world, self.network, behaviour=chance.choice((PostgresBehaviour(), HARSH)))
        if scenario.behaviour is not None:
            self.postgres.behaviour = scenario.behaviour
        self.checker = PromiseChecker(self)
        self.postgres.on_acknowledged = self.checker.on_acknowledged
        self.postgres.on_read_write = self.checker.on_read_write
        self.postgres.on_started = self.checker.on_started
        self.postgres.on_destroying = self.checker.on_destroying
        self.store.on_applied = lambda _, before, after: self.checker.on_applied(before, after)
        self.store.on_interference = lambda *_: self.checker.on_interference()
        maximum_lag_bytes = self.maximum_lag_bytes = chance.choice((0, 500, 16 << 20))
        self.instances = {
            name: SimulatedInstance(
                world,
                self.network,
                self.store,
                self.postgres,
                name,
                self.names,
                durability=self.durability,
                timings=self.timings,
                maximum_lag_bytes=maximum_lag_bytes,
                on_agent_error=self._agent_error,
            )
            for name in self.names
        }
        self.clients = Clients(self, random.Random(chance.getrandbits(64)))
        self._destroyed: dict[MemberId, DataDirectory] = {}
        """And those that are not mounted for a while."""
        self._members: dict[str, tuple[bytes, MemberId | None]] = {}
        self._volume_spent = False
        self.lies_in_wait = False
        """One of `rare_situations` does."""
        self.undos: dict[int, tuple[Fault, Undo]] = {}
        self._next_undo = 0
        self._last_mend_s = float("inf")

    # What others look at.

    @property
    def record(self) -> ClusterRecord | None:
        return self.store.record

    @property
    def mode(self) -> str:
        return "asynchronous" if self.durability == "asynchronous" else "synchronous"

    def holder_instance(self) -> SimulatedInstance | None:
        record = self.record
        return self.instances.get(record.holder.name) if record is not None and record.holder is not None else None

    def member_at(self, instance: SimulatedInstance) -> MemberId | None:
        """By what is on its volume, whatever its agent believes."""
        content = instance.storage.content
        if content is None:
            return None
        known = self._members.get(instance.name)
        if known is None or known[0] is not content:
            known = self._members[instance.name] = (content, from_json(content, VolumeState).member_id)
        return known[1]

    def is_member(self, instance: SimulatedInstance) -> bool:
        """Does its directory belong to the cluster's history, and was it not given up?"""
        member, record = self.member_at(instance), self.record
        return member is not None and record is not None and member not in record.excluded

    def directory_of(self, member: MemberId) -> DataDirectory | None:
        """Of this member; one that was destroyed from outside is remembered as it was."""
        instance = self.instances.get(member_name_of(member))
        if instance is not None and self.member_at(instance) == member and instance.volume.data is not None:
            return instance.volume.data
        return self._destroyed.get(member)

    def _is_dead(self, holder: Holder) -> bool:
        instance = self.instances.get(holder.name)
        return instance is None or instance.is_over(holder.incarnation)

    def _agent_error(self, instance: SimulatedInstance, error: BaseException) -> None:
        """An agent that lost its supervisor ends by design; any other error is a defect of the agent."""
        if isinstance(error, SupervisorError) or (
            isinstance(error, BaseExceptionGroup) and error.split(SupervisorError)[1] is None
        ):
            return
        self.world.stop(error)

    # For the faults.

    def links_of(self, name: str, channels: list[str]) -> list[tuple[str, str, str]]:
        others = [other for other in self.names if other != name]
        found = []
        for channel in channels:
            ends = {"store": ["store"], "clients": ["clients"]}.get(channel, others)
            found += [(name, end, channel) for end in ends] + [(end, name, channel) for end in ends]
        return found

    def excuse(self, instance: SimulatedInstance, for_s: float = float("inf")) -> None:
        """Its supervisor will not be scheduled in time, which asynchronous clusters openly rely on."""
        excused = self.checker.excused_until_s
        excused[instance.name] = max(excused.get(instance.name, 0.0), self.world.now_s + for_s + EXCUSE_S)

    def end_excuse(self, instance: SimulatedInstance) -> None:
        self.checker.excused_until_s[instance.name] = self.world.now_s + EXCUSE_S + SUSPENDED_AT_MOST_S

    def may_lose_volume(self) -> bool:
        """Once in a seed; not from a record that a hand has changed, and not while a user has one cloned anew."""
        record = self.record
        if record is None or self._volume_spent or len(self.names) == 1 or self.checker.was_tampered_with:
            return False
        if any(self.member_at(instance) in record.excluded for instance in self.instances.values()):
            return False
        return all(
            each.volume.data is not None
            and not each.volume.rewind_attempts
            and each.server is not None
            and each.server.ready
            for each in self.instances.values()
        )

    @property
    def has_data(self) -> bool:
        """Before there is any, a user who damaged the record would just delete it."""
        return self.record is not None and self.record.opened

    @property
    def has_lost_volume(self) -> bool:
        return self._volume_spent

    def spend_volume(self) -> None:
        self._volume_spent = True

    def lose_volume(self, instance: SimulatedInstance, *, with_memory: bool = True) -> None:
        self.spend_volume()
        member = self.member_at(instance)
        if member is not None and instance.volume.data is not None:
            self._destroyed[member] = instance.volume.data
        instance.destroy_volume(with_memory=with_memory)

    def lose_directory_alone(self, instance: SimulatedInstance) -> None:
        """Under a living container."""
        self.spend_volume()
        member = self.member_at(instance)
        if member is not None and instance.volume.data is not None:
            self._destroyed[member] = instance.volume.data
        instance.lose_directory()

    def mount(self, instance: SimulatedInstance, volume: DataVolume, storage: SimulatedStorage) -> Undo:
        """Another volume in place of the right one, which is remembered as it was; what is returned mounts that again."""
        right, member = (instance.volume, instance.storage), self.member_at(instance)
        if member is not None and instance.volume.data is not None:
            self._destroyed[member] = instance.volume.data
        instance.mount(volume, storage)

        def undo() -> None:
            instance.mount(*right)
            if member is not None:
                self._destroyed.pop(member, None)

        return undo

    def state_before_every_memory(self, chance: random.Random) -> float | None:
        """How long ago the record was at an epoch that every volume remembers a later one of; None: never."""
        seen = []
        for instance in self.instances.values():
            content = instance.storage.content
            seen.append(from_json(content, VolumeState).recorded_epoch if content is not None else 0)
        found = [
            state.now_s
            for state in self.store.history
            if isinstance(state.content, StoredRecord) and state.content.record.epoch < min(seen)
        ]
        return self.world.now_s - chance.choice(found) if found else None

    def bad_store_faults(self, chance: random.Random) -> StoreFaults:
        def sometimes(most: float) -> float:
            return chance.choice((0.0, 0.0, most / 5, most))

        return StoreFaults(
            slow=sometimes(0.3),
            too_many_requests=sometimes(0.3),
            error_before=sometimes(0.3),
            error_after=sometimes(0.3),
            answer_lost=sometimes(0.3),
            lands_late=sometimes(0.3),
            lands_never=sometimes(0.2),
            duplicated=sometimes(0.3),
            spurious_conflict=sometimes(0.3),
            stale_read=sometimes(0.3),
            hint_lost=sometimes(0.8),
            hint_late=sometimes(0.8),
            hint_duplicated=sometimes(0.5),
        )

    def verb(self, verb: str, arguments: dict[str, Any], *, on: SimulatedInstance | None = None) -> None:
        """A user's command to this or any instance that runs, not waited for."""
        running = [i for i in self.instances.values() if i.supervisor is not None and i.supervisor.agent is not None]
        if not running:
            return
        instance = on or self.chance.choice(running)
        supervisor = instance.supervisor
        if supervisor is None or supervisor.agent is None or instance.agent is None or not supervisor.agent.alive:
            return
        self.world.trace.add("user", "%s %s on %s", verb, arguments, instance.name)
        supervisor.agent.spawn(self._carry_out(instance, verb, arguments))

    async def _carry_out(self, instance: SimulatedInstance, verb: str, arguments: dict[str, Any]) -> None:
        assert instance.agent is not None
        try:
            async for answer in instance.agent.control(verb, arguments):
                if isinstance(answer, ControlResult):
                    self.world.counters[f"verb: {verb} {'done' if answer.ok else 'refused'}"] += 1
                    self.world.trace.add("user", "%s on %s: %s", verb, instance.name, answer.message)
        except MalformedCall as error:
            self.world.counters[f"verb: {verb} refused"] += 1
            self.world.trace.add("user", "%s on %s: %s", verb, instance.name, error)
        except Exception as error:
            self.world.counters[f"verb: {verb} failed"] += 1
            self.world.trace.add("user", "%s on %s failed: %r", verb, instance.name, error)

    # A seed.

    def run(self) -> float:
        """The whole story; returns how long healing took."""
        for instance in self.instances.values():
            self.world.call_later(self.chance.uniform(0, 1.0), instance.start)
        if self.chance.random() < FAULTS_FROM_THE_START:
            self.clients.start()
            self.world.run(self.world.now_s + self.chance.uniform(0.5, 5.0))
        else:
            self._until_whole(STARTS_WITHIN_S, "at the start")
            self.clients.start()
            self.world.run(self.world.now_s + self.chance.uniform(0.5, 5.0))
        self._break_things(choose_mix(self.chance, self.mode, self.scenario.faults))
        took_s = self._heal()
        self.clients.judge()
        return took_s

    def _break_things(self, mix: Mix) -> None:
        world, chance = self.world, self.chance
        ends_s = world.now_s + mix.duration_s
        while world.now_s < ends_s:
            fault = chance.choices(mix.faults, [fault.weight for fault in mix.faults])[0]
            self.inject(fault)
            world.run(world.now_s + chance.expovariate(1 / mix.mean_pause_s))

    def inject(self, fault: Fault) -> None:
        world = self.world
        world.trace.add("fault", fault.name)
        undo = fault.apply(self, self.chance)
        world.counters[f"fault: {fault.name}"] += 1
        if undo is not None:
            key = self._next_undo = self._next_undo + 1
            self.undos[key] = (fault, undo)
            lasts_s = min(self.chance.uniform(*fault.lasts_s), self.chance.uniform(*fault.lasts_s) * 2)
            world.call_later(lasts_s, self._undo, key)

    def _undo(self, key: int) -> None:
        fault, undo = self.undos.pop(key, (None, None))
        if fault is not None and undo is not None:
            self.world.trace.add("fault", "ends: %s", fault.name)
            undo()

    def _heal(self) -> float:
        """Everything is undone; what only a user can mend, the user mends."""
        for key in list(self.undos):
            self._undo(key)
        self.network.heal()
        self.network.faults = NetworkFaults()
        self.store.outage = False
        self.store.faults = StoreFaults()
        for instance in self.instances.values():
            instance.start()
        self.world.trace.add("fault", "everything is mended")
        began_s = self.world.now_s
        self._last_mend_s = began_s + LOSSY_AFTER_S
        self._until_whole(HEALS_WITHIN_S, "after healing")
        return self.world.now_s - began_s

    def _until_whole(self, within_s: float, when: str) -> None:
        ends_s = self.world.now_s + within_s
        why = "nothing was looked at"
        mends_s = self.world.now_s + 1.0
        while self.world.now_s < ends_s:
            self.world.run(self.world.now_s + LOOK_S)
            why_not = self.why_not_whole()
            if why_not is None:
                return
            why = why_not
            if self.world.now_s >= mends_s:
                mends_s = self.world.now_s + USER_LOOKS_S
                self._user_mends()
        raise Stuck(f"{within_s:g} s {when}: {why}")

    def _user_mends(self) -> None:
        """What was done by a user, a user takes back, again and again until it shows."""
        may_have_lost = self._volume_spent or self.checker.was_tampered_with or self._a_voter_is_gone()
        if self.world.now_s >= self._last_mend_s and may_have_lost:
            self._last_mend_s = self.world.now_s + LOSSY_AFTER_S
            self.checker.loss_allowed_until_s = self.world.now_s + LOSSY_AFTER_S
            self.verb("failover", {"allow_data_loss": True})
        record = self.record
        if record is None:
            return
        for name in sorted(record.fenced):
            self.verb("unfence", {"name": name})
        if record.paused:
            self.verb("resume", {})

    def _a_voter_is_gone(self) -> bool:
        """Its directory was set aside while q was 0, and it was counted on again before that was known: like a lost disk."""
        record = self.record
        return record is not None and any(self.directory_of(voter) is None for voter in sorted(record.voters))

    def why_not_whole(self) -> str | None:
        record = self.record
        if record is None:
            return "there is no record"
        if record.holder is None:
            return "nobody holds the Lease"
        holder = self.instances[record.holder.name]
        agent = holder.agent
        if agent is None or not agent.context.gate_open or not agent.context.holds_lease:
            return f"{holder.name} holds the Lease and is not open: {agent.context.role.value if agent else 'no agent'}"
        if record.fenced or record.paused:
            return f"fenced {sorted(record.fenced)}, paused {record.paused}"
        if holder.server is None or not holder.server.read_write:
            return f"the Postgres of {holder.name} cannot commit"
        for instance in self.instances.values():
            if instance is holder:
                continue
            server = instance.server
            receiver = server.walreceiver if server is not None else None
            if receiver is None or receiver.status != "streaming" or receiver.host != holder.name:
                return f"{instance.name} does not stream from {holder.name}"
            member = self.member_at(instance)
            if member not in record.voters:
                return f"{instance.name} ({member}) is not among the voters {sorted(record.voters)}"
        if record.mode == "synchronous" and record.quorum != agent.context.wanted_k():
            return f"q is {record.quorum}, {agent.context.wanted_k()} is wanted"
        return None


def run_seed(seed: int, *, variant: str | None = None, traced: bool = False) -> Outcome:
    """One seed from beginning to end, always the same; with a broken rule of `broken_rules`, if one is named."""
    if variant is None:
        return _run_seed(seed, ANYTHING, traced=traced)
    from broken_rules import BROKEN

    broken = BROKEN[variant]
    with broken.applied():
        return _run_seed(seed, broken.scenario, traced=traced)


def _run_seed(seed: int, scenario: Scenario, *, traced: bool) -> Outcome:
    began_s = time.process_time()
    cluster = SimulatedCluster(seed, scenario, traced=traced)
    world = cluster.world
    failure, healed_s = None, 0.0
    handler = _TraceHandler(world) if traced else None
    if handler is not None:
        logger = logging.getLogger("instance_manager")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    else:
        logging.disable(logging.CRITICAL)
    try:
        healed_s = cluster.run()
    except (PromiseBroken, HistoryViolation, Stuck) as error:
        failure = f"{type(error).__name__}: {error}"
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        if traced:
            world.trace.add("error", "%s", "".join(traceback.format_exception(error)))
    finally:
        if handler is not None:
            logging.getLogger("instance_manager").removeHandler(handler)
    lines = list(world.trace.lines()) if traced else []
    counters = Counter(world.counters)
    counters.update(taken())
    fingerprint = hashlib.sha256(repr((world.events, world.now_s, sorted(world.counters.items()))).encode()).hexdigest()
    outcome = Outcome(
        seed=seed,
        failure=failure,
        virtual_s=world.now_s,
        cpu_s=time.process_time() - began_s,
        events=world.events,
        acknowledged=cluster.checker.acknowledgements,
        counters=counters,
        fingerprint=fingerprint[:16],
        healed_s=healed_s,
        trace=lines,
    )
    world.close()
    return outcome


class _TraceHandler(logging.Handler):
    """The agents' own log lines, on virtual time, in the trace."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        import asyncio

        loop = asyncio._get_running_loop()
        process = getattr(loop, "process", None)
        self._world.trace.add(process.name if process is not None else "world", "%s", record.getMessage())
