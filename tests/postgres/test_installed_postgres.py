"""The agent's port to a real server: what one of its calls waits for, no other does."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from agent_database import installed_postgres_of
from harness import Cluster, wait_until

from instance_manager.agent import server_files
from instance_manager.agent.installed_postgres import SqlFailed
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.host_based_access import Access
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


async def test_p8_an_opening_of_the_gate_that_was_cut_off_does_not_come_after_its_closing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operation is ended while the disk is slow, and the instance starts again as a primary that keeps clients out."""
    postgres = await installed_postgres_of(cluster.add("x"))
    hangs, goes_on, landed = threading.Event(), threading.Event(), threading.Event()

    def slow(path: Path, content: bytes, **options: Any) -> None:
        first = not hangs.is_set()
        if first:
            hangs.set()
            assert goes_on.wait(60)
        write_atomically(path, content, **options)
        if first:
            landed.set()

    monkeypatch.setattr(server_files, "write_atomically", slow)
    opening = asyncio.create_task(postgres.write_access(Access.OPEN))
    assert await asyncio.to_thread(hangs.wait, 30)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    closing = asyncio.create_task(postgres.write_access(Access.CLOSED))
    # Whoever does not wait for the late one is done by now.
    await asyncio.wait([closing], timeout=0.5)
    goes_on.set()
    await closing
    assert await asyncio.to_thread(landed.wait, 30)
    assert await postgres.written_access() is Access.CLOSED
