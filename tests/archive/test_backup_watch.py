"""What the primary's archiver tells of backups: how many are good, the newest, and how far back can be recovered."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from archive_harness import Desk, chain_of
from backup_harness import LAYOUT
from wal_builders import SIZE

from instance_manager.archive.backup.catalogue import Listed
from instance_manager.archive.backup.info import BackupInfo, render_info
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.watch import AGAIN_AFTER_S, LOOK_EVERY_S, BackupWatch, recoverable
from instance_manager.archive.content import MemoryContent
from instance_manager.archive.telling import backups_of, state_of
from instance_manager.archive.wal_names import Segment
from instance_manager.core.types import Lsn, Timeline, TimelineChain
from instance_manager.ports import StoreUnreachable

BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
ONE = TimelineChain(Timeline(1))


def backup(day: int, *, timeline: int = 1, **changes: Any) -> BackupInfo:
    """Begins in segment ten times the day and ends in the next one, at noon."""
    time = BEGIN + timedelta(days=day)
    usual: dict[str, Any] = {
        "backup_id": time.strftime("%Y%m%dT%H%M%S"),
        "timeline": Timeline(timeline),
        "begin_lsn": Lsn(10 * day * SIZE.size_bytes + 0x28),
        "end_lsn": Lsn((10 * day + 1) * SIZE.size_bytes + 0x28),
        "begin_time": time,
        "end_time": time + timedelta(hours=12),
        "system_identifier": "1",
        "segment_bytes": SIZE.size_bytes,
        "version_number": 150000,
        "data_directory": "/data",
    }
    return BackupInfo(**{**usual, **changes})


def listed(*infos: BackupInfo, state: Any = "done") -> list[Listed]:
    return [Listed(backup_id=info.backup_id, state=state, info=info) for info in infos]


def there(*numbers: int, timeline: int = 1) -> dict[Timeline, frozenset[int]]:
    return {Timeline(timeline): frozenset(numbers)}


def test_the_window_begins_with_the_oldest_backup_from_which_the_log_has_no_gap() -> None:
    found = recoverable(listed(backup(1), backup(2), backup(3)), ONE, SIZE, there(*range(10, 15), *range(20, 40)))
    assert (found.good, found.newest, found.oldest, found.gap) == (3, backup(3), backup(2), None)
    gap = recoverable(listed(backup(1), backup(2)), ONE, SIZE, there(*range(10, 22), 23))
    assert (gap.good, gap.oldest, gap.gap) == (2, None, Segment(Timeline(1), 22))


def test_a_backup_without_its_own_log_or_with_damage_or_behind_a_fork_is_not_good() -> None:
    assert recoverable(listed(backup(1)), ONE, SIZE, there(10)).good == 0
    assert recoverable(listed(backup(1)), ONE, SIZE, there(10, 11)).good == 1
    assert recoverable(listed(backup(1), state="damaged"), ONE, SIZE, there(10, 11)).good == 0
    forked = chain_of((2, 1, 15 * SIZE.size_bytes))
    assert recoverable(listed(backup(2)), forked, SIZE, there(*range(20, 25))).good == 0
    followed = {**there(*range(10, 16)), **there(*range(15, 30), timeline=2)}
    assert recoverable(listed(backup(1)), forked, SIZE, followed).oldest == backup(1)
    assert recoverable([], ONE, SIZE, {}).newest is None


class World:
    """A primary's archiver at noon of the third day, its clock advanced by hand."""

    def __init__(self, desk: Desk, store: Any = None) -> None:
        self.desk = desk
        self.status = desk.archiver.status
        self.status.archive = "ok"
        self.news = 0
        self.watch = BackupWatch(
            store or desk.store,
            LAYOUT,
            desk.archiver.orders,
            self.status,
            news=lambda: self.news,
            now_s=lambda: desk.now_s,
            now=lambda: BEGIN + timedelta(days=3, hours=12),
        )
        desk.command(desk.primary(until_s=1e9))

    async def put(self, name: str, content: bytes = b"x") -> None:
        await self.desk.store.create(name, MemoryContent.of(content), deadline_s=5)

    async def put_backup(self, info: BackupInfo) -> None:
        await self.put(BackupNames(LAYOUT, info.backup_id).info, render_info(info))

    async def put_log(self, *numbers: int) -> None:
        for number in numbers:
            await self.put(LAYOUT.wal(SIZE.name(Segment(Timeline(1), number))))

    async def later(self, seconds: float) -> None:
        self.desk.now_s += seconds
        await self.watch.look_when_due()

    @property
    def good(self) -> int:
        assert self.status.backups is not None
        return self.status.backups.good


