"""How a standby starts and follows: by which record, and what it does about a history that is none of the cluster's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from agent_builders import CHAIN, A, B, P, end, held_by_a, holder, record, taken_by_a
from agent_instance import Instance

from instance_manager.agent.agent import Agent
from instance_manager.agent.context import OperationFailed
from instance_manager.agent.health import Health
from instance_manager.agent.own_verbs import reinitialise
from instance_manager.agent.recovering import NotMade
from instance_manager.agent.rejoining import Rejoining
from instance_manager.config_sections import ArchiveSection, BootstrapSection, ReplicasFrom
from instance_manager.core.decide import Decision
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch, Timeline
from instance_manager.core.voting import VolumeState
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.postgres.source_questions import SourceNotReady


class Standby(Instance):
    """`a` has Postgres as a standby here; what `p` or another does is in the record."""

    def __init__(self, directory: Path, found: ClusterRecord) -> None:
        super().__init__(directory, "a", found)
        self.context.role = Role.STANDBY
        self.rejoining = Rejoining(self.context)

    async def remembers(self, change: Callable[[VolumeState], VolumeState]) -> None:
        await self.volume.save(change)
        self.events.clear()


# A dead end: a history that a promotion left behind which was cut off before its first record.


async def test_p4_a_standby_that_receives_nothing_over_a_dead_end_is_restarted_to_follow(tmp_path: Path) -> None:
    async with Standby(tmp_path, record()) as a:
        a.database.left = (Timeline(3),)
        await a.rejoining.follow()
        assert a.events == ["stop", "volume", "start standby"]
        ((upstream, chain),) = a.database.started
        assert upstream is not None
        assert (upstream.holder, upstream.epoch, upstream.member_id) == (P, 5, A)
        # By the history the start knows which to forget.
        assert chain == CHAIN
        assert a.context.role is Role.STANDBY


async def test_p4_a_standby_that_does_not_stop_in_time_is_killed_and_started_past_its_dead_end(tmp_path: Path) -> None:
    async with Standby(tmp_path, record()) as a:
        a.database.left = (Timeline(3),)
        a.database.stops = False
        await a.rejoining.follow()
        assert a.events == ["stop", "kill", "volume", "start standby"]


async def test_p4_a_standby_that_receives_is_not_restarted_whatever_histories_are_left_there(tmp_path: Path) -> None:
    async with Standby(tmp_path, record()) as a:
        a.database.left = (Timeline(3),)
        # From the same primary, under an earlier epoch of it.
        a.database.receiving, a.database.following = True, (P, Epoch(4))
        await a.rejoining.follow()
        assert a.events == ["volume", "follow"]
        assert a.database.started == []


async def test_p4_a_standby_without_a_dead_end_is_told_to_follow_where_it_runs(tmp_path: Path) -> None:
    async with Standby(tmp_path, record()) as a:
        await a.rejoining.follow()
        assert a.events == ["volume", "follow"]
        assert a.database.started == []


async def test_p4_r5_who_promises_a_later_epoch_while_it_stops_is_not_started_to_follow_the_earlier(
    tmp_path: Path,
) -> None:
    async with Standby(tmp_path, record()) as a:

        async def promise() -> None:
            await a.volume.save(lambda state: state.promising(Epoch(6), B))

        a.database.left = (Timeline(3),)
        a.database.on["stop"] = promise
        with pytest.raises(ValueError, match="promised epoch 6"):
            await a.rejoining.follow()
        assert a.database.started == []
        assert a.volume.state.promised_epoch == 6


# A start that follows nobody yet.


async def test_r3_a_standby_is_started_by_the_later_of_the_lease_and_what_its_volume_remembers(tmp_path: Path) -> None:
    """A Lease that was put back knows less of the history than this log may have, and would tell of a shorter one."""
    later = taken_by_a()
    async with Standby(tmp_path, record()) as a:
        await a.remembers(lambda state: state.saw_record(later))
        await a.rejoining.start_standby("the Lease is damaged")
        assert a.database.judged_by == [later.chain]
    async with Standby(tmp_path, later) as a:
        await a.remembers(lambda state: replace(state, known_record=record()))
        await a.rejoining.start_standby("a standby may serve reads")
        assert a.database.judged_by == [later.chain]


async def test_r3_a_standby_is_started_by_what_its_volume_remembers_when_the_lease_is_gone(tmp_path: Path) -> None:
    async with Standby(tmp_path, record()) as a:
        await a.remembers(lambda state: state.saw_record(taken_by_a()))
        a.store.put(None)
        await a.keeper.read()
        await a.rejoining.start_standby("the Lease is gone")
        assert a.database.judged_by == [taken_by_a().chain]
        assert a.database.started == [(None, None)]
        assert a.volume.state.starts == 1


@pytest.mark.parametrize(
    ("facts", "reason"),
    [({"at": None}, "the end of its log cannot be told"), ({"needs": end(300)}, "must receive up to 2:0/12C")],
    ids=["its end cannot be told", "recovery needs more than there is"],
)
async def test_r5_a_standby_is_not_started_to_follow_nobody_when(
    tmp_path: Path, facts: dict[str, Any], reason: str
) -> None:
    async with Standby(tmp_path, record()) as a:
        for name, value in facts.items():
            setattr(a.database, name, value)
        with pytest.raises(OperationFailed, match=reason):
            await a.rejoining.start_standby("a standby may serve reads")
        assert (a.events, a.database.started, a.volume.state.starts) == ([], [], 0)


# A clone that somebody asks for.


class Reinitialised(Standby):
    def __init__(self, directory: Path, found: ClusterRecord) -> None:
        super().__init__(directory, found)
        self.caller.on("p", "nudge", True)
        self.caller.on("b", "nudge", True)
        self.agent = Agent(self.context)


@pytest.mark.parametrize(
    "found",
    [holder(A, "a-life-1"), holder(A, "a-life-0"), None],
    ids=["it holds the Lease", "an earlier life of it holds the Lease", "nobody holds the Lease"],
)
async def test_r6_r16_a_directory_is_not_cloned_anew_when(tmp_path: Path, found: Holder | None) -> None:
    """Whatever the holder's log has that no other has would be gone with it."""
    before = record(holder=found, voters=frozenset({B}))
    async with Reinitialised(tmp_path, before) as a:
        with pytest.raises(OperationFailed, match="switch over first"):
            await reinitialise(a.context)
        assert a.record.excluded == frozenset()
        assert a.events == []


