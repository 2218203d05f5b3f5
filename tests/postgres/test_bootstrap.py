"""A new cluster: initdb into place, roles that can be made again, passwords that the server never saw."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
from own_fixtures import own_template, servers
from own_server import APPLICATION_PASSWORD, MAJOR, REPLICATION_PASSWORD, ROLES, OwnServer, Servers

from instance_manager.postgres.bootstrap import create_roles, initialise, read_secret, scram_verifier, verifies
from instance_manager.postgres.configuration import NOTHING_SYNCHRONOUS, ReplicationSettings
from instance_manager.postgres.directory import DirectoryRefused, inspect_directory
from instance_manager.postgres.host_based_access import MONITORING_ROLE, REPLICATION_ROLE, Access
from instance_manager.postgres.server import ProgramFailed
from instance_manager.postgres.sql import session

__all__ = ["own_template", "servers"]


async def log_in(one: OwnServer, user: str, password: str, database: str = "app") -> str:
    connection = await asyncpg.connect(
        host="127.0.0.1", port=one.server.port, user=user, password=password, database=database, ssl=False, timeout=5
    )
    try:
        return str(await connection.fetchval("select current_user"))
    finally:
        connection.terminate()


async def test_roles_are_made_once_and_mended_when_they_differ(servers: Servers) -> None:
    one = await servers.primary(log_statement="all")
    async with session(one.server) as opened:
        assert await create_roles(opened, ROLES) == ()
        await opened.execute(f'alter role "{REPLICATION_ROLE}" superuser')
        await opened.execute("drop database app")
        changed = replace(ROLES, application_password="ein anderes Paßwort\u00a0²")
        done = await create_roles(opened, changed)
        assert done == ("attributes of streaming_replica", "password of app", "database app")
        assert await create_roles(opened, changed) == ()
        stored = await opened.fetch("select rolname, rolpassword from pg_authid where rolpassword is not null")
        assert all(row["rolpassword"].startswith("SCRAM-SHA-256$4096:") for row in stored)
        assert len(stored) == 3
        assert await opened.fetchval("select rolpassword is null from pg_authid where rolname = 'postgres'")
    assert await log_in(one, "app", changed.application_password) == "app"
    assert await log_in(one, MONITORING_ROLE, ROLES.monitoring_password) == MONITORING_ROLE
    assert await log_in(one, REPLICATION_ROLE, REPLICATION_PASSWORD, "postgres") == REPLICATION_ROLE
    with pytest.raises(asyncpg.InvalidPasswordError):
        await log_in(one, "app", APPLICATION_PASSWORD)
    for password in (REPLICATION_PASSWORD, changed.application_password, ROLES.monitoring_password):
        assert password not in one.log()
    assert "password=" not in repr(ROLES)
    assert REPLICATION_PASSWORD not in repr(ROLES)


async def test_the_superuser_comes_in_over_the_socket_only(servers: Servers) -> None:
    one = await servers.primary()
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await log_in(one, "postgres", "x", "postgres")
    one.configure(access=Access.CLOSED)
    await one.fetchval("select pg_reload_conf()")
    await one.wait_for("select count(*) filter (where error is not null) = 0 from pg_hba_file_rules")
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await log_in(one, "app", APPLICATION_PASSWORD)
    assert await log_in(one, REPLICATION_ROLE, REPLICATION_PASSWORD, "postgres") == REPLICATION_ROLE


async def test_every_rendered_setting_is_one_that_the_server_takes(servers: Servers) -> None:
    one = await servers.primary()
    async with session(one.server) as opened:
        errors = await opened.fetch("select name, error from pg_file_settings where error is not null or not applied")
        replaced = {"synchronous_standby_names", "primary_conninfo", "primary_slot_name", "restore_command"}
        assert [row for row in errors if row["name"] not in replaced] == []
        assert await opened.fetchval("select count(*) from pg_hba_file_rules where error is not null") == 0
        assert await opened.fetchval("show data_checksums") == "on"
        assert await opened.fetchval("show server_encoding") == "UTF8"
        assert await opened.fetchval("show restart_after_crash") == "off"


async def test_what_alter_system_set_is_gone_at_the_next_start(servers: Servers) -> None:
    one = await servers.primary()
    if MAJOR >= 17:
        with pytest.raises(asyncpg.PostgresError):
            await one.fetchval("alter system set fsync = off")
        return
    async with session(one.server) as opened:
        await opened.execute("alter system set synchronous_standby_names = 'x'")
        await opened.execute("alter system set work_mem = '7MB'")
    await one.stop()
    one.configure(replication=ReplicationSettings(synchronous_standby_names=NOTHING_SYNCHRONOUS))
    await one.start()
    assert await one.fetchval("show synchronous_standby_names") == ""
    assert await one.fetchval("show work_mem") == "7MB"


async def test_a_failed_initdb_leaves_nothing_and_a_taken_place_is_refused(servers: Servers) -> None:
    one = servers.new("x")
    with pytest.raises(ProgramFailed, match=r"wal-segsize|WAL segment"):
        await initialise(one.server, major=MAJOR, wal_segment_mib=3)
    assert sorted(path.name for path in one.root.iterdir()) == ["passfile", "socket", "state"]
    one.data.mkdir()
    (one.data / "precious").write_text("mine")
    with pytest.raises(DirectoryRefused):
        await initialise(one.server, major=MAJOR)
    assert (one.data / "precious").read_text() == "mine"
    assert inspect_directory(one.server).leftovers == ()


def test_verifiers_are_those_of_postgres() -> None:
    # From a server: ALTER ROLE ... PASSWORD 'foo' with a known salt (RFC 7677's example keys checked by `verifies`).
    made = scram_verifier("foo", salt=b"0123456789abcdef")
    assert verifies("foo", made)
    assert not verifies("bar", made)
    assert not verifies("foo", "md5acbd18db4cc2f85cedef654fccc4a4d8")
    assert scram_verifier("foo") != scram_verifier("foo")
    for bad in ("", "a\0b"):
        with pytest.raises(ValueError, match="password"):
            scram_verifier(bad)


def test_a_secret_is_one_line_and_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("pass word\n")
    assert read_secret(file) == "pass word"
    for bad in ("", "\n", "hidden1\nhidden2\n", "hid\0den"):
        file.write_text(bad)
        with pytest.raises(ValueError, match="must hold one line") as refused:
            read_secret(file)
        assert "hid" not in str(refused.value)
    assert os.fspath(file)
