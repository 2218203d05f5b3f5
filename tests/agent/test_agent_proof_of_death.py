"""R9: a proof of death is of one life of an instance only (found by the simulation)."""

from __future__ import annotations

from pathlib import Path

from agent_builders import HOLDER, OTHER, P, held_by_a, holder, record
from agent_instance import Instance


async def test_r9_a_proof_of_death_says_nothing_of_a_later_life_or_of_another_holder(tmp_path: Path) -> None:
    async with Instance(tmp_path, "b", record()) as b:
        b.context.dead_holder = HOLDER
        assert b.context.is_proven_dead(record())
        assert not b.context.is_proven_dead(record(holder=holder(P, "p-life-2")))
        assert not b.context.is_proven_dead(held_by_a(holder=OTHER))
        assert not b.context.is_proven_dead(record(holder=None))
        assert not b.context.is_proven_dead(None)
