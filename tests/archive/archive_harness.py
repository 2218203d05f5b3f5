"""An archiver without its process: parts over a real store, a pg_wal made by hand, and a clock that the test moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from wal_builders import SIZE, SYSTEM, make_ready, segment_content

from instance_manager.archive.archiver import Archiver, ArchiverSettings
from instance_manager.archive.codecs import CodecName, codec_of_suffix
from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.filling import Replayed
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import Orders
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.streaming import Flushed
from instance_manager.core.types import Epoch, Lsn, Timeline, TimelineChain, TimelineSwitch
from instance_manager.ports import ObjectInfo, ObjectStore
from instance_manager.threads import monotonic_s

QUICK = Patience(total_s=10.0, attempt_s=5.0, attempts_max=3, first_pause_s=0.01)
SERVER = "orders"


def chain_of(*switches: tuple[int, int, int], first: int = 1) -> TimelineChain:
    """From (timeline, parent, switch position)."""
    return TimelineChain(
        Timeline(first),
        tuple(
            TimelineSwitch(Timeline(timeline), Timeline(parent), Lsn(lsn), Epoch(number))
            for number, (timeline, parent, lsn) in enumerate(switches, 2)
        ),
    )


class Desk:
    """One archiver's parts under one directory; `orders` are a primary's with a permit for a minute."""

    def __init__(
        self, root: Path, store: ObjectStore, *, codec: CodecName = "zstd", parallel: int = 2, **changes: object
    ) -> None:
        self.now_s = 1000.0
        self.wal = root / "pg_wal"
        (self.wal / "archive_status").mkdir(parents=True, exist_ok=True)
        self.flushed: Flushed | None = None
        self.replayed: Replayed | None = None
        settings = ArchiverSettings(
            instance="orders-1",
            server_name=SERVER,
            wal_directory=self.wal,
            socket=root / "archive.sock",
            codec=codec,
            parallel=parallel,
            patience=QUICK,
            fetch=FetchSettings(standby=QUICK, recovery=QUICK, parallel=2, prefetch_bytes=4 << 20),
        )
        self.settings = replace(settings, **changes)  # type: ignore[arg-type]
        self.store = store
        self.archiver = Archiver(self.settings, store, self._flushed, lambda: self.now_s, replayed=self._replayed)
        self.layout: Layout = self.archiver.pusher._layout
        self.command(self.primary())

    @property
    def push_counters(self):  # type: ignore[no-untyped-def]
        return self.archiver.status.push

    @staticmethod
    def primary(
        epoch: int = 1,
        *,
        chain: TimelineChain | None = None,
        until_s: float = 1060.0,
        system: int = SYSTEM,
        cluster_uid: str = "uid-1",
    ) -> Orders:
        return Orders(
            cluster_uid=cluster_uid,
            role="primary",
            epoch=Epoch(epoch),
            permit_until_s=until_s,
            system_identifier=str(system),
            wal_segment_bytes=SIZE.size_bytes,
            chain=chain,
        )

    @staticmethod
    def standby(epoch: int = 1, *, chain: TimelineChain | None = None, **flags: bool) -> Orders:
        return Orders(
            role="standby",
            cluster_uid="uid-1",
            epoch=Epoch(epoch),
            system_identifier=str(SYSTEM),
            wal_segment_bytes=SIZE.size_bytes,
            chain=chain,
            **flags,
        )

    def command(self, orders: Orders) -> None:
        self.archiver.orders.take(orders)

    def ready(self, *names: str, seed: int = 0) -> None:
        for name in names:
            make_ready(self.wal, name, segment_content(name.removesuffix(".partial"), seed=seed))

    async def push(self, name: str) -> None:
        """As Postgres: ask, and rename when acknowledged."""
        await self.archiver.pusher.push(name)
        status = self.wal / "archive_status"
        (status / f"{name}.ready").replace(status / f"{name}.done")

    async def stored(self, object_name: str) -> bytes | None:
        """The content of an object, decompressed."""
        codec = codec_of_suffix(object_name)

        def receive(_: ObjectInfo, chunks):  # type: ignore[no-untyped-def]
            return b"".join(codec.decompressed(chunks, limit_bytes=1 << 31))

        return await self.store.receive(object_name, receive, deadline_s=10)

    async def wal_in_store(self, name: str) -> bytes | None:
        return await self.stored(self.layout.wal(name))

    async def object_names(self, prefix: str = f"{SERVER}/wals/") -> list[str]:
        return [entry.name async for entry in self.store.entries(prefix, deadline_s=10)]

    async def _flushed(self) -> Flushed | None:
        return self.flushed

    async def _replayed(self) -> Replayed | None:
        return self.replayed

    async def close(self) -> None:
        await self.archiver.pusher.close()
        await self.archiver.fetcher.close()


@contextlib.asynccontextmanager
async def desk_at(root: Path, store: ObjectStore, **changes: object) -> AsyncIterator[Desk]:
    desk = Desk(root, store, **changes)  # type: ignore[arg-type]
    try:
        yield desk
    finally:
        await desk.close()


async def until(condition: Callable[[], object], *, deadline_s: float = 10.0) -> None:
    """Until it is true; AssertionError at the deadline."""
    end_s = monotonic_s() + deadline_s
    while True:
        if condition():
            return
        assert monotonic_s() < end_s, "not in time"
        await asyncio.sleep(0.005)
