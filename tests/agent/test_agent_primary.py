"""The primary's steps: what is on the volume, in Postgres and in the record, in which order, whoever is faster meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_builders import OTHER, A, B, end, record, taken_by_a
from agent_fakes import Fault, settle, unknown
from agent_instance import Instance

from instance_manager.agent.context import OperationFailed
from instance_manager.agent.giving_up import GivingUp
from instance_manager.agent.lease_keeper import WriteRefused
from instance_manager.agent.primary import PrimaryDuties
from instance_manager.core.quorum import ALONE, SynchronousSet
from instance_manager.core.record import ClusterRecord
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch
from instance_manager.ports import OutcomeUnknown

BOTH = SynchronousSet(1, frozenset({A, B}))


class Primary(Instance):
    """`p` serves; `a` and `b` stream unless a test says otherwise."""

    def __init__(self, directory: Path, found: ClusterRecord, told: SynchronousSet = BOTH, **options: Any) -> None:
        super().__init__(directory, "p", found, **options)
        self.volume.state = replace(self.volume.state, last_record=found)
        self.knows("a", "b")
        self.database.senders = {A: 0, B: 0}
        self.context.synchronous, self.context.synchronous_confirmed = told, True
        self.duties = PrimaryDuties(self.context)
        self.giving_up = GivingUp(self.context, self.duties)
        self.steps: list[str] = []

    async def serve(self, times: int = 1) -> list[str]:
        """What happened, renewals left out."""
        self.events.clear()
        for _ in range(times):
            await self.duties.serve()
        return list(self.events)

    async def looks(self, for_s: float) -> None:
        for _ in range(int(for_s / 0.5)):
            await asyncio.sleep(0.5)
            self.duties.look()
        self.events.clear()

    def meanwhile(self, found: ClusterRecord) -> Callable[[], Awaitable[None]]:
        async def change() -> None:
            self.store.put(found)

        return change


async def test_r3_what_an_agent_before_this_one_wrote_is_remembered_before_it_is_acted_on(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(voters=frozenset(), quorum=0), told=BOTH) as p:
        # It was killed between the write of q = 0 and its note of it: a repair would bring back the old voters.
        alone = record(voters=frozenset(), quorum=0)
        p.volume.state = replace(p.volume.state, last_record=record(), intended_record=alone)
        await p.looks(2.5)
        assert (await p.serve())[0] == "volume"
        assert p.volume.state.remembers(p.record)


async def test_r13_what_the_takeover_found_is_forgotten_before_a_client_is_let_in(tmp_path: Path) -> None:
    """A repair of the Lease may bring back a record that says "never opened": nothing acknowledged is given back by it."""
    async with Primary(tmp_path, record(opened=False)) as p:
        p.volume.state = p.volume.state.taking(record(), Epoch(5))
        p.context.gate_open = False
        p.context.role = Role.PROMOTING
        assert (await p.serve())[:4] == ["barrier", "volume", "record", "open gate"]
        assert p.volume.state.took is None
        assert p.record.opened


async def test_section_4_a_settled_primary_writes_nothing(tmp_path: Path) -> None:
    async with Primary(tmp_path, record()) as p:
        await p.looks(2)
        assert await p.serve(3) == []


async def test_section_4_r3_a_voter_is_added_on_the_volume_in_the_record_and_then_in_postgres(tmp_path: Path) -> None:
    only_a = SynchronousSet(1, frozenset({A}))
    async with Primary(tmp_path, record(voters=frozenset({A})), only_a) as p:
        await p.looks(1.9)
        assert await p.serve() == ["volume", "record", "volume"]
        assert p.record.voters == {A, B}
        assert p.database.set == []
        assert await p.serve() == ["synchronous"]
        assert p.database.set == [BOTH]


async def test_section_4_r3_a_lost_voter_is_dropped_from_postgres_behind_the_barrier_and_from_the_record_last(
    tmp_path: Path,
) -> None:
    async with Primary(tmp_path, record()) as p:
        await p.looks(2)
        del p.database.senders[B]
        await p.looks(3)
        assert await p.serve() == ["synchronous"]
        assert p.database.set == [SynchronousSet(1, frozenset({A}))]
        assert p.record.voters == {A, B}
        assert await p.serve() == ["barrier", "volume", "record", "volume"]
        assert p.record.voters == {A}


async def test_a_barrier_waits_no_longer_for_a_standby_that_is_lost_as_well(tmp_path: Path) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async with Primary(tmp_path, record()) as p:
        await p.looks(2)
        del p.database.senders[B]
        await p.looks(0.5)
        del p.database.senders[A]
        await p.looks(2)
        assert await p.serve() == ["synchronous"]
        assert p.database.set == [SynchronousSet(1, frozenset({A}))]
        p.database.on["barrier"] = never
        waiting = asyncio.create_task(p.duties.serve())
        await p.looks(1)
        assert waiting.done()
        assert p.record.voters == {A, B}
        assert await p.serve() == ["volume", "record", "volume"]
        assert p.record.quorum == 0


async def test_section_4_q_is_raised_behind_the_barrier_only(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(quorum=0)) as p:
        await p.looks(1.9)
        assert await p.serve() == ["barrier", "volume", "record", "volume"]
        assert p.record.quorum == 1


async def test_section_4_q_is_lowered_in_the_record_before_commits_stop_waiting(tmp_path: Path) -> None:
    async with Primary(tmp_path, record()) as p:
        await p.looks(2)
        p.database.senders.clear()
        await p.looks(3)
        assert await p.serve() == ["volume", "record", "volume"]
        assert p.record.quorum == 0
        assert await p.serve() == ["synchronous"]
        assert p.database.set == [ALONE]


async def test_section_4_a_barrier_that_is_not_reached_records_nothing(tmp_path: Path) -> None:
    async def late() -> None:
        raise OperationFailed("a does not reach the mark")

    async with Primary(tmp_path, record(quorum=0)) as p:
        await p.looks(1.9)
        p.database.on["barrier"] = late
        with pytest.raises(OperationFailed):
            await p.serve()
        assert p.events == []
        assert p.record.quorum == 0


async def test_p5_a_list_that_postgres_did_not_confirm_is_told_again_and_nothing_is_recorded(tmp_path: Path) -> None:
    async def late() -> None:
        raise OperationFailed("a walsender still runs on the old list")

    async with Primary(tmp_path, record()) as p:
        await p.looks(2)
        del p.database.senders[B]
        await p.looks(3)
        p.database.on["synchronous"] = late
        with pytest.raises(OperationFailed):
            await p.serve()
        assert not p.context.synchronous_confirmed
        p.database.on.clear()
        assert await p.serve() == ["synchronous"]
        assert p.record.voters == {A, B}


async def test_r1_after_an_unknown_write_nothing_is_told_to_postgres_before_a_write_of_our_own(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(quorum=0)) as p:
        await p.looks(1.9)
        p.store.faults_of_writes.append(unknown(lands_after_s=1.0))
        with pytest.raises(OutcomeUnknown):
            await p.serve()
        p.database.senders.clear()
        p.keeping.refusal = "so that nothing but the test writes"
        await p.looks(5)
        assert await p.serve(3) == []
        p.keeping.refusal = None
        await asyncio.sleep(2.1)
        # What the late write has left there is noted first (R3).
        assert await p.serve() == ["volume", "volume", "record", "volume"]
        assert (p.record.quorum, p.database.set) == (0, [])


async def test_r3_the_intention_of_an_unknown_write_stays_on_the_volume(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(quorum=0)) as p:
        await p.looks(1.9)
        p.store.faults_of_writes.append(unknown())
        with pytest.raises(OutcomeUnknown):
            await p.serve()
        state = p.volume.state
        assert state.last_record is not None
        assert state.intended_record is not None
        assert (state.last_record.quorum, state.intended_record.quorum) == (0, 1)
        assert p.keeper.view().damage is None


async def test_r12_a_step_that_was_decided_on_another_record_is_not_written(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(quorum=0)) as p:
        await p.looks(1.9)
        p.database.on["barrier"] = p.meanwhile(taken_by_a())
        with pytest.raises(WriteRefused):
            await p.serve()
        assert p.record == taken_by_a()


async def test_r3_a_primary_that_serves_by_a_damaged_lease_raises_and_lowers_nothing_by_it(tmp_path: Path) -> None:
    """The Lease is restored from before the voters were dropped; the primary goes on, until its permit ends, unchanged."""
    only_a = record(voters=frozenset({A}))
    async with Primary(tmp_path, only_a, SynchronousSet(1, frozenset({A}))) as p:
        await p.volume.save(lambda state: state.writing(only_a, None))
        p.store.put(record(quorum=0))
        await p.keeper.read()
        assert p.keeper.view().damage is not None
        await p.looks(1.9)
        assert await p.serve() == []


# R8: the mode.


async def test_r8_the_change_to_synchronous_goes_through_q_zero_and_waits_a_lease_duration(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(mode="asynchronous", quorum=0), ALONE) as p:
        await p.looks(1.9)
        assert await p.serve() == ["volume", "record", "volume"]
        assert (p.record.mode, p.record.quorum) == ("synchronous", 0)
        await p.looks(9.5)
        assert "record" not in await p.serve()
        assert p.record.quorum == 0
        assert p.duties.quorum_state.startswith("waiting one lease duration")
        # Not just when a renewal is on its way: then nothing else is begun.
        await p.looks(1.5)
        await p.serve(3)
        assert p.record.quorum == 1


async def test_r8_the_wait_is_kept_when_the_change_to_synchronous_had_an_unknown_outcome(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(mode="asynchronous", quorum=0), ALONE) as p:
        await p.looks(1.9)
        p.store.faults_of_writes.append(unknown(lands_after_s=0.0))
        with pytest.raises(OutcomeUnknown):
            await p.serve()
        await p.looks(3)
        await p.serve(3)
        assert p.record.mode == "synchronous"
        assert p.record.quorum == 0


async def test_r8_r3_the_holders_own_change_of_the_mode_is_no_damage(tmp_path: Path) -> None:
    """q goes to 0 without the intention on the volume: the holder takes its own write for a restored Lease."""
    async with Primary(tmp_path, record(), durability="asynchronous") as p:
        await p.volume.save(lambda state: state.writing(record(), None))
        await p.serve()
        assert (p.record.mode, p.record.quorum) == ("asynchronous", 0)
        assert p.keeper.view().damage is None


async def test_r8_a_deposed_primary_does_not_change_the_mode_of_its_successor(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(), durability="asynchronous") as p:
        p.store.faults_of_writes.append(Fault(before=lambda: p.store.put(taken_by_a())))
        with pytest.raises(WriteRefused):
            await p.serve()
        assert p.record == taken_by_a()


# Giving up.


async def test_p12_r3_a_hand_over_stops_first_revokes_remembers_and_only_then_releases(tmp_path: Path) -> None:
    async with Primary(tmp_path, record()) as p:
        await p.looks(2)
        p.caller.ends_at("a", end(200))
        p.caller.ends_at("b", end(200))
        await p.giving_up.hand_over("shutdown was asked for")
        assert p.events == ["checkpoint", "stop", "revoke", "volume", "record"]
        release = p.record.release
        assert release is not None
        assert (p.record.holder, release.end, release.releaser) == (None, end(200), p.member_id)
        assert release.target in {A, B}
        assert p.record.voters == {A, B}


async def test_p12_a_target_that_does_not_hold_the_end_is_not_named(tmp_path: Path) -> None:
    async with Primary(tmp_path, record()) as p:
        await p.looks(2)
        p.caller.ends_at("a", end(190))
        p.caller.ends_at("b", end(190))
        await p.giving_up.hand_over("shutdown was asked for")
        release = p.record.release
        assert release is not None
        assert release.target == p.member_id
        assert p.record.voters == frozenset()


async def test_r4_a_hand_over_never_releases_the_lease_of_a_successor(tmp_path: Path) -> None:
    """Cut off while it stops, `p` is replaced by `a`; cut off no more, it stamps `a`'s Lease with its own end, takes that
    release without any promise, and everything that `a` has acknowledged is lost."""
    async with Primary(tmp_path, record()) as p:
        await p.looks(2)
        p.database.on["stop"] = p.meanwhile(taken_by_a())
        with pytest.raises((WriteRefused, OperationFailed, ValueError)):
            await p.giving_up.hand_over("shutdown was asked for")
        assert p.record.holder == OTHER
        assert p.record.release is None


async def test_r12_a_primary_reaffirms_only_if_q_voters_would_follow_and_then_above_all_epochs(tmp_path: Path) -> None:
    async with Primary(tmp_path, record()) as p:
        with pytest.raises(OperationFailed, match="0 of 1 voters"):
            await p.duties.reaffirm("b promised 8")
        assert p.record.epoch == 5
        p.caller.ends_at("b", end(200), highest_epoch=Epoch(8))
        await p.duties.reaffirm("b promised 8")
        assert p.record.epoch == 9
        assert p.volume.state.last_record == replace(p.record)


async def test_r12_a_primary_reaffirms_above_what_one_that_is_no_voter_promised(tmp_path: Path) -> None:
    """Alone it has no voters to ask, and who promised a later epoch follows nobody of an earlier."""
    async with Primary(tmp_path, record(voters=frozenset(), quorum=0)) as p:
        p.knows("b", promised_epoch=Epoch(19))
        await p.duties.reaffirm("b promised 19")
        assert p.record.epoch == 20


async def test_p5_a_server_that_starts_although_nobody_answered_has_confirmed_nothing(tmp_path: Path) -> None:
    async with Primary(tmp_path, record(quorum=0, voters=frozenset())) as p:
        p.context.synchronous_confirmed = True
        p.database.running = p.database.running_read_write = False
        p.database.on["start primary"] = nobody_answers
        with pytest.raises(OperationFailed, match="nobody answered"):
            await p.duties.resume()
        assert p.events[-1] != "start primary"
        assert not p.context.synchronous_confirmed


async def nobody_answers() -> None:
    raise OperationFailed("nobody answered")


async def test_r12_the_pauses_between_reaffirmations_double(tmp_path: Path) -> None:
    async with Primary(tmp_path, record()) as p:
        pauses = []
        for _ in range(6):
            began_s = p.clock.now_s()
            with pytest.raises(OperationFailed):
                await p.duties.reaffirm("b promised 8")
            pauses.append(p.context.reaffirm_again_s - began_s)
        assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 8])


async def test_a_cancelled_step_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async with Primary(tmp_path, record(quorum=0)) as p:
        await p.looks(1.9)
        p.database.on["barrier"] = never
        step = asyncio.create_task(p.duties.serve())
        await settle()
        step.cancel()
        await asyncio.sleep(3)
        assert p.record.quorum == 0
