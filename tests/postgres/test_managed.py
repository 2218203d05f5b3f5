"""What is declared inside Postgres: made once, mended when it differs, never dropped if it is not ours, never a way up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from own_fixtures import own_template, servers
from own_server import APPLICATION_PASSWORD, ROLES, OwnServer, Servers

from instance_manager.postgres import observation
from instance_manager.postgres.bootstrap import create_roles, verifies
from instance_manager.postgres.managed import (
    DatabaseWanted,
    ExtensionWanted,
    ManagedRefused,
    RoleWanted,
    keep,
    keep_database,
    keep_extension,
    keep_role,
)
from instance_manager.postgres.sql import LocalSql, Session, session

__all__ = ["own_template", "servers"]

REPORTING = RoleWanted(
    name="reporting",
    member_of=("pg_read_all_data",),
    password="reports' \\secret",
    connection_limit=3,
    valid_until=datetime(2040, 1, 1, tzinfo=UTC),
)


def opener(server: OwnServer) -> Any:
    @contextlib.asynccontextmanager
    async def open_(database: str) -> AsyncIterator[Session]:
        async with session(server.server, database=database, statement_timeout_s=60) as opened:
            yield opened

    return open_


async def as_user(server: OwnServer, user: str, password: str, database: str) -> asyncpg.Connection:
    return await asyncpg.connect(
        host="127.0.0.1", port=server.server.port, user=user, password=password, database=database, ssl=False
    )


async def test_a_role_is_made_as_declared_and_made_once(servers: Servers) -> None:
    one = await servers.primary()
    async with session(one.server) as sql:
        assert await keep_role(sql, REPORTING)
        assert not await keep_role(sql, REPORTING)
        row = await sql.fetchrow("select * from pg_authid where rolname = 'reporting'")
        assert row is not None
        assert (row["rolsuper"], row["rolcreatedb"], row["rolcanlogin"], row["rolconnlimit"]) == (False, False, True, 3)
        assert row["rolvaliduntil"] == datetime(2040, 1, 1, tzinfo=UTC)
        assert verifies("reports' \\secret", row["rolpassword"])
        assert await sql.fetchval("select pg_has_role('reporting', 'pg_read_all_data', 'USAGE')")
    connection = await as_user(one, "reporting", "reports' \\secret", "app")
    connection.terminate()


async def test_what_somebody_changed_by_hand_is_mended_and_what_is_not_declared_stays(servers: Servers) -> None:
    one = await servers.primary()
    async with session(one.server) as sql:
        await keep_role(sql, REPORTING)
        await sql.execute(
            "alter role reporting createdb connection limit 99 password null; grant pg_signal_backend to reporting"
        )
        assert await keep_role(sql, REPORTING)
        assert not await keep_role(sql, REPORTING)
        assert await sql.fetchval("select rolconnlimit from pg_roles where rolname = 'reporting'") == 3
        assert await sql.fetchval("select pg_has_role('reporting', 'pg_signal_backend', 'MEMBER')")
        changed = RoleWanted(name="reporting", login=False)
        assert await keep_role(sql, changed)
        assert not await keep_role(sql, changed)
        # No password declared: the one that is there is left alone.
        assert await sql.fetchval("select rolpassword is not null from pg_authid where rolname = 'reporting'")


async def test_only_what_we_made_is_dropped_and_never_with_what_it_owns(servers: Servers) -> None:
    one = await servers.primary()
    async with session(one.server) as sql:
        await sql.execute("create role theirs")
        await sql.execute("create database owned_by_ours")
        with pytest.raises(ManagedRefused, match="was not made by the instance manager"):
            await keep_role(sql, RoleWanted(name="theirs", present=False))
        await keep_role(sql, REPORTING)
        await sql.execute("alter database owned_by_ours owner to reporting")
        outcome = await keep("role reporting", keep_role(sql, RoleWanted(name="reporting", present=False)))
        assert outcome.state == "failed"
        assert "cannot be dropped because some objects depend on it" in (outcome.problem or "")
        await sql.execute("alter database owned_by_ours owner to postgres")
        assert await keep_role(sql, RoleWanted(name="reporting", present=False))
        assert not await keep_role(sql, RoleWanted(name="reporting", present=False))
        assert await sql.fetchval("select count(*) from pg_roles where rolname in ('theirs', 'reporting')") == 1


async def test_no_declaration_makes_a_role_as_good_as_superuser(servers: Servers) -> None:
    one = await servers.primary()
    async with session(one.server) as sql:
        await sql.execute(
            "create role boss superuser; create role hidden; grant boss to hidden; create role runner; "
            "grant pg_execute_server_program to runner; create role copy replication"
        )
        for group in ("boss", "hidden", "runner", "copy"):
            with pytest.raises(ManagedRefused, match="as good as superuser"):
                await keep_role(sql, RoleWanted(name="climber", member_of=(group,)))
        for present in ("boss", "copy", "postgres"):
            with pytest.raises(ManagedRefused, match="never managed"):
                await keep_role(sql, RoleWanted(name=present, password="mine now"))
        assert await sql.fetchval("select count(*) from pg_authid where rolpassword is not null and rolsuper") == 0


async def test_databases_are_made_for_their_owner_and_never_changed_beyond_that(servers: Servers) -> None:
    one = await servers.primary()
    wanted = DatabaseWanted(name="orders", owner="app")
    async with session(one.server, statement_timeout_s=60) as sql:
        assert await keep_database(sql, wanted)
        assert not await keep_database(sql, wanted)
        await sql.execute("alter database orders owner to postgres")
        assert await keep_database(sql, wanted)
        with pytest.raises(ManagedRefused, match="its encoding is UTF8, LATIN1 is declared"):
            await keep_database(sql, DatabaseWanted(name="orders", owner="app", encoding="LATIN1"))
        with pytest.raises(ManagedRefused, match="template"):
            await keep_database(sql, DatabaseWanted(name="template1", owner="app"))


async def test_a_failure_is_told_and_is_nobody_elses(servers: Servers) -> None:
    one = await servers.primary()
    async with session(one.server) as sql:
        failed = await keep("database x", keep_database(sql, DatabaseWanted(name="x", owner="nobody_of_this_name")))
        assert (failed.state, failed.problem) == ("failed", 'role "nobody_of_this_name" does not exist')
        assert (await keep("role reporting", keep_role(sql, REPORTING))).state == "changed"


async def test_a_trusted_extension_is_its_databases_owners(servers: Servers) -> None:
    one = await servers.primary()
    open_ = opener(one)
    assert await keep_extension(open_, "app", ExtensionWanted(name="pg_trgm"))
    assert not await keep_extension(open_, "app", ExtensionWanted(name="pg_trgm"))
    assert await keep_extension(open_, "app", ExtensionWanted(name="uuid-ossp", schema="ids"))
    assert await keep_extension(open_, "app", ExtensionWanted(name="citext", version="1.4", schema="ids"))
    assert await keep_extension(open_, "app", ExtensionWanted(name="citext", version="1.6"))
    async with open_("app") as sql:
        rows = await sql.fetch(
            "select e.extname, r.rolname, n.nspname from pg_extension e join pg_roles r on r.oid = e.extowner "
            "join pg_namespace n on n.oid = e.extnamespace where e.extname <> 'plpgsql' order by 1"
        )
        assert [tuple(row) for row in rows] == [
            ("citext", "app", "ids"),
            ("pg_trgm", "app", "public"),
            ("uuid-ossp", "app", "ids"),
        ]
        assert await sql.fetchval("select extversion from pg_extension where extname = 'citext'") == "1.6"


async def test_one_that_needs_the_superuser_goes_where_only_the_superuser_creates(servers: Servers) -> None:
    one = await servers.primary()
    open_ = opener(one)
    assert await keep_extension(open_, "app", ExtensionWanted(name="pg_stat_statements"))
    async with open_("app") as sql:
        assert (
            await sql.fetchval(
                "select extnamespace::regnamespace::text from pg_extension where extname like 'pg_stat%'"
            )
            == "extensions"
        )
    tenant = await as_user(one, "app", APPLICATION_PASSWORD, "app")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await tenant.execute("create table extensions.planted (id int)")
    await tenant.execute("create schema trap")
    tenant.terminate()
    for schema in ("trap", "public"):
        with pytest.raises(ManagedRefused, match="others may create what its script would call"):
            await keep_extension(open_, "app", ExtensionWanted(name="pg_buffercache", schema=schema))
    with pytest.raises(ManagedRefused, match="do not bring it"):
        await keep_extension(open_, "app", ExtensionWanted(name="no_such_extension"))


PLANTED = """
create table public.caught (who name, what text);
grant all on public.caught to public;
{operators}
create function public.count(text) returns bigint language plpgsql as
  $$ begin insert into public.caught values (current_user, 'count'); return 1; end $$;