async def test_r6_the_directory_of_a_standby_is_given_up_in_the_record_to_be_cloned_anew(tmp_path: Path) -> None:
    async with Reinitialised(tmp_path, record()) as a:
        assert await reinitialise(a.context) == "a will be set aside and made anew"
        assert a.record.excluded == {A}
        # It is a voter until the primary has dropped it by the table.
        assert a.record.voters == {A, B}


# What a holder holds on to.


async def test_r3_a_holder_whose_postgres_has_ended_does_not_renew_a_damaged_lease(tmp_path: Path) -> None:
    """Nobody starts by it, and who renews "lives": the verb that a user has left for this would be refused for ever."""
    async with Reinitialised(tmp_path, held_by_a()) as a:
        a.context.health = cast(Health, SimpleNamespace(unhealthy=lambda: None))
        assert a.agent.renewal_facts().refusal is None
        a.store.put(held_by_a(epoch=Epoch(3)))
        await a.keeper.read()
        assert a.agent.renewal_facts().refusal is None, "a server that runs is fenced by nothing that a hand wrote"
        a.database.running = False
        assert "is not started by a Lease that is damaged" in str(a.agent.renewal_facts().refusal)
        a.store.put(held_by_a())
        await a.keeper.read()
        assert a.agent.renewal_facts().refusal is None


# A hand-over, and the end of the instance.


async def deciding_to_leave(agent: Agent) -> bool:
    """Does the hand-over that is under way go on?"""
    agent._operation_act = "hand_over"
    agent._operation = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
    handing_over = agent._operation
    await agent._act(Decision("wait", "so that nothing is begun in its place"))
    await agent._act(Decision("leave", "shutdown was asked for"))
    goes_on = not handing_over.cancelled()
    await agent._end_operation()
    return goes_on


async def test_a_hand_over_that_has_stopped_postgres_is_finished_before_the_instance_leaves(tmp_path: Path) -> None:
    async with Reinitialised(tmp_path, record()) as a:
        a.database.running = False
        assert await deciding_to_leave(a.agent)


async def test_section_1_a_server_that_runs_without_the_lease_is_left_at_once(tmp_path: Path) -> None:
    async with Reinitialised(tmp_path, record()) as a:
        assert not await deciding_to_leave(a.agent)


# A directory that is not there.


async def test_r6_a_voter_without_a_directory_gives_its_id_up_and_is_cloned(tmp_path: Path) -> None:
    """There is no log left that an election could rest on; with `required` the primary never drops its last voter."""
    async with Standby(tmp_path, record()) as a:
        a.knows("p")
        a.database.running = a.database.exists = False
        await a.rejoining.rejoin("Postgres does not run here")
        assert a.events[:2] == ["volume", "clone"]
        assert a.volume_states[0].member_id is None
        assert a.volume.state.member_id not in (None, A)


async def test_r6_a_voter_with_a_directory_is_neither_rewound_nor_cloned(tmp_path: Path) -> None:
    async with Standby(tmp_path, record()) as a:
        a.knows("p")
        a.database.running = False
        a.database.at = end(300, timeline=1)
        with pytest.raises(OperationFailed, match="the primary drops it first"):
            await a.rejoining.rejoin("Postgres does not run here")
        assert a.events == []


