"""The verb that may lose, over a Lease that is damaged while its holder goes on to renew it (R3, R15)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from agent_builders import A, P, peer_state, record
from agent_fakes import Fault
from agent_instance import Instance

from instance_manager.agent.context import OperationFailed
from instance_manager.agent.operator_failover import REPLACES, lossy_failover
from instance_manager.core.types import Epoch
from instance_manager.ports import Conflict

pytestmark = pytest.mark.asyncio


def candidate(directory: Path) -> Instance:
    """`a`, which has seen epoch 5 in full; a hand has put the Lease back to epoch 4."""
    a = Instance(directory, "a", record(epoch=Epoch(4)))
    a.volume.state = replace(a.volume.state, known_record=record())
    return a


async def test_a_damaged_lease_that_is_renewed_just_then_is_judged_and_replaced_again(tmp_path: Path) -> None:
    async with candidate(tmp_path) as a:
        a.store.faults_of_writes.append(Fault(before=a.store.edit(renewals=7)))
        done, told = await lossy_failover(a.context, peer_state("a"), preview=False)
        assert done, told
        assert a.record.holder is not None
        assert a.record.holder.member_id == A
        assert a.record.epoch == 6
        assert P in a.record.excluded


async def test_a_lease_that_somebody_repaired_just_then_stays_repaired(tmp_path: Path) -> None:
    async with candidate(tmp_path) as a:
        a.store.faults_of_writes.append(Fault(before=a.store.edit(epoch=Epoch(5))))
        with pytest.raises(OperationFailed, match="repaired meanwhile"):
            await lossy_failover(a.context, peer_state("a"), preview=False)
        assert a.record.epoch == 5


async def test_it_gives_up_where_every_try_finds_another_version(tmp_path: Path) -> None:
    async with candidate(tmp_path) as a:
        a.store.faults_of_writes.extend(Fault(before=a.store.edit(renewals=each)) for each in range(10, 10 + REPLACES))
        with pytest.raises(Conflict):
            await lossy_failover(a.context, peer_state("a"), preview=False)
        assert a.record.epoch == 4
