"""Between the agent and its archiver: orders over the socket, and what people are told of the archive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from archive_harness import Desk, until
from wal_builders import SIZE

from instance_manager.agent import archiver_client
from instance_manager.agent.archiver_client import ArchiverClient
from instance_manager.agent.reporting import archive_risks
from instance_manager.archive.counters import ArchiverStatus, Backlog
from instance_manager.archive.telling import state_of
from instance_manager.core.archive_state import ArchiveState, BackupsState
from instance_manager.core.types import Lsn

MIB = 1 << 20


class BootClock:
    def now_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@asynccontextmanager
async def client_at(socket: Path) -> AsyncIterator[tuple[ArchiverClient, list[bool]]]:
    """The agent's end, and whether it answered each time that it called back."""
    heard: list[bool] = []
    client = ArchiverClient(socket, BootClock(), on_answer=lambda: heard.append(client.silent_since_s is None))
    task = asyncio.create_task(client.run())
    try:
        yield client, heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running(desk: Desk) -> AsyncIterator[None]:
    task = asyncio.create_task(desk.archiver.run())
    await until(desk.settings.socket.exists)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_last_word_is_told_and_a_restarted_archiver_hears_it_again(local_desk: Desk) -> None:
    async with client_at(local_desk.settings.socket) as (client, heard):
        orders = local_desk.primary(epoch=7)
        client.give(orders)
        await until(lambda: client.silent_since_s is not None)
        assert client.taken is None
        async with running(local_desk):
            await until(lambda: client.taken == orders)
            assert local_desk.archiver.orders.current == orders
            assert client.state is not None
            assert client.state.level == "calm"
            later = local_desk.primary(epoch=8)
            client.give(later)
            await until(lambda: client.taken == later)
        await until(lambda: client.silent_since_s is not None)
        again = Desk(local_desk.wal.parent, local_desk.store)
        async with running(again):
            await until(lambda: client.taken == later)
            assert again.archiver.orders.current == later
        assert heard[:2] == [False, True]


async def test_an_archiver_that_hangs_or_refuses_is_silent_with_its_reason(local_desk: Desk) -> None:
    local_desk.command(local_desk.primary(epoch=9))
    async with running(local_desk), client_at(local_desk.settings.socket) as (client, _):
        client.give(local_desk.primary(epoch=3))
        await until(lambda: client.silent_since_s is not None)
        assert "epoch 3 is over" in client.why_silent
    local_desk.settings.socket.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(lambda reader, writer: asyncio.sleep(60), str(local_desk.settings.socket))
    async with client_at(local_desk.settings.socket) as (client, _):
        client.give(local_desk.primary())
        await until(lambda: client.silent_since_s is not None)
        assert client.why_silent == f"no answer within {archiver_client.ANSWER_DEADLINE_S:g} s"
    server.close()


async def test_an_archiver_that_answers_too_much_is_silent_and_ends_no_agent(tmp_path: Path) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"done " + bytes(2 * archiver_client.ANSWER_MAX_BYTES) + b"\n")

    server = await asyncio.start_unix_server(answer, str(tmp_path / "socket"))
    async with client_at(tmp_path / "socket") as (client, _):
        client.give(Desk.primary())
        await until(lambda: client.silent_since_s is not None)
        assert client.why_silent == f"its answer is longer than {archiver_client.ANSWER_MAX_BYTES} bytes"
    server.close()


def told(**changes: object) -> ArchiveState:
    return state_of(ArchiverStatus(**{"archive": "ok", **changes}), Desk.primary(), 1000.0)  # type: ignore[arg-type]


def test_the_position_is_before_what_postgres_still_asks_for() -> None:
    status = ArchiverStatus(archive="ok")
    status.stream.durable_lsn, status.stream.covered_s = 7 * MIB + 100, 999.0
    state = state_of(status, Desk.primary(), 1000.0)
    assert (state.position, state.lag_s) == (7 * MIB + 100, 1.0)
    status.backlog = Backlog(ready=2, oldest=SIZE.name(SIZE.parse("000000010000000000000006")), oldest_age_s=40.0)
    state = state_of(status, Desk.primary(), 1000.0)
    assert (state.position, state.lag_s, state.waiting) == (6 * MIB, 40.0, 2)
    status.backlog = Backlog(ready=1, oldest="00000002.history", oldest_age_s=40.0)
    assert state_of(status, Desk.primary(), 1000.0).position == 7 * MIB + 100


def test_trouble_is_what_stops_the_archive_now_and_only_a_primarys() -> None:
    assert told().trouble is None
    assert told(push_trouble="refused").trouble == "refused"
    assert told(archive="another's").trouble == "another's"
    assert told(archive="not looked at yet").trouble is None
    assert state_of(ArchiverStatus(push_trouble="refused"), None, 0.0) == ArchiveState(level="calm")


def test_each_risk_is_a_sentence() -> None:
    assert list(archive_risks(ArchiveState(level="calm", position=Lsn(1)))) == []
    bad = ArchiveState(
        level="pressed",
        waiting=40,
        oldest="000000010000000000000006",
        oldest_age_s=90.0,
        gaps=2,
        first_gap="000000010000000000000003",
        conflicts=1,
        trouble="the bucket is gone",
    )
    assert list(archive_risks(bad)) == [
        "nothing is archived: the bucket is gone",
        "archiving is pressed: 40 files wait, 000000010000000000000006 for 90 s; the volume fills up",
        "the archive lacks 2 segments, 000000010000000000000003 first: no recovery passes them; take a base backup",
        "other content is in the archive under a name of this log: see the log of the archiver",
    ]


def test_an_archive_from_which_nothing_can_be_recovered_is_a_risk() -> None:
    def risks(**changes: Any) -> list[str]:
        return list(archive_risks(ArchiveState(level="calm", backups=BackupsState(**{"good": 1, **changes}))))

    assert risks() == []
    assert risks(good=0) == ["the archive has no backup that can be restored: take one with `instance-manager backup`"]
    (gap,) = risks(first_gap="000000010000000000000003")
    assert gap.startswith("the archive lacks 000000010000000000000003 behind its newest backup")
