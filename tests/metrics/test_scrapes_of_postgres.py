"""What a scrape does to Postgres, and what Postgres can do to a scrape."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest
from harness import Cluster, frozen, title_of, wait_until
from metrics_servers import SERVER, Scrape, collecting, monitored_primary, scrape

from instance_manager.metrics.postgres import SCRAPE_BUDGET_S, Options
from instance_manager.postgres.host_based_access import MONITORING_ROLE
from instance_manager.postgres.sql import connect

WITHIN_S = 1.0


async def test_a_scrape_waits_no_second_for_a_postgres_that_hangs_and_says_so(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    async with collecting(primary) as statistics:
        assert (await scrape(statistics)).value("pg_up") == 1
        backends = primary.child_pids(f"{MONITORING_ROLE} postgres")
        assert len(backends) == 1
        with frozen(primary.pid), frozen(backends[0]):
            for _ in range(2):
                began_s = time.monotonic()
                seen = Scrape(await statistics.collect(running=True))
                assert time.monotonic() - began_s < WITHIN_S
                assert seen.value("pg_up") == 0
                assert seen.success("connect") == 0
                assert seen.value("pg_exporter_last_scrape_error") == 1
                # Nothing of before passes for the present.
                assert seen.value("pg_database_size_bytes", datname="postgres") is None

        async def is_up() -> bool:
            return (await scrape(statistics)).value("pg_up") == 1

        await wait_until(is_up, deadline_s=20, what="scrapes see the server again")


async def test_a_server_that_does_not_run_is_not_waited_for(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    async with collecting(primary) as statistics:
        await scrape(statistics)
        await primary.stop()
        began_s = time.monotonic()
        seen = Scrape(await statistics.collect(running=False))
        assert time.monotonic() - began_s < SCRAPE_BUDGET_S
        assert seen.value("pg_up") == 0


async def test_a_scrape_never_waits_for_a_round_over_tables_that_is_held_up(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    await primary.execute("CREATE DATABASE tenant")
    options = Options(SERVER, refresh_s=0)
    async with collecting(primary, options) as statistics:
        await scrape(statistics)
        blocker = await primary.connect()
        try:
            await blocker.execute("BEGIN; LOCK TABLE pg_class IN ACCESS EXCLUSIVE MODE")
            began_s = time.monotonic()
            seen = Scrape(await statistics.collect(running=True))
            assert time.monotonic() - began_s < WITHIN_S
            assert seen.text
        finally:
            blocker.terminate()


async def test_no_more_than_two_connections_and_all_of_the_monitoring_role(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    for number in range(4):
        await primary.execute(f"CREATE DATABASE tenant_{number}")
    await primary.execute("ALTER SYSTEM SET log_connections = on")
    await primary.reload()

    async def logs_connections() -> bool:
        return str(await primary.fetchval("SHOW log_connections")) == "on"

    await wait_until(logs_connections, what="connections are logged")
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            titles = [title_of(pid) for pid in primary.child_pids("instance_manager_monitor")]
            most = max(most, len(titles))
            await asyncio.sleep(0.001)

    async with collecting(primary, Options(SERVER, refresh_s=0)) as statistics:
        watching = asyncio.create_task(watch())
        for _ in range(2):
            await asyncio.gather(*(scrape(statistics) for _ in range(4)))
        watching.cancel()
    assert 1 <= most <= 2
    tenants = [
        line for line in primary.log_text().splitlines() if "connection authorized" in line and "tenant_" in line
    ]
    assert tenants
    assert all(f"user={MONITORING_ROLE} " in line for line in tenants)


async def test_tables_of_every_database_are_told_with_its_name(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    for name in ("one", "two"):
        await primary.execute(f"CREATE DATABASE {name}")
        connection = await asyncpg.connect(
            host=str(primary.socket), port=primary.port, user="postgres", password="", database=name, ssl=False
        )
        await connection.execute(
            "CREATE TABLE public.orders (id int); INSERT INTO public.orders SELECT generate_series(1, 9)"
        )
        await connection.close()
    async with collecting(primary, Options(SERVER, refresh_s=0)) as statistics:

        async def counted() -> bool:
            seen = await scrape(statistics)
            return all(
                seen.value("pg_stat_user_tables_n_tup_ins", datname=name, relname="orders") == 9
                for name in ("one", "two")
            )

        await wait_until(counted, what="both tables are counted")
    async with collecting(primary, Options(SERVER, tables=False)) as statistics:
        assert "pg_stat_user_tables" not in (await scrape(statistics)).text


async def test_names_that_users_choose_stay_one_label(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    strange = 'a"} 1\nfake{x="\\'
    await primary.execute('CREATE DATABASE "' + strange.replace('"', '""') + '"')
    async with collecting(primary) as statistics:
        seen = await scrape(statistics)
        assert seen.value("pg_database_size_bytes", datname=strange) is not None
        assert not [name for name, _ in seen.samples if name == "fake"]


async def test_the_monitoring_sessions_write_nothing_and_find_no_operator_that_others_planted(cluster: Cluster) -> None:
    """CVE-2026-55769 and CVE-2026-44477, for the sessions of metrics."""
    primary = await monitored_primary(cluster)
    await primary.execute("GRANT CREATE ON SCHEMA public TO public")
    await primary.execute(
        "CREATE FUNCTION public.planted(int4, numeric) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN RAISE 'planted'; END $$"
    )
    await primary.execute("CREATE OPERATOR public.= (leftarg = int4, rightarg = numeric, function = public.planted)")
    connection = await connect(primary.server, as_monitor=True)
    try:
        assert await connection.fetchval("SHOW search_path") == "pg_catalog,pg_temp"
        assert await connection.fetchval("SELECT 1::int4 = 1::numeric") is True
        assert await connection.fetchval("SELECT current_setting('is_superuser')") == "off"
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("CREATE TABLE public.mine (id int)")
    finally:
        connection.terminate()
    planted = await connect(primary.server, as_monitor=True, schemas=("public",))
    try:
        with pytest.raises(asyncpg.RaiseError, match="planted"):
            await planted.fetchval("SELECT 1::int4 = 1::numeric")
    finally:
        planted.terminate()
