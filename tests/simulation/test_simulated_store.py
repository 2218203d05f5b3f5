"""The simulated store: what a client may rely on, and that every fault really happens and is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
from simulated_network import STORE, Network
from simulated_store import ADMINISTRATOR, SimulatedStore, StoreClient
from simulated_time import Host, Process, World

from instance_manager.core.record import ClusterRecord, Holder, StoredRecord
from instance_manager.core.types import Epoch, MemberId
from instance_manager.ports import (
    Conflict,
    Coordination,
    CoordinationError,
    OutcomeUnknown,
    RecordUnreadable,
    StoreUnavailable,
)

T = TypeVar("T")

DEADLINE_S = 1.5
HOLDER = Holder(member_id=MemberId("a/1"), incarnation="life-1")


def record_of(epoch: int) -> ClusterRecord:
    return ClusterRecord(
        cluster_name="main", cluster_uid="uid", mode="synchronous", lease_duration_s=10.0, epoch=Epoch(epoch)
    )


class Place:
    """A store and two instances; questions are answered by driving the world."""

    def __init__(self) -> None:
        self.world = World(1)
        self.network = Network(self.world, self.world.random)
        self.network.faults.slow = 0.0
        self.store = SimulatedStore(self.world, self.network)
        self.a, self.b = (Process(Host(self.world, name), name) for name in "ab")
        self.at_a: Coordination = StoreClient(self.store, self.a)
        self.at_b: Coordination = StoreClient(self.store, self.b)

    def begin(self, question: Awaitable[T], process: Process | None = None) -> list[T | CoordinationError]:
        """What it comes to, in a list that is empty until then."""
        outcomes: list[T | CoordinationError] = []

        async def ask() -> None:
            try:
                outcomes.append(await question)
            except CoordinationError as error:
                outcomes.append(error)

        (process or self.a).spawn(ask())
        return outcomes

    def ask(self, question: Awaitable[T], process: Process | None = None) -> T | CoordinationError:
        outcomes = self.begin(question, process)
        while not outcomes:
            self.world.run(self.world.now_s + 0.01)
        return outcomes[0]

    def read(self) -> StoredRecord | CoordinationError | None:
        return self.ask(self.at_a.read(deadline_s=DEADLINE_S))

    def read_at_b(self) -> StoredRecord | CoordinationError | None:
        return self.ask(self.at_b.read(deadline_s=DEADLINE_S), self.b)

    def create(self, epoch: int = 1) -> StoredRecord | CoordinationError:
        return self.ask(self.at_a.create(record_of(epoch), deadline_s=DEADLINE_S))

    def replace(self, epoch: int, version: str | None = None) -> StoredRecord | CoordinationError:
        return self.ask(self.at_a.replace(record_of(epoch), version=version or self.version, deadline_s=DEADLINE_S))

    @property
    def version(self) -> str:
        content = self.store.content
        assert content is not None
        return content.version

    @property
    def epoch(self) -> int:
        record = self.store.record
        assert record is not None
        return record.epoch

    @property
    def counters(self) -> Counter[str]:
        return self.world.counters


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.world.close()


@pytest.fixture
def held(place: Place) -> Place:
    """With a record of epoch 1."""
    assert isinstance(place.create(), StoredRecord)
    return place


# What a client may rely on.


def test_a_write_takes_effect_on_exactly_the_version_that_it_names(place: Place) -> None:
    assert place.read() is None
    first = place.create(1)
    assert isinstance(first, StoredRecord)
    assert isinstance(place.create(1), Conflict)
    second = place.replace(2, first.version)
    assert isinstance(second, StoredRecord)
    assert isinstance(place.replace(3, first.version), Conflict)
    assert place.read_at_b() == second
    assert first.version != second.version


def test_of_two_writes_on_one_version_one_wins(held: Place) -> None:
    version = held.version
    outcomes = [
        held.begin(client.replace(record_of(epoch), version=version, deadline_s=DEADLINE_S), process)
        for client, process, epoch in ((held.at_a, held.a, 2), (held.at_b, held.b, 3))
    ]
    held.world.run(2.0)
    assert sorted(type(outcome).__name__ for (outcome,) in outcomes) == ["Conflict", "StoredRecord"]


def test_every_effect_is_told_at_its_moment_and_kept(place: Place) -> None:
    told: list[tuple[str, int | None, int]] = []
    place.store.on_applied = lambda instance, before, after: told.append(
        (instance, before.epoch if before else None, after.epoch)
    )
    place.create(1)
    place.replace(2)
    assert told == [("a", None, 1), ("a", 1, 2)]
    assert [state.by for state in place.store.history] == ["nobody", "a", "a"]


# What may go wrong with a write.


def test_429_and_spurious_conflicts_apply_nothing(held: Place) -> None:
    held.store.faults.too_many_requests = 1.0
    assert isinstance(held.replace(2), StoreUnavailable)
    assert isinstance(held.read(), StoreUnavailable)
    held.store.faults.too_many_requests = 0.0
    held.store.faults.spurious_conflict = 1.0
    assert isinstance(held.replace(2), Conflict)
    assert held.epoch == 1
    assert held.counters["store: 429"] == 2
    assert held.counters["store: conflict although nothing changed"] == 1


def test_an_error_before_the_write_is_refused_or_unknown_and_applies_nothing(held: Place) -> None:
    held.store.faults.error_before = 1.0
    outcomes = {type(held.replace(2)) for _ in range(20)}
    assert outcomes == {StoreUnavailable, OutcomeUnknown}
    assert isinstance(held.read(), StoreUnavailable)
    assert held.epoch == 1
    assert held.counters["store: 5xx before the write"] == 20


def test_an_error_after_the_write_is_unknown_and_applied(held: Place) -> None:
    held.store.faults.error_after = 1.0
    assert isinstance(held.replace(2), OutcomeUnknown)
    assert held.epoch == 2
    assert held.counters["store: 5xx after the write applied"] == 1


def test_a_lost_answer_is_unknown_at_the_deadline_of_the_clients_clock(held: Place) -> None:
    held.store.faults.answer_lost = 1.0
    held.a.host.rate = 1.5
    began_s = held.world.now_s
    assert isinstance(held.replace(2), OutcomeUnknown)
    assert held.world.now_s - began_s == pytest.approx(1.0, abs=0.02)
    assert held.epoch == 2
    assert held.counters["store: answer lost after the write applied"] == 1


def test_a_late_write_lands_if_nobody_was_faster(held: Place) -> None:
    held.store.faults.lands_late = 1.0
    outcomes = Counter[str]()
    for epoch in range(2, 42):
        outcomes[type(held.replace(epoch)).__name__] += 1
        held.world.run(held.world.now_s + 6.0)
        assert held.epoch == epoch
    assert outcomes["OutcomeUnknown"] > outcomes["StoredRecord"] > 0
    assert held.counters["store: write lands late"] == 40
    assert held.counters["store: write landed after its client gave up: applied"] == outcomes["OutcomeUnknown"]


def test_a_late_write_conflicts_with_a_faster_one(held: Place) -> None:
    version = held.version
    held.store.faults.lands_late = 1.0
    outcome = held.begin(held.at_a.replace(record_of(2), version=version, deadline_s=0.01))
    held.world.run(held.world.now_s + 0.02)
    held.store.faults.lands_late = 0.0
    assert held.epoch == 1
    assert isinstance(held.replace(3), StoredRecord)
    held.world.run(held.world.now_s + 10.0)
    assert isinstance(outcome[0], OutcomeUnknown)
    assert held.epoch == 3
    assert held.counters["store: write landed after its client gave up: a conflict"] == 1


def test_a_vanished_write_never_lands(held: Place) -> None:
    held.store.faults.lands_never = 1.0
    assert isinstance(held.replace(2), OutcomeUnknown)
    held.world.run(30.0)
    assert held.epoch == 1
    assert held.counters["store: write vanished"] == 1


def test_a_slow_store_answers_beyond_the_deadline_before_or_after_the_effect(held: Place) -> None:
    held.store.faults.slow = 1.0
    applied = Counter[bool]()
    for epoch in range(2, 42):
        if isinstance(held.replace(epoch), OutcomeUnknown):
            applied[held.epoch == epoch] += 1
        held.world.run(held.world.now_s + 5.0)
    assert applied[True] > 3
    assert applied[False] > 3
    assert held.counters["store: slow write"] == 40
    reads = Counter(type(held.read()).__name__ for _ in range(40))
    assert reads["StoreUnavailable"] > 5
    assert reads["StoredRecord"] > 5


def test_a_doubled_write_applies_once_and_may_be_answered_by_its_own_conflict(held: Place) -> None:
    held.store.faults.duplicated = 1.0
    outcomes = Counter[str]()
    for epoch in range(2, 22):
        outcomes[type(held.replace(epoch)).__name__] += 1
        assert held.epoch == epoch
    assert len(held.store.history) == 22
    assert outcomes["Conflict"] == held.counters["store: conflict for a write that applied"] > 3
    assert outcomes["StoredRecord"] > 3


def test_a_write_goes_on_when_its_client_is_killed_or_cancelled(held: Place) -> None:
    held.begin(held.at_a.replace(record_of(2), version=held.version, deadline_s=DEADLINE_S))
    held.world.call_later(0.00001, held.a.kill)
    held.world.run(held.world.now_s + 1.0)
    assert held.epoch == 2


# Outages and partitions.


def test_in_an_outage_nothing_is_answered_and_nothing_applied(held: Place) -> None:
    held.store.outage = True
    outcomes = Counter(type(held.replace(2)).__name__ for _ in range(40))
    assert outcomes["StoreUnavailable"] > outcomes["OutcomeUnknown"] > 0
    assert isinstance(held.read(), StoreUnavailable)
    assert held.ask(held.at_a.is_proven_dead(HOLDER, deadline_s=1.0)) is False
    held.store.outage = False
    held.world.run(held.world.now_s + 10.0)
    assert held.epoch == 1
    assert held.counters["store: request refused in an outage"] > 5
    assert held.counters["store: request lost in an outage"] > 5


def test_what_the_store_had_begun_it_does_in_the_outage(held: Place) -> None:
    held.store.faults.latency_min_s = held.store.faults.latency_max_s = 0.1
    outcome = held.begin(held.at_a.replace(record_of(2), version=held.version, deadline_s=DEADLINE_S))
    held.world.call_later(0.05, setattr, held.store, "outage", True)
    held.world.run(held.world.now_s + 3.0)
    assert held.epoch == 2
    assert isinstance(outcome[0], OutcomeUnknown)
    assert held.counters["store: answer lost in an outage"] == 1


@pytest.mark.parametrize("direction", [("a", STORE), (STORE, "a")])
def test_a_partition_cuts_off_one_instance(held: Place, direction: tuple[str, str]) -> None:
    held.network.block(*direction, STORE)
    outcomes = Counter(type(held.replace(2)).__name__ for _ in range(10))
    assert outcomes["OutcomeUnknown"] > 0
    # Only what never went out can be known to be without effect.
    assert (outcomes["StoreUnavailable"] > 0) == (direction[0] == "a") == (held.epoch == 1)
    assert isinstance(held.read(), StoreUnavailable)
    assert isinstance(held.read_at_b(), StoredRecord)


# Reads, hints, proofs of death.


def test_a_stale_read_answers_with_an_earlier_state(held: Place) -> None:
    for epoch in range(2, 12):
        held.world.run(held.world.now_s + 0.5)
        held.replace(epoch)
    held.store.faults.stale_read = 1.0
    epochs = set()
    for _ in range(30):
        answer = held.read()
        assert isinstance(answer, StoredRecord)
        epochs.add(int(answer.record.epoch))
    assert len(epochs) > 3
    assert held.counters["store: stale read"] == 30


def _hints(place: Place) -> list[float]:
    came: list[float] = []
    place.at_b = StoreClient(place.store, place.b)

    async def listen(changes: AsyncIterator[None]) -> None:
        async for _ in changes:
            came.append(place.world.now_s)

    place.b.spawn(listen(place.at_b.changes()))
    place.world.run(place.world.now_s + 1.0)
    assert len(came) == 1, "one hint at once"
    came.clear()
    return came


def _no_fault(store: SimulatedStore) -> None:
    return None


def _lost(store: SimulatedStore) -> None:
    store.faults.hint_lost = 1.0


def _late(store: SimulatedStore) -> None:
    store.faults.hint_late = 1.0


def _doubled(store: SimulatedStore) -> None:
    store.faults.hint_duplicated = 1.0


def _cut_off(store: SimulatedStore) -> None:
    store.network.block(STORE, "b", STORE)


@pytest.mark.parametrize(
    ("fault", "soon", "at_last", "counted"),
    [
        (_no_fault, 1, 1, "store: hint"),
        (_lost, 0, 0, "store: hint lost"),
        (_late, 0, 1, "store: hint late"),
        (_doubled, 2, 2, "store: hint doubled"),
        (_cut_off, 0, 0, "network: message into a partition"),
    ],
)
def test_a_change_is_hinted_unless_the_hint_is_lost_late_or_doubled(
    held: Place, fault: Callable[[SimulatedStore], None], soon: int, at_last: int, counted: str
) -> None:
    came = _hints(held)
    fault(held.store)
    held.replace(2)
    held.world.run(held.world.now_s + 0.1)
    assert len(came) == soon
    held.world.run(held.world.now_s + 20.0)
    assert len(came) == at_last
    assert held.counters[counted] > 0


def test_death_is_proven_by_the_truth_at_that_moment(held: Place) -> None:
    dead: list[Holder] = []
    held.store.is_dead = lambda holder: holder in dead
    assert held.ask(held.at_a.is_proven_dead(HOLDER, deadline_s=1.0)) is False
    dead.append(HOLDER)
    assert held.ask(held.at_a.is_proven_dead(HOLDER, deadline_s=1.0)) is True
    held.network.block("a", STORE, STORE)
    assert held.ask(held.at_a.is_proven_dead(HOLDER, deadline_s=1.0)) is False


# What people do to the record.


def test_a_deleted_record_is_none_and_may_be_created_again_under_a_new_version(held: Place) -> None:
    before = held.version
    held.store.delete()
    assert held.read() is None
    assert isinstance(held.replace(2, before), Conflict)
    again = held.create(3)
    assert isinstance(again, StoredRecord)
    assert again.version != before


def test_a_damaged_record_is_unreadable_and_replaced_by_its_version(held: Place) -> None:
    before = held.version
    held.store.damage()
    error = held.read()
    assert isinstance(error, RecordUnreadable)
    assert isinstance(held.create(2), Conflict)
    assert isinstance(held.replace(2, before), Conflict)
    assert isinstance(held.replace(2, error.version), StoredRecord)  # type: ignore[attr-defined]


def test_a_restored_and_an_edited_record_are_new_versions_of_their_own(held: Place) -> None:
    told: list[str] = []
    held.store.on_applied = lambda *_: pytest.fail("this is no instance's write")
    held.store.on_interference = lambda what, before, after: told.append(f"{what}: {after.epoch if after else None}")
    versions = [held.version]
    held.world.run(10.0)
    assert held.store.edit(epoch=Epoch(7))
    versions.append(held.version)
    held.world.run(20.0)
    assert held.store.restore(15.0)
    versions.append(held.version)
    assert held.store.edit(record_of(9))
    versions.append(held.version)
    held.store.delete()
    assert not held.store.edit(epoch=Epoch(8))
    assert not held.store.restore(1000.0)
    assert told == ["edited: 7", "restored: 1", "edited: 9", "deleted: None"]
    assert len(set(versions)) == 4
    assert held.store.history[-1].by == ADMINISTRATOR
    assert held.counters["store: record restored by hand"] == 1


# One seed, one run.


def _story(seed: int) -> tuple[str, Counter[str]]:
    """Two instances write against each other under every fault at once."""
    world = World(seed)
    network = Network(world, world.random)
    store = SimulatedStore(world, network)
    network.faults.loss = network.faults.slow = 0.05
    faults = store.faults
    faults.slow = faults.too_many_requests = faults.error_before = faults.error_after = faults.answer_lost = 0.05
    faults.lands_late = faults.lands_never = faults.duplicated = faults.spurious_conflict = faults.stale_read = 0.05

    async def write_again_and_again(process: Process, client: Coordination) -> None:
        while True:
            try:
                stored = await client.read(deadline_s=DEADLINE_S)
                if stored is None:
                    stored = await client.create(record_of(1), deadline_s=DEADLINE_S)
                wanted = record_of(stored.record.epoch + 1)
                stored = await client.replace(wanted, version=stored.version, deadline_s=DEADLINE_S)
                world.trace.add(process.name, "wrote %s", stored.version)
            except CoordinationError as error:
                world.trace.add(process.name, "%r", error)

    for name in "ab":
        process = Process(Host(world, name), name)
        process.spawn(write_again_and_again(process, StoreClient(store, process)))
    world.run(60.0)
    story = str(world.trace), world.counters
    world.close()
    return story


def test_the_same_seed_tells_the_same_story_with_every_fault_in_it() -> None:
    story, counters = _story(3)
    assert (story, counters) == _story(3)
    assert story != _story(4)[0]
    assert [
        what
        for what in (
            "network: message lost",
            "store: 429",
            "store: 5xx before the write",
            "store: 5xx after the write applied",
            "store: answer lost after the write applied",
            "store: write lands late",
            "store: write vanished",
            "store: write doubled",
            "store: conflict although nothing changed",
            "store: stale read",
            "store: slow write",
            "store: slow read",
        )
        if not counters[what]
    ] == []
