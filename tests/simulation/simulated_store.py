"""The coordination store of the simulation: one register, and each instance's client of it.

The register itself is linearizable: a write takes effect at one moment, on exactly the version that it names, and versions
never come again. Everything around it may go wrong: requests and answers late, lost, doubled; refusals; a write that lands
long after its client gave up; hints of changes that never come; people who delete, damage, restore and edit the record.

Not modelled: a store that loses what it has acknowledged other than by `restore`, and one that forks.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from simulated_network import STORE, Network
from simulated_time import Process, World

from instance_manager.core.record import ClusterRecord, Holder, StoredRecord
from instance_manager.ports import Conflict, CoordinationError, OutcomeUnknown, RecordUnreadable, StoreUnavailable

T = TypeVar("T")

HISTORY_MAX = 20_000
ADMINISTRATOR = "administrator"


@dataclass(frozen=True, slots=True)
class Damaged:
    """What is stored is no record. By `version` it can be replaced."""

    version: str


class DamagedRecord(RecordUnreadable):
    """With the version of what is stored, as the store on one machine tells it."""

    def __init__(self, version: str) -> None:
        super().__init__(f"version {version} is no record")
        self.version = version


@dataclass(slots=True)
class StoreFaults:
    """What may happen to one request; probabilities from 0 to 1."""

    latency_min_s: float = 0.0002
    latency_max_s: float = 0.005
    """Of the work in the store, on top of the network's."""
    slow: float = 0.0
    """That the work takes up to `slow_max_s` before or, as likely, after it has taken effect."""
    slow_max_s: float = 3.0
    too_many_requests: float = 0.0
    """429: refused before anything."""
    error_before: float = 0.0
    """5xx, nothing was applied; the client can tell in half of the cases."""
    error_after: float = 0.0
    """5xx although the write is applied."""
    answer_lost: float = 0.0
    """The write is applied, and its client never hears."""
    lands_late: float = 0.0
    """The write takes effect, if it still can, up to `late_max_s` afterwards; its client has long given up."""
    late_max_s: float = 6.0
    lands_never: float = 0.0
    duplicated: float = 0.0
    """The write arrives twice; the client gets the first answer or, as likely, the second: a conflict."""
    spurious_conflict: float = 0.0
    """409 although the version is the current one."""
    stale_read: float = 0.0
    stale_max_s: float = 3.0
    hint_lost: float = 0.0
    hint_late: float = 0.0
    hint_late_max_s: float = 10.0
    hint_duplicated: float = 0.0
    refuses_in_outage: float = 0.5
    """That a request during an outage is refused at once; else it meets silence."""


Content = StoredRecord | Damaged | None
"""None: nothing is stored."""


@dataclass(frozen=True, slots=True)
class State:
    """One state that the register was in, from `now_s` on."""

    now_s: float
    by: str
    content: Content


def _ignore_write(instance: str, before: ClusterRecord | None, after: ClusterRecord) -> None:
    return None


def _ignore_interference(what: str, before: ClusterRecord | None, after: ClusterRecord | None) -> None:
    return None


