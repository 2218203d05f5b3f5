"""The section `managed`: roles, databases and extensions that the primary keeps as declared."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from instance_manager.config_sections import PostgresSection, Section

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_EXTENSION = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ENCODING = re.compile(r"[A-Z][A-Z0-9_]{1,31}")
_OURS = frozenset(
    {"postgres", "template0", "template1", "public", "none", "streaming_replica", "instance_manager_monitor"}
)
AS_GOOD_AS_SUPERUSER = frozenset(
    {"pg_execute_server_program", "pg_write_server_files", "pg_read_server_files", "pg_database_owner"}
)
"""They run programs or reach files as the server's user; the last cannot be granted at all."""


class ManagedRole(Section, frozen=True):
    name: str
    ensure: Literal["present", "absent"] = "present"
    """`absent` drops it if the instance manager made it."""
    login: bool = True
    createdb: bool = False
    createrole: bool = False
    inherit: bool = True
    member_of: tuple[str, ...] = ()
    password_file: Path | None = None
    """None: whatever password it has is left alone."""
    connection_limit: Annotated[int, msgspec.Meta(ge=-1)] = -1
    valid_until: str | None = None
    """The password holds until then: `2027-01-31T00:00:00Z`. None: for ever."""


class ManagedExtension(Section, frozen=True):
    name: str
    version: str | None = None
    """None: the newest when it is created, and never changed."""
    schema: str | None = None
    """By default `public` for one that Postgres trusts, else `extensions`, in which only the superuser may create."""


class ManagedDatabase(Section, frozen=True):
    name: str
    owner: str
    encoding: str = "UTF8"
    """Of a new one; an existing database keeps its own."""
    extensions: tuple[ManagedExtension, ...] = ()


class ManagedSection(Section, frozen=True):
    roles: tuple[ManagedRole, ...] = ()
    databases: tuple[ManagedDatabase, ...] = ()
    extensions: tuple[ManagedExtension, ...] = ()
    """In the application's database."""


def check_managed(managed: ManagedSection, postgres: PostgresSection) -> list[str]:
    """What must not be declared, a sentence each."""
    found: list[str] = []
    names = [role.name for role in managed.roles]
    for role in managed.roles:
        at = f"managed.roles: {role.name!r}"
        found += _name_problems(at, role.name)
        if role.name == postgres.application_owner:
            found.append(f"{at} is postgres.application_owner, which is there already")
        for group in role.member_of:
            if _NAME.fullmatch(group) is None:
                found.append(f"{at}: member_of {group!r} is no plain name")
            elif group in AS_GOOD_AS_SUPERUSER or group in _OURS:
                found.append(f"{at}: member_of {group} would be as good as superuser, or is not to be granted")
        if role.valid_until is not None and _time_of(role.valid_until) is None:
            found.append(f"{at}: valid_until {role.valid_until!r} is no time with a zone, as 2027-01-31T00:00:00Z")
    found += [f"managed.roles: {name!r} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    databases = [database.name for database in managed.databases]
    found += [
        f"managed.databases: {n!r} is there twice" for n in sorted({n for n in databases if databases.count(n) > 1})
    ]
    for database in managed.databases:
        at = f"managed.databases: {database.name!r}"
        found += _name_problems(at, database.name)
        if database.name == postgres.application_database:
            found.append(f"{at} is postgres.application_database, which is there already; use managed.extensions")
        if _NAME.fullmatch(database.owner) is None or database.owner in _OURS or database.owner.startswith("pg_"):
            found.append(f"{at}: owner {database.owner!r} is no plain name of a role that may own it")
        if _ENCODING.fullmatch(database.encoding) is None:
            found.append(f"{at}: encoding {database.encoding!r} is none of Postgres's names")
        found += _extension_problems(at, database.extensions)
    return found + _extension_problems("managed.extensions", managed.extensions)


def _name_problems(at: str, name: str) -> list[str]:
    if _NAME.fullmatch(name) is None:
        return [f"{at} is no plain name: lower-case letters, digits and _, 63 at most"]
    if name in _OURS or name.startswith("pg_"):
        return [f"{at} is reserved"]
    return []


def _extension_problems(at: str, extensions: tuple[ManagedExtension, ...]) -> list[str]:
    found = []
    for extension in extensions:
        if _EXTENSION.fullmatch(extension.name) is None:
            found.append(f"{at}: {extension.name!r} is no name of an extension")
        if extension.version is not None and _VERSION.fullmatch(extension.version) is None:
            found.append(f"{at}: {extension.version!r} is no version of an extension")
        if extension.schema is not None and (
            _NAME.fullmatch(extension.schema) is None or extension.schema.startswith("pg_")
        ):
            found.append(f"{at}: schema {extension.schema!r} is no plain name")
    return found


def _time_of(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is not None else None
