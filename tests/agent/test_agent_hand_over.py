"""A hand-over right after a write of which nothing is known: that one is closed before the release is intended."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from agent_builders import OTHER, A, B, end, record, taken_by_a
from agent_fakes import settle, unknown
from test_agent_primary import Primary

from instance_manager.agent.lease_keeper import WriteRefused
from instance_manager.core.voting import VolumeState
from instance_manager.ports import OutcomeUnknown


class Unsettled(Primary):
    """It wanted to raise q from 0 to 1, and does not know whether it did."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, record(quorum=0))
        self.caller.ends_at("a", end(200))
        self.caller.ends_at("b", end(200))

    async def raises_q(self, *, lands_after_s: float | None) -> None:
        await self.looks(1.9)
        self.store.faults_of_writes.append(unknown(lands_after_s=lands_after_s))
        with pytest.raises(OutcomeUnknown):
            await self.duties.serve()
        await settle()
        self.keeping.refusal = "so that nothing but the hand-over writes"
        self.events.clear()

    @property
    def intended_quorum(self) -> int | None:
        intended = self.volume.state.intended_record
        return intended.quorum if intended is not None else None


def intentions_replaced(states: list[VolumeState]) -> list[tuple[VolumeState, VolumeState]]:
    """Where an intention is followed by another, and nothing was known of the first."""
    return [
        (before, after)
        for before, after in itertools.pairwise(states)
        if before.intended_record is not None and after.intended_record not in (None, before.intended_record)
    ]


@pytest.mark.parametrize(
    ("lands_after_s", "quorum"),
    [(None, 0), (0.0, 1), (0.5, 0)],
    ids=["it never lands", "it has landed", "it would land later"],
)
async def test_r1_r3_a_hand_over_closes_an_unknown_write_by_one_of_its_own_before_it_intends_the_release(
    tmp_path: Path, lands_after_s: float | None, quorum: int
) -> None:
    async with Unsettled(tmp_path) as p:
        await p.raises_q(lands_after_s=lands_after_s)
        assert (p.intended_quorum, p.record.quorum) == (1, quorum)
        await p.giving_up.hand_over("shutdown was asked for")
        assert p.events == ["checkpoint", "stop", "revoke", "record", "volume", "volume", "record"]
        settled, releasing = p.volume_states[-2:]
        # What it found is what it acted on; only then the release is intended.
        assert settled.intended_record is None
        assert settled.last_record is not None
        assert settled.last_record.quorum == quorum
        assert releasing.intended_record is not None
        assert releasing.intended_record.release == p.record.release
        assert intentions_replaced(p.volume_states) == []
        assert p.record.release is not None
        assert (p.record.holder, p.record.voters) == (None, frozenset({A, B}))
        assert p.record.release.target in {A, B}
        await p.clock.sleep(2)
        assert p.record.release == releasing.intended_record.release, "what was under way has come too late"
        assert p.keeper.view().damage is None


async def test_r1_r3_without_an_unknown_write_a_hand_over_writes_the_release_only(tmp_path: Path) -> None:
    async with Unsettled(tmp_path) as p:
        await p.looks(1.9)
        await p.giving_up.hand_over("shutdown was asked for")
        assert p.events == ["checkpoint", "stop", "revoke", "volume", "record"]
        assert intentions_replaced(p.volume_states) == []


async def test_r1_r3_a_hand_over_whose_closing_write_is_unknown_too_intends_no_release(tmp_path: Path) -> None:
    async with Unsettled(tmp_path) as p:
        await p.raises_q(lands_after_s=None)
        p.store.faults_of_writes.append(unknown())
        with pytest.raises(OutcomeUnknown):
            await p.giving_up.hand_over("shutdown was asked for")
        assert p.events == ["checkpoint", "stop", "revoke"]
        assert p.intended_quorum == 1
        assert (p.record.holder, p.record.release) == (p.holder, None)


async def test_r1_r4_a_hand_over_closes_nothing_on_the_record_of_a_successor(tmp_path: Path) -> None:
    async with Unsettled(tmp_path) as p:
        await p.raises_q(lands_after_s=None)
        p.database.on["stop"] = p.meanwhile(taken_by_a())
        with pytest.raises(WriteRefused):
            await p.giving_up.hand_over("shutdown was asked for")
        assert p.record == taken_by_a()
        assert p.record.holder == OTHER
        assert p.intended_quorum == 1
