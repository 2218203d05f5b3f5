"""A new cluster from a chain of incremental backups, by the options of the demo, and its standby from the same chain. Postgres 17 or later:
`tests/majors.sh 17 18` runs this file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from archiving_server import all_archived, archiving, prepared
from backup_harness import store_of, take
from harness import BIN_DIRECTORY, FAST_DIRECTORY, Cluster
from incremental_backups import LARGE_PAGES, SUMMARIES, incremental, large_table, sums

from instance_manager.demo import command
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import loopback_plan
from instance_manager.demo.ports import choose_base_port

pytestmark = pytest.mark.timeout(240)
TABLES = ("t", "large", "later")


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


async def asked(cluster: LocalCluster, name: str, query: str) -> list[asyncpg.Record]:
    member = cluster.plan.member(name)
    connection = await asyncpg.connect(
        host=str(cluster.layout.instance(name) / "socket"),
        port=member.postgres_port,
        user="postgres",
        database="postgres",
    )
    try:
        return list(await connection.fetch(query))
    finally:
        await connection.close()


def told(log: Path, beginning: str) -> list[str]:
    found = []
    for line in log.read_text(errors="replace").splitlines():
        message = json.loads(line).get("message", "") if line.startswith("{") else ""
        if str(message).startswith(beginning):
            found.append(str(message))
    return found


async def test_a_cluster_and_its_standby_begin_with_a_chain_to_the_last_row(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        await large_table(server)
        await take(made, store)
        await server.execute("UPDATE large SET filler = 'first' WHERE n % 40 = 0")
        await server.execute("CREATE TABLE later AS SELECT n FROM generate_series(1, 3000) n")
        await incremental(made, store)
        await server.execute("DELETE FROM large WHERE n < 50")
        await server.execute("VACUUM large")
        last = await incremental(made, store)
        assert last.info.parent_id is not None
        await server.execute("INSERT INTO later SELECT n FROM generate_series(3001, 4000) n")
        wanted = await sums(server, *TABLES)
        await all_archived(server)
        server.kill()
    assert wanted["large"]["rows"] == LARGE_PAGES - 49
    plan = loopback_plan(
        instances=2,
        base_port=choose_base_port(4, None, spread=True),
        bin_directory=str(BIN_DIRECTORY),
        parameters=(("shared_buffers", "32MB"),),
        recovery=command._recovery_plan(options("--recover-from", f"{directory_section['directory']}/orders")),
        replicas_from="archive",
    )
    with LocalCluster.create(plan, below=FAST_DIRECTORY) as recovered:
        await asyncio.to_thread(recovered.start_all)
        try:
            primary = await asyncio.to_thread(recovered.wait_redundant, 120)
        except BaseException:
            print(*(recovered.layout.log(name).read_text(errors="replace")[-6000:] for name in recovered.names))
            raise
        assert any(
            last.info.backup_id in line for line in told(recovered.layout.log(primary), "recovery: restoring backup ")
        )
        (standby,) = recovered.standbys()
        (came,) = told(recovered.layout.log(standby), "clone: ")
        assert came.startswith(f"clone: from backup {last.info.backup_id} of the source's archive"), came
        for name in (primary, standby):
            for table in TABLES:
                query = f"SELECT count(*) AS rows, sum(hashtext({table}::text)::bigint) AS sum FROM {table}"  # noqa: S608
                (row,) = await asked(recovered, name, query)
                assert dict(row) == wanted[table], (name, table)
        await asked(recovered, primary, "INSERT INTO later VALUES (9999)")
