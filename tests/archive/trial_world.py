"""A world for random trials: two members, one archive whose store fails, kills and failovers, and what must be true after."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from archive_harness import Desk, chain_of
from wal_builders import SIZE, history_content, make_ready, segment_content

from instance_manager.archive.content import sha256_of
from instance_manager.archive.fetch import Fetched
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.streaming import Flushed
from instance_manager.archive.upload import NotArchived
from instance_manager.archive.wal_names import Segment
from instance_manager.core.types import Lsn, Timeline, TimelineChain
from instance_manager.ports import Content, ObjectInfo, StoreUnreachable
from instance_manager.postgres.histories import parse_history

T = TypeVar("T")
SEGMENT = SIZE.size_bytes
HASTE = Patience(total_s=5.0, attempt_s=5.0, attempts_max=3, first_pause_s=0.0005)


class FlakyStore(DirectoryStore):
    """Fails before or after what it was asked to do, as often as `rate` says."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        super().__init__(root)
        self._chance = chance
        self.rate = 0.0

    def _fail(self) -> None:
        if self._chance.random() < self.rate:
            raise StoreUnreachable("injected")

    async def create(
        self, name: str, content: Content, *, metadata: Mapping[str, str] | None = None, deadline_s: float
    ) -> None:
        self._fail()
        await super().create(name, content, metadata=metadata, deadline_s=deadline_s)
        self._fail()

    async def receive(
        self,
        name: str,
        receiver: Callable[[ObjectInfo, Iterator[bytes]], T],
        *,
        byte_range: tuple[int, int] | None = None,
        deadline_s: float,
    ) -> T | None:
        self._fail()
        return await super().receive(name, receiver, byte_range=byte_range, deadline_s=deadline_s)

    async def entries(
        self, prefix: str, *, after: str = "", shallow: bool = False, deadline_s: float
    ) -> AsyncIterator[ObjectInfo]:
        async for entry in super().entries(prefix, after=after, shallow=shallow, deadline_s=deadline_s):
            self._fail()
            yield entry

    async def delete(self, name: str, *, deadline_s: float) -> None:
        self._fail()
        await super().delete(name, deadline_s=deadline_s)
        self._fail()


