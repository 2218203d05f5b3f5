"""How Postgres is stopped when a decision says so: killed, at the soft deadline, fenced, or because the instance leaves."""

from __future__ import annotations

from instance_manager.agent.context import Context
from instance_manager.core.roles import Role


async def kill(context: Context, reason: str) -> None:
    """Every process, at once; a holder asks before to be replaced."""
    c = context
    _count_self_fence(c, "unhealthy" if c.holds_lease else "lease_lost")
    c.take_role(Role.STOPPING, reason)
    c.gate_open = False
    if c.holds_lease:
        # First: on a stalled disk the processes end only when it answers again; none of them can commit till then.
        c.start_yielding(reason)
    await c.database.kill()
    c.take_role(Role.STOPPED, reason)


async def stop(context: Context, reason: str) -> None:
    """The soft deadline: stop fast; what does not stop, the supervisor kills at the hard one."""
    c = context
    _count_self_fence(c, "soft_deadline")
    c.take_role(Role.STOPPING, reason)
    if not await c.database.stop(deadline_s=c.configuration.timings.stop_timeout_s):
        await c.database.kill()
    c.gate_open = False
    c.take_role(Role.STOPPED, reason)


async def fence(context: Context, reason: str) -> None:
    """Stopped, and it stays so for as long as the record fences this instance."""
    c = context
    if c.database.running:
        c.take_role(Role.STOPPING, reason)
        if not await c.database.stop(deadline_s=c.configuration.timings.stop_timeout_s):
            await c.database.kill()
    if c.role is not Role.FENCED:
        if c.role not in (Role.STOPPING, Role.STOPPED, Role.STARTING):
            c.take_role(Role.STOPPING, reason)
        c.take_role(Role.FENCED, reason)


async def stop_to_leave(context: Context, reason: str) -> None:
    """Whatever still runs when the instance ends."""
    c = context
    if c.database.running:
        c.take_role(Role.STOPPING, reason)
        if not await c.database.stop(deadline_s=2 * c.configuration.timings.stop_timeout_s):
            await c.database.kill()


def _count_self_fence(context: Context, reason: str) -> None:
    if context.database.running_read_write:
        context.measures.self_fences.add(reason)
