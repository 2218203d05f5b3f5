"""Voter and candidate: what is on the volume before anything is done, and what a promise and a takeover stand on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_builders import HOLDER, OTHER, A, B, P, end, record, taken_by_a
from agent_fakes import Fault, settle, unknown
from agent_instance import Instance

from instance_manager.agent.context import OperationFailed
from instance_manager.agent.elections import Elections
from instance_manager.agent.lease_keeper import WriteRefused
from instance_manager.agent.rejoining import Rejoining
from instance_manager.agent.volume import VolumeUnusable
from instance_manager.codec import from_json
from instance_manager.core.archive_state import GAP
from instance_manager.core.election import VoteAnswer
from instance_manager.core.record import ClusterRecord
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch, Timeline
from instance_manager.core.voting import ExtensionRequest, VolumeState, VoteRequest
from instance_manager.postgres.server import LocalPostgresError


def request(**changes: Any) -> VoteRequest:
    base = VoteRequest(cluster_uid="uid-1", candidate=A, epoch=Epoch(6), record_epoch=Epoch(5), end=end(200))
    return replace(base, **changes)


def granted(name: str, lsn: int | None = 200, **changes: Any) -> VoteAnswer:
    base = VoteAnswer(
        voter={"a": A, "b": B}[name],
        granted=True,
        reason="",
        highest_epoch=Epoch(5),
        end=None if lsn is None else end(lsn),
    )
    return replace(base, **changes)


class Voter(Instance):
    def __init__(self, directory: Path, name: str = "b", found: ClusterRecord | None = None) -> None:
        super().__init__(directory, name, found if found is not None else record())
        self.context.suspects = "p refuses connections"
        self.elections = Elections(self.context)
        self.rejoining = Rejoining(self.context)

    def votes(self, name: str, pre_vote: VoteAnswer, promise: VoteAnswer | None = None) -> None:
        self.caller.on(name, "pre_vote", pre_vote)
        if promise is not None:
            self.caller.on(name, "promise", promise)

    def asked(self, call: str) -> list[VoteRequest]:
        return [from_json(body, VoteRequest) for _, each, body in self.caller.calls if each == call]


# The voter's side.


async def test_p2_a_promise_is_persisted_before_the_voter_stops_to_follow(tmp_path: Path) -> None:
    async with Voter(tmp_path) as b:
        b.database.at = end(190)
        answer = await b.elections.answer_promise(request())
        assert answer.granted
        assert answer.end == end(190)
        assert b.events == ["volume", "stop following"]
        assert (b.volume.state.promised_epoch, b.volume.state.promised_to) == (6, A)


@pytest.mark.parametrize("error", [LocalPostgresError("a walreceiver still runs"), OperationFailed("busy")])
async def test_r5_a_promise_that_cannot_be_proven_is_not_yet_but_stays_promised(
    tmp_path: Path, error: Exception
) -> None:
    async def fail() -> None:
        raise error

    async with Voter(tmp_path) as b:
        b.database.on["stop following"] = fail
        answer = await b.elections.answer_promise(request())
        assert (answer.granted, answer.end) == (False, None)
        assert answer.reason.startswith("not yet")
        assert b.volume.state.promised_epoch == 6
        b.database.on.clear()
        assert (await b.elections.answer_promise(request())).granted


async def test_p4_a_log_outside_the_history_makes_no_promise(tmp_path: Path) -> None:
    async with Voter(tmp_path) as b:
        b.database.at = end(300, timeline=1)
        answer = await b.elections.answer_promise(request())
        assert not answer.granted
        assert "no rank" in answer.reason


async def test_p6_a_promise_that_cannot_be_persisted_is_not_made(tmp_path: Path) -> None:
    async with Voter(tmp_path) as b:
        (tmp_path / "volume.json").mkdir()
        with pytest.raises(VolumeUnusable):
            await b.elections.answer_promise(request())
        assert "stop following" not in b.events
        assert b.volume.state.promised_epoch == 5


async def test_r12_a_pre_vote_reads_the_lease_and_persists_nothing(tmp_path: Path) -> None:
    async with Voter(tmp_path) as b:
        reads = b.store.reads
        answer = await b.elections.answer_pre_vote(request())
        assert answer.granted
        assert b.store.reads == reads + 1
        assert b.events == []


async def test_section_4_a_voter_that_suspects_nobody_persists_nothing(tmp_path: Path) -> None:
    async with Voter(tmp_path) as b:
        b.context.suspects = None
        assert not (await b.elections.answer_promise(request())).granted
        assert b.events == []


async def test_section_4_two_candidates_of_one_epoch_get_one_promise(tmp_path: Path) -> None:
    async with Voter(tmp_path) as b:
        made = await asyncio.gather(
            b.elections.answer_promise(request()),
            b.elections.answer_promise(request(candidate=B)),
            return_exceptions=True,
        )
        assert sum(isinstance(each, VoteAnswer) and each.granted for each in made) == 1


async def test_section_4_who_is_about_to_follow_an_earlier_primary_does_not_once_it_has_promised(
    tmp_path: Path,
) -> None:
    async with Voter(tmp_path) as b:
        go_on = asyncio.Event()

        async def wait() -> None:
            await go_on.wait()

        b.database.on["stop following"] = wait
        promise = asyncio.create_task(b.elections.answer_promise(request()))
        await settle()
        follow = asyncio.create_task(b.rejoining.follow())
        await settle()
        go_on.set()
        assert (await promise).granted
        with pytest.raises((OperationFailed, ValueError)):
            await follow
        assert "follow" not in b.events


async def test_section_4_a_promise_waits_until_following_has_begun_and_stops_it(tmp_path: Path) -> None:
    async with Voter(tmp_path) as b:
        go_on = asyncio.Event()

        async def wait() -> None:
            await go_on.wait()

        b.database.on["follow"] = wait
        follow = asyncio.create_task(b.rejoining.follow())
        await settle()
        promise = asyncio.create_task(b.elections.answer_promise(request()))
        await settle()
        go_on.set()
        await follow
        assert (await promise).granted
        assert [each for each in b.events if each != "volume"] == ["follow", "stop following"]


async def test_r5_following_is_a_promise_that_is_persisted_before(tmp_path: Path) -> None:
    async with Voter(tmp_path, found=taken_by_a(chain=record().chain)) as b:
        await b.rejoining.follow()
        assert b.events == ["volume", "follow"]
        assert (b.volume.state.promised_epoch, b.volume.state.promised_to) == (6, A)


async def test_r11_an_extension_binds_on_disk_before_it_is_answered(tmp_path: Path) -> None:
    async with Voter(tmp_path) as b:
        asked = ExtensionRequest(cluster_uid="uid-1", holder=P, epoch=Epoch(5), duration_s=10.0)
        assert (await b.elections.answer_extension(asked)).granted
        assert b.events == ["volume"]
        assert b.volume.state.extension_until_s == pytest.approx(b.clock.now_s() + 10)
        assert not (await b.elections.answer_promise(request())).granted
        await asyncio.sleep(10.1)
        await b.keeper.read()
        assert (await b.elections.answer_promise(request())).granted


async def test_r11_an_instance_that_has_just_bound_itself_does_not_promise_itself(tmp_path: Path) -> None:
    """Its candidacy is judged while its extension, judged before, is still on its way to the disk."""
    async with Voter(tmp_path, "a", record(voters=frozenset({A}))) as a:
        asked = ExtensionRequest(cluster_uid="uid-1", holder=P, epoch=Epoch(5), duration_s=10.0)
        async with a.volume._turn:
            extension = asyncio.create_task(a.elections.answer_extension(asked))
            await settle()
            standing = asyncio.create_task(a.elections.stand("p is silent"))
            await settle()
        verdict = await extension
        with pytest.raises((OperationFailed, ValueError)):
            await standing
        assert verdict.granted
        assert a.record.holder is not None
        assert a.record.holder.member_id == P


# The candidate's side.


async def test_section_4_the_takeover_is_written_on_the_grounds_of_its_promises(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b"), granted("b"))
        await a.elections.stand("p refuses connections")
        assert (a.record.holder, a.record.epoch) == (OTHER, 6)
        assert (a.record.voters, a.record.quorum) == (frozenset({B}), 1)
        assert a.record.highest_timeline == 3
        assert a.events == ["volume", "stop following", "record"]
        assert a.volume.state.highest_epoch == 6


async def test_r12_the_epoch_asked_for_is_above_every_answers(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b", highest_epoch=Epoch(11)), granted("b"))
        await a.elections.stand("p refuses connections")
        assert [each.epoch for each in a.asked("promise")] == [12]
        assert a.record.epoch == 12


async def test_r12_a_candidate_that_cannot_win_promises_nothing_and_asks_for_no_promise(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b", granted=False, reason="I do not suspect the primary"))
        await a.elections.stand("p refuses connections")
        assert a.asked("promise") == []
        assert a.events == []
        assert a.record.epoch == 5
        assert a.context.stand_again_s > a.clock.now_s()


async def test_r12_a_better_voter_is_told_to_stand(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b", 210))
        await a.elections.stand("p refuses connections")
        assert ("b", "nudge") in [(name, call) for name, call, _ in a.caller.calls]
        assert a.record.epoch == 5


async def test_section_4_a_promiser_that_turns_out_ahead_is_not_passed_over(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b", 200), granted("b", 208))
        await a.elections.stand("p refuses connections")
        assert a.record.epoch == 5
        assert not a.context.takeover_open


@pytest.mark.parametrize("promise", [granted("b", None), granted("b", granted=False, reason="not yet: busy")])
async def test_r5_a_promise_without_a_proven_end_does_not_elect(tmp_path: Path, promise: VoteAnswer) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b"), promise)
        await a.elections.stand("p refuses connections")
        assert a.record.epoch == 5


async def test_section_4_a_candidate_that_cannot_promise_itself_takes_nothing(tmp_path: Path) -> None:
    async def fail() -> None:
        raise LocalPostgresError("a walreceiver still runs")

    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b"), granted("b"))
        a.database.on["stop following"] = fail
        with pytest.raises(OperationFailed):
            await a.elections.stand("p refuses connections")
        assert a.record.epoch == 5
        assert not a.context.takeover_open


async def test_r12_a_takeover_is_repeated_after_a_mere_renewal_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b"), granted("b"))
        a.store.faults_of_writes.append(Fault(before=a.store.edit(renewals=17)))
        await a.elections.stand("p refuses connections")
        assert (a.record.holder, a.record.renewals) == (OTHER, 0)


@pytest.mark.parametrize(
    "changes", [{"voters": frozenset({A})}, {"quorum": 2}, {"epoch": Epoch(6)}, {"configuration_counter": 1}]
)
async def test_r12_a_takeover_is_not_written_when_what_its_promises_stood_on_has_changed(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b"), granted("b"))
        a.store.faults_of_writes.append(Fault(before=a.store.edit(**changes)))
        with pytest.raises((WriteRefused, OperationFailed)):
            await a.elections.stand("p refuses connections")
        assert a.record.holder is not None
        assert a.record.holder.member_id == P
        assert not a.context.takeover_open


async def test_r1_a_takeover_with_an_unknown_outcome_is_not_won_by_reading_it(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b"), granted("b"))
        a.store.faults_of_writes.append(unknown(lands_after_s=0.1))
        with pytest.raises(OperationFailed):
            await a.elections.stand("p refuses connections")
        await asyncio.sleep(0.2)
        await a.keeper.read()
        assert a.context.holds_lease
        assert a.keeping.permits == []
        assert a.keeper.view().unknown_write
        await asyncio.sleep(2.1)
        assert len(a.keeping.permits) >= 1
        assert not a.keeper.view().unknown_write


async def test_section_4_no_promise_elects_in_a_record_that_changed_before_it_was_asked(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        a.votes("b", granted("b"), granted("b"))
        a.store.put(record(quorum=0))
        await a.elections.stand("p refuses connections")
        assert a.record == record(quorum=0)


async def test_time_never_elects_in_a_synchronous_cluster(tmp_path: Path) -> None:
    async with Voter(tmp_path, "a") as a:
        with pytest.raises(OperationFailed, match="only promises elect"):
            await a.elections.take_by_time("p is silent")
        assert a.record.epoch == 5


# Beginning a cluster.


async def test_a_gap_that_a_first_recovery_meets_is_told_at_once_and_once(tmp_path: Path) -> None:
    """It is tried again for an hour; whoever could put the segment back is to know before."""
    empty = record(system_identifier=None, chain=None, voters=frozenset(), quorum=0)
    async with Voter(tmp_path, "p", replace(empty, highest_timeline=Timeline(0), position=None, opened=False)) as p:
        p.context.role = Role.STARTING
        p.database.recovery_says = ["8 MiB restored", f"{GAP}: 00 is missing", f"waiting: {GAP}"]
        shown: list[str | None] = []
        say = p.rejoining._recovering

        def and_look(text: str) -> None:
            say(text)
            shown.append(p.context.operation)

        p.rejoining._recovering = and_look  # type: ignore[method-assign]
        await p.rejoining.initialise()
        assert shown[0] == "recovering from an archive: 8 MiB restored"
        told = [line.reason for line in p.context.journal.lines() if line.decision == "archive gap"]
        assert told == [f"{GAP}: 00 is missing"]


async def test_section_3_a_slow_first_holder_does_not_initialise_the_record_of_another(tmp_path: Path) -> None:
    """Frozen during initdb; another began again with the empty cluster; then this one's system identifier is written."""
    empty = record(epoch=Epoch(1), holder=OTHER, system_identifier=None, chain=None, voters=frozenset(), quorum=0)
    first = replace(empty, highest_timeline=Timeline(0), position=None, opened=False)
    async with Voter(tmp_path, "a", first) as a:
        other = replace(first, epoch=Epoch(2), holder=HOLDER)

        async def begin_again() -> None:
            a.store.put(other)

        a.volume.state = VolumeState(member_id=A)
        a.database.on["initdb"] = begin_again
        with pytest.raises((WriteRefused, OperationFailed, ValueError)):
            await a.rejoining.initialise()
        assert a.record == other
