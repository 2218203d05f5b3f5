"""What every store must do, on each of them: conditional writes with one winner, absence and damage told apart, hints."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from coordination_records import EVERYTHING, FIRST
from coordination_stores import StoreUnderTest

from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Epoch
from instance_manager.ports import Conflict, RecordUnreadable


def renewal(record: ClusterRecord) -> ClusterRecord:
    return replace(record, renewals=record.renewals + 1)


async def test_where_nothing_was_stored_there_is_no_record(tested: StoreUnderTest) -> None:
    assert await tested.store.read(deadline_s=2) is None


@pytest.mark.parametrize("record", [FIRST, EVERYTHING], ids=["first", "everything"])
async def test_what_was_written_is_read_with_its_version_by_everybody(
    tested: StoreUnderTest, record: ClusterRecord
) -> None:
    created = await tested.store.create(record, deadline_s=2)
    assert created.record == record
    assert await tested.another().read(deadline_s=2) == created
    replaced = await tested.store.replace(renewal(record), version=created.version, deadline_s=2)
    assert replaced.version != created.version
    assert await tested.another().read(deadline_s=2) == replaced


async def test_a_record_that_exists_is_not_created_again(tested: StoreUnderTest) -> None:
    created = await tested.store.create(FIRST, deadline_s=2)
    with pytest.raises(Conflict):
        await tested.another().create(renewal(FIRST), deadline_s=2)
    assert await tested.store.read(deadline_s=2) == created
    tested.damage()
    with pytest.raises(Conflict):
        await tested.store.create(FIRST, deadline_s=2)


async def test_a_write_on_another_version_is_a_conflict_and_changes_nothing(tested: StoreUnderTest) -> None:
    first = await tested.store.create(FIRST, deadline_s=2)
    second = await tested.another().replace(renewal(FIRST), version=first.version, deadline_s=2)
    with pytest.raises(Conflict):
        await tested.store.replace(renewal(FIRST), version=first.version, deadline_s=2)
    assert await tested.store.read(deadline_s=2) == second


async def test_a_write_on_a_record_that_is_gone_is_a_conflict(tested: StoreUnderTest) -> None:
    created = await tested.store.create(FIRST, deadline_s=2)
    tested.remove()
    with pytest.raises(Conflict):
        await tested.store.replace(FIRST, version=created.version, deadline_s=2)
    assert await tested.store.read(deadline_s=2) is None


async def test_no_version_comes_again_after_a_deletion(tested: StoreUnderTest) -> None:
    created = await tested.store.create(FIRST, deadline_s=2)
    tested.remove()
    again = await tested.store.create(FIRST, deadline_s=2)
    assert again.version != created.version
    with pytest.raises(Conflict):
        await tested.another().replace(FIRST, version=created.version, deadline_s=2)


async def test_r3_what_is_damaged_is_unreadable_and_repaired_only_as_it_was_seen(tested: StoreUnderTest) -> None:
    await tested.store.create(FIRST, deadline_s=2)
    tested.damage()
    with pytest.raises(RecordUnreadable) as seen:
        await tested.store.read(deadline_s=2)
    version = seen.value.version  # type: ignore[attr-defined]
    repaired = await tested.another().replace(renewal(FIRST), version=version, deadline_s=2)
    assert await tested.store.read(deadline_s=2) == repaired
    with pytest.raises(Conflict):
        await tested.store.replace(FIRST, version=version, deadline_s=2)


async def test_of_many_writers_on_one_version_exactly_one_wins(tested: StoreUnderTest) -> None:
    stored = await tested.store.create(FIRST, deadline_s=2)
    writers = [tested.another() for _ in range(5)]
    for _ in range(5):
        outcomes = await asyncio.gather(
            *(
                each.replace(
                    replace(stored.record, renewals=stored.record.renewals + 1, write_id=f"{number:016x}"),
                    version=stored.version,
                    deadline_s=5,
                )
                for number, each in enumerate(writers)
            ),
            return_exceptions=True,
        )
        won = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(won) == 1
        assert all(isinstance(each, Conflict) for each in outcomes if isinstance(each, BaseException))
        found = await tested.store.read(deadline_s=2)
        assert found == won[0]
        stored = found


async def test_changes_hint_at_a_takeover_and_at_a_deletion(tested: StoreUnderTest) -> None:
    created = await tested.store.create(FIRST, deadline_s=2)
    hints = asyncio.Queue[None]()

    async def listen() -> None:
        async for _ in tested.store.changes():
            hints.put_nowait(None)

    listening = asyncio.create_task(listen())
    await asyncio.wait_for(hints.get(), 1)
    await _until_quiet(hints)
    taken = replace(FIRST, epoch=Epoch(FIRST.epoch + 1))
    await tested.another().replace(taken, version=created.version, deadline_s=2)
    await asyncio.wait_for(hints.get(), 1)
    await _until_quiet(hints)
    tested.remove()
    await asyncio.wait_for(hints.get(), 1)
    listening.cancel()


async def _until_quiet(hints: asyncio.Queue[None]) -> None:
    while True:
        try:
            await asyncio.wait_for(hints.get(), 0.3)
        except TimeoutError:
            return
