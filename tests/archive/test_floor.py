"""A backup that begins while another expires: every order of their steps, and whichever wins has all of its log."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from backup_harness import LAYOUT
from test_retention import info_at, put, put_backup
from wal_builders import SIZE

from instance_manager.archive.backup import expire as expiring
from instance_manager.archive.backup.expire import expire
from instance_manager.archive.backup.floor import LogExpired, floors, require_above_floor
from instance_manager.archive.backup.info import render_info
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.retention import Policy
from instance_manager.archive.wal_names import Segment
from instance_manager.core.types import Timeline
from instance_manager.ports import ObjectExists, ObjectInfo

BEGUN_ON_AN_OLD_CHECKPOINT = replace(
    info_at(3, segment=5), begin_time=info_at(2).begin_time, end_time=info_at(2).end_time
)
"""A standby's last checkpoint may be far behind the oldest backup that is kept."""


@dataclass
class MemoryStore:
    """The port, in memory; `before` is awaited before each call, with its number."""

    objects: dict[str, bytes] = field(default_factory=dict)
    before: Callable[[int], Awaitable[None]] | None = None
    calls: int = 0

    async def _step(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if self.before is not None:
            await self.before(number)

    async def create(self, name: str, content: Any, *, metadata: Any = None, deadline_s: float) -> None:
        await self._step()
        if name in self.objects:
            raise ObjectExists(name)
        self.objects[name] = b"".join(content.chunks())

    async def receive(self, name: str, receiver: Any, *, byte_range: Any = None, deadline_s: float) -> Any:
        await self._step()
        content = self.objects.get(name)
        return None if content is None else receiver(ObjectInfo(name, len(content), {}), iter([content]))

    async def info(self, name: str, *, deadline_s: float) -> ObjectInfo | None:
        await self._step()
        content = self.objects.get(name)
        return None if content is None else ObjectInfo(name, len(content), {})

    async def entries(
        self, prefix: str, *, after: str = "", shallow: bool = False, deadline_s: float
    ) -> AsyncIterator[ObjectInfo]:
        await self._step()
        seen = set()
        for name in sorted(self.objects):
            if name.startswith(prefix) and name > after:
                head, slash, _ = name[len(prefix) :].partition("/")
                told = prefix + head + slash if shallow else name
                if told not in seen:
                    seen.add(told)
                    yield ObjectInfo(told, len(self.objects[name]), {})

    async def delete(self, name: str, *, deadline_s: float) -> None:
        await self._step()
        self.objects.pop(name, None)


def wal(number: int) -> str:
    return LAYOUT.wal(SIZE.name(Segment(Timeline(1), number)))


async def an_archive() -> MemoryStore:
    """One whole backup that begins in segment 8, and the log from 0 on; each deletion is decided for itself."""
    store: Any = MemoryStore()
    await put_backup(store, info_at(2, segment=8))
    for number in range(10):
        await put(store, wal(number))
    store.calls = 0
    return store  # type: ignore[no-any-return]


async def backup_in_steps(store: MemoryStore, steps: list[Callable[[], Awaitable[None]]]) -> None:
    """What `take_backup` does, as far as an expiry can see it."""
    quiet: Any = MemoryStore(store.objects)
    names = BackupNames(LAYOUT, BEGUN_ON_AN_OLD_CHECKPOINT.backup_id)

    async def begin() -> None:
        await put(quiet, names.begun)

    async def look() -> None:
        await require_above_floor(quiet, LAYOUT, BEGUN_ON_AN_OLD_CHECKPOINT.begin_lsn // SIZE.size_bytes, deadline_s=1)
        if any(wal(number) not in store.objects for number in range(5, 10)):
            raise LogExpired("not in the archive")

    async def finish() -> None:
        await put(quiet, names.tar("data", ""))
        await put(quiet, names.info, render_info(BEGUN_ON_AN_OLD_CHECKPOINT))

    steps += [begin, look, finish]


def moments(count: int) -> Iterator[tuple[int, ...]]:
    """Before which call of the expiry each of the backup's three steps comes; `count` is after the last."""
    for begin, look in itertools.combinations_with_replacement(range(count + 1), 2):
        for finish in {look, (look + count) // 2, count}:
            yield begin, look, finish


async def calls_of_an_expiry() -> int:
    store: Any = await an_archive()
    await expire(store, LAYOUT, Policy(count=1))
    assert wal(7) not in store.objects
    assert wal(8) in store.objects
    return int(store.calls)


async def one_order(at: tuple[int, ...]) -> bool:
    """Whether the backup became whole; what it needs must be there then, at once and at the end."""
    store = await an_archive()
    steps: list[Callable[[], Awaitable[None]]] = []
    await backup_in_steps(store, steps)
    todo = list(zip(at, steps, strict=True))

    async def interleave(number: int) -> None:
        while todo and todo[0][0] <= number:
            try:
                await todo.pop(0)[1]()
            except LogExpired:
                todo.clear()

    store.before = interleave
    made: Any = store
    await expire(made, LAYOUT, Policy(count=2))
    await interleave(1 << 30)
    is_whole = BackupNames(LAYOUT, BEGUN_ON_AN_OLD_CHECKPOINT.backup_id).info in store.objects
    if is_whole:
        assert [number for number in range(5, 10) if wal(number) not in store.objects] == [], at
    return is_whole


async def test_in_every_order_of_their_steps_a_whole_backup_has_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiring, "LOOK_EVERY", 3)
    count = await calls_of_an_expiry()
    outcomes = [await one_order(at) for at in moments(count)]
    assert outcomes.count(True) > 10
    assert outcomes.count(False) > 10
    print(f"{len(outcomes)} orders of {count} calls, {outcomes.count(True)} backups whole")


async def test_a_floor_gives_way_to_the_next_and_to_a_backup_for_which_nothing_was_deleted() -> None:
    store: Any = await an_archive()
    await expire(store, LAYOUT, Policy(count=1))
    (first,) = [name for name in store.objects if name.startswith(floors(LAYOUT))]
    await put_backup(store, info_at(4, segment=9))
    await expire(store, LAYOUT, Policy(count=1))
    (second,) = [name for name in store.objects if name.startswith(floors(LAYOUT))]
    assert first < second
    await put(store, BackupNames(LAYOUT, info_at(5).backup_id).begun)
    await expire(store, LAYOUT, Policy(count=1))
    assert [name for name in store.objects if name.startswith(floors(LAYOUT))] == [second]
    with pytest.raises(LogExpired, match="Take it later, or from the primary"):
        await require_above_floor(store, LAYOUT, 8, deadline_s=1)
    await require_above_floor(store, LAYOUT, 9, deadline_s=1)
