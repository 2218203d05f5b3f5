"""What a user may ask of this very instance, here or through a peer; `control` holds the verbs that work through the record."""

from __future__ import annotations

from dataclasses import replace

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.core.roles import Role


async def restart_postgres(context: Context) -> str:
    """Stop it; the next decision starts it again. OperationFailed: it does not answer within a minute."""
    c = context
    name = c.configuration.name
    if not c.database.running:
        return f"Postgres does not run on {name}"
    await c.database.checkpoint(deadline_s=30)
    if not await c.database.stop(deadline_s=30):
        await c.database.kill()
    ends_s = c.clock.now_s() + 60
    c.wake.set()
    while c.clock.now_s() < ends_s:
        if c.database.view().answers and c.role in (Role.PRIMARY, Role.STANDBY):
            return f"{name} was restarted and is {c.role.value}"
        await c.clock.sleep(0.05)
    raise OperationFailed(f"{name} was stopped, but does not answer again yet")


async def reinitialise(context: Context) -> str:
    """Clone anew. Only a standby; it is no voter while it does, because its log is gone (R6)."""
    c = context
    record = c.record
    member_id = c.member_id
    if record.holder is None or record.holder.member_id == member_id:
        # Also under an earlier life: its log may hold what no other does.
        raise OperationFailed("only a standby with a serving primary can be cloned anew; switch over first")
    await c.keeper.write(lambda current: replace(current, excluded=current.excluded | {member_id}))
    await c.peers.nudge(c.peers.names)
    return f"{c.configuration.name} will be set aside and made anew"