create function public.pg_get_userbyid(oid) returns name language plpgsql as
  $$ begin insert into public.caught values (current_user, 'function'); return 'x'; end $$;
create function public.format(text, text) returns text language plpgsql as
  $$ begin insert into public.caught values (current_user, 'format'); return ''; end $$;
create function public.array_agg(name) returns text language plpgsql as
  $$ begin insert into public.caught values (current_user, 'agg'); return ''; end $$;
create table public.pg_extension (extname name, extversion text, extowner oid, extnamespace oid);
create table public.pg_roles (rolname name, oid oid, rolsuper bool);
create table public.pg_namespace (oid oid, nspname name);
"""
FUNCTION = """create function public.evil(KIND, KIND) returns boolean language plpgsql as
  $$ begin insert into public.caught values (current_user, 'operator'); return true; end $$;
"""
OPERATOR = "create operator public.SIGN (leftarg = KIND, rightarg = KIND, function = public.evil);\n"
OPERATORS = "".join(
    (FUNCTION + "".join(OPERATOR.replace("SIGN", sign) for sign in ("=", "<>", ">", "<"))).replace("KIND", kind)
    for kind in ("name", "text", "oid", "integer", "bigint", "pg_lsn", "boolean")
)


async def test_what_tenants_plant_is_never_run_by_the_superuser(servers: Servers) -> None:
    """CVE-2026-55769: everything that this program runs as superuser, with traps in `public` of both databases."""
    one = await servers.primary()
    tenant = await as_user(one, "app", APPLICATION_PASSWORD, "app")
    await tenant.execute(PLANTED.format(operators=OPERATORS))
    # What the owner of a database may set for everybody who enters it.
    await tenant.execute("alter role app set search_path = public, pg_catalog")
    await tenant.execute("set search_path = public, pg_catalog")
    await tenant.fetchval("select 'a'::name = 'b'::name")
    assert await tenant.fetchval("select pg_catalog.count(*) from public.caught") == 1
    await tenant.execute("truncate public.caught")
    async with session(one.server) as sql:
        # As if somebody had opened `postgres` to them as well, for both databases' default.
        await sql.execute("alter database app set search_path = public, pg_catalog")
        await sql.execute("alter database postgres set search_path = public, pg_catalog")
        await sql.execute("alter role postgres set search_path = public, pg_catalog")
        await sql.execute(PLANTED.format(operators=OPERATORS))
    async with session(one.server, statement_timeout_s=60) as sql:
        assert await create_roles(sql, ROLES) == ()
        await keep_role(sql, REPORTING)
        await keep_database(sql, DatabaseWanted(name="orders", owner="app"))
    kept = LocalSql(one.server)
    await observation.observe(kept, deadline_s=5)
    kept.close()
    open_ = opener(one)
    assert await keep_extension(open_, "app", ExtensionWanted(name="citext", schema="words"))
    assert await keep_extension(open_, "app", ExtensionWanted(name="pg_stat_statements"))
    assert not await keep_extension(open_, "app", ExtensionWanted(name="citext"))
    for database in ("app", "postgres"):
        async with open_(database) as sql:
            caught = await sql.fetch("select distinct who, what from public.caught where who = 'postgres'")
            assert caught == [], database
    tenant.terminate()


@contextlib.asynccontextmanager
async def sloppy_extension(server: OwnServer) -> AsyncIterator[str]:
    """Installed on the machine: Postgres runs its script with the rights of whoever creates it, and that calls a function without its schema."""
    async with session(server.server) as sql:
        folder = Path(await sql.fetchval("select setting from pg_config where name = 'SHAREDIR'"))
    if not os.access(folder / "extension", os.W_OK):
        pytest.skip(f"needs to put an extension into {folder}, that is, root")
    name = f"sloppy_{os.getpid()}"
    files = {
        folder / f"extension/{name}.control": "default_version = '1.0'\nsuperuser = false\ntrusted = true\n",
        folder / f"extension/{name}--1.0.sql": "CREATE TABLE sloppy_data (n int); SELECT helper();\n",
        folder / f"extension/{name}--1.0--1.1.sql": "SELECT helper();\n",
    }
    for path, text in files.items():
        path.write_text(text)
    try:
        yield name
    finally:
        for path in files:
            path.unlink()


TRAP = """
create or replace function public.helper() returns void language plpgsql as $$
  begin
    execute 'reset role';
    execute 'alter role app superuser';
  exception when others then
    insert into public.tried values (current_user, sqlerrm);
  end $$;
