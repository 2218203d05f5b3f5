"""R13: a winner that cannot open gives the Lease back, so that another can be elected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.core.lease import given_back, helps_to_give_back
from instance_manager.core.record import ClusterRecord

PAUSE_S = 10.0
"""It stands again after this time: whoever could not open is not the first to try again."""


def unopened_for_s(context: Context) -> float | None:
    """How long ago this instance took the Lease that it holds, has not opened and could leave to another; None otherwise.

    An agent that restarted since counts from its own start.
    """
    c = context
    record, took = c.keeper.record, c.volume.state.took
    if record is None or took is None or not c.holds_lease or record.opened or record.epoch < took.epoch:
        return None
    if not helps_to_give_back(record, took.found, c.member_id):
        return None
    return c.clock.now_s() - taken_at_s(c)


def taken_at_s(context: Context) -> float:
    return context.took_at_s if context.took_at_s is not None else context.started_s


async def give_back(
    context: Context, settled: Callable[[ClusterRecord], Awaitable[ClusterRecord]], reason: str
) -> None:
    """`settled`: the record once it is known what became of an earlier intention (R1).

    Nobody was let in, so nothing was acknowledged since the takeover, and the N and q that it found elect as before.
    """
    c = context
    took, chain = c.volume.state.took, c.record.chain
    found_chain = took.found.chain if took is not None else None
    if took is None or found_chain is None or chain is None or not c.holds_lease:
        raise OperationFailed("there is nothing to be given back")
    found = took.found
    end = c.database.view().end if c.database.running else (await c.database.directory.stopped_facts(chain)).end
    # Others may have followed it there, under this claim or one before it.
    promoted = end is not None and not found_chain.knows(end.timeline) and chain.knows(end.timeline)
    await c.link.revoke(c.record.epoch)
    record = await settled(c.record)
    # Persisted before: after this nobody may take what was given back for lost and repair the Lease by it (R3).
    back = given_back(record, found, promoted=promoted)
    await c.volume.save(lambda state: state.writing(record, back))
    await c.keeper.write(lambda current: given_back(current, found, promoted=promoted), grounds=record.grounds())
    c.stand_again_s = c.clock.now_s() + PAUSE_S
    c.stop_yielding()
    c.journal.note("give back", reason)
