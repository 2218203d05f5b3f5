"""A new cluster: initdb, and the roles that every cluster has.

No password ever leaves this process: the server gets SCRAM verifiers, libpq reads a passfile. The superuser has none.
Between initdb and the opening of pg_hba.conf the server listens on its Unix socket only (`listen_address` empty).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import shutil
import stringprep
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from instance_manager.postgres.directory import INITDB_MARK, create_staging, install_staging
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.host_based_access import MONITORING_ROLE, REPLICATION_ROLE
from instance_manager.postgres.server import LocalServer, ProgramFailed, run_program
from instance_manager.postgres.sql import quote_identifier, quote_literal

SCRAM_ITERATIONS = 4096
_VERIFIER = re.compile(r"SCRAM-SHA-256\$(\d{1,9}):([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+):([A-Za-z0-9+/=]+)")
_RESERVED = frozenset({"postgres", "template0", "template1", "public", "none", REPLICATION_ROLE, MONITORING_ROLE})
# What pg_rewind calls on its source (from its documentation).
_REWIND_FUNCTIONS = (
    "pg_catalog.pg_ls_dir(text, boolean, boolean)",
    "pg_catalog.pg_stat_file(text, boolean)",
    "pg_catalog.pg_read_binary_file(text)",
    "pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean)",
)


class Sql(Protocol):
    """What is needed of `sql.Session` or `sql.LocalSql`."""

    async def fetchrow(self, query: str, *args: object, deadline_s: float = ...) -> Any: ...

    async def execute(self, query: str, *args: object, deadline_s: float = ...) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleOptions:
    """Roles that every cluster has, and their passwords (never shown)."""

    replication_password: str = field(repr=False)
    monitoring_password: str = field(repr=False)
    application_password: str = field(repr=False)
    superuser_password: str | None = field(default=None, repr=False)
    """None: the superuser has none, and one that somebody gave it is taken away."""
    superuser: str = "postgres"
    application_owner: str = "app"
    application_database: str = "app"


async def initialise(server: LocalServer, *, major: int, wal_segment_mib: int = 16, deadline_s: float = 120.0) -> str:
    """initdb into place; returns the locale. With checksums, UTF8, and the locale C.UTF-8, or C where it is unknown.

    The directory appears whole or not at all. DirectoryRefused: the place is taken. ProgramFailed, DeadlinePassed.
    """
    options = [["--locale=C.UTF-8"], ["--locale=C"]]
    if major >= 17:
        # Postgres's own: the order of an index never changes with the C library.
        options.insert(0, ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C.UTF-8"])
    for option in options:
        staging = await asyncio.to_thread(create_staging, server, INITDB_MARK)
        argv = [
            server.program("initdb"),
            f"--pgdata={staging}",
            f"--username={server.superuser}",
            "--encoding=UTF8",
            "--data-checksums",
            "--auth-local=peer",
            "--auth-host=reject",
            f"--wal-segsize={wal_segment_mib}",
            "--no-instructions",
            *option,
        ]
        try:
            await run_program(server, argv, deadline_s=deadline_s)
            await asyncio.to_thread(install_staging, server, staging)
        except ProgramFailed as error:
            if option is options[-1] or "locale" not in error.stderr:
                raise
        else:
            return option[-1].removeprefix("--locale=")
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True))
    raise AssertionError("unreachable")


async def create_roles(sql: Sql, options: RoleOptions, *, deadline_s: float = 30.0) -> tuple[str, ...]:
    """Create what is missing and mend what differs; returns what was done, nothing when called again.

    On a writable server, as superuser, in the database postgres (pg_rewind's rights are those of that database).
    ValueError: names that are reserved, or no plain names.
    """
    for name in (options.application_owner, options.application_database):
        if (problem := name_problem(name)) is not None:
            raise ValueError(problem)
    owner = quote_identifier(options.application_owner)
    database = quote_identifier(options.application_database)
    done: list[str] = []

    async def run(query: str, what: str) -> None:
        await sql.execute(query, deadline_s=deadline_s)
        done.append(what)

    for name, password, replication in (
        (REPLICATION_ROLE, options.replication_password, True),
        (MONITORING_ROLE, options.monitoring_password, False),
        (options.application_owner, options.application_password, False),
    ):
        row = await sql.fetchrow(
            "select rolpassword, rolcanlogin, rolreplication, rolsuper from pg_catalog.pg_authid where rolname = $1",
            name,
            deadline_s=deadline_s,
        )
        wanted = f"LOGIN NOSUPERUSER {'REPLICATION' if replication else 'NOREPLICATION'}"
        role = quote_identifier(name)
        verifier = quote_literal(scram_verifier(password))
        if row is None:
            await run(f"CREATE ROLE {role} {wanted} PASSWORD {verifier}", f"role {name}")
            continue
        if (row["rolcanlogin"], row["rolreplication"], row["rolsuper"]) != (True, replication, False):
            await run(f"ALTER ROLE {role} {wanted}", f"attributes of {name}")
        if not verifies(password, row["rolpassword"] or ""):
            await run(f"ALTER ROLE {role} PASSWORD {verifier}", f"password of {name}")

    row = await sql.fetchrow(
        "select rolpassword from pg_catalog.pg_authid where rolname = $1", options.superuser, deadline_s=deadline_s
    )
    superuser, stored = quote_identifier(options.superuser), row["rolpassword"] if row is not None else None
    if options.superuser_password is None and stored is not None:
        await run(f"ALTER ROLE {superuser} PASSWORD NULL", f"no password for {options.superuser}")
    elif options.superuser_password is not None and not verifies(options.superuser_password, stored or ""):
        verifier = quote_literal(scram_verifier(options.superuser_password))
        await run(f"ALTER ROLE {superuser} PASSWORD {verifier}", f"password of {options.superuser}")

    for function in _REWIND_FUNCTIONS:
        row = await sql.fetchrow(
            "select pg_catalog.has_function_privilege($1::text, $2::text, 'EXECUTE') as granted",
            REPLICATION_ROLE,
            function,
            deadline_s=deadline_s,
        )
        if not row["granted"]:
            await run(
                f"GRANT EXECUTE ON FUNCTION {function} TO {quote_identifier(REPLICATION_ROLE)}",
                f"{function} for pg_rewind",
            )

    row = await sql.fetchrow(
        "select pg_catalog.pg_has_role($1::text, 'pg_monitor', 'MEMBER') as member, "
        "(select rolconfig from pg_catalog.pg_roles where rolname = $1::text) as settings",
        MONITORING_ROLE,
        deadline_s=deadline_s,
    )
    monitor = quote_identifier(MONITORING_ROLE)
    if not row["member"]:
        await run(f"GRANT pg_monitor TO {monitor}", "monitoring rights")
    for name, value in (
        ("default_transaction_read_only", "on"),
        ("statement_timeout", "5s"),
        ("search_path", "pg_catalog"),
    ):
        if f"{name}={value}" not in (row["settings"] or ()):
            await run(f"ALTER ROLE {monitor} SET {name} = {quote_literal(value)}", f"{name} of {MONITORING_ROLE}")

    row = await sql.fetchrow(
        "select 1 from pg_catalog.pg_database where datname = $1", options.application_database, deadline_s=deadline_s
    )
    if row is None:
        await run(f"CREATE DATABASE {database} OWNER {owner}", f"database {options.application_database}")
    row = await sql.fetchrow(
        "select pg_catalog.has_schema_privilege('public', 'public', 'CREATE') as open", deadline_s=deadline_s
    )
    if row["open"]:
        # 14's default. Our own sessions never look there; others in this database may.
        await run("REVOKE CREATE ON SCHEMA public FROM PUBLIC", "schema public of the database postgres")
    return tuple(done)


def name_problem(name: str) -> str | None:
    """Why nothing of an application may be called so; None: it may."""
    try:
        quote_identifier(name)
    except ValueError as error:
        return str(error)
    return f"{name!r} is reserved" if name in _RESERVED or name.startswith("pg_") else None


def scram_verifier(password: str, *, salt: bytes | None = None, iterations: int = SCRAM_ITERATIONS) -> str:
    """What Postgres stores in place of the password (RFC 5803), made here so that the password is in no SQL text.

    ValueError: an empty password, or one with a zero byte.
    """
    if not password or "\0" in password:
        raise ValueError("a password must have characters, none of them a zero byte")
    salt = secrets.token_bytes(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", _prepared(password).encode(), salt, iterations)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    parts = (base64.b64encode(each).decode() for each in (salt, stored_key, server_key))
    return "SCRAM-SHA-256${}:{}${}:{}".format(iterations, *parts)


def verifies(password: str, verifier: str) -> bool:
    """Is this the password behind a stored verifier? False for anything that is no SCRAM verifier."""
    match = _VERIFIER.fullmatch(verifier)
    if match is None:
        return False
    try:
        salt = base64.b64decode(match[2], validate=True)
    except ValueError:
        return False
    return hmac.compare_digest(scram_verifier(password, salt=salt, iterations=int(match[1])), verifier)


def read_secret(path: Path) -> str:
    """The one line of a secret's file. ValueError: empty, too long, or more than a line; the content is never shown."""
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret or len(secret) > 1024 or re.search(r"[\x00-\x1f\x7f]", secret) is not None:
        raise ValueError(f"{path} must hold one line of 1 to 1024 characters without control characters")
    return secret


def write_passfile(server: LocalServer, path: Path, *, password: str, user: str = REPLICATION_ROLE) -> None:
    """Write libpq's password file for `user` on any member, readable by Postgres's user only."""
    escaped = password.replace("\\", "\\\\").replace(":", "\\:")
    if re.search(r"[\r\n\0]", password) is not None:
        raise ValueError("a password must be one line")
    write_atomically(path, f"*:*:*:{user}:{escaped}\n".encode(), run_as=server.run_as)


def read_passfile(path: Path, *, user: str = REPLICATION_ROLE) -> str:
    """The password that `write_passfile` wrote for `user`. ValueError: there is none. (asyncpg's own reader does not
    undo the escapes.)"""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith(f"*:*:*:{user}:"):
            return re.sub(r"\\(.)", r"\1", line.removeprefix(f"*:*:*:{user}:"))
    raise ValueError(f"{path} has no password of {user}")


def _prepared(password: str) -> str:
    """SASLprep (RFC 4013), which libpq applies too; what it forbids is taken as it is, as Postgres does."""
    if password.isascii():
        return password
    mapped = "".join(
        " " if stringprep.in_table_c12(character) else character
        for character in password
        if not stringprep.in_table_b1(character)
    )
    normal = unicodedata.normalize("NFKC", mapped)
    right_to_left = [stringprep.in_table_d1(character) for character in normal]
    forbidden = (
        stringprep.in_table_a1,
        stringprep.in_table_c12,
        stringprep.in_table_c21_c22,
        stringprep.in_table_c3,
        stringprep.in_table_c4,
        stringprep.in_table_c5,
        stringprep.in_table_c6,
        stringprep.in_table_c7,
        stringprep.in_table_c8,
        stringprep.in_table_c9,
    )
    if not normal or any(check(character) for character in normal for check in forbidden):
        return password
    if any(right_to_left):
        mixed = any(stringprep.in_table_d2(character) for character in normal)
        if mixed or not (right_to_left[0] and right_to_left[-1]):
            return password
    return normal
