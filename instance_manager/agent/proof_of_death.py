"""Proof that a silent holder's life is over, where the place that it runs in can tell (R9)."""

from __future__ import annotations

import contextlib

from instance_manager.agent.context import Context
from instance_manager.ports import CoordinationError


async def look_for_death(context: Context) -> None:
    """Asynchronous clusters: proof that the holder's life is over (R9)."""
    c = context
    while True:
        record = c.keeper.record
        asynchronous = record is not None and record.mode == "asynchronous"
        if asynchronous and record is not None and record.holder is not None and c.suspects is not None:
            with contextlib.suppress(CoordinationError):
                dead = await c.coordination.is_proven_dead(record.holder, deadline_s=1.0)
                c.dead_holder = record.holder if dead else None
        if asynchronous:
            await c.clock.sleep(0.25)
        else:
            # Which it may become by a change of the configuration, and by nothing faster.
            await c.beat.sleep(5.0)
