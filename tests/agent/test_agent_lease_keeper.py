"""The task that owns the Lease, against a store that is slow, away, silent about its writes, or damaged."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from agent_builders import HOLDER, OTHER, P, end, held_by_a, record, volume
from agent_fakes import BEGIN_S, TIMINGS, Fault, Keeping, MemoryCoordination, settle, unavailable, unknown

from instance_manager.agent.lease_keeper import WriteRefused
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import Epoch
from instance_manager.ports import Conflict, OutcomeUnknown, StoreUnavailable

pytestmark = pytest.mark.asyncio

BEAT_S = TIMINGS.renew_interval_s


def store(found: ClusterRecord | None = None) -> MemoryCoordination:
    made = MemoryCoordination()
    made.put(found if found is not None else record())
    return made


def keeping(found: MemoryCoordination, who: Holder | None = HOLDER) -> Keeping:
    return Keeping(found, who, volume=volume(P))


def paused(found: ClusterRecord) -> ClusterRecord:
    return replace(found, paused=True)


# Permits.


async def test_section_3_a_permit_counts_from_when_the_renewal_was_sent_not_from_its_answer() -> None:
    found = store()
    found.faults_of_writes.append(Fault(after_s=1.2))
    async with keeping(found) as at:
        await asyncio.sleep(1.3)
        (permit,) = at.permits
    assert permit.epoch == 5
    assert permit.soft_s == pytest.approx(BEGIN_S + TIMINGS.soft_s)
    assert permit.hard_s == pytest.approx(BEGIN_S + TIMINGS.hard_s)


async def test_section_3_after_a_conflict_the_permit_counts_from_the_write_that_succeeded() -> None:
    found = store()
    found.faults_of_writes.append(Fault(after_s=0.5, before=lambda: found.put(paused(found.record))))
    async with keeping(found) as at:
        await asyncio.sleep(0.6)
        (permit,) = at.permits
    assert permit.soft_s == pytest.approx(BEGIN_S + 0.5 + TIMINGS.soft_s)


async def test_section_3_a_holder_renews_every_interval() -> None:
    async with keeping(store()) as at:
        await asyncio.sleep(5 * BEAT_S + 0.1)
        assert len(at.permits) == 6
        assert at.store.record.renewals == 6


async def test_who_decides_is_woken_by_what_is_new_in_the_lease_and_not_by_its_renewals() -> None:
    for who in (HOLDER, OTHER):
        async with keeping(store(), who) as at:
            await asyncio.sleep(BEAT_S)
            woken = at.changes
            await asyncio.sleep(4 * BEAT_S)
            assert at.changes == woken
            at.store.put(paused(at.store.record))
            await asyncio.sleep(BEAT_S)
            assert at.changes == woken + 1
            at.store.faults_of_reads.append(unavailable())
            at.store.faults_of_writes.append(unavailable())
            await asyncio.sleep(2 * BEAT_S)
            assert at.changes > woken + 1


async def test_section_3_without_proof_of_health_nothing_is_renewed_and_the_store_is_still_read() -> None:
    async with keeping(store()) as at:
        at.refusal = "Postgres has answered no new connection for 4.1 s"
        granted, renewals, reads = len(at.permits), at.store.record.renewals, at.store.reads
        await asyncio.sleep(4 * BEAT_S + 0.1)
        assert len(at.permits) == granted
        assert at.store.record.renewals == renewals
        assert at.store.reads >= reads + 4
        assert at.keeper.view().read_age_s <= BEAT_S


async def test_section_3_a_write_of_an_unhealthy_holder_grants_nothing() -> None:
    found = store()
    at = keeping(found)
    at.refusal = "no write to the volume has come back for 4.1 s"
    async with at:
        await at.keeper.write(paused)
        assert found.record.paused
        assert at.permits == []


async def test_section_3_who_reads_another_holder_gets_no_permit() -> None:
    found = store()
    async with keeping(found) as at:
        granted = len(at.permits)
        found.put(held_by_a(epoch=Epoch(6)))
        await asyncio.sleep(3 * BEAT_S)
        assert len(at.permits) == granted
        assert found.record.holder == OTHER
        assert at.keeper.record == found.record


async def test_section_3_a_namesakes_later_life_does_not_renew_what_the_earlier_life_holds() -> None:
    async with keeping(store(), replace(HOLDER, incarnation="p-life-2")) as at:
        await asyncio.sleep(3 * BEAT_S)
        assert at.permits == []
        assert at.store.attempts == []


async def test_section_3_a_renewal_stamps_the_position_and_keeps_the_last_known_one() -> None:
    at = keeping(store())
    at.position = end(300)
    async with at:
        assert at.store.record.position == end(300)
        at.position = None
        await asyncio.sleep(BEAT_S + 0.1)
        assert at.store.record.position == end(300)


async def test_r13_opened_is_never_taken_back_by_a_renewal() -> None:
    at = keeping(store(record(opened=False)))
    async with at:
        assert not at.store.record.opened
        at.opened = True
        await asyncio.sleep(BEAT_S + 0.1)
        assert at.store.record.opened
        at.opened = False
        await asyncio.sleep(2 * BEAT_S)
        assert at.store.record.opened


# Unknown outcomes.


async def test_r1_a_new_agent_starts_with_an_unknown_write_and_the_holders_first_act_is_a_write() -> None:
    found = store()
    at = keeping(found)
    assert at.keeper.view().unknown_write
    async with at:
        assert len(found.applied) == 1
        assert not at.keeper.view().unknown_write


async def test_r1_a_read_does_not_close_the_unknown_write_of_the_agent_before() -> None:
    async with keeping(store(held_by_a())) as at:
        await at.keeper.read()
        await asyncio.sleep(3 * BEAT_S)
        assert at.keeper.view().unknown_write


@pytest.mark.parametrize("lands_after_s", [None, 0.0, 1.0])
async def test_r1_an_unknown_outcome_grants_nothing_and_stays_unknown_until_a_write_of_our_own(
    lands_after_s: float | None,
) -> None:
    found = store()
    async with keeping(found) as at:
        granted = len(at.permits)
        at.refusal = "so that nothing but the test writes"
        found.faults_of_writes.append(unknown(lands_after_s=lands_after_s))
        with pytest.raises(OutcomeUnknown):
            await at.keeper.write(paused)
        await at.keeper.read()
        await asyncio.sleep(2 * BEAT_S - 0.1)
        assert found.record.paused == (lands_after_s is not None)
        assert at.keeper.view().unknown_write
        assert len(at.permits) == granted
        at.refusal = None
        await asyncio.sleep(BEAT_S)
        assert not at.keeper.view().unknown_write
        assert len(at.permits) == granted + 1


async def test_r1_after_a_later_write_of_our_own_the_unknown_one_cannot_land_any_more() -> None:
    found = store()
    async with keeping(found) as at:
        found.faults_of_writes.append(unknown(lands_after_s=10.0))
        with pytest.raises(OutcomeUnknown):
            await at.keeper.write(paused)
        await asyncio.sleep(BEAT_S + 0.1)
        assert not at.keeper.view().unknown_write
        await asyncio.sleep(20)
        assert not found.record.paused


async def test_r1_a_renewal_with_an_unknown_outcome_grants_nothing() -> None:
    found = store()
    found.faults_of_writes.append(unknown(lands_after_s=0.0))
    async with keeping(found) as at:
        assert at.permits == []
        assert at.keeper.view().unknown_write
        await asyncio.sleep(0.3)
        (permit,) = at.permits
        assert permit.soft_s == pytest.approx(BEGIN_S + 0.25 + TIMINGS.soft_s)


async def test_r1_a_write_that_was_given_up_in_flight_is_unknown_until_it_is_answered() -> None:
    """Raising q is on its way when its caller is cancelled; the next decision still reads q = 0 and empties S."""
    found = store()
    async with keeping(found) as at:
        found.faults_of_writes.append(Fault(after_s=1.0))
        asking = asyncio.create_task(at.keeper.write(paused))
        await settle()
        asking.cancel()
        await settle()
        assert at.keeper.view().unknown_write


# Conflicts and requests.


async def test_section_3_a_conflict_is_read_back_and_the_change_is_made_on_what_is_there() -> None:
    found = store()
    async with keeping(found) as at:
        found.faults_of_writes.append(Fault(before=found.edit(configuration_counter=7)))
        await at.keeper.write(paused)
        assert found.record.paused
        assert found.record.configuration_counter == 7


async def test_r12_a_change_is_not_repeated_when_the_grounds_have_changed() -> None:
    found = store()
    async with keeping(found) as at:
        grounds = found.record.grounds()
        found.faults_of_writes.append(Fault(before=found.edit(epoch=Epoch(6), holder=OTHER, voters=frozenset())))
        with pytest.raises(WriteRefused, match="epoch 6, held by a"):
            await at.keeper.write(paused, grounds=grounds)
        assert not found.record.paused


async def test_r12_a_change_is_repeated_after_a_mere_renewal() -> None:
    found = store(held_by_a())
    async with keeping(found) as at:
        grounds = found.record.grounds()
        found.faults_of_writes.append(Fault(before=found.edit(renewals=41)))
        await at.keeper.write(paused, grounds=grounds)
        assert found.record.paused
        assert found.record.renewals == 41


async def test_a_record_that_changes_under_every_try_is_given_up_after_a_few() -> None:
    found = store()
    async with keeping(found) as at:
        at.refusal = "so that nothing but the test writes"
        found.faults_of_writes.extend(Fault(before=found.edit(renewals=100 + each)) for each in range(9))
        with pytest.raises(WriteRefused):
            await at.keeper.write(paused)
        assert len(found.faults_of_writes) == 5


async def test_a_change_that_refuses_writes_nothing() -> None:
    def refuse(_: ClusterRecord) -> ClusterRecord:
        raise ValueError("no")

    async with keeping(store()) as at:
        attempts = len(at.store.attempts)
        with pytest.raises(ValueError, match="no"):
            await at.keeper.write(refuse)
        assert len(at.store.attempts) == attempts


async def test_r1_a_request_that_was_given_up_before_its_turn_is_never_written() -> None:
    found = store()
    async with keeping(found) as at:
        found.faults_of_reads.append(Fault(after_s=1.0))
        reading = asyncio.create_task(at.keeper.read())
        await settle()
        asking = asyncio.create_task(at.keeper.write(paused))
        await settle()
        asking.cancel()
        await reading
        await asyncio.sleep(2 * BEAT_S)
        assert not any(attempt.paused for attempt in found.attempts)


async def test_r1_a_request_that_was_given_up_is_not_tried_again_after_a_conflict() -> None:
    found = store()
    async with keeping(found) as at:
        found.faults_of_writes.append(Fault(after_s=1.0, before=found.edit(configuration_counter=7)))
        asking = asyncio.create_task(at.keeper.write(paused))
        await settle()
        asking.cancel()
        await asyncio.sleep(2 * BEAT_S)
        assert not found.record.paused


async def test_a_read_that_was_asked_for_is_sent_afterwards() -> None:
    found = store(held_by_a())
    async with keeping(found) as at:
        found.put(held_by_a(renewals=1))
        answer = await at.keeper.read()
        assert answer is not None
        assert answer.record.renewals == 1


# Outages.


async def test_a_store_that_is_away_ends_nothing_and_is_asked_again_soon() -> None:
    found = store()
    async with keeping(found) as at:
        granted = len(at.permits)
        found.faults_of_writes.extend(unavailable() for _ in range(8))
        await asyncio.sleep(BEAT_S + 1.0)
        assert at.keeper.last_error is not None
        assert "StoreUnavailable" in at.keeper.last_error
        assert not at.keeper.view().unknown_write
        assert at.keeper.record is not None
        await asyncio.sleep(2.0)
        assert at.keeper.last_error is None
        assert len(at.permits) > granted


async def test_a_read_that_hangs_ends_at_its_deadline_and_the_next_beat_renews() -> None:
    found = store()
    found.faults_of_reads.append(Fault(after_s=3600))
    async with keeping(found) as at:
        await asyncio.sleep(TIMINGS.request_timeout_s + 0.3)
        (permit,) = at.permits
        assert permit.soft_s >= BEGIN_S + TIMINGS.request_timeout_s + TIMINGS.soft_s


async def test_an_error_of_the_store_reaches_who_asked() -> None:
    found = store()
    async with keeping(found) as at:
        found.faults_of_writes.append(unavailable())
        with pytest.raises(StoreUnavailable):
            await at.keeper.write(paused)
        found.faults_of_reads.append(unavailable())
        with pytest.raises(StoreUnavailable):
            await at.keeper.read()


async def test_a_hint_of_the_store_is_followed_at_once() -> None:
    found = store(held_by_a())
    async with keeping(found, None) as at:
        found.put(held_by_a(epoch=Epoch(9)))
        found.hint()
        await settle()
        assert at.keeper.record is not None
        assert at.keeper.record.epoch == 9


async def test_an_instance_that_is_no_member_reads_a_lease_that_nobody_holds_at_every_beat() -> None:
    """Nobody holds it and this instance has no directory: None equals None, and without a hint it never reads again."""
    found = store(record(holder=None))
    async with keeping(found, None) as at:
        found.put(held_by_a(epoch=Epoch(6)))
        await asyncio.sleep(3 * BEAT_S)
        assert at.keeper.record is not None
        assert at.keeper.record.epoch == 6


# Time.


async def test_r12_the_time_that_a_record_is_unchanged_grows_over_successful_reads_only() -> None:
    found = store(held_by_a())
    async with keeping(found) as at:
        await asyncio.sleep(3 * BEAT_S + 0.5)
        assert at.keeper.view().unchanged_for_s == pytest.approx(3 * BEAT_S)
        found.faults_of_reads.extend(unavailable(after_s=0.2) for _ in range(100))
        await asyncio.sleep(4.0)
        assert at.keeper.view().unchanged_for_s == pytest.approx(3 * BEAT_S)
        assert at.keeper.view().read_age_s >= 4.0


async def test_r12_after_a_gap_between_reads_the_time_unchanged_begins_anew() -> None:
    found = store(held_by_a())
    async with keeping(found) as at:
        await asyncio.sleep(3 * BEAT_S + 0.5)
        found.faults_of_reads.extend(unavailable(after_s=0.25) for _ in range(14))
        await asyncio.sleep(9.9)
        view = at.keeper.view()
        assert view.read_age_s <= BEAT_S
        assert view.unchanged_for_s <= 4.0


async def test_r12_a_renewal_of_the_holder_begins_the_time_anew() -> None:
    found = store(held_by_a())
    async with keeping(found) as at:
        await asyncio.sleep(3 * BEAT_S + 0.5)
        found.put(replace(found.record, renewals=1))
        await at.keeper.read()
        assert at.keeper.view().unchanged_for_s == 0.0


async def test_r12_answers_that_cannot_be_read_do_not_count_as_reads_of_the_same_record() -> None:
    """Nobody can renew what is unreadable; when it is readable again its holder needs the time of one renewal."""
    found = store(held_by_a())
    async with keeping(found) as at:
        before = found.stored
        found.stored, found.unreadable = None, "v-garbage"
        await asyncio.sleep(2 * TIMINGS.lease_duration_s)
        found.stored, found.unreadable = before, None
        await at.keeper.read()
        assert at.keeper.view().unchanged_for_s < TIMINGS.lease_duration_s / 2


# Damage.


async def test_r3_what_cannot_be_read_is_damaged_and_nothing_is_written_over_it() -> None:
    found = store()
    async with keeping(found) as at:
        found.damage()
        await at.keeper.read()
        assert at.keeper.view().damage is not None
        attempts, granted = len(found.attempts), len(at.permits)
        with pytest.raises(WriteRefused):
            await at.keeper.write(paused)
        await asyncio.sleep(3 * BEAT_S)
        assert len(found.attempts) == attempts
        assert len(at.permits) == granted


async def test_r3_an_unreadable_record_is_repaired_by_the_version_it_was_seen_with() -> None:
    found = store()
    async with keeping(found) as at:
        found.damage()
        await at.keeper.read()
        judged = at.keeper.damaged_version
        stored = await at.keeper.repair(record(epoch=Epoch(6)), judged)
        assert found.record.epoch == 6
        assert stored.record == found.record
        assert at.keeper.view().damage is None


async def test_r3_a_damage_that_somebody_else_has_repaired_meanwhile_stays_repaired() -> None:
    found = store()
    async with keeping(found) as at:
        found.damage()
        await at.keeper.read()
        judged = at.keeper.damaged_version
        found.put(held_by_a(epoch=Epoch(8)))
        with pytest.raises(Conflict):
            await at.keeper.repair(record(epoch=Epoch(6)), judged)
        assert found.record.epoch == 8


async def test_r3_a_repair_never_replaces_a_newer_version_that_was_read_after_the_damage_was_judged() -> None:
    """Judged on the damage; a beat reads the operator's restored record before the request's turn comes."""
    found = store()
    async with keeping(found) as at:
        found.damage()
        await at.keeper.read()
        assert at.keeper.view().damage is not None
        judged = at.keeper.damaged_version
        found.faults_of_reads.append(Fault(after_s=0.5, before=lambda: found.put(held_by_a(epoch=Epoch(8)))))
        reading = asyncio.create_task(at.keeper.read())
        await settle()
        with pytest.raises((Conflict, WriteRefused)):
            await at.keeper.repair(record(epoch=Epoch(6)), judged)
        await reading
        assert found.record.epoch == 8


async def test_r3_a_missing_lease_of_a_cluster_with_data_is_damaged_and_not_renewed() -> None:
    found = store()
    async with keeping(found) as at:
        found.put(None)
        await asyncio.sleep(3 * BEAT_S)
        assert at.keeper.view().damage is not None
        assert found.stored is None


async def test_the_first_record_is_created_where_there_is_none() -> None:
    found = MemoryCoordination()
    at = Keeping(found, HOLDER)
    async with at:
        assert at.keeper.view().damage is None
        await at.keeper.create(record(epoch=Epoch(1)))
        assert found.record.epoch == 1
        assert len(at.permits) == 1
        assert not at.keeper.view().unknown_write


async def test_who_was_slower_to_create_the_first_record_gets_a_conflict() -> None:
    found = MemoryCoordination()
    async with Keeping(found, HOLDER) as at:
        found.put(held_by_a())
        with pytest.raises(Conflict):
            await at.keeper.create(record(epoch=Epoch(1)))
        assert found.record.holder == OTHER


async def test_section_3_a_first_record_never_replaces_one_that_was_read_meanwhile() -> None:
    """Two instances begin a cluster: one creates the Lease while the other's own creation waits for its turn."""
    found = MemoryCoordination()
    async with Keeping(found, HOLDER) as at:
        found.faults_of_reads.append(Fault(after_s=0.5, before=lambda: found.put(held_by_a())))
        reading = asyncio.create_task(at.keeper.read())
        await settle()
        with pytest.raises((Conflict, WriteRefused)):
            await at.keeper.create(record(epoch=Epoch(1), holder=HOLDER))
        await reading
        assert found.record.holder == OTHER
