"""P1: a commit of our own tells whether commits wait; one of which nobody knows how it went tells nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from harness import Cluster, PostgresProcess, wait_until
from test_p1_leaving_the_empty_list import A, replication_of

from instance_manager.core.quorum import NOBODY
from instance_manager.postgres.deadlines import Deadline
from instance_manager.postgres.server import DeadlinePassed, LocalPostgresError


class Over(Deadline):
    """It has passed, and whoever asks for what is left gets all of it."""

    @property
    def passed(self) -> bool:
        return True

    @property
    def left_s(self) -> float:
        return self.whole_s


async def unseen(*_: object, **__: object) -> bool:
    """A look that came too early, or too late."""
    return False


async def waiting_canary(primary: PostgresProcess, watch: Any) -> tuple[asyncio.Task[bool], int]:
    """Of which `watch` has not seen that it waits; and its backend."""
    watch._session.fetchval = unseen
    canary = asyncio.create_task(watch.canary_waits(Deadline(30)))
    look = "SELECT max(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    return canary, await wait_until(lambda: primary.fetchval(look))


async def test_p1_a_commit_that_is_neither_over_nor_seen_waiting_proves_nothing(cluster: Cluster) -> None:
    primary, _ = await cluster.primary_with_standbys(A)
    async with primary.running.replication(Deadline(5)) as watch:
        assert not await watch.canary_waits(Deadline(5))
        with pytest.raises(DeadlinePassed, match="neither over nor seen waiting"):
            await watch.canary_waits(Over(5))


async def test_p1_a_wait_that_somebody_has_cancelled_is_a_wait(cluster: Cluster) -> None:
    primary, _ = await cluster.primary_with_standbys(A)
    await replication_of(primary).apply(NOBODY, deadline_s=5)
    async with primary.running.replication(Deadline(5)) as watch:
        canary, pid = await waiting_canary(primary, watch)
        await primary.execute(f"SELECT pg_cancel_backend({pid})")
        assert await canary


async def test_p1_a_commit_whose_connection_is_lost_proves_nothing(cluster: Cluster) -> None:
    primary, _ = await cluster.primary_with_standbys(A)
    await replication_of(primary).apply(NOBODY, deadline_s=5)
    async with primary.running.replication(Deadline(5)) as watch:
        canary, pid = await waiting_canary(primary, watch)
        await primary.execute(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises((LocalPostgresError, asyncpg.PostgresError)):
            await canary
