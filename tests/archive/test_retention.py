"""What may be deleted, as a pure function; and how deleting shows its crashes."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import pytest
from archive_harness import Desk, chain_of
from backup_harness import LAYOUT
from wal_builders import SIZE

from instance_manager.archive.backup.catalogue import Listed, State, list_backups
from instance_manager.archive.backup.expire import expire, foresee
from instance_manager.archive.backup.info import BackupInfo, render_info
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.removal import BackupKept, delete_backup, keep_backup
from instance_manager.archive.backup.retention import Policy, RetentionRefused, expiry
from instance_manager.archive.content import MemoryContent
from instance_manager.archive.layout import Piece
from instance_manager.archive.wal_names import Segment
from instance_manager.core.types import Lsn, Timeline
from instance_manager.ports import ObjectStore, StoreUnreachable

DAY_S = 86400
BEGIN = datetime.datetime(2025, 11, 1, tzinfo=datetime.UTC)


def info_at(day: int, *, timeline: int = 1, segment: int | None = None) -> BackupInfo:
    begin = Lsn((10 * day if segment is None else segment) * SIZE.size_bytes + 0x28)
    time = BEGIN + datetime.timedelta(days=day)
    return BackupInfo(
        backup_id=time.strftime("%Y%m%dT%H%M%S"),
        timeline=Timeline(timeline),
        begin_lsn=begin,
        end_lsn=Lsn(begin + 0x100),
        begin_time=time,
        end_time=time + datetime.timedelta(minutes=5),
        system_identifier="1",
        segment_bytes=SIZE.size_bytes,
        version_number=150000,
        data_directory="/data",
    )


def listed_at(day: int, state: State = "done", keep: str | None = None, **changes: Any) -> Listed:
    info = info_at(day, **changes)
    has_info = state not in ("incomplete", "unreadable", "deleting")
    return Listed(backup_id=info.backup_id, state=state, info=info if has_info else None, keep=keep)


def going(listed: list[Listed], policy: Policy) -> list[int]:
    """Days of the backups that go."""
    days = {each.backup_id: day for day, each in enumerate(listed)}
    return [days[each.backup_id] for each in expiry(listed, policy).backups]


def test_without_a_rule_nothing_expires() -> None:
    assert going([listed_at(day) for day in range(9)], Policy()) == []


def test_count_keeps_the_newest_and_the_window_the_one_before_it_too() -> None:
    listed = [listed_at(day) for day in range(10)]
    assert going(listed, Policy(count=3)) == list(range(7))
    # Three days back from day 9 is day 6: with that backup the whole window can be recovered.
    assert going(listed, Policy(window_s=3 * DAY_S)) == list(range(6))
    assert going(listed, Policy(window_s=2.5 * DAY_S)) == list(range(6))
    assert going(listed, Policy(window_s=3 * DAY_S, count=8)) == [0, 1]
    assert going(listed[:1], Policy(window_s=1, count=1)) == []


def test_a_clock_that_has_leapt_ahead_lets_nothing_go_before_its_time() -> None:
    """The server of the newest backup, or of all from then on, believes that it is a year later."""
    listed = [listed_at(day) for day in range(5)]
    for day in range(5, 8):
        leapt = listed_at(day)
        assert leapt.info is not None
        assert leapt.info.end_time is not None
        year = datetime.timedelta(days=365)
        info = replace(leapt.info, begin_time=leapt.info.begin_time + year, end_time=leapt.info.end_time + year)
        listed.append(replace(leapt, info=info))
        assert going(listed, Policy(window_s=3 * DAY_S)) == list(range(day - 3))
    with pytest.raises(RetentionRefused, match="a clock was wrong"):
        expiry([*listed, listed_at(8)], Policy(window_s=3 * DAY_S))


def test_only_good_backups_let_older_ones_go() -> None:
    listed = [listed_at(0), listed_at(1), listed_at(2, "damaged"), listed_at(3, "failed"), listed_at(4, "incomplete")]
    assert going(listed, Policy(count=1)) == [0]
    assert going([listed_at(0), listed_at(1, "damaged")], Policy(count=1)) == []
    assert going([listed_at(0, "damaged"), listed_at(1)], Policy(count=1)) == [0]


def test_a_keep_holds_whatever_the_rule_and_stands_in_for_none() -> None:
    listed = [listed_at(0, keep="full"), listed_at(1), listed_at(2, keep="standalone"), listed_at(3), listed_at(4)]
    assert going(listed, Policy(count=2)) == [1]
    assert going([listed_at(0), listed_at(1), listed_at(2), listed_at(3, keep="full")], Policy(count=2)) == [0]


def test_the_log_stays_from_the_oldest_backup_on_and_for_standalone_ones_what_makes_them_consistent() -> None:
    found = expiry([listed_at(1, keep="standalone"), listed_at(3), listed_at(4), listed_at(5)], Policy(count=2)).wal
    assert found is not None
    assert [number for number in range(60) if found.holds(number)] == [10, *range(40, 60)]


@pytest.mark.parametrize("unsure", ["incomplete", "unreadable"])
def test_the_log_stays_whole_while_it_is_not_known_what_needs_it(unsure: State) -> None:
    assert expiry([listed_at(1), listed_at(2), listed_at(3, unsure)], Policy(count=1)).wal is None
    assert expiry([listed_at(1, "damaged")], Policy(count=1)).wal is None
    assert expiry([listed_at(1, keep="standalone")], Policy(count=1)).wal is None


def test_one_that_barman_is_taking_needs_its_log() -> None:
    found = expiry([listed_at(1, "started"), listed_at(2), listed_at(3)], Policy(count=1)).wal
    assert found is not None
    assert found.from_number == 10


def test_a_backup_of_an_older_timeline_at_a_later_position_costs_nobody_his_log() -> None:
    """A dead branch went further than the history that replaced it: what any backup needs begins at its own begin."""
    dead = listed_at(1, timeline=1, segment=90)
    listed = [listed_at(0, segment=50), dead, replace(listed_at(2, timeline=2, segment=60))]
    found = expiry([listed[0], listed[2]], Policy(count=1))
    assert [each.backup_id for each in found.backups] == [listed[0].backup_id]
    assert found.wal is not None
    assert found.wal.from_number == 60


def test_a_backup_of_a_dead_branch_lets_none_of_the_accepted_history_go() -> None:
    """It lies behind the fork, further than the new history has come: the newest by position, and of use for nothing."""
    chain = chain_of((2, 1, 55 * SIZE.size_bytes))
    before, dead, after = listed_at(0, segment=50), listed_at(1, segment=90), listed_at(2, timeline=2, segment=60)
    found = expiry([before, dead, after], Policy(count=1), chain)
    assert [each.backup_id for each in found.backups] == [before.backup_id]
    assert found.wal is not None
    assert found.wal.from_number == 60
    later = listed_at(3, timeline=2, segment=99)
    gone = [each.backup_id for each in expiry([before, dead, after, later], Policy(count=1), chain).backups]
    assert sorted(gone) == sorted(each.backup_id for each in (before, dead, after))


def test_a_kept_backup_whose_deletion_broke_off_still_holds_its_log() -> None:
    assert expiry([listed_at(1, "deleting", keep="full"), listed_at(2)], Policy(count=1)).wal is None
    assert expiry([listed_at(1, "deleting"), listed_at(2)], Policy(count=1)).wal is not None


def test_times_that_contradict_the_positions_stop_everything_until_somebody_has_deleted_the_wrong_one() -> None:
    behind, before = listed_at(0, segment=500), listed_at(9)
    with pytest.raises(RetentionRefused, match="a clock was wrong") as refused:
        expiry([behind, before], Policy(count=1))
    text = str(refused.value)
    assert before.info is not None
    assert behind.info is not None
    for each in (behind.backup_id, before.backup_id, f"{behind.info.end_time}", f"{before.info.begin_time}"):
        assert each in text
    assert text.endswith("`instance-manager backup delete ID` the one whose time is wrong")
    # A keep does not help, and is not told to.
    with pytest.raises(RetentionRefused):
        expiry([behind, replace(before, keep="full")], Policy(count=1))
    assert expiry([behind], Policy(count=1)).backups == ()


async def put(store: ObjectStore, name: str, content: bytes = b"x") -> None:
    await store.create(name, MemoryContent.of(content), deadline_s=5)


async def put_backup(store: ObjectStore, info: BackupInfo) -> BackupNames:
    names = BackupNames(LAYOUT, info.backup_id)
    for name in (names.begun, names.tar("data", ""), names.tar("data_0001", "")):
        await put(store, name)
    await put(store, names.info, render_info(info))
    return names


async def left(store: ObjectStore) -> set[str]:
    return {entry.name async for entry in store.entries("orders/", deadline_s=5)}


async def test_expiring_deletes_backups_and_below_the_oldest_their_log_but_no_history(local_desk: Desk) -> None:
    store = local_desk.store
    for day in (1, 2, 3):
        await put_backup(store, info_at(day))
    for number in (5, 10, 19, 20, 29, 30, 35):
        await put(store, LAYOUT.wal(SIZE.name(Segment(Timeline(1), number))))
    await put(store, LAYOUT.wal(f"{SIZE.name(Segment(Timeline(1), 10))}.00000028.backup"))
    history = b"1\t0/2800000\tno recovery target specified\n"
    await put(store, LAYOUT.wal("00000002.history"), b"".join(LAYOUT.codec.compressed([history], len(history))))
    foreseen = await foresee(store, LAYOUT, Policy(count=2))
    assert foreseen.backups == (info_at(1).backup_id,)
    before = await left(store)
    assert await left(store) == before, "only looked"
    done = await expire(store, LAYOUT, Policy(count=2))
    assert done.backups == foreseen.backups
    assert [each.state for each in await list_backups(store, LAYOUT, deadline_s=5)] == ["done", "done"]
    wal = sorted(name for name in await left(store) if "/wals/" in name)
    kept = [LAYOUT.wal(SIZE.name(Segment(Timeline(1), number))) for number in (20, 29, 30, 35)]
    assert wal == sorted([*kept, LAYOUT.wal("00000002.history")])


async def test_what_forks_have_left_expires_with_the_log_around_it(local_desk: Desk) -> None:
    """Pieces and `.partial` segments of ended timelines stayed for ever."""
    store = local_desk.store
    for day in (1, 2):
        await put_backup(store, info_at(day))

    def leftovers(number: int) -> set[str]:
        name = SIZE.name(Segment(Timeline(1), number))
        return {
            LAYOUT.piece(name, Piece(0, 8192)),
            LAYOUT.piece(name, Piece(8192, 9000)),
            LAYOUT.wal(f"{name}.partial"),
            LAYOUT.other_partial(f"{name}.partial", "ab" * 32),
        }

    for number in (9, 12, 19, 20, 25):
        for name in leftovers(number):
            await put(store, name)
    await put(store, f"{LAYOUT.other_partials}readme")
    await put(store, f"{LAYOUT.all_pieces}readme/now")
    await expire(store, LAYOUT, Policy(count=1))
    folders = (LAYOUT.wals, LAYOUT.all_pieces, LAYOUT.other_partials)
    found = {name for name in await left(store) if name.startswith(folders)}
    strange = {f"{LAYOUT.other_partials}readme", f"{LAYOUT.all_pieces}readme/now"}
    assert found == leftovers(20) | leftovers(25) | strange


class Crashing:
    """A store that fails after so many deletions: as a kill between two of them."""

    def __init__(self, store: ObjectStore, deletions: int) -> None:
        self._store, self._left = store, deletions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def delete(self, name: str, *, deadline_s: float) -> None:
        if self._left == 0:
            raise StoreUnreachable("crashed")
        self._left -= 1
        await self._store.delete(name, deadline_s=deadline_s)


async def test_a_crash_while_deleting_shows_at_every_step_and_is_finished_by_the_next_try(local_desk: Desk) -> None:
    store: Any = local_desk.store
    names = await put_backup(store, info_at(1))
    await put_backup(store, info_at(2))
    for deletions in range(20):
        try:
            await delete_backup(Crashing(store, deletions), names, deadline_s=5)
        except StoreUnreachable:
            states = {each.backup_id: each.state for each in await list_backups(store, LAYOUT, deadline_s=5)}
            assert states[names.backup_id] == "deleting"
            continue
        break
    else:
        raise AssertionError("never done")
    assert deletions >= 1
    (remaining,) = await list_backups(store, LAYOUT, deadline_s=5)
    assert (remaining.state, remaining.backup_id) == ("done", info_at(2).backup_id)


async def test_a_kept_backup_is_never_marked_as_being_deleted(local_desk: Desk) -> None:
    """For a moment it would hold no log, and somebody may just be expiring."""
    store: Any = local_desk.store
    names = await put_backup(store, info_at(1))
    await keep_backup(store, names, "full", deadline_s=5)
    with pytest.raises(BackupKept, match="unkeep"):
        await delete_backup(Crashing(store, 0), names, deadline_s=5)
    (listed,) = await list_backups(store, LAYOUT, deadline_s=5)
    assert (listed.state, listed.keep) == ("done", "full")


class Beginning:
    """Somebody begins a backup when the first WAL has been deleted."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.deleted = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def delete(self, name: str, *, deadline_s: float) -> None:
        await self._store.delete(name, deadline_s=deadline_s)
        self.deleted += "/wals/" in name
        if self.deleted == 1 and "/wals/" in name:
            await put(self._store, BackupNames(LAYOUT, info_at(3).backup_id).begun)


async def test_a_long_expiry_stops_when_a_backup_is_begun_meanwhile(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instance_manager.archive.backup.expire.LOOK_EVERY", 2)
    store: Any = Beginning(local_desk.store)
    await put_backup(store, info_at(2))
    for number in range(10):
        await put(store, LAYOUT.wal(SIZE.name(Segment(Timeline(1), number))))
    await expire(store, LAYOUT, Policy(count=1))
    assert store.deleted == 2, "from where on the new one needs the log nobody knows"


async def test_of_a_keep_and_a_deletion_at_once_one_sees_the_other(local_desk: Desk) -> None:
    store = local_desk.store
    names = await put_backup(store, info_at(1))
    await keep_backup(store, names, "full", deadline_s=5)
    with pytest.raises(BackupKept, match="unkeep"):
        await delete_backup(store, names, deadline_s=5)
    (listed,) = await list_backups(store, LAYOUT, deadline_s=5)
    assert (listed.state, listed.keep) == ("done", "full")
    await store.delete(names.keep, deadline_s=5)
    await put(store, names.deleting)
    with pytest.raises(BackupKept, match="being deleted"):
        await keep_backup(store, names, "full", deadline_s=5)
    assert await store.info(names.keep, deadline_s=5) is None
