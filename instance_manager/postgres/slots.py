"""Physical replication slots: one for each member, by its id, on the primary only.

Why not on standbys. A slot there holds WAL for a member that reads from somebody else, so it must be advanced all the
time by what the primary knows, or it fills the disk; what it would buy is WAL beyond `wal_keep_size` for a member
that lags at the very failover. `wal_keep_size` (512 MB) covers the rest; who lags more is restored from the archive or
cloned. So a primary makes its members' slots before it lets anybody in, and a standby has none of ours.

A slot is also how a name is held by one machine: the second to stream through it is refused (P7).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import asyncpg

from instance_manager.core.types import MEMBER_ID_PATTERN, MemberId
from instance_manager.postgres.deadlines import Deadline
from instance_manager.postgres.observation import Sql


@dataclass(frozen=True, slots=True)
class SlotChanges:
    created: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    recreated: tuple[str, ...] = ()
    """Were lost: their member may lack WAL now, and may have to be cloned."""
    busy: tuple[str, ...] = ()
    """Of nobody any more but in use: dropped another time, once its walsender is gone."""
    failed: tuple[tuple[str, str], ...] = ()
    """Name and Postgres's reason."""


@dataclass(frozen=True, slots=True)
class SlotPlan:
    create: tuple[str, ...]
    drop: tuple[str, ...]
    recreate: tuple[str, ...]
    busy: tuple[str, ...]


def plan_slots(existing: Collection[tuple[str, bool, str | None]], wanted: Collection[MemberId]) -> SlotPlan:
    """From (name, active, wal_status) of all physical slots. Slots whose name is no member's id are not ours."""
    known = {name: (active, status) for name, active, status in existing}
    ours = {name for name in known if MEMBER_ID_PATTERN.fullmatch(name) is not None}
    unowned = ours - set(wanted)
    return SlotPlan(
        create=tuple(sorted(set(wanted) - set(known))),
        drop=tuple(sorted(name for name in unowned if not known[name][0])),
        recreate=tuple(sorted(name for name in wanted if name in known and known[name] == (False, "lost"))),
        busy=tuple(sorted(name for name in unowned if known[name][0])),
    )


async def reconcile(sql: Sql, wanted: Collection[MemberId], *, deadline_s: float = 5.0) -> SlotChanges:
    """On a primary: exactly these members have slots, each keeping WAL from now on. On a standby: `wanted` is empty.

    What one slot refuses does not keep back the others. DeadlinePassed or SqlUnavailable: half done; ask again.
    """
    deadline = Deadline(deadline_s)
    rows = await sql.fetch(
        "SELECT slot_name, active_pid IS NOT NULL AS active, wal_status FROM pg_get_replication_slots() "
        "WHERE slot_type = 'physical' AND NOT temporary",
        deadline_s=deadline.left_s,
    )
    plan = plan_slots([(row["slot_name"], row["active"], row["wal_status"]) for row in rows], wanted)
    failed: list[tuple[str, str]] = []

    async def run(query: str, names: Collection[str]) -> tuple[str, ...]:
        done = []
        for name in names:
            try:
                await sql.fetchval(query, name, deadline_s=deadline.left_s)
            except asyncpg.PostgresError as error:
                failed.append((name, str(error)))
            else:
                done.append(name)
        return tuple(done)

    drop = "SELECT pg_drop_replication_slot($1)"
    create = "SELECT pg_create_physical_replication_slot($1, true)"
    dropped = await run(drop, plan.drop)
    created = await run(create, plan.create)
    recreated = await run(create, await run(drop, plan.recreate))
    return SlotChanges(created, dropped, recreated, plan.busy, tuple(failed))
