"""Roles, databases and extensions as declared: each is looked at, and only what differs is changed. Nothing is dropped but a
role that is declared absent and that carries our mark.

Who does it. Roles and databases are made by the superuser in the database `postgres`, over the Unix socket, with a pinned
`search_path`; there nobody else may create anything. A tenant's database is entered for its extensions only:

- one that Postgres calls trusted and that needs the superuser is created *as the database's owner*: it is the owner's, and
  Postgres itself runs its script, which was written for that, as the superuser (CVE-2026-55769);
- any other's script runs with the rights of this session, and might call what a tenant planted in the same schema. It goes into
  a schema in which only the superuser may create, by default `extensions`; a schema that is there and somebody else's is refused.

A script never runs behind `SET ROLE` with a tenant's rights: it is no wall, because what a tenant planted may say RESET ROLE and
is the superuser then. So one whose script runs with the rights of whoever calls it, and that a tenant owns, is the tenant's to update.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg

from instance_manager.postgres.bootstrap import scram_verifier, verifies
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.postgres.sql import Session, quote_identifier, quote_literal

MARK = "made by the instance manager"
"""A comment on a role: only such a one is ever dropped."""
SUPERUSERS_SCHEMA = "extensions"
DEADLINE_S = 10.0
LONG_DEADLINE_S = 120.0
"""Of CREATE DATABASE and CREATE EXTENSION."""

Open = Callable[[str], AbstractAsyncContextManager[Session]]
"""A superuser's session in a database; see `sql.session`."""


class ManagedRefused(LocalPostgresError):
    """What is there is not to be touched; the text says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleWanted:
    name: str
    present: bool = True
    login: bool = True
    createdb: bool = False
    createrole: bool = False
    inherit: bool = True
    member_of: tuple[str, ...] = ()
    password: str | None = field(default=None, repr=False)
    connection_limit: int = -1
    valid_until: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionWanted:
    name: str
    version: str | None = None
    schema: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseWanted:
    name: str
    owner: str
    encoding: str = "UTF8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    what: str
    state: str
    """as declared, changed, failed, left alone."""
    problem: str | None = None


async def keep(what: str, work: Awaitable[bool]) -> Outcome:
    """One thing; how it ended. A failure is told and holds up nothing else."""
    try:
        changed = await work
    except ManagedRefused as error:
        return Outcome(what=what, state="left alone", problem=str(error))
    except (asyncpg.PostgresError, LocalPostgresError, OSError, ValueError, TimeoutError) as error:
        return Outcome(what=what, state="failed", problem=" ".join(str(error).split()) or type(error).__name__)
    return Outcome(what=what, state="changed" if changed else "as declared")


async def keep_role(sql: Session, wanted: RoleWanted) -> bool:
    """True: something was changed. ManagedRefused: it is a superuser's or a replication role, or not ours to drop."""
    role = quote_identifier(wanted.name)
    row = await sql.fetchrow(
        "select rolsuper, rolreplication, rolbypassrls, rolcanlogin, rolcreatedb, rolcreaterole, rolinherit, rolconnlimit, "
        "rolvaliduntil, rolpassword, pg_catalog.shobj_description(oid, 'pg_authid') as comment "
        "from pg_catalog.pg_authid where rolname = $1",
        wanted.name,
        deadline_s=DEADLINE_S,
    )
    if not wanted.present:
        return await _drop_role(sql, role, row)
    changed = row is None
    if row is None:
        # In one transaction, so that none is ever left without its mark.
        await sql.execute(
            f"BEGIN; CREATE ROLE {role} {_attributes(wanted)}; COMMENT ON ROLE {role} IS {quote_literal(MARK)}; COMMIT",
            deadline_s=DEADLINE_S,
        )
    elif row["rolsuper"] or row["rolreplication"] or row["rolbypassrls"]:
        raise ManagedRefused(
            "a role of this name is there with SUPERUSER, REPLICATION or BYPASSRLS, which are never managed; take them away "
            "or give another name"
        )
    elif _differs(row, wanted):
        await sql.execute(f"ALTER ROLE {role} {_attributes(wanted)}", deadline_s=DEADLINE_S)
        changed = True
    if wanted.password is not None and not verifies(wanted.password, (row["rolpassword"] if row else None) or ""):
        verifier = quote_literal(scram_verifier(wanted.password))
        await sql.execute(f"ALTER ROLE {role} PASSWORD {verifier}", deadline_s=DEADLINE_S)
        changed = True
    return await _keep_memberships(sql, wanted) or changed


async def _drop_role(sql: Session, role: str, row: asyncpg.Record | None) -> bool:
    if row is None:
        return False
    if row["comment"] != MARK:
        raise ManagedRefused("it is declared absent, and was not made by the instance manager; drop it by hand")
    # Refused by Postgres while it owns anything: nothing of anybody's is dropped along.
    await sql.execute(f"DROP ROLE {role}", deadline_s=DEADLINE_S)
    return True


