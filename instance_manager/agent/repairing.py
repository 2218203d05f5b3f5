"""R3: a damaged Lease is written anew by its last holder, and by nobody else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.agent.peering import EndAnswer
from instance_manager.core.lease import repair
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Epoch, MemberId


async def repair_lease(
    context: Context, ask_ends: Callable[[ClusterRecord], Awaitable[dict[MemberId, EndAnswer]]], reason: str
) -> None:
    """R3: only the last holder repairs a damaged Lease, after q of its own persisted voters confirm."""
    c = context
    last = c.volume.state.last_record
    holder = c.holder
    if last is None or holder is None:
        raise OperationFailed("this instance cannot repair the Lease: it was not its last holder")
    ends = await ask_ends(last)
    confirmations: dict[MemberId, Epoch | None] = {voter: answer.promised_epoch for voter, answer in ends.items()}
    await c.keeper.read()
    version = c.keeper.damaged_version
    if c.keeper.view().damage is None:
        return
    permit = c.link.permit
    permitted = permit is not None and permit.epoch == last.epoch and c.clock.now_s() < permit.soft_s
    repaired = repair(c.volume.state, holder, confirmations, permitted=permitted)
    if isinstance(repaired, str):
        raise OperationFailed(f"{reason}; not repaired: {repaired}")
    await c.volume.save(lambda state: state.seen(repaired.epoch))
    stored = await c.keeper.repair(repaired, version)
    await c.volume.save(lambda state: state.writing(stored.record, None))
    c.journal.note("repair", f"{reason}; the Lease is at epoch {repaired.epoch} now")