@pytest.fixture
def world(local_desk: Desk) -> World:
    return World(local_desk)


async def test_people_are_told_the_newest_backup_its_age_and_since_when_all_can_be_recovered(world: World) -> None:
    await world.put_backup(backup(1))
    await world.put_backup(backup(2))
    await world.put_log(*range(10, 25))
    await world.later(0)
    state = state_of(world.status, world.desk.archiver.orders.permitted(), world.desk.now_s + 60)
    told = state.backups
    assert told is not None
    assert (told.good, told.newest, told.newest_age_s) == (2, backup(2).backup_id, 86400 + 60)
    assert (told.recoverable_from, told.recoverable_s) == ("2026-11-02 12:00:00", 2 * 86400 + 60)
    assert (told.first_gap, told.problem) == ("", None)


async def test_it_looks_again_after_news_and_else_now_and_then(world: World) -> None:
    await world.later(0)
    assert world.good == 0
    await world.put_backup(backup(1))
    await world.put_log(10, 11)
    await world.later(LOOK_EVERY_S - 1)
    assert world.good == 0
    await world.later(1)
    assert world.good == 1
    await world.put_backup(backup(2))
    await world.put_log(*range(12, 22))
    world.news = 1
    await world.later(1)
    assert world.good == 2


async def test_a_gap_is_told_when_it_is_still_there_and_nothing_waits_to_fill_it(world: World) -> None:
    await world.put_backup(backup(1))
    await world.put_log(10, 11, 13)
    await world.later(0)
    seen = world.status.backups
    assert seen is not None
    assert seen.first_gap == "", "a later segment may be there first"
    name = SIZE.name(Segment(Timeline(1), 12))
    world.status.backlog.oldest = name
    await world.later(AGAIN_AFTER_S)
    assert world.status.backups is not None
    assert world.status.backups.first_gap == "", "it waits to be archived"
    world.status.backlog.oldest = ""
    await world.later(AGAIN_AFTER_S)
    assert world.status.backups.first_gap == name
    assert world.status.backups.recoverable_from_unix_s is None
    await world.put_log(12)
    await world.later(LOOK_EVERY_S)
    assert world.status.backups.first_gap == ""


class Failing:
    """A store that can be made to fail."""

    def __init__(self, store: Any) -> None:
        self._store, self.fails = store, False

    def __getattr__(self, name: str) -> Any:
        if self.fails:
            raise StoreUnreachable("away")
        return getattr(self._store, name)


async def test_what_was_seen_stays_with_its_age_while_the_store_is_away(local_desk: Desk) -> None:
    store = Failing(local_desk.store)
    world = World(local_desk, store)
    await world.put_backup(backup(2))
    await world.put_log(20, 21)
    await world.later(0)
    store.fails = True
    await world.later(LOOK_EVERY_S)
    assert world.status.backups is not None
    told = backups_of(world.status.backups, world.desk.now_s)
    assert (told.good, told.problem, told.newest_age_s) == (1, "away", 86400 + LOOK_EVERY_S)
    store.fails = False
    await world.later(AGAIN_AFTER_S)
    assert world.status.backups.problem is None


async def test_only_the_primary_with_an_archive_of_its_own_tells(world: World) -> None:
    await world.later(0)
    assert world.status.backups is not None
    world.desk.command(world.desk.standby())
    await world.later(1)
    assert world.status.backups is None
    world.desk.command(world.desk.primary(until_s=1e9))
    world.status.archive = "it is another cluster's"
    await world.later(1)
    assert world.status.backups is None