class SimulatedStore:
    """The register. `is_dead` is the truth about a holder's life: its supervisor and all of its Postgres are gone."""

    def __init__(
        self,
        world: World,
        network: Network,
        *,
        is_dead: Callable[[Holder], bool] = lambda holder: False,
        random: random.Random | None = None,
    ) -> None:
        self.world = world
        self.network = network
        self.random = random or world.random
        self.is_dead = is_dead
        self.faults = StoreFaults()
        self.outage = False
        """Nothing is answered, by nobody; what it had begun it still does."""
        self.history: deque[State] = deque([State(world.now_s, "nobody", None)], maxlen=HISTORY_MAX)
        self.on_applied: Callable[[str, ClusterRecord | None, ClusterRecord], None] = _ignore_write
        """Called with the instance, the state before and after, at the moment when a write takes effect."""
        self.on_interference: Callable[[str, ClusterRecord | None, ClusterRecord | None], None] = _ignore_interference
        """Called when somebody deletes, damages, restores or edits the record."""
        self._clients: list[StoreClient] = []
        self._versions = 0

    @property
    def content(self) -> Content:
        """The truth just now."""
        return self.history[-1].content

    @property
    def record(self) -> ClusterRecord | None:
        return _record_of(self.content)

    # What people do to it.

    def delete(self) -> None:
        self._interfere("deleted", None)

    def damage(self) -> None:
        """Something is stored that is no record."""
        self._interfere("damaged", Damaged(f"unreadable-{self._next_version()}"))

    def restore(self, back_s: float) -> bool:
        """Bring back the record of `back_s` ago, under a new version; False: there was none."""
        record = _record_of(self._content_before(back_s))
        if record is None:
            return False
        self._interfere("restored", StoredRecord(record, self._next_version()))
        return True

    def edit(self, record: ClusterRecord | None = None, /, **changes: Any) -> bool:
        """Put `record` in the place of the record, or change fields of it, by hand; False: there is none."""
        if self.record is None:
            return False
        self._interfere("edited", StoredRecord(replace(record or self.record, **changes), self._next_version()))
        return True

    def _interfere(self, what: str, content: Content) -> None:
        before = self.record
        self.world.counters[f"store: record {what} by hand"] += 1
        self.world.trace.add(STORE, "record %s by hand", what)
        self._become(ADMINISTRATOR, content)
        self.on_interference(what, before, self.record)

    # What a client's request meets; all of it runs as the world.

    def happens(self, probability: float, what: str) -> bool:
        """Draw, and count what happened."""
        if probability <= 0 or self.random.random() >= probability:
            return False
        self.world.counters[what] += 1
        return True

    def service_s(self) -> float:
        return self.random.uniform(self.faults.latency_min_s, self.faults.latency_max_s)

    def read(self) -> Content:
        if self.happens(self.faults.stale_read, "store: stale read"):
            return self._content_before(self.random.uniform(0.0, self.faults.stale_max_s))
        return self.content

    def write(self, instance: str, record: ClusterRecord, expected: str | None) -> StoredRecord | Conflict:
        """Take effect now, or conflict."""
        before = self.content
        if (version := _version_of(before)) != expected:
            return Conflict(f"the version is {version}, not {expected}")
        stored = StoredRecord(record, self._next_version())
        self.world.trace.add(
            STORE, "%s wrote %s: epoch %d, renewal %d", instance, stored.version, record.epoch, record.renewals
        )
        self._become(instance, stored)
        self.on_applied(instance, _record_of(before), record)
        return stored

    def connect(self, client: StoreClient) -> None:
        self._clients.append(client)

    def disconnect(self, client: StoreClient) -> None:
        if client in self._clients:
            self._clients.remove(client)

    def _become(self, by: str, content: Content) -> None:
        self.history.append(State(self.world.now_s, by, content))
        for client in self._clients:
            self._send_hint(client)

    def _send_hint(self, client: StoreClient) -> None:
        if self.outage or self.happens(self.faults.hint_lost, "store: hint lost"):
            return
        delay_s = 0.0
        if self.happens(self.faults.hint_late, "store: hint late"):
            delay_s = self.random.uniform(0.0, self.faults.hint_late_max_s)
        copies = 2 if self.happens(self.faults.hint_duplicated, "store: hint doubled") else 1
        for _ in range(copies):
            self.world.call_later(delay_s, self.network.message, STORE, client.instance, STORE, client.hinted)

    def _content_before(self, back_s: float) -> Content:
        then_s = self.world.now_s - back_s
        return next(
            (state.content for state in reversed(self.history) if state.now_s <= then_s), self.history[0].content
        )

    def _next_version(self) -> str:
        self._versions += 1
        return f"v{self._versions}"


def _record_of(content: Content) -> ClusterRecord | None:
    return content.record if isinstance(content, StoredRecord) else None


