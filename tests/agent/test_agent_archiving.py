"""What the agent tells its archiver, when it wakes Postgres's, and what of the answers becomes news."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from agent_builders import record
from agent_fakes import settle
from agent_instance import Instance

from instance_manager.agent.archiving import HUNG_AFTER_S, TROUBLE_AFTER_S, Archiving
from instance_manager.archive.orders import Orders
from instance_manager.core.archive_state import ArchiveState
from instance_manager.core.lease import Permit
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch, Lsn

SEGMENT_BYTES = 16 << 20


class FakeArchiver:
    """Takes every order at once, unless it `hangs`."""

    is_configured = True

    def __init__(self) -> None:
        self.given: list[Orders] = []
        self.taken: Orders | None = None
        self.state: ArchiveState | None = ArchiveState(level="calm")
        self.silent_since_s: float | None = None
        self.why_silent = "nobody"
        self.hangs = False

    def give(self, orders: Orders) -> None:
        if not self.given or self.given[-1] != orders:
            self.given.append(orders)
        if not self.hangs:
            self.taken = orders

    async def run(self) -> None:
        return None


class Desk:
    """One instance with an archiver; the parts of the database that the orders are made of are the test's."""

    def __init__(self, made: Instance) -> None:
        self.made = made
        self.archiver = made.context.archiver = FakeArchiver()
        self.archiving = Archiving(made.context)
        self.woken = 0
        self.restarts = 0
        database = made.database
        database.directory.is_startable = True
        database.directory.wal_segment_bytes = self._segment_bytes  # type: ignore[attr-defined]
        database.wake_archiving = self._wake  # type: ignore[attr-defined]
        made.context.link.restart_companion = self._restart  # type: ignore[method-assign]

    async def _segment_bytes(self) -> int:
        return SEGMENT_BYTES

    async def _wake(self) -> None:
        self.woken += 1

    def _restart(self) -> None:
        self.restarts += 1

    def permit(self, hard_s: float, epoch: int | None = None) -> None:
        held = self.made.record.epoch if epoch is None else Epoch(epoch)
        self.made.context.link.permit = Permit(held, hard_s - 2, hard_s)

    async def look(self) -> Orders:
        self.archiving.look()
        await settle()
        self.archiving.look()
        await settle()
        return self.archiver.given[-1]

    def news(self) -> list[tuple[str, str]]:
        lines = self.made.context.journal.lines()
        return [(line.decision, line.reason) for line in reversed(lines) if line.decision.startswith("archive")]


class Running:
    """`async with`: the desk of an instance by name, its archiving running."""

    def __init__(self, directory: Path, name: str) -> None:
        self._instance = Instance(directory, name, record())

    async def __aenter__(self) -> Desk:
        await self._instance.__aenter__()
        desk = Desk(self._instance)
        self._task = asyncio.create_task(desk.archiving.run())
        await settle()
        return desk

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._instance.__aexit__()


async def test_a_primary_tells_its_permit_and_the_records_history(tmp_path: Path) -> None:
    async with Running(tmp_path, "p") as desk:
        desk.permit(1008.0)
        found = desk.made.record
        assert await desk.look() == Orders(
            role="primary",
            epoch=found.epoch,
            permit_until_s=1008.0,
            cluster_uid=found.cluster_uid,
            system_identifier=str(found.system_identifier),
            wal_segment_bytes=SEGMENT_BYTES,
            chain=found.chain,
        )
        desk.permit(1010.0)
        assert (await desk.look()).permit_until_s == 1010.0
        desk.permit(1020.0, epoch=found.epoch - 1)
        assert (await desk.look()).permit_until_s == 0.0, "a permit of an earlier epoch permits nothing"


@pytest.mark.parametrize("role", [Role.STOPPING, Role.STOPPED, Role.FENCED])
async def test_a_primary_that_is_to_stop_is_a_standby_to_its_archiver(tmp_path: Path, role: Role) -> None:
    async with Running(tmp_path, "p") as desk:
        desk.permit(1008.0)
        assert (await desk.look()).role == "primary"
        desk.made.context.role = role
        stopping = await desk.look()
        assert (stopping.role, stopping.permit_until_s) == ("standby", 0.0)
        desk.made.context.archives_to_the_end = True
        assert (await desk.look()).role == "primary", "unless nobody takes over"


async def test_p9_a_standby_withholds_from_its_promise_until_it_follows_that_epoch(tmp_path: Path) -> None:
    async with Running(tmp_path, "a") as desk:
        database, volume = desk.made.database, desk.made.volume
        epoch = desk.made.record.epoch
        holder = desk.made.record.holder
        assert holder is not None
        volume.state = replace(volume.state, promised_epoch=epoch)
        database.following, database.receiving = (holder.member_id, epoch), True
        follows = await desk.look()
        assert (follows.role, follows.is_streaming, follows.is_withholding) == ("standby", True, False)
        database.receiving = False
        assert not (await desk.look()).is_withholding
        volume.state = replace(volume.state, promised_epoch=Epoch(epoch + 1))
        assert (await desk.look()).is_withholding, "promised, and still told to follow"
        database.following = None
        assert (await desk.look()).is_withholding
        database.following = (holder.member_id, Epoch(epoch + 1))
        assert not (await desk.look()).is_withholding


