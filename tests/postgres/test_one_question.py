"""One question without a driver: what a real server answers, refuses, or does not answer."""

from __future__ import annotations

import pytest
from harness import Cluster, frozen, wait_until

from instance_manager.postgres import one_question
from instance_manager.postgres.server import DeadlinePassed
from instance_manager.postgres.sql import SqlUnavailable

NAME = "instance-manager: test"


async def test_the_first_row_comes_as_text(cluster: Cluster) -> None:
    server = (await cluster.primary()).server

    async def ask(query: str) -> list[str | None]:
        return await one_question.ask(server, query, application_name=NAME, deadline_s=5)

    assert await ask("SELECT 1, NULL, 'ä' UNION ALL SELECT 2, '', ''") == ["1", None, "ä"]
    assert await ask("SELECT 1 WHERE false") == []
    assert await ask("SHOW search_path") == ["pg_catalog,pg_temp"]
    assert await ask("SHOW application_name") == [NAME]


async def test_what_the_server_refuses_carries_its_state(cluster: Cluster) -> None:
    server = (await cluster.primary()).server
    with pytest.raises(SqlUnavailable, match="no_such_table") as refused:
        await one_question.ask(server, "SELECT * FROM no_such_table", application_name=NAME, deadline_s=5)
    assert refused.value.sqlstate == "42P01"


async def test_an_answer_without_an_end_is_refused_before_it_fills_the_memory(cluster: Cluster) -> None:
    server = (await cluster.primary()).server
    with pytest.raises(SqlUnavailable, match="more than"):
        await one_question.ask(server, "SELECT repeat('x', 200000)", application_name=NAME, deadline_s=5)


async def test_a_silent_server_is_left_after_the_deadline(cluster: Cluster) -> None:
    primary = await cluster.primary()
    with frozen(primary.pid), pytest.raises(DeadlinePassed):
        await one_question.ask(primary.server, "SELECT 1", application_name=NAME, deadline_s=0.3)


async def test_nothing_of_it_stays_in_the_server_or_its_log(cluster: Cluster) -> None:
    primary = await cluster.primary()
    for _ in range(5):
        await one_question.ask(primary.server, "SELECT 1", application_name=NAME, deadline_s=5)
    async with primary.session() as client:
        left = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"

        async def none_is_left() -> bool:
            return bool(await client.fetchval(left, NAME) == 0)

        await wait_until(none_is_left, what="the connections have ended")
    assert "unexpected EOF" not in primary.log_text()