def _version_of(content: Content) -> str | None:
    return content.version if content is not None else None


class Request(Generic[T]):
    """One request on its way through network and store. It goes on when its client has gone."""

    __slots__ = ("answer", "certainly_lost", "instance", "store")

    def __init__(self, store: SimulatedStore, process: Process) -> None:
        self.store = store
        self.instance = process.host.name
        self.answer: asyncio.Future[T | CoordinationError] = process.loop.create_future()
        self.certainly_lost = False
        """It never reached the store and never will."""

    def send(self, arrive: Callable[[], object]) -> None:
        def at_the_store() -> None:
            if self.store.outage:
                self._meet_outage()
            else:
                arrive()

        self.store.network.message(self.instance, STORE, STORE, at_the_store, lost=self._lose)

    def answer_with(self, answer: T | CoordinationError) -> None:
        if self.store.outage:
            self.store.world.counters["store: answer lost in an outage"] += 1
            return
        self.store.network.message(STORE, self.instance, STORE, lambda: self._finish(answer))

    def _meet_outage(self) -> None:
        store = self.store
        self.certainly_lost = True
        if store.happens(store.faults.refuses_in_outage, "store: request refused in an outage"):
            refusal = StoreUnavailable("connection refused")
            store.network.message(STORE, self.instance, STORE, lambda: self._finish(refusal))
        else:
            store.world.counters["store: request lost in an outage"] += 1

    def _lose(self) -> None:
        self.certainly_lost = True

    def _finish(self, answer: T | CoordinationError) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


class _Write(Request[StoredRecord]):
    """A conditional write and what may become of it."""

    __slots__ = ("_expected", "_record")

    def __init__(self, store: SimulatedStore, process: Process, record: ClusterRecord, expected: str | None) -> None:
        super().__init__(store, process)
        self._record = record
        self._expected = expected

    def arrive(self) -> None:
        store, faults = self.store, self.store.faults
        if store.happens(faults.too_many_requests, "store: 429"):
            self.answer_with(StoreUnavailable("429"))
        elif store.happens(faults.error_before, "store: 5xx before the write"):
            certain = store.random.random() < 0.5
            self.answer_with(StoreUnavailable("503") if certain else OutcomeUnknown("500"))
        elif store.happens(faults.spurious_conflict, "store: conflict although nothing changed"):
            self.answer_with(Conflict("409, for no reason"))
        elif store.happens(faults.lands_never, "store: write vanished"):
            return
        elif store.happens(faults.lands_late, "store: write lands late"):
            store.world.call_later(store.random.uniform(0.0, faults.late_max_s), self._land)
        elif store.happens(faults.slow, "store: slow write"):
            self._take_long()
        else:
            store.world.call_later(store.service_s(), self._land)

    def _take_long(self) -> None:
        store = self.store
        took_s = store.random.uniform(0.0, store.faults.slow_max_s)
        if store.random.random() < 0.5:
            store.world.call_later(took_s, self._land)
        else:
            store.world.call_later(store.service_s(), self._land, took_s)

    def _land(self, answer_after_s: float = 0.0) -> None:
        store, faults = self.store, self.store.faults
        outcome = store.write(self.instance, self._record, self._expected)
        if isinstance(outcome, Conflict):
            store.world.counters["store: conflict"] += 1
        elif store.happens(faults.duplicated, "store: write doubled"):
            store.world.call_later(store.service_s(), self._land_again, outcome)
            return
        elif store.happens(faults.answer_lost, "store: answer lost after the write applied"):
            return
        elif store.happens(faults.error_after, "store: 5xx after the write applied"):
            self.answer_with(OutcomeUnknown("500"))
            return
        if self.answer.done():
            what = "a conflict" if isinstance(outcome, Conflict) else "applied"
            store.world.counters[f"store: write landed after its client gave up: {what}"] += 1
        store.world.call_later(answer_after_s, self.answer_with, outcome)

    def _land_again(self, first: StoredRecord) -> None:
        store = self.store
        second = store.write(self.instance, self._record, self._expected)
        if store.random.random() < 0.5:
            store.world.counters["store: conflict for a write that applied"] += 1
            self.answer_with(second)
        else:
            self.answer_with(first)