class World:
    """One trial. The accepted log is `log`, by (timeline, segment number); its end is in segment `number` at `offset`."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.chance = random.Random(seed)
        (root / "archive").mkdir(parents=True)
        self.store = FlakyStore(root / "archive", self.chance)
        self.switches: list[tuple[int, int, int]] = []
        self.epoch, self.number, self.offset = 1, 5, 0
        self.log: dict[tuple[int, int], bytes] = {}
        self.at_the_fork = b""
        self.acknowledged: dict[str, str] = {}
        self.streamed = 0
        self.primary, self.standby = self.member("a"), self.member("b")
        self.former: Desk | None = None
        self.begin_segment(b"")
        self.command()

    @property
    def timeline(self) -> int:
        return self.switches[-1][0] if self.switches else 1

    @property
    def chain(self) -> TimelineChain:
        return chain_of(*self.switches)

    def name(self, number: int | None = None) -> str:
        return SIZE.name(Segment(Timeline(self.timeline), self.number if number is None else number))

    def member(self, name: str) -> Desk:
        return Desk(self.root / name, self.store, patience=HASTE)

    def command(self) -> None:
        self.primary.command(self.primary.primary(epoch=self.epoch, chain=self.chain))
        self.standby.command(self.standby.standby(epoch=self.epoch, chain=self.chain))

    def begin_segment(self, prefix: bytes) -> None:
        planned = segment_content(self.name(), seed=self.chance.randrange(1 << 30))
        self.log[self.timeline, self.number] = prefix + planned[len(prefix) :]

    async def step(self) -> None:
        steps = [
            self.flush,
            self.flush,
            self.finish,
            self.finish,
            self.archive,
            self.archive,
            self.archive,
            self.stream,
        ]
        steps += [self.stream, self.kill, self.fail_over, self.former_goes_on]
        self.store.rate = self.chance.choice((0.0, 0.05, 0.3))
        await self.chance.choice(steps)()

    async def flush(self) -> None:
        """A little more of the current segment is on both disks."""
        self.offset = min(SEGMENT - 1, self.offset + self.chance.randrange(100, 60_000))
        content = self.log[self.timeline, self.number]
        unflushed = bytes(SEGMENT - self.offset)
        for desk in (self.primary, self.standby):
            (desk.wal / self.name()).write_bytes(content[: self.offset] + unflushed)
        position = self.number * SEGMENT + self.offset
        self.primary.flushed = Flushed(Timeline(self.timeline), Lsn(position))

    async def finish(self) -> None:
        content = self.log[self.timeline, self.number]
        make_ready(self.primary.wal, self.name(), content)
        (self.standby.wal / self.name()).write_bytes(content)
        (self.standby.wal / "archive_status" / f"{self.name()}.done").touch()
        self.number, self.offset = self.number + 1, 0
        self.begin_segment(b"")

    async def archive(self, desk: Desk | None = None) -> None:
        """Postgres's archiver asks for its next file; the archiver may be killed meanwhile."""
        asking = desk or self.primary
        name = next(iter(ready_files(asking.wal)), None)
        if name is None:
            return
        digest = sha256_of([(asking.wal / name).read_bytes()])
        left_out = asking.push_counters.past_the_fork
        push = asyncio.create_task(asking.push(name))
        if self.chance.random() < 0.2:
            for _ in range(self.chance.randrange(40)):
                await asyncio.sleep(0)
            push.cancel()
        with contextlib.suppress(asyncio.CancelledError, NotArchived):
            await push
            if asking.push_counters.past_the_fork == left_out:
                self.acknowledged[name] = digest

    async def stream(self) -> None:
        if self.offset and await self.primary.archiver.streamer.step():
            self.streamed = max(self.streamed, self.primary.archiver.status.stream.durable_lsn)

    async def kill(self) -> None:
        """The primary's archiver is killed, and started anew; what its threads do still happens."""
        for begun in self.primary.archiver.pusher._begun.values():
            if begun.task is not None:
                begun.task.cancel()
        flushed = self.primary.flushed
        self.primary = self.member(self.primary.wal.parent.name)
        self.primary.flushed = flushed
        self.command()

    async def fail_over(self) -> None:
        """The standby takes over at the end of the log; the former one does not know yet, and its permit still holds."""
        if self.former is not None or self.offset < 100:
            return
        parent, position = self.timeline, self.number * SEGMENT + self.offset
        prefix = self.log[parent, self.number][: self.offset]
        self.log.pop((parent, self.number))
        self.at_the_fork = prefix
        old_name = self.name()
        self.switches.append((parent + self.chance.choice((1, 1, 3)), parent, position))
        self.epoch += 1
        self.former, self.primary = self.primary, self.standby
        self.begin_segment(prefix)
        history = history_content(*((each[1], each[2]) for each in self.switches))
        make_ready(self.primary.wal, f"{self.timeline:08X}.history", history)
        make_ready(self.primary.wal, f"{old_name}.partial", prefix + bytes(SEGMENT - len(prefix)))
        (self.primary.wal / old_name).unlink(missing_ok=True)
        self.primary.command(self.primary.primary(epoch=self.epoch, chain=self.chain))
        self.standby = self.member(f"m{self.epoch}")
        shutil.copytree(self.primary.wal, self.standby.wal, dirs_exist_ok=True)
        for path in (self.standby.wal / "archive_status").glob("*.ready"):
            path.replace(path.with_suffix(".done"))
        self.standby.command(self.standby.standby(epoch=self.epoch, chain=self.chain))
        await self.flush()

    async def former_goes_on(self) -> None:
        """It writes and archives behind the fork, until it learns of it."""
        former = self.former
        if former is None:
            return
        parent, position = self.switches[-1][1], self.switches[-1][2]
        for number in range(position // SEGMENT, position // SEGMENT + self.chance.randrange(1, 3)):
            name = SIZE.name(Segment(Timeline(parent), number))
            accepted = self.at_the_fork if number == position // SEGMENT else b""
            alone = segment_content(name, seed=self.chance.randrange(1 << 30))
            make_ready(former.wal, name, accepted + alone[len(accepted) :])
        while list(ready_files(former.wal)):
            before = list(ready_files(former.wal))
            await self.archive(former)
            if before == list(ready_files(former.wal)):
                break
        self.former = None

    async def settle(self) -> None:
        """The store is well again: everything that waits is archived."""
        self.store.rate = 0.0
        while name := next(iter(ready_files(self.primary.wal)), None):
            await self.primary.push(name)
            self.acknowledged.setdefault(name, "")
        orders = self.primary.archiver.orders.current
        assert orders is not None
        await self.primary.archiver.backfill_once(orders, self.chain)

    async def check_nothing_acknowledged_is_missing_or_other(self) -> None:
        for name, digest in self.acknowledged.items():
            found = await self.primary.wal_in_store(name)
            if name.endswith(".partial"):
                continue
            assert found is not None, f"{name} was acknowledged"
            assert digest in ("", sha256_of([found])), f"{name} is not what was acknowledged"
        for timeline, parent, position in self.switches:
            found = await self.primary.wal_in_store(f"{timeline:08X}.history")
            assert found is not None, f"the history of {timeline} is missing"
            assert parse_history(Timeline(timeline), found.decode())[-1] == (parent, position)

    async def check_recovery_reaches_all_that_is_durable(self) -> None:
        fresh = self.member("fresh")
        fresh.command(fresh.standby(epoch=self.epoch, chain=self.chance.choice((None, self.chain))))
        place = fresh.wal / "RECOVERYXLOG"

        async def fetch(name: str) -> bytes | None:
            answer = await fresh.archiver.fetcher.fetch("recovery", name, place)
            return place.read_bytes() if answer is Fetched.PRESENT else None

        newest = 1
        probed = 2
        while (content := await fetch(f"{probed:08X}.history")) is not None:
            newest = probed if content else newest
            probed += 1
        assert newest == self.timeline
        begins = {1: 0} | {timeline: position // SEGMENT for timeline, _, position in self.switches}
        number, end = 5, 5 * SEGMENT
        while True:
            candidates = [each for each in sorted(begins, reverse=True) if begins[each] <= number]
            names = [SIZE.name(Segment(Timeline(each), number)) for each in candidates]
            found = None
            for name in names:
                if (found := await fetch(name)) is not None:
                    break
            if found is None:
                break
            expected = next(self.log[each, number] for each in candidates if (each, number) in self.log)
            same = len(expected) if found == expected else _common(found, expected)
            assert found[same:] == bytes(SEGMENT - same), f"{name} holds what is not of the accepted log"
            end = number * SEGMENT + same
            if same < SEGMENT:
                break
            number += 1
        assert end >= self.number * SEGMENT, "a finished segment is missing"
        assert end >= self.streamed, "what was streamed is missing"
        await fresh.close()

    async def close(self) -> None:
        for desk in (self.primary, self.standby, self.former):
            if desk is not None:
                await desk.close()


def ready_files(wal: Path) -> Iterator[str]:
    """As Postgres's archiver: histories first, then by name."""
    names = [path.name.removesuffix(".ready") for path in (wal / "archive_status").glob("*.ready")]
    yield from sorted(names, key=lambda name: (not name.endswith(".history"), name))


def _common(found: bytes, expected: bytes) -> int:
    """How far two segments agree, zeros at the end of the first aside."""
    low, high = 0, len(found)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if found[:middle] == expected[:middle] else (low, middle - 1)
    return low