create table if not exists public.tried (who name, what text);
"""


async def test_a_script_that_runs_a_tenants_function_never_leads_to_the_superuser(
    servers: Servers,
) -> None:
    """`SET ROLE` is no wall: what runs behind it may say RESET ROLE, and is the session's user again."""
    one = await servers.primary()
    open_ = opener(one)
    tenant = await as_user(one, "app", APPLICATION_PASSWORD, "app")
    await tenant.execute(TRAP)

    async def is_superuser() -> bool:
        async with session(one.server) as sql:
            return bool(await sql.fetchval("select rolsuper from pg_roles where rolname = 'app'"))

    async with sloppy_extension(one) as name:
        with pytest.raises((ManagedRefused, asyncpg.PostgresError)):
            await keep_extension(open_, "app", ExtensionWanted(name=name))
        assert not await is_superuser()
        # One that the tenant has made, in its own schema and with its own rights: that is its own affair, and so is its update.
        await tenant.execute(f"create extension {name} schema public")
        with pytest.raises(ManagedRefused, match=r"let app say ALTER EXTENSION \w+ UPDATE"):
            await keep_extension(open_, "app", ExtensionWanted(name=name, version="1.1"))
        assert not await is_superuser()
        assert {row["who"] for row in await tenant.fetch("select who from public.tried")} == {"app"}
    tenant.terminate()


