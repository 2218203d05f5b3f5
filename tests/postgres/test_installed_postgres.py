"""The agent's port to a real server: what one of its calls waits for, no other does."""

from __future__ import annotations

import asyncio

import pytest
from agent_database import installed_postgres_of
from harness import Cluster, wait_until

from instance_manager.agent.installed_postgres import SqlFailed
from instance_manager.postgres.sql import session


async def test_roles_that_a_user_holds_up_keep_nobody_from_looking_and_are_an_ordinary_failure(
    cluster: Cluster,
) -> None:
    """While the look does not come back, a serving primary counts as not ready, and its quorum stands still."""
    one = cluster.add("x")
    (one.root / "secret").write_text("a password of these tests")
    await one.start()
    postgres = await installed_postgres_of(one)
    async with session(one.server) as user, session(one.server) as other:
        await user.execute("BEGIN; CREATE ROLE app")
        making = asyncio.create_task(postgres.create_roles())

        async def waits() -> bool:
            return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await wait_until(waits, deadline_s=30, what="the role is waited for")
        await postgres.observe(deadline_s=2)
        assert not making.done()
        with pytest.raises(SqlFailed, match="statement timeout"):
            await making
        await user.execute("ROLLBACK")
    assert "role app" in await postgres.create_roles()
    postgres.forget()
