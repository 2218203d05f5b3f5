"""Recovery from the archive alone, to every kind of target, and only to that."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from archiving_server import all_archived, archiving, insert, prepared
from backup_harness import store_of, take
from harness import Cluster
from recovery_harness import Restoration

pytestmark = pytest.mark.timeout(240)


async def test_time_before_a_mistaken_delete(cluster: Cluster, directory_section: dict[str, Any]) -> None:
    server = cluster.add("p")
    store = store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        await insert(server, 0, 1000)
        taken = await take(made, store)
        await insert(server, 1000, 1000)
        before = await server.fetchval("SELECT clock_timestamp()::text")
        await asyncio.sleep(0.05)
        await server.execute("DELETE FROM t")
        await insert(server, 5000, 10)
        await all_archived(server)
        server.kill()
    restoration = Restoration(cluster.add("r"), store)
    restored = await restoration.run(time=before)
    print("\n".join(restoration.said), restored)
    assert restored.info.backup_id == taken.info.backup_id
    assert await restoration.numbers() == set(range(2000))