@pytest.mark.parametrize("failed_rewinds", [0, 3])
async def test_r6_the_last_copy_is_not_given_up_for_a_primary_that_is_not_there(
    tmp_path: Path, failed_rewinds: int
) -> None:
    """Seed 1008020: the primary had lost its directory and was believed to serve: three rewinds met nobody, and the only data
    that was left was set aside."""

    async def refused() -> None:
        raise SourceNotReady("p:5432: connection refused")

    async with Standby(tmp_path, record(voters=frozenset({B}))) as a:
        a.knows("p")
        a.database.running = False
        a.database.at = end(300, timeline=1)
        a.rejoining.failed_rewinds = failed_rewinds
        a.database.on["require source"] = refused
        for _ in range(4):
            with pytest.raises(SourceNotReady):
                await a.rejoining.rejoin("Postgres does not run here")
        assert a.events == []
        assert a.volume.state.member_id == A
        del a.database.on["require source"]
        await a.rejoining.rejoin("Postgres does not run here")
        done = ["set aside", "clone"] if failed_rewinds else ["rewind"]
        assert a.events == ["require source", "volume", *done, "volume"]


# A directory from an archive, in place of a clone.


class WithArchive(Standby):
    """Without a directory, and with an archive that `fails` or not."""

    def __init__(self, directory: Path, replicas_from: ReplicasFrom = "auto") -> None:
        super().__init__(directory, record(voters=frozenset({B})))
        self.context.configuration = msgspec.structs.replace(
            self.context.configuration,
            archive=ArchiveSection(directory=directory),
            bootstrap=BootstrapSection(replicas_from=replicas_from),
        )
        self.knows("p")
        self.database.running = self.database.exists = False
        self.tried = 0
        self.shown: str | None = None
        self.fails: LocalPostgresError | None = None
        self.database.on["from archive"] = self._try

    async def _try(self) -> None:
        self.tried += 1
        self.shown = self.context.operation
        if self.fails is not None:
            raise self.fails

    async def rejoins(self) -> list[str]:
        """What was done, the volume's states aside."""
        self.events.clear()
        await self.rejoining.rejoin("Postgres does not run here")
        return [event for event in self.events if event != "volume"]

    def told(self, what: str) -> list[str]:
        return [line.reason for line in self.context.journal.lines() if line.decision == what]


async def test_p7_a_directory_from_an_archive_is_a_new_member_and_the_primary_is_not_copied(tmp_path: Path) -> None:
    async with WithArchive(tmp_path) as a:
        a.database.recovery_says = ["3 of 7 MiB restored"]
        assert await a.rejoins() == ["from archive"]
        assert a.shown == "a standby's directory from an archive: 3 of 7 MiB restored"
        assert a.context.operation is None
        # R6: its old id speaks for no log from before the first byte on.
        assert a.volume_states[0].member_id is None
        assert a.volume.state.member_id not in (None, A)
        assert a.told("clone") == [f"from backup 1: now member {a.volume.state.member_id}"]


async def test_where_the_primary_is_the_better_source_it_is_copied_and_why_is_told(tmp_path: Path) -> None:
    async with WithArchive(tmp_path) as a:
        a.fails = NotMade("too much log", is_choice=True)
        assert await a.rejoins() == ["clone"]
        assert a.told("from the primary") == ["too much log"]
        assert await a.rejoins() == ["clone"]
        assert a.tried == 2, "that is asked anew for each directory"


@pytest.mark.parametrize("fails", [NotMade("damaged", is_choice=False), SourceNotReady("damaged")])
async def test_a_failure_of_the_archive_costs_a_clone_and_is_not_met_again_before_there_is_a_directory(
    tmp_path: Path, fails: LocalPostgresError
) -> None:
    async def refused() -> None:
        raise SourceNotReady("the connection broke")

    async with WithArchive(tmp_path) as a:
        a.fails, a.database.on["clone"] = fails, refused
        for _ in range(3):
            with pytest.raises(SourceNotReady, match="the connection broke"):
                await a.rejoins()
        assert a.tried == 1
        assert a.told("archive copy failed") == ["damaged; after 0 s p is copied instead"]
        del a.database.on["clone"]
        assert await a.rejoins() == ["clone"]
        assert a.told("clone") == [f"from p: now member {a.volume.state.member_id}"]
        a.fails = None
        assert await a.rejoins() == ["from archive"]


async def test_an_archive_is_not_asked_where_it_is_not_wanted(tmp_path: Path) -> None:
    async with WithArchive(tmp_path, "primary") as a:
        assert await a.rejoins() == ["clone"]
        assert a.tried == 0
