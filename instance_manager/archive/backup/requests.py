"""Who wants a backup and who takes it, as objects of the archive: so a failover neither forgets a request nor repeats one.

<server>/instance-manager/requests/<id>/request.json
<server>/instance-manager/requests/<id>/attempt-0001.claim.json     created once: who creates it takes the backup
<server>/instance-manager/requests/<id>/attempt-0001.begun.json     the backup's id
<server>/instance-manager/requests/<id>/attempt-0001.beat-000007    a sign of life with the progress; each replaces the one before
<server>/instance-manager/requests/<id>/attempt-0001.wal.json       taken from a standby: the primary may finish its segment
<server>/instance-manager/requests/<id>/attempt-0001.ended.json     how it ended

A claim whose beats do not change is dead: whoever watches times that on its own clock, ends it and clears it up.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from instance_manager.archive.backup.names import requests_folder
from instance_manager.archive.content import MemoryContent, read_object
from instance_manager.archive.layout import Layout
from instance_manager.codec import from_json, to_json
from instance_manager.ports import ContentDamaged, ObjectExists, ObjectStore

T = TypeVar("T")

DEADLINE_S = 20.0
ATTEMPTS_MAX = 3
REQUESTS_KEPT = 50
_OBJECT = re.compile(
    r"([A-Za-z0-9-]+)/(request\.json|attempt-(\d{4})\.(claim|begun|wal|ended)\.json|attempt-(\d{4})\.beat-(\d{6}))"
)


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asked for."""

    name: str | None
    by: str
    at: str
    """For people, and for the order."""
    incremental: bool = False
    on: str | None = None
    """What an incremental one shall stand on; None: the newest good one."""


@dataclass(frozen=True, slots=True)
class Claim:
    instance: str
    at: str


@dataclass(frozen=True, slots=True)
class Begun:
    backup_id: str


@dataclass(frozen=True, slots=True)
class WalWanted:
    lsn: int


@dataclass(frozen=True, slots=True)
class Ended:
    backup_id: str | None
    """None: there is no backup of this attempt."""
    error: str = ""
    damaged_pages: int = 0


@dataclass(frozen=True, slots=True)
class Beat:
    """Progress, for people."""

    phase: str
    read_bytes: int
    estimated_bytes: int


@dataclass(slots=True)
class Attempt:
    """What is in the archive of one attempt: which objects, not what they say."""

    number: int
    kinds: set[str] = field(default_factory=set)
    beat: int = 0

    @property
    def is_over(self) -> bool:
        return "ended" in self.kinds


@dataclass(slots=True)
class Open:
    """A request and its attempts."""

    request_id: str
    attempts: dict[int, Attempt] = field(default_factory=dict)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[max(self.attempts)] if self.attempts else None


