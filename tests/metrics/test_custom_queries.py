"""Custom queries: both familiar forms, and what a bad one costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Cluster, wait_until
from metrics_servers import SERVER, collecting, monitored_primary, scrape
from test_exporter_families import EXAMPLE_QUERIES

from instance_manager.metrics.custom import QueriesUnusable, load_all, parse_queries
from instance_manager.metrics.postgres import Options

ONE = "{query: SELECT 1 AS n, metrics: [{n: {usage: GAUGE, description: A number.}}]}"


def options(text: str) -> Options:
    return Options(SERVER, custom=parse_queries(text, "test"), tables=False)


async def test_an_example_of_postgres_exporter_is_taken_whole(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    found = load_all([EXAMPLE_QUERIES])
    # What is built in with the same labels and type is not asked twice.
    assert {query.query.name for query in found} == {"pg_stat_statements", "pg_process_idle"}
    await primary.execute("CREATE TABLE public.orders (id int)")
    async with collecting(primary, Options(SERVER, custom=found)) as statistics:
        seen = await scrape(statistics)
        # What is built in is there once; what the server has not is one failed collector.
        assert seen.value("pg_replication_lag") == 0
        assert (
            seen.value("pg_stat_user_tables_seq_scan", relname="orders", datname="postgres", schemaname="public") == 0
        )
        assert seen.success("pg_stat_statements") == 0
        assert seen.value("pg_process_idle_seconds_count") is None or seen.success("pg_process_idle") == 1


async def test_a_query_of_a_built_in_ones_name_adds_to_it_and_takes_nothing_away(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    await primary.execute("CREATE TABLE public.orders (id int)")
    text = """
        pg_stat_user_tables:
          query: SELECT current_database() AS datname, 'public' AS schemaname, 'orders' AS relname, 5 AS seq_scan, 7 AS mine
          metrics: [{datname: {usage: LABEL}}, {schemaname: {usage: LABEL}}, {relname: {usage: LABEL}},
                    {seq_scan: {usage: COUNTER}}, {mine: {usage: GAUGE}}]
    """
    async with collecting(primary, Options(SERVER, custom=parse_queries(text, "test"))) as statistics:
        seen = await scrape(statistics)
        labels = {"relname": "orders", "datname": "postgres", "schemaname": "public"}
        assert seen.value("pg_stat_user_tables_mine", **labels) == 7
        assert seen.value("pg_stat_user_tables_seq_scan", **labels) == 0
        assert seen.success("pg_stat_user_tables") == seen.success("pg_stat_user_tables_custom") == 1


async def test_target_databases_are_patterns_and_told_apart_by_a_label(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    for name in ("shop_1", "shop_2", "other"):
        await primary.execute(f"CREATE DATABASE {name}")
    async with collecting(
        primary,
        options(
            "size: {query: 'SELECT current_database()::text AS which, 7 AS n', target_databases: ['shop_*'], "
            "metrics: [{which: {usage: LABEL}}, {n: {usage: GAUGE}}]}"
        ),
    ) as statistics:
        seen = await scrape(statistics)
        assert seen.value("size_n", datname="shop_1", which="shop_1") == 7
        assert seen.value("size_n", datname="shop_2", which="shop_2") == 7
        assert "other" not in "".join(line for line in seen.text.splitlines() if line.startswith("size_"))


async def test_a_predicate_and_primary_only_and_a_range_of_versions_decide_whether_it_runs(cluster: Cluster) -> None:
    primary, standby = await cluster.primary_with_standbys("s")
    await primary.execute("CREATE ROLE instance_manager_monitor LOGIN IN ROLE pg_monitor")
    text = """
        met: {predicate_query: SELECT true, runonserver: ">=14.0.0 <16.0.0", master: true, query: SELECT 1 AS n, metrics: [{n: {usage: GAUGE}}]}
        unmet: {predicate_query: SELECT false, query: SELECT 1 AS n, metrics: [{n: {usage: GAUGE}}]}
        later: {runonserver: ">=16.0.0", query: SELECT 1 AS n, metrics: [{n: {usage: GAUGE}}]}
    """
    async with collecting(primary, options(text)) as statistics:
        seen = await scrape(statistics)
        assert seen.value("met_n") == 1
        assert seen.value("unmet_n") is None
        assert seen.success("unmet") == 1
        assert seen.value("later_n") is None
        assert seen.success("later") is None

    async def there() -> object:
        return await standby.fetchval("SELECT 1 FROM pg_roles WHERE rolname = 'instance_manager_monitor'")

    await wait_until(there, what="the role is replicated")
    async with collecting(standby, options(text)) as statistics:
        seen = await scrape(statistics)
        assert seen.value("pg_replication_is_replica") == 1
        assert seen.value("met_n") is None


async def test_bad_queries_are_failed_collectors_and_not_a_failed_scrape(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    await primary.execute("CREATE TABLE public.secret (id int)")
    text = """
        writes: {query: "INSERT INTO public.secret VALUES (1) RETURNING id", metrics: [{id: {usage: GAUGE}}]}
        unset: {query: "SELECT set_config('transaction_read_only', 'off', false) AS s, 1 AS n", metrics: [{n: {usage: GAUGE}}]}
        forbidden: {query: SELECT id FROM public.secret, metrics: [{id: {usage: GAUGE}}]}
        slow: {query: SELECT pg_sleep(5) AS n, timeout: 200ms, metrics: [{n: {usage: GAUGE}}]}
        twice: {query: "SELECT 1 AS n UNION ALL SELECT 2", metrics: [{n: {usage: GAUGE}}]}
        text: {query: "SELECT 'no number' AS n", metrics: [{n: {usage: GAUGE}}]}
        missing: {query: SELECT 1 AS m, metrics: [{n: {usage: GAUGE}}]}
        two: {query: "SELECT 1 AS n; SELECT 2 AS n", metrics: [{n: {usage: GAUGE}}]}
        good: {query: SELECT 1 AS n, metrics: [{n: {usage: GAUGE}}]}
    """
    async with collecting(primary, options(text)) as statistics:
        seen = await scrape(statistics)
        for bad in ("writes", "unset", "forbidden", "slow", "twice", "text", "missing", "two"):
            assert seen.success(bad) == 0, bad
        assert seen.value("good_n") == 1
        assert seen.success("good") == 1
        assert seen.value("pg_up") == 1
        assert seen.value("pg_exporter_last_scrape_error") == 1
    assert await primary.fetchval("SELECT count(*) FROM public.secret") == 0


async def test_what_a_query_is_not_asked_again_for_is_its_cache(cluster: Cluster) -> None:
    primary = await monitored_primary(cluster)
    text = """
        kept: {cache_seconds: 3600, query: SELECT clock_timestamp() AS n, metrics: [{n: {usage: GAUGE}}]}
        fresh: {query: SELECT clock_timestamp() AS n, metrics: [{n: {usage: GAUGE}}]}
    """
    async with collecting(primary, options(text)) as statistics:
        first = await scrape(statistics)
        # The second begins a round, whose results the third shows at the earliest.
        for _ in range(3):
            await scrape(statistics)
            assert statistics._round is not None
            await statistics._round
        last = await scrape(statistics)
        assert last.value("kept_n") == first.value("kept_n") is not None
        assert last.value("fresh_n") != first.value("fresh_n") is not None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "is not YAML"),
        ("a: {metrics: []}", "query: is missing"),
        ("a: {query: SELECT 1, metrics: [{n: {usage: GUAGE}}]}", "'GUAGE' is none of"),
        ("a: {query: SELECT 1, metrics: [{n: {usage: LABEL}}]}", "there are only labels"),
        ("a: {query: SELECT 1, timeout: 1h, metrics: [{n: {usage: GAUGE}}]}", "at most 10 s"),
        ("a: {query: SELECT 1, tiemout: 1s, metrics: [{n: {usage: GAUGE}}]}", "unknown key `tiemout`"),
        (
            "a: {query: SELECT 1, search_path: ['x, public'], metrics: [{n: {usage: GAUGE}}]}",
            "no plain name of a schema",
        ),
        *(
            (
                f"a: {{query: SELECT 1, metrics: [{{{label}: {{usage: LABEL}}}}, {{n: {{usage: GAUGE}}}}]}}",
                "is a label already",
            )
            for label in ("server", "le", "__name__")
        ),
        ("a: {query: SELECT 1, metrics: [{n: {usage: GAUGE}}, {n: {usage: GAUGE}}]}", "n: is there twice"),
        *(
            (
                f"{name}: {{query: SELECT 1, metrics: [{{{column}: {{usage: GAUGE}}}}]}}",
                f"{name}_{column} is, or may be, a fam",
            )
            for name, column in (
                ("instance_manager_a", "n"),
                ("instance_manager", "healthy"),
                ("pg", "up"),
                ("pg_settings", "max_connections"),
                ("pg_exporter", "scrapes_total"),
                ("process", "open_fds"),
            )
        ),
        # The same name with other labels, or as another type: neither of the two could be believed.
        ("pg_locks: {query: SELECT 1, metrics: [{count: {usage: GAUGE}}]}", "as a gauge with the labels datname, mode"),
        (
            "pg_locks: {query: SELECT 1, metrics: [{datname: {usage: LABEL}}, {mode: {usage: LABEL}}, {count: {usage: COUNTER}}]}",
            "pg_locks_count is built in, as a gauge",
        ),
        (
            "pg: {query: SELECT 1, metrics: [{database: {usage: LABEL}}, {locks: {usage: HISTOGRAM}}]}",
            "pg_locks_count is built in",
        ),
        (f"a: {ONE}\nb: {{name: a, query: SELECT 2 AS n, metrics: [{{n: {{usage: GAUGE}}}}]}}", "a_n: is there twice"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_is_wrong(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "queries.yaml").write_text(text)
    with pytest.raises(QueriesUnusable) as raised:
        load_all([tmp_path / "queries.yaml"])
    assert complaint in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_one_name_for_two_ranges_of_versions_is_no_duplicate() -> None:
    body = "query: SELECT 1 AS n, metrics: [{n: {usage: GAUGE}}]}"
    found = parse_queries(f"a: {{runonserver: '<15.0.0', {body}\nb: {{name: a, runonserver: '>=15.0.0', {body}", "test")
    assert [query.query.name for query in found] == ["a", "a"]