async def test_postgres_is_woken_once_its_archiver_takes_the_history_and_again_after_a_silence(tmp_path: Path) -> None:
    async with Running(tmp_path, "p") as desk:
        desk.permit(1008.0)
        desk.made.context.gate_open = False
        await desk.look()
        assert desk.woken == 0, "the opening of the gate reloads anyway"
        desk.made.context.gate_open = True
        await desk.look()
        await desk.look()
        assert desk.woken == 1
        desk.archiver.taken, desk.archiver.hangs = None, True
        await desk.look()
        desk.archiver.hangs = False
        await desk.look()
        assert desk.woken == 2


async def test_trouble_that_lasts_is_news_and_so_is_its_end(tmp_path: Path) -> None:
    async with Running(tmp_path, "p") as desk:
        clock = desk.made.clock
        desk.permit(1008.0)
        await desk.look()
        desk.archiver.state = ArchiveState(level="calm", trouble="the bucket is gone")
        await desk.look()
        clock.pause(TROUBLE_AFTER_S - 1)
        await desk.look()
        assert desk.news() == []
        clock.pause(1.5)
        await desk.look()
        assert desk.news() == [("archive trouble", "the bucket is gone")]
        woken = desk.woken
        desk.archiver.state = ArchiveState(level="calm")
        await desk.look()
        assert desk.news()[1:] == [("archive works", "again, after: the bucket is gone")]
        assert desk.woken == woken + 1, "Postgres may be in its minute's pause"


async def test_a_silent_archiver_is_trouble_and_one_that_hangs_is_started_again(tmp_path: Path) -> None:
    async with Running(tmp_path, "p") as desk:
        clock = desk.made.clock
        desk.permit(1008.0)
        await desk.look()
        desk.archiver.silent_since_s, desk.archiver.taken, desk.archiver.hangs = clock.now_s(), None, True
        state = desk.archiving.state()
        assert state is not None
        assert (state.level, state.trouble) == ("unknown", "the archiver does not answer: nobody")
        clock.pause(HUNG_AFTER_S - 1)
        await desk.look()
        assert desk.restarts == 0
        for _ in range(3):
            clock.pause(2)
            await desk.look()
        assert desk.restarts == 1
        clock.pause(HUNG_AFTER_S)
        await desk.look()
        assert desk.restarts == 2


async def test_a_standby_remembers_how_far_its_primary_has_archived(tmp_path: Path) -> None:
    """So that after a promotion only what is behind that is asked for again."""
    async with Running(tmp_path, "a") as desk:
        desk.made.knows("p", archive=ArchiveState(level="calm", position=Lsn(150)))
        await desk.look()
        holder = desk.made.record.holder
        assert holder is not None
        assert desk.made.context.archived_to == (holder.member_id, 150)
        desk.made.knows("p", archive=ArchiveState(level="calm"))
        await desk.look()
        assert desk.made.context.archived_to == (holder.member_id, 150), "it has stopped since, and archives no more"


async def test_the_lag_is_what_is_flushed_and_not_in_the_archive(tmp_path: Path) -> None:
    async with Running(tmp_path, "p") as desk:
        desk.permit(1008.0)
        await desk.look()
        end = desk.made.database.at
        assert end is not None
        desk.archiver.state = ArchiveState(level="calm", position=Lsn(end.lsn - 50))
        state = desk.archiving.state()
        assert state is not None
        assert state.lag_bytes == 50


async def test_a_gap_is_news_at_once_and_so_is_its_end(tmp_path: Path) -> None:
    """It was in the log of the archiver only: what could still fill it is removed while nobody looks."""
    async with Running(tmp_path, "p") as desk:
        desk.permit(1008.0)
        await desk.look()
        desk.archiver.state = ArchiveState(level="calm", gaps=2, first_gap="000000010000000000000006")
        await desk.look()
        await desk.look()
        [(what, reason)] = desk.news()
        assert (what, "lacks 2 files of the log, 000000010000000000000006 first" in reason) == ("archive gap", True)
        desk.archiver.state = ArchiveState(level="calm")
        await desk.look()
        assert desk.news()[1:] == [("archive gap filled", "nothing is missing in the archive any more")]


async def test_a_standby_is_told_that_its_primary_has_gaps(tmp_path: Path) -> None:
    async with Running(tmp_path, "a") as desk:
        desk.made.knows("p", archive=ArchiveState(level="calm"))
        assert not (await desk.look()).has_gaps
        desk.made.knows("p", archive=ArchiveState(level="calm", gaps=1, first_gap="000000010000000000000006"))
        assert (await desk.look()).has_gaps
        desk.made.knows("p", archive=ArchiveState(level="calm"))
        assert not (await desk.look()).has_gaps


async def test_a_primary_asks_nothing_of_itself(tmp_path: Path) -> None:
    async with Running(tmp_path, "p") as desk:
        desk.permit(1008.0)
        desk.made.knows("a", archive=ArchiveState(level="calm", gaps=1, first_gap="000000010000000000000006"))
        assert not (await desk.look()).has_gaps