def _attributes(wanted: RoleWanted) -> str:
    switches = (
        ("LOGIN", wanted.login),
        ("CREATEDB", wanted.createdb),
        ("CREATEROLE", wanted.createrole),
        ("INHERIT", wanted.inherit),
    )
    words = [word if on else f"NO{word}" for word, on in switches]
    until = "infinity" if wanted.valid_until is None else wanted.valid_until.isoformat()
    return " ".join((*words, f"CONNECTION LIMIT {wanted.connection_limit:d}", f"VALID UNTIL {quote_literal(until)}"))


def _differs(row: asyncpg.Record, wanted: RoleWanted) -> bool:
    present = (
        row["rolcanlogin"],
        row["rolcreatedb"],
        row["rolcreaterole"],
        row["rolinherit"],
        row["rolconnlimit"],
    )
    declared = (wanted.login, wanted.createdb, wanted.createrole, wanted.inherit, wanted.connection_limit)
    # asyncpg tells `infinity` as the last moment that a datetime has.
    until = row["rolvaliduntil"]
    for_ever = until is None or until.year == datetime.max.year
    return present != declared or (None if for_ever else until) != wanted.valid_until


async def _keep_memberships(sql: Session, wanted: RoleWanted) -> bool:
    """Grant what is missing. What somebody else granted stays: it is not ours to take."""
    rows = await sql.fetch(
        "select g.rolname from pg_catalog.pg_auth_members m join pg_catalog.pg_roles g on g.oid = m.roleid "
        "join pg_catalog.pg_roles r on r.oid = m.member where r.rolname = $1",
        wanted.name,
        deadline_s=DEADLINE_S,
    )
    missing = [group for group in wanted.member_of if group not in {row["rolname"] for row in rows}]
    for group in missing:
        if await _reaches_superuser(sql, group):
            raise ManagedRefused(f"membership in {group} would make it as good as superuser")
        await sql.execute(f"GRANT {quote_identifier(group)} TO {quote_identifier(wanted.name)}", deadline_s=DEADLINE_S)
    return bool(missing)


async def _reaches_superuser(sql: Session, group: str) -> bool:
    """Itself, or whatever it is a member of in turn."""
    return bool(
        await sql.fetchval(
            "with recursive up(oid) as (select oid from pg_catalog.pg_roles where rolname = $1 "
            "union select m.roleid from pg_catalog.pg_auth_members m join up on m.member = up.oid) "
            "select pg_catalog.bool_or(r.rolsuper or r.rolreplication or r.rolname = any($2::name[])) "
            "from up join pg_catalog.pg_roles r using (oid)",
            group,
            ["pg_execute_server_program", "pg_write_server_files", "pg_read_server_files"],
            deadline_s=DEADLINE_S,
        )
    )


async def keep_database(sql: Session, wanted: DatabaseWanted) -> bool:
    """True: created, or given to its owner. The encoding of one that is there is as it is."""
    database, owner = quote_identifier(wanted.name), quote_identifier(wanted.owner)
    row = await sql.fetchrow(
        "select pg_catalog.pg_get_userbyid(datdba) as owner, datistemplate as template, "
        "pg_catalog.pg_encoding_to_char(encoding) as encoding from pg_catalog.pg_database where datname = $1",
        wanted.name,
        deadline_s=DEADLINE_S,
    )
    if row is None:
        # template0: what somebody put into template1 is not copied, and any encoding is possible.
        await sql.execute(
            f"CREATE DATABASE {database} OWNER {owner} TEMPLATE template0 ENCODING {quote_literal(wanted.encoding)}",
            deadline_s=LONG_DEADLINE_S,
        )
        return True
    if row["template"]:
        raise ManagedRefused("it is a template; it is not touched")
    if row["encoding"] != wanted.encoding:
        raise ManagedRefused(
            f"its encoding is {row['encoding']}, {wanted.encoding} is declared: dump it and make it anew, or declare what it is"
        )
    if row["owner"] == wanted.owner:
        return False
    await sql.execute(f"ALTER DATABASE {database} OWNER TO {owner}", deadline_s=DEADLINE_S)
    return True


async def keep_extension(open_: Open, database: str, wanted: ExtensionWanted) -> bool:
    """True: created or updated. It is never dropped, moved or set back."""
    async with open_(database) as sql:
        installed = await sql.fetchrow(
            "select e.extversion as version, pg_catalog.pg_get_userbyid(e.extowner) as owner, r.rolsuper as by_superuser, "
            "n.nspname as schema from pg_catalog.pg_extension e join pg_catalog.pg_roles r on r.oid = e.extowner "
            "join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = $1",
            wanted.name,
            deadline_s=DEADLINE_S,
        )
        if installed is None:
            await _create_extension(sql, wanted)
            return True
        if wanted.version is None or installed["version"] == wanted.version:
            return False
        update = f"ALTER EXTENSION {_extension(wanted.name)} UPDATE TO {quote_literal(wanted.version)}"
        if installed["by_superuser"]:
            await _require_safe_schema(sql, installed["schema"])
        elif not await _runs_as_superuser_for_others(sql, wanted):
            raise ManagedRefused(
                f"{installed['owner']} owns it, and its script would run what {installed['owner']} may have planted: let "
                f"{installed['owner']} say ALTER EXTENSION {wanted.name} UPDATE"
            )
        await _as_role(sql, installed["owner"], update)
        return True