class Requests:
    """The requests of one archive."""

    def __init__(self, store: ObjectStore, layout: Layout) -> None:
        self._store = store
        self._folder = requests_folder(layout)

    async def ask(self, request_id: str, request: Request) -> bool:
        """False: there was one of this id already."""
        return await self._create(f"{request_id}/request.json", to_json(request))

    async def listing(self) -> dict[str, Open]:
        """All that are there, by id, the oldest first."""
        found: dict[str, Open] = {}
        async for entry in self._store.entries(self._folder, deadline_s=DEADLINE_S):
            match = _OBJECT.fullmatch(entry.name.removeprefix(self._folder))
            if match is None:
                continue
            request = found.setdefault(match[1], Open(match[1]))
            number = int(match[3] or match[5] or 0)
            if number:
                attempt = request.attempts.setdefault(number, Attempt(number))
                if match[4]:
                    attempt.kinds.add(match[4])
                else:
                    attempt.beat = max(attempt.beat, int(match[6]))
        return found

    async def request(self, request_id: str) -> Request | None:
        return await self._read(f"{request_id}/request.json", Request)

    async def claim(self, request_id: str, number: int, claim: Claim) -> bool:
        """True: it is ours alone."""
        return await self._create(f"{request_id}/attempt-{number:04d}.claim.json", to_json(claim))

    async def claimed_by(self, request_id: str, number: int) -> Claim | None:
        return await self._read(f"{request_id}/attempt-{number:04d}.claim.json", Claim)

    async def begun(self, request_id: str, number: int, begun: Begun) -> None:
        await self._create(f"{request_id}/attempt-{number:04d}.begun.json", to_json(begun))

    async def begun_of(self, request_id: str, number: int) -> Begun | None:
        return await self._read(f"{request_id}/attempt-{number:04d}.begun.json", Begun)

    async def want_wal(self, request_id: str, number: int, wanted: WalWanted) -> None:
        await self._create(f"{request_id}/attempt-{number:04d}.wal.json", to_json(wanted))

    async def beat(self, request_id: str, number: int, count: int, beat: Beat) -> None:
        stem = f"{request_id}/attempt-{number:04d}.beat-"
        await self._create(f"{stem}{count:06d}", to_json(beat))
        if count > 1:
            await self._store.delete(f"{self._folder}{stem}{count - 1:06d}", deadline_s=DEADLINE_S)

    async def progress(self, request_id: str, attempt: Attempt) -> Beat | None:
        return await self._read(f"{request_id}/attempt-{attempt.number:04d}.beat-{attempt.beat:06d}", Beat)

    async def end(self, request_id: str, number: int, ended: Ended) -> bool:
        """False: somebody else has ended it before."""
        return await self._create(f"{request_id}/attempt-{number:04d}.ended.json", to_json(ended))

    async def ended(self, request_id: str, number: int) -> Ended | None:
        return await self._read(f"{request_id}/attempt-{number:04d}.ended.json", Ended)

    async def forget(self, request_id: str) -> None:
        """All of its objects, the request itself last."""
        names = [
            entry.name async for entry in self._store.entries(f"{self._folder}{request_id}/", deadline_s=DEADLINE_S)
        ]
        for name in sorted(names):
            await self._store.delete(name, deadline_s=DEADLINE_S)

    async def _create(self, name: str, content: bytes) -> bool:
        with contextlib.suppress(ObjectExists):
            await self._store.create(self._folder + name, MemoryContent.of(content), deadline_s=DEADLINE_S)
            return True
        return False

    async def _read(self, name: str, kind: type[T]) -> T | None:
        content = await read_object(self._store, self._folder + name, limit_bytes=1 << 16, deadline_s=DEADLINE_S)
        if content is None:
            return None
        try:
            return from_json(content, kind)
        except msgspec.MsgspecError as error:
            raise ContentDamaged(f"{self._folder}{name} cannot be read: {error}") from error


def manual_id(now: datetime.datetime) -> str:
    """Of a request that a user makes."""
    return f"{now.astimezone(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Times of day in UTC, and on which weekdays (0 is Monday); no weekdays: on every one."""

    at: tuple[datetime.time, ...]
    weekdays: frozenset[int] = frozenset()

    def last_due(self, now: datetime.datetime) -> datetime.datetime | None:
        """The latest moment at or before `now`; None: none within a week, which no schedule has."""
        today = now.astimezone(datetime.UTC)
        for days in range(8):
            day = today.date() - datetime.timedelta(days=days)
            if self.weekdays and day.weekday() not in self.weekdays:
                continue
            moments = [datetime.datetime.combine(day, time, datetime.UTC) for time in self.at]
            due = [moment for moment in moments if moment <= today]
            if due:
                return max(due)
        return None


def scheduled_id(due: datetime.datetime) -> str:
    """The same from every instance, so that each moment is asked for once. Sorts among the manual ones."""
    return f"{due:%Y%m%dT%H%M%SZ}-scheduled"


def outdated(ids: Sequence[str], over: set[str]) -> list[str]:
    """Of the requests that are over, those beyond the newest ones that are kept to be looked at."""
    return sorted(set(ids) & over)[:-REQUESTS_KEPT]
