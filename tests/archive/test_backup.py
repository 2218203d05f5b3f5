"""Taking a base backup of a real server: whole or nothing, with the hashes of all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from archiving_server import archiving, insert, prepared
from backup_harness import info_of, objects, store_of, take
from harness import Cluster

pytestmark = pytest.mark.timeout(240)


async def test_first(cluster: Cluster, section: dict[str, Any], tmp_path: Path) -> None:
    server = cluster.add("p")
    store = store_of(section)
    with archiving(server, section) as made:
        await prepared(cluster, made)
        await insert(server, 0, 3000)
        taken = await take(made, store, name="first", split_bytes=4 << 20)
    print(taken.info)
    print(taken.manifest)
    assert await info_of(store, taken.info.backup_id) == taken.info
    print(await objects(store))