async def _create_extension(sql: Session, wanted: ExtensionWanted) -> None:
    offered = await sql.fetchrow(
        "select v.trusted and v.superuser as by_anybody, v.schema, pg_catalog.pg_get_userbyid(d.datdba) as owner, r.rolsuper as owner_is_superuser "
        "from pg_catalog.pg_available_extensions e "
        "join pg_catalog.pg_available_extension_versions v on v.name = e.name "
        "and v.version = coalesce($2, e.default_version), "
        "pg_catalog.pg_database d join pg_catalog.pg_roles r on r.oid = d.datdba "
        "where e.name = $1 and d.datname = pg_catalog.current_database()",
        wanted.name,
        wanted.version,
        deadline_s=DEADLINE_S,
    )
    if offered is None:
        version = f" in version {wanted.version}" if wanted.version else ""
        raise ManagedRefused(f"this server's programs do not bring it{version}; install its package on every instance")
    version = f" VERSION {quote_literal(wanted.version)}" if wanted.version is not None else ""
    if offered["by_anybody"] and not offered["owner_is_superuser"]:
        schema = wanted.schema or offered["schema"] or "public"
        where = "" if offered["schema"] is not None else f" SCHEMA {quote_identifier(schema)}"
        make = f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(schema)}; " if wanted.schema is not None else ""
        await _as_role(sql, offered["owner"], f"{make}CREATE EXTENSION {_extension(wanted.name)}{where}{version}")
        return
    schema = offered["schema"] or wanted.schema or SUPERUSERS_SCHEMA
    if schema != "pg_catalog":
        await _require_safe_schema(sql, schema, may_be_missing=True)
    where = "" if offered["schema"] is not None else f" SCHEMA {quote_identifier(schema)}"
    make = ""
    if offered["schema"] is None:
        # CREATE SCHEMA fails if somebody was faster: never IF NOT EXISTS, which would take theirs.
        exists = await sql.fetchval("select pg_catalog.to_regnamespace($1) is not null", quote_identifier(schema))
        name = quote_identifier(schema)
        make = "" if exists else f"CREATE SCHEMA {name}; GRANT USAGE ON SCHEMA {name} TO PUBLIC; "
    await sql.execute(
        f"BEGIN; {make}CREATE EXTENSION {_extension(wanted.name)}{where}{version}; COMMIT", deadline_s=LONG_DEADLINE_S
    )


async def _runs_as_superuser_for_others(sql: Session, wanted: ExtensionWanted) -> bool:
    """Does Postgres run every step to this version as the superuser, whoever asks for it? Each step has its own version's word."""
    rows = await sql.fetch(
        "select coalesce(v.trusted and v.superuser, false) as by_anybody from pg_catalog.pg_extension e "
        "join pg_catalog.pg_extension_update_paths($1) p on p.source = e.extversion and p.target = $2 "
        "cross join pg_catalog.string_to_table(p.path, '--') as step (version) "
        "left join pg_catalog.pg_available_extension_versions v on v.name = $1 and v.version = step.version "
        "where e.extname = $1 and step.version <> e.extversion",
        wanted.name,
        wanted.version,
        deadline_s=DEADLINE_S,
    )
    return bool(rows) and all(row["by_anybody"] for row in rows)


async def _require_safe_schema(sql: Session, schema: str, *, may_be_missing: bool = False) -> None:
    """ManagedRefused: others than superusers may create in it, and so plant what an extension's script would call."""
    row = await sql.fetchrow(
        "select o.rolsuper as ours, exists(select from pg_catalog.aclexplode(n.nspacl) a left join pg_catalog.pg_roles r "
        "on r.oid = a.grantee where a.privilege_type = 'CREATE' and not coalesce(r.rolsuper, false)) as open "
        "from pg_catalog.pg_namespace n join pg_catalog.pg_roles o on o.oid = n.nspowner where n.nspname = $1",
        schema,
        deadline_s=DEADLINE_S,
    )
    if row is None:
        if may_be_missing:
            return
        raise ManagedRefused(f"there is no schema {schema}")
    if not row["ours"] or row["open"]:
        raise ManagedRefused(
            f"it needs the superuser, and in the schema {schema} others may create what its script would call; "
            "declare a schema of its own"
        )


async def _as_role(sql: Session, role: str, statement: str) -> None:
    """In one transaction with the rights of `role`; nothing that `role` may have planted may run in it."""
    await sql.execute(f"BEGIN; SET LOCAL ROLE {_any_name(role)}; {statement}; COMMIT", deadline_s=LONG_DEADLINE_S)


def _extension(name: str) -> str:
    """Names of extensions may have a hyphen (`uuid-ossp`)."""
    quote_identifier(name.replace("-", "_"))
    return f'"{name}"'


def _any_name(name: str) -> str:
    """Of a role that is there, whoever made it; from the catalogue."""
    if "\0" in name:
        raise ValueError("a zero byte cannot be in a name")
    return '"' + name.replace('"', '""') + '"'
