"""SQL sessions: never fooled by a tenant's operators, never hanging on a server that has stopped, never leaking sockets."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import time
from pathlib import Path

import asyncpg
import pytest
from own_fixtures import own_template, servers
from own_server import APPLICATION_PASSWORD, Servers

from instance_manager.postgres.server import DeadlinePassed, ProgramFailed, run_program
from instance_manager.postgres.sql import LocalSql, SqlUnavailable, quote_identifier, quote_literal, session

__all__ = ["own_template", "servers"]


def open_sockets() -> int:
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            count += path.readlink().name.startswith("socket:")
        except OSError:
            continue
    return count


async def test_operators_planted_in_public_are_not_run(servers: Servers) -> None:
    one = await servers.primary()
    planted = await asyncpg.connect(
        host="127.0.0.1", port=one.server.port, user="app", password=APPLICATION_PASSWORD, database="app", ssl=False
    )
    await planted.execute(
        """
        create table public.caught(who name);
        create function public.evil(bigint, integer) returns boolean language plpgsql as
          $$ begin insert into public.caught values (current_user); return true; end $$;
        create operator public.> (leftarg = bigint, rightarg = integer, function = public.evil);
        create function public.now() returns timestamptz language plpgsql as
          $$ begin insert into public.caught values (current_user); return null; end $$;
        create table public.pg_stat_activity(pid int);
        alter role app set search_path = public, pg_catalog;
        """
    )
    await planted.execute("set search_path = public, pg_catalog")
    await planted.fetchval("select 1::bigint > 2")
    assert await planted.fetchval("select count(*) from public.caught") == 1
    async with session(one.server, database="app") as ours:
        await ours.execute("alter database app set search_path = public, pg_catalog")
    async with session(one.server, database="app") as ours:
        assert await ours.fetchval("select 1::bigint > 2") is False
        assert await ours.fetchval("select now() is not null")
        assert await ours.fetchval("select count(*) > 0 from pg_stat_activity")
        assert await ours.fetchval("show search_path") == "pg_catalog,pg_temp"
        assert await ours.fetchval("show synchronous_commit") == "local"
        assert await ours.fetchval("show application_name") == "instance-manager"
    assert await planted.fetchval("select count(*) from public.caught") == 1
    planted.terminate()


async def test_a_stopped_postmaster_is_a_deadline_and_leaks_nothing(servers: Servers) -> None:
    one = await servers.primary()
    sql = LocalSql(one.server)
    assert await sql.fetchval("select 1") == 1
    before = open_sockets()
    assert one.process is not None
    one.process.send_signal(signal.SIGSTOP)
    try:
        assert await sql.fetchval("select 2") == 2
        for _ in range(5):
            began_s = time.monotonic()
            with pytest.raises(DeadlinePassed):
                async with session(one.server, deadline_s=0.1):
                    pass
            assert time.monotonic() - began_s < 1
        await asyncio.sleep(0.05)
        assert open_sockets() == before
    finally:
        one.process.send_signal(signal.SIGCONT)
    assert await one.fetchval("select 3") == 3
    sql.close()


async def test_a_stopped_backend_is_a_deadline_and_the_next_call_has_a_new_session(servers: Servers) -> None:
    one = await servers.primary()
    sql = LocalSql(one.server)
    pid = await sql.fetchval("select pg_backend_pid()")
    before = open_sockets()
    os.kill(pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        results = await asyncio.gather(
            *(sql.fetchval("select 1", deadline_s=0.2) for _ in range(3)), return_exceptions=True
        )
        assert time.monotonic() - began_s < 2
        assert isinstance(results[0], DeadlinePassed)
        assert await sql.fetchval("select 1") == 1
        assert await sql.fetchval("select pg_backend_pid()") != pid
        await asyncio.sleep(0.05)
        assert open_sockets() <= before
    finally:
        os.kill(pid, signal.SIGCONT)
    # No cancel request was sent: the postmaster had no connection beyond ours.
    assert "canceling statement due to user request" not in one.log()
    sql.close()


async def test_a_cancelled_call_closes_its_session(servers: Servers) -> None:
    one = await servers.primary()
    sql = LocalSql(one.server)
    pid = await sql.fetchval("select pg_backend_pid()")
    task = asyncio.create_task(sql.fetchval("select pg_sleep(30)", deadline_s=60))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await sql.fetchval("select pg_backend_pid()") != pid
    # The backend sees that its client is gone while it sleeps.
    await one.wait_for("select not exists(select from pg_stat_activity where query like '%pg_sleep(30)')", deadline_s=5)
    sql.close()


async def test_a_statement_that_takes_too_long_ends_in_the_server(servers: Servers) -> None:
    one = await servers.primary()
    async with session(one.server, statement_timeout_s=0.2) as opened:
        with pytest.raises(asyncpg.QueryCanceledError):
            await opened.fetchval("select pg_sleep(5)")
        assert await opened.fetchval("select 1") == 1


async def test_a_server_that_went_away_is_unavailable_and_comes_back(servers: Servers) -> None:
    one = await servers.primary()
    sql = LocalSql(one.server)
    assert await sql.fetchval("select 1") == 1
    await one.stop()
    for _ in range(2):
        with pytest.raises(SqlUnavailable):
            await sql.fetchval("select 1")
    await one.start()
    assert await sql.fetchval("select 1") == 1
    await sql.execute("select 1; select 2")
    with pytest.raises(asyncpg.UndefinedTableError):
        await sql.fetch("select * from nowhere")
    assert await sql.fetchval("select $1::text", "a'b") == "a'b"
    sql.close()


async def test_quoted_text_comes_back_as_it_was(servers: Servers) -> None:
    one = await servers.primary()
    async with session(one.server) as opened:
        for text in ("", "a'b", "\\'; drop table x; --", "\\", "''", "ü\n$$"):
            assert await opened.fetchval(f"select{quote_literal(text)}") == text
    for name in ('a"b', "A", "", "a b", "x" * 64, "1a"):
        with pytest.raises(ValueError, match="not a name"):
            quote_identifier(name)


async def test_a_program_is_killed_and_reaped_at_its_deadline(servers: Servers) -> None:
    one = servers.new("x")
    began_s = time.monotonic()
    with pytest.raises(DeadlinePassed):
        await run_program(one.server, ["/bin/sleep", "30"], deadline_s=0.2)
    task = asyncio.create_task(run_program(one.server, ["/bin/sleep", "30"], deadline_s=60))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began_s < 3
    lines: list[str] = []
    with pytest.raises(ProgramFailed) as failed:
        await run_program(
            one.server,
            ["/bin/sh", "-c", "id -u; id -G; printf 'a\\rb\\nc' >&2; exit 3"],
            deadline_s=5,
            on_line=lines.append,
        )
    assert failed.value.exit_code == 3
    assert lines == ["a", "b", "c"]
    identity = await run_program(one.server, ["/bin/sh", "-c", "id -u; id -G; cat"], deadline_s=5, input=b"in")
    if one.server.run_as is not None:
        assert identity.split() == [str(one.server.run_as.uid), str(one.server.run_as.gid), "in"]


_PARENT = """
import asyncio, sys
from pathlib import Path
from instance_manager.postgres.server import LocalServer, run_program

here = Path("/")
server = LocalServer(here, here, here, "", 1, here, None)
asyncio.run(run_program(server, ["/bin/sh", "-c", "echo $$ >&2; exec sleep 300"], deadline_s=300, ends_with_parent=True,
                        on_line=lambda line: print(line, flush=True)))
"""


async def test_a_program_that_ends_with_its_parent_outlives_no_kill() -> None:
    """pg_combinebackup writes into a place that the next restore empties."""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", _PARENT, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = int(await asyncio.wait_for(parent.stdout.readline(), 30))
    descriptor = os.pidfd_open(child)
    try:
        parent.kill()
        await parent.wait()
        readable, _, _ = await asyncio.to_thread(select.select, [descriptor], [], [], 10)
        assert readable, "it lives"
    finally:
        os.close(descriptor)
