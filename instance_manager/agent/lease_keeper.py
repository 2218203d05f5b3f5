"""The one task that owns the Lease: it reads, renews and writes, and publishes immutable snapshots.

It touches neither disk nor SQL (patroni#2380: a frozen disk hung the loop that kept the lock), and nobody else writes the
Lease. Rules: a permit counts from the time a write was sent; a conflict is read back; an unknown outcome is closed only
by a later successful conditional write of our own, never by a read (R1); only another holder, read, or a deadline ends
a primary.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from instance_manager.core.lease import Permit, permit_of_renewal, record_damage
from instance_manager.core.observation import LeaseView
from instance_manager.core.record import ClusterRecord, Holder, StoredRecord, renewed
from instance_manager.core.timing import Timings
from instance_manager.core.types import WalEnd
from instance_manager.core.voting import VolumeState
from instance_manager.ports import (
    Clock,
    Conflict,
    Coordination,
    CoordinationError,
    OutcomeUnknown,
    RecordUnreadable,
    StoreUnavailable,
)
from instance_manager.wall_clock import timestamp

log = logging.getLogger(__name__)

Change = Callable[[ClusterRecord], ClusterRecord]


class WriteRefused(Exception):
    """The change was not made: the record is no longer what it stood on, or the change itself refused."""


_RENEWAL_RESULTS: dict[type[Exception], str] = {
    OutcomeUnknown: "unknown",
    StoreUnavailable: "unavailable",
    WriteRefused: "refused",
}


@dataclass(slots=True)
class _Request:
    change: Change | None
    """None: a plain read."""
    grounds: tuple[object, ...] | None
    """`ClusterRecord.grounds` that the change stands on; it is not made on anything else (R12)."""
    create: ClusterRecord | None
    answer: asyncio.Future[StoredRecord | None]
    abandoned: bool = False
    version: str | None = None
    """Of the damaged state that `create` replaces."""


@dataclass(frozen=True, slots=True)
class RenewalFacts:
    """What the holder stamps on a renewal, gathered elsewhere."""

    holder: Holder | None
    """Who this instance would be as holder; None while it cannot be."""
    refusal: str | None
    """Why it must not renew: no fresh proof of health."""
    position: WalEnd | None
    opened: bool


class LeaseKeeper:
    """`view()` for decisions, `write` for changes; everything happens in `run`."""

    def __init__(
        self,
        coordination: Coordination,
        clock: Clock,
        timings: Timings,
        *,
        cluster_uid: str,
        facts: Callable[[], RenewalFacts],
        volume: Callable[[], VolumeState],
        grant: Callable[[Permit], None],
        on_change: Callable[[], None],
        chance: random.Random,
        measured: Callable[[str, float], None] = lambda _result, _seconds: None,
    ) -> None:
        self._chance = chance
        self._measured = measured
        """Told what came of each renewal, and after how many seconds."""
        self._coordination = coordination
        self._clock = clock
        self._timings = timings
        self._cluster_uid = cluster_uid
        self._facts = facts
        self._volume = volume
        self._grant = grant
        self._on_change = on_change
        self._requests: deque[_Request] = deque()
        self._hinted = False
        self._called = asyncio.Event()
        """A request or a hint waits: one event for both, for this is waited for all the time."""
        self._stored: StoredRecord | None = None
        self._read_ever = False
        self._unreadable: str | None = None
        self._damaged_version: str | None = None
        self._interrupted = False
        """Something that was no record was read since: the record's age begins anew."""
        self._writing = False
        """A write is on its way: what was read says nothing of what will be there (R1)."""
        self._read_sent_s = float("-inf")
        self._seen_since_s = 0.0
        """When the very same record was first seen without a gap between reads longer than a lease duration."""
        self.unknown_write = True
        """Also at the start: a write of the agent before this one may still be under way (R1)."""
        self.last_error: str | None = None
        self.renewals = 0
        self._told: tuple[object, ...] = ()
        self._judged: tuple[ClusterRecord | None, VolumeState, str | None] | None = None

    @property
    def stored(self) -> StoredRecord | None:
        return self._stored

    @property
    def record(self) -> ClusterRecord | None:
        return self._stored.record if self._stored is not None else None

    def view(self) -> LeaseView:
        now_s = self._clock.now_s()
        record = self.record
        damage = self._unreadable
        if damage is None and self._read_ever:
            damage = self._damage(record, self._volume())
        return LeaseView(
            record=record,
            read=self._read_ever,
            read_age_s=now_s - self._read_sent_s,
            unchanged_for_s=max(0.0, self._read_sent_s - self._seen_since_s) if self._read_ever else 0.0,
            damage=damage,
            unknown_write=self.unknown_write or self._writing,
        )

    def _damage(self, record: ClusterRecord | None, volume: VolumeState) -> str | None:
        """Asked for many times a second, of the same two."""
        judged = self._judged
        if judged is None or judged[0] is not record or judged[1] is not volume:
            # A member's id is made before the first Lease is: by itself it says nothing of data.
            known = volume.recorded_epoch > 0
            # Where none is configured the first that this volume followed or led is its own for ever (R14).
            uid = self._cluster_uid or volume.cluster_uid or (record.cluster_uid if record is not None else "")
            found = record_damage(record, volume, cluster_uid=uid, data_known=known)
            judged = self._judged = (record, volume, found)
        return judged[2]

    def hint(self) -> None:
        """The record may have changed: read soon."""
        self._hinted = True
        self._called.set()

    async def read(self) -> StoredRecord | None:
        """A read that was sent after this call. CoordinationError if the store does not answer."""
        return await self._ask(_Request(None, None, None, asyncio.get_running_loop().create_future()))

    async def create(self, record: ClusterRecord) -> StoredRecord:
        """The cluster's first record; Conflict if somebody was faster."""
        stored = await self._ask(_Request(None, None, record, asyncio.get_running_loop().create_future()))
        assert stored is not None  # noqa: S101 - a write answers with what it wrote
        return stored

    async def write(self, change: Change, *, grounds: tuple[object, ...] | None = None) -> StoredRecord:
        """Apply `change` to the current record and write it on exactly the version that it was applied to.

        A newer version is tried again only while `grounds` are the same. The change may raise WriteRefused or
        ValueError. OutcomeUnknown and StoreUnavailable are for the caller: look at the record again.
        """
        stored = await self._ask(_Request(change, grounds, None, asyncio.get_running_loop().create_future()))
        assert stored is not None  # noqa: S101 - a write answers with what it wrote
        return stored

    @property
    def damaged_version(self) -> str | None:
        """The version of what was last read, to be taken when it is judged; None: nothing is stored."""
        if self._damaged_version is not None:
            return self._damaged_version
        return self._stored.version if self._stored is not None else None

    async def repair(self, record: ClusterRecord, version: str | None) -> StoredRecord:
        """Replace exactly the version that was judged damaged (R3); never tried again on anything newer."""
        answer: asyncio.Future[StoredRecord | None] = asyncio.get_running_loop().create_future()
        stored = await self._ask(_Request(None, None, record, answer, version=version))
        assert stored is not None  # noqa: S101 - a write answers with what it wrote
        return stored

    async def run(self) -> None:
        """Own the Lease until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._keep())

    async def _listen(self) -> None:
        async for _ in self._coordination.changes():
            self.hint()

    async def _keep(self) -> None:
        while True:
            began_s = self._clock.now_s()
            try:
                await self._beat()
                self.last_error = None
            except CoordinationError as error:
                self._note_error(error)
            except WriteRefused:
                pass
            self._tell_news()
            next_s = began_s + (self._timings.renew_interval_s if self.last_error is None else 0.25)
            await self._serve_requests_until(next_s)

    async def _serve_requests_until(self, next_s: float) -> None:
        while (left_s := next_s - self._clock.now_s()) > 0:
            if self._requests:
                await self._serve(self._requests.popleft())
                self._on_change()
            elif self._hinted:
                self._hinted = False
                await self._read_on_hint()
            else:
                self._called.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._called.wait()

    async def _read_on_hint(self) -> None:
        try:
            await self._read()
        except CoordinationError as error:
            self._note_error(error)
        self._tell_news()

    def _tell_news(self) -> None:
        """Whoever decides is woken by what is new; how old it is he sees at his own pace."""
        record = self.record
        news = (record and record.without_renewals(), self._unreadable, self.last_error, self.unknown_write)
        if news != self._told:
            self._told = news
            self._on_change()

    async def _beat(self) -> None:
        """Renew if this instance is the holder and healthy, else read."""
        facts = self._facts()
        if (
            self._stored is None
            or self._unreadable
            or facts.holder is None
            or self._stored.record.holder != facts.holder
        ):
            await self._read()
            facts = self._facts()
        if (
            self._stored is not None
            and self._unreadable is None
            and facts.holder is not None
            and self._stored.record.holder == facts.holder
            and facts.refusal is None
        ):
            await self._renew()
        elif facts.refusal is not None and self._stored is not None and self._stored.record.holder == facts.holder:
            await self._read()

    async def _renew(self) -> None:
        sent_s = self._clock.now_s()
        result = "success"
        try:
            await self._write(_renewal(self._facts), None)
        except (CoordinationError, WriteRefused) as error:
            result = _RENEWAL_RESULTS.get(type(error), "error")
            raise
        finally:
            self._measured(result, self._clock.now_s() - sent_s)
        self.renewals += 1

    async def _ask(self, request: _Request) -> StoredRecord | None:
        self._requests.append(request)
        self._called.set()
        try:
            return await asyncio.shield(request.answer)
        except asyncio.CancelledError:
            request.abandoned = True
            raise

    async def _serve(self, request: _Request) -> None:
        if request.abandoned or request.answer.cancelled():
            # Whoever asked has gone on to something else: a late write would stand on what is no more (R1).
            return
        try:
            if request.create is not None:
                result: StoredRecord | None = await self._create(request.create, request.version)
            elif request.change is not None:
                result = await self._write(request.change, request.grounds, lambda: request.abandoned, asked=True)
            else:
                await self._read()
                result = self._stored
        except Exception as error:  # also whatever a change that somebody asked for raises: it is theirs
            if isinstance(error, CoordinationError):
                self._note_error(error)
            if not request.answer.done():
                request.answer.set_exception(error)
                request.answer.exception()
            return
        if not request.answer.done():
            request.answer.set_result(result)

    async def _read(self) -> None:
        sent_s = self._clock.now_s()
        try:
            stored = await self._coordination.read(deadline_s=self._timings.request_timeout_s)
        except RecordUnreadable as error:
            self._read_ever, self._unreadable, self._interrupted = True, str(error), True
            self._damaged_version = getattr(error, "version", None)
            return
        self._unreadable = self._damaged_version = None
        self._take(stored, sent_s)

    def _take(self, stored: StoredRecord | None, sent_s: float) -> None:
        # Reads and writes are made one after another, so an answer is never older than the one before it.
        gap_s = sent_s - self._read_sent_s
        same = (
            self._read_ever
            and stored is not None
            and self._stored is not None
            and stored.version == self._stored.version
        )
        lease_duration_s = stored.record.lease_duration_s if stored is not None else self._timings.lease_duration_s
        if not same or self._interrupted or gap_s > lease_duration_s / 2:
            # What an answer shows may be younger than its question, by as much as that was on its way.
            self._seen_since_s = self._clock.now_s()
        self._interrupted = False
        self._stored, self._read_sent_s, self._read_ever = stored, sent_s, True

    async def _create(self, record: ClusterRecord, version: str | None) -> StoredRecord:
        """Where nothing is stored, or over exactly the damaged `version`."""
        record = replace(record, write_id=self._write_id(), acquired_at=timestamp())
        deadline_s = self._timings.request_timeout_s
        sent_s = self._clock.now_s()
        self._writing = True
        try:
            if version is None:
                stored = await self._coordination.create(record, deadline_s=deadline_s)
            else:
                stored = await self._coordination.replace(record, version=version, deadline_s=deadline_s)
        except OutcomeUnknown:
            self.unknown_write = True
            raise
        finally:
            self._writing = False
        self._succeeded(stored, sent_s)
        return stored

    async def _write(
        self,
        change: Change,
        grounds: tuple[object, ...] | None,
        abandoned: Callable[[], bool] = lambda: False,
        *,
        asked: bool = False,
    ) -> StoredRecord:
        """One conditional write; after a conflict read back and try again, a few times. `asked`: it is no renewal."""
        for _ in range(4):
            if abandoned():
                raise WriteRefused("whoever asked for it has gone on")
            if self._stored is None:
                await self._read()
            if self._stored is None or self._unreadable is not None:
                raise WriteRefused(self._unreadable or "there is no Lease")
            current = self._stored
            if grounds is not None and current.record.grounds() != grounds:
                raise WriteRefused(
                    f"the Lease has changed: epoch {current.record.epoch}, held by {_holder(current.record)}"
                )
            if asked and (damage := self._damage(current.record, self._volume())) is not None:
                # R3: nothing is built on a record that nobody wrote. Only the renewals go on, while it is repaired.
                raise WriteRefused(damage)
            write_id = self._write_id()
            wanted = replace(change(current.record), write_id=write_id)
            sent_s = self._clock.now_s()
            self._writing = True
            try:
                stored = await self._coordination.replace(
                    wanted, version=current.version, deadline_s=self._timings.request_timeout_s
                )
            except Conflict:
                await self._read()
                continue
            except OutcomeUnknown:
                self.unknown_write = True
                raise
            finally:
                self._writing = False
            self._succeeded(stored, sent_s)
            return stored
        raise WriteRefused("the Lease changed under every try")

    def _succeeded(self, stored: StoredRecord, sent_s: float) -> None:
        self.unknown_write = False
        self._unreadable = self._damaged_version = None
        self._take(stored, sent_s)
        facts = self._facts()
        if facts.holder is not None and stored.record.holder == facts.holder and facts.refusal is None:
            self._grant(permit_of_renewal(stored.record.epoch, sent_s, self._timings))

    def _write_id(self) -> str:
        return f"{self._chance.getrandbits(64):016x}"

    def _note_error(self, error: CoordinationError) -> None:
        if self.last_error is None:
            log.warning("the coordination store: %s", error, extra={"fields": {"error": type(error).__name__}})
        self.last_error = f"{type(error).__name__}: {error}"


def _renewal(facts: Callable[[], RenewalFacts]) -> Change:
    def change(record: ClusterRecord) -> ClusterRecord:
        now = facts()
        if record.holder is None or record.holder != now.holder:
            raise WriteRefused(f"the Lease is held by {_holder(record)}")
        return replace(
            renewed(record, position=now.position, write_id="", wall_time=timestamp()),
            opened=record.opened or now.opened,
        )

    return change


def _holder(record: ClusterRecord) -> str:
    return record.holder.name if record.holder is not None else "nobody"
