"""The agent's world in memory: an event loop on virtual time, a clock, and a store that does what a test tells it to.

The cluster of the tests is in `agent_builders`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from instance_manager.agent.lease_keeper import LeaseKeeper, RenewalFacts
from instance_manager.core.lease import Permit
from instance_manager.core.record import ClusterRecord, Holder, StoredRecord
from instance_manager.core.timing import Timings
from instance_manager.core.types import WalEnd
from instance_manager.core.voting import VolumeState
from instance_manager.ports import Conflict, OutcomeUnknown, RecordUnreadable, StoreUnavailable

T = TypeVar("T")

"""The test says what must hold and does not today; it fails as soon as it does, so that the mark is taken away."""

TIMINGS = Timings()
BEGIN_S = 1000.0


class _NoWaiting(selectors.DefaultSelector):
    """Where a loop would wait for its next timer, time itself goes on to it."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise RuntimeError("everybody waits for something that never comes")
            self.loop.passed_s += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only while everybody waits; work for threads is done at once."""

    def __init__(self) -> None:
        self.passed_s = BEGIN_S
        selector = _NoWaiting()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.passed_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        answer: asyncio.Future[T] = self.create_future()
        try:
            answer.set_result(func(*args))
        except Exception as error:
            answer.set_exception(error)
        return answer


class VirtualClock:
    """The Clock port over the loop's own virtual time."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop

    def now_s(self) -> float:
        return self._loop.passed_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def pause(self, seconds: float) -> None:
        """This process is not scheduled for a while."""
        self._loop.passed_s += seconds


class HandClock:
    """A Clock port that a test sets by hand, for what runs without a loop."""

    def __init__(self) -> None:
        self.time_s = BEGIN_S

    def now_s(self) -> float:
        return self.time_s

    async def sleep(self, seconds: float) -> None:
        self.time_s += seconds


async def settle() -> None:
    """Let everybody go on who can, without time passing."""
    for _ in range(50):
        await asyncio.sleep(0)


@dataclass
class Fault:
    """What the store does with one request instead of answering it at once."""

    after_s: float = 0.0
    """How long the answer takes; never longer than the deadline."""
    before: Callable[[], None] | None = None
    """Done when the request arrives, before it is looked at: somebody else was faster."""
    error: type[Exception] | None = None
    """StoreUnavailable (never applied) or OutcomeUnknown; None: a slow answer."""
    lands_after_s: float | None = None
    """OutcomeUnknown: when the write reaches the register; None: never. It is judged by the version then."""


@dataclass
class MemoryCoordination:
    """One register. `faults_of_*` are used up one by one, in order; then everything is answered at once."""

    stored: StoredRecord | None = None
    unreadable: str | None = None
    """Version of the garbage that lies where the record should be."""
    faults_of_reads: deque[Fault] = field(default_factory=deque)
    faults_of_writes: deque[Fault] = field(default_factory=deque)
    reads: int = 0
    attempts: list[ClusterRecord] = field(default_factory=list)
    """Every record that somebody asked to be written."""
    applied: list[ClusterRecord] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    """Shared with other fakes where a test looks at the order of things; without renewals."""
    _versions: int = 0
    _late: set[asyncio.Task[None]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def record(self) -> ClusterRecord:
        assert self.stored is not None
        return self.stored.record

    def put(self, record: ClusterRecord | None) -> None:
        """Somebody else writes, restores or deletes."""
        self.unreadable = None
        self.stored = None if record is None else StoredRecord(record, self._next_version())

    def edit(self, **changes: Any) -> Callable[[], None]:
        """For `Fault.before`: somebody else changes the record."""
        return lambda: self.put(replace(self.record, **changes))

    def damage(self) -> None:
        """What is stored is no record any more."""
        self.stored, self.unreadable = None, self._next_version()

    def hint(self) -> None:
        self._changed.set()

    async def read(self, *, deadline_s: float) -> StoredRecord | None:
        self.reads += 1
        await self._fault(self.faults_of_reads, deadline_s, None)
        if self.unreadable is not None:
            error = RecordUnreadable("what is stored is no record")
            error.version = self.unreadable  # type: ignore[attr-defined]
            raise error
        return self.stored

    async def create(self, record: ClusterRecord, *, deadline_s: float) -> StoredRecord:
        return await self._write(record, None, deadline_s)

    async def replace(self, record: ClusterRecord, *, version: str, deadline_s: float) -> StoredRecord:
        return await self._write(record, version, deadline_s)

    async def changes(self) -> AsyncIterator[None]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            yield

    async def is_proven_dead(self, holder: Holder, *, deadline_s: float) -> bool:
        return False

    async def close(self) -> None:
        return None

    async def _write(self, record: ClusterRecord, version: str | None, deadline_s: float) -> StoredRecord:
        self.attempts.append(record)

        def land() -> StoredRecord:
            current = self.unreadable or (self.stored.version if self.stored is not None else None)
            if current != version:
                raise Conflict(f"the version is {current}, not {version}")
            before = self.stored.record if self.stored is not None else None
            self.put(record)
            self.applied.append(record)
            if (
                before is None
                or (before.renewals, before.epoch) == (record.renewals, record.epoch)
                or record.renewals == 0
            ):
                self.events.append("record")
            return StoredRecord(record, self.stored.version if self.stored is not None else "")

        await self._fault(self.faults_of_writes, deadline_s, land)
        return land()

    async def _fault(self, faults: deque[Fault], deadline_s: float, land: Callable[[], StoredRecord] | None) -> None:
        fault = faults.popleft() if faults else Fault()
        if fault.before is not None:
            fault.before()
        if fault.lands_after_s is not None and land is not None:
            task = asyncio.create_task(self._land_late(land, fault.lands_after_s))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        await asyncio.sleep(min(fault.after_s, deadline_s))
        if fault.error is not None:
            raise fault.error("so the test wants it")
        if fault.after_s > deadline_s:
            raise (StoreUnavailable if land is None else OutcomeUnknown)("no answer in time")

    async def _land_late(self, land: Callable[[], StoredRecord], after_s: float) -> None:
        await asyncio.sleep(after_s)
        with contextlib.suppress(Conflict):
            land()

    def _next_version(self) -> str:
        self._versions += 1
        return f"v{self._versions}"


def unknown(*, lands_after_s: float | None = None, after_s: float = 0.0) -> Fault:
    return Fault(error=OutcomeUnknown, lands_after_s=lands_after_s, after_s=after_s)


def unavailable(*, after_s: float = 0.0) -> Fault:
    return Fault(error=StoreUnavailable, after_s=after_s)


@dataclass
class Keeping:
    """A LeaseKeeper of one instance with settable facts; run it with `async with`."""

    store: MemoryCoordination
    holder: Holder | None
    volume: VolumeState = field(default_factory=VolumeState)
    refusal: str | None = None
    position: WalEnd | None = None
    opened: bool = False
    permits: list[Permit] = field(default_factory=list)
    changes: int = 0

    def __post_init__(self) -> None:
        self.live_volume: Callable[[], VolumeState] = lambda: self.volume
        self.clock = VirtualClock()
        self.keeper = LeaseKeeper(
            self.store,
            self.clock,
            TIMINGS,
            cluster_uid="uid-1",
            facts=lambda: RenewalFacts(self.holder, self.refusal, self.position, self.opened),
            volume=lambda: self.live_volume(),
            grant=self.permits.append,
            on_change=self._on_change,
            chance=random.Random(1),
        )

    def _on_change(self) -> None:
        self.changes += 1

    async def __aenter__(self) -> Keeping:
        self._task = asyncio.create_task(self.keeper.run())
        await settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
