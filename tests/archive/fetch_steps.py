"""Steps of the tests of WAL fetch: fill an archive, ask for a file of it, look at what came."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from archive_harness import Desk
from wal_builders import SIZE

from instance_manager.archive import fetch as fetching
from instance_manager.archive.content import MemoryContent
from instance_manager.archive.fetch import Fetched, Mode
from instance_manager.archive.restore_file import restore_wal
from instance_manager.core.types import TimelineChain

A, B, C, D = (f"00000001000000000000000{number}" for number in (5, 6, 7, 8))
ON_2 = "000000020000000000000007"
SEGMENT = SIZE.size_bytes
FORK = 0x700100
PRESENT, ABSENT = Fetched.PRESENT, Fetched.ABSENT


async def fill(desk: Desk, *names: str, chain: TimelineChain | None = None) -> None:
    """Archive these, then be a standby that has lost its stream."""
    desk.command(desk.primary(epoch=1))
    desk.ready(*names)
    for name in names:
        await desk.push(name)
        (desk.wal / name).unlink()
    desk.command(desk.standby(epoch=1, chain=chain))


async def fetch(desk: Desk, name: str, mode: Mode = "recovery", to: str = "RECOVERYXLOG") -> Fetched:
    return await desk.archiver.fetcher.fetch(mode, name, desk.wal / to)


def restored(desk: Desk, to: str = "RECOVERYXLOG") -> bytes:
    return (desk.wal / to).read_bytes()


async def put(desk: Desk, name: str, content: bytes, **metadata: str) -> None:
    packed = b"".join(desk.layout.codec.compressed([content], len(content)))
    await desk.store.create(desk.layout.wal(name), MemoryContent.of(packed), metadata=metadata, deadline_s=10)


def hold_back(name: str, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """This segment comes from the store, and goes no further before the event is set."""
    let_go = asyncio.Event()

    async def slow(store: Any, layout: Any, expected: Any, spool: Any, *, deadline_s: float) -> Path | None:
        found = await restore_wal(store, layout, expected, spool, deadline_s=deadline_s)
        if expected.name == name:
            await let_go.wait()
        return found

    monkeypatch.setattr(fetching, "restore_wal", slow)
    return let_go