class StoreClient:
    """`ports.Coordination` of one instance's process. Deadlines are by the clock of its host."""

    def __init__(self, store: SimulatedStore, process: Process) -> None:
        self.instance = process.host.name
        self._store = store
        self._process = process
        self._changed = asyncio.Event()
        store.connect(self)
        process.on_exit.append(self._disconnect)

    async def read(self, *, deadline_s: float) -> StoredRecord | None:
        request: Request[Content] = Request(self._store, self._process)
        content = await self._ask_to_read(request, self._store.read, deadline_s)
        if isinstance(content, Damaged):
            raise DamagedRecord(content.version)
        return content

    async def create(self, record: ClusterRecord, *, deadline_s: float) -> StoredRecord:
        return await self._write(record, None, deadline_s)

    async def replace(self, record: ClusterRecord, *, version: str, deadline_s: float) -> StoredRecord:
        return await self._write(record, version, deadline_s)

    async def changes(self) -> AsyncIterator[None]:
        """One hint at once, then what comes through of those that the store sends."""
        self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            yield

    async def is_proven_dead(self, holder: Holder, *, deadline_s: float) -> bool:
        request: Request[bool] = Request(self._store, self._process)
        try:
            return await self._ask_to_read(request, lambda: self._store.is_dead(holder), deadline_s)
        except StoreUnavailable:
            return False

    async def close(self) -> None:
        self._disconnect()

    def hinted(self) -> None:
        """For the store: a hint has come."""
        self._store.world.counters["store: hint"] += 1
        self._changed.set()

    def _disconnect(self) -> None:
        self._store.disconnect(self)

    async def _ask_to_read(self, request: Request[T], answer: Callable[[], T], deadline_s: float) -> T:
        store = self._store

        def arrive() -> None:
            delay_s = store.service_s()
            if store.happens(store.faults.too_many_requests, "store: 429"):
                request.answer_with(StoreUnavailable("429"))
            elif store.happens(store.faults.error_before, "store: 5xx for a read"):
                request.answer_with(StoreUnavailable("500"))
            elif store.happens(store.faults.slow, "store: slow read"):
                # Looked up at its beginning, or at its end.
                took_s = store.random.uniform(0.0, store.faults.slow_max_s)
                if store.random.random() < 0.5:
                    store.world.call_later(took_s, request.answer_with, answer())
                else:
                    store.world.call_later(took_s, lambda: request.answer_with(answer()))
            else:
                store.world.call_later(delay_s, lambda: request.answer_with(answer()))

        request.send(arrive)
        try:
            async with asyncio.timeout(deadline_s):
                outcome = await request.answer
        except TimeoutError as error:
            store.world.counters["store: read without an answer"] += 1
            raise StoreUnavailable(f"no answer within {deadline_s:g} s") from error
        if isinstance(outcome, CoordinationError):
            raise outcome
        return outcome

    async def _write(self, record: ClusterRecord, expected: str | None, deadline_s: float) -> StoredRecord:
        request = _Write(self._store, self._process, record, expected)
        request.send(request.arrive)
        try:
            async with asyncio.timeout(deadline_s):
                outcome = await request.answer
        except TimeoutError as error:
            raise self._no_answer(request, deadline_s) from error
        if isinstance(outcome, CoordinationError):
            raise outcome
        return outcome

    def _no_answer(self, request: _Write, deadline_s: float) -> CoordinationError:
        """A client may know that it never connected; mostly it knows nothing."""
        store = self._store
        if request.certainly_lost and store.happens(0.5, "store: write that never reached the store"):
            return StoreUnavailable(f"no connection within {deadline_s:g} s")
        store.world.counters["store: write without an answer"] += 1
        return OutcomeUnknown(f"no answer within {deadline_s:g} s")
