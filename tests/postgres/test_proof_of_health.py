"""Section 3: which answers of a real postmaster to a new connection are a proof of health (cloudnative-pg#11024)."""

from __future__ import annotations

import signal

import asyncpg
import pytest
from agent_database import database_of
from harness import Cluster, PostgresProcess, frozen, wait_until

from instance_manager.agent.database import CANNOT_CONNECT_NOW
from instance_manager.postgres.server import DeadlinePassed
from instance_manager.postgres.sql import SqlUnavailable


async def wait_refusing(process: PostgresProcess, why: str) -> None:
    """Until a new connection is told that this is why it cannot be had."""

    async def refuses() -> bool:
        try:
            await process.fetchval("SELECT 1")
        except asyncpg.CannotConnectNowError as error:
            return why in str(error)
        except OSError:
            # It does not listen yet.
            return False
        return False

    await wait_until(refuses, what=f"{process.name} answers: {why}")


async def test_section_3_a_postmaster_in_a_long_recovery_is_alive(cluster: Cluster) -> None:
    starting = cluster.add("x")
    starting.make_standby()
    # Recovery waits for an archive that does not answer.
    starting.set_dynamic(restore_command="exec sleep 600")
    await starting.start(wait=False)
    await wait_refusing(starting, "the database system is starting up")
    await (await database_of(starting)).answers_new_connection(5)
    assert starting.process is not None
    assert starting.process.poll() is None


async def test_section_3_a_postmaster_that_shuts_down_is_no_proof_of_health(cluster: Cluster) -> None:
    primary = await cluster.primary()
    database = await database_of(primary)
    await database.answers_new_connection(5)
    async with primary.session() as client:
        await client.fetchval("SELECT 1")
        # It waits for that client, as long as it stays.
        primary.send(signal.SIGTERM)
        await wait_refusing(primary, "the database system is shutting down")
        with pytest.raises(SqlUnavailable) as refusal:
            await database.answers_new_connection(5)
    assert refusal.value.sqlstate == CANNOT_CONNECT_NOW


async def test_section_3_a_silent_postmaster_and_one_that_is_gone_are_no_proof_of_health(cluster: Cluster) -> None:
    primary = await cluster.primary()
    database = await database_of(primary)
    async with primary.session() as client:
        with frozen(primary.pid):
            assert await client.fetchval("SELECT 1") == 1, "old connections are served on"
            with pytest.raises(DeadlinePassed):
                await database.answers_new_connection(0.5)
        await database.answers_new_connection(5)
    primary.kill()
    with pytest.raises(SqlUnavailable) as refusal:
        await database.answers_new_connection(5)
    assert refusal.value.sqlstate is None