async def test_no_password_and_no_verifier_reaches_the_servers_log(servers: Servers) -> None:
    """CVE-2026-55765: even where the server logs every statement."""
    one = await servers.primary(
        log_statement="all",
        log_min_duration_statement=0,
        log_min_error_statement="debug5",
        log_error_verbosity="verbose",
    )
    async with session(one.server) as sql:
        await keep_role(sql, REPORTING)
        verifier = await sql.fetchval("select rolpassword from pg_authid where rolname = 'reporting'")
        with pytest.raises(asyncpg.PostgresError):
            await sql.execute(f"ALTER ROLE nobody_here PASSWORD '{verifier}'")
    await (await as_user(one, "app", APPLICATION_PASSWORD, "app")).execute("select 'is logged'")
    log = one.log()
    assert "is logged" in log
    assert "secret" not in log
    assert verifier not in log
    assert "SCRAM-SHA-256$" not in log


async def test_the_superuser_has_no_password_unless_one_is_configured(servers: Servers) -> None:
    one = await servers.primary()
    stored = "select rolpassword from pg_authid where rolname = 'postgres'"
    async with session(one.server) as sql:
        assert await sql.fetchval(stored) is None
        await sql.execute("alter role postgres password 'given by hand'")
        assert await create_roles(sql, ROLES) == ("no password for postgres",)
        assert await sql.fetchval(stored) is None
        assert await create_roles(sql, replace(ROLES, superuser_password="by choice")) == ("password of postgres",)
        assert verifies("by choice", str(await sql.fetchval(stored)))
