"""Members by TLS: replication by certificate, cloning from a verified server, and a certificate renewed by a reload."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
from harness import wait_until
from own_fixtures import own_template, servers
from own_server import APPLICATION_PASSWORD, OwnServer, Servers

from instance_manager import certificates
from instance_manager.postgres.clone import clone
from instance_manager.postgres.configuration import (
    NOTHING_SYNCHRONOUS,
    ClientTls,
    ReplicationSettings,
    TlsFiles,
    replication_conninfo,
)
from instance_manager.postgres.directory import create_standby_signal
from instance_manager.postgres.host_based_access import REPLICATION_ROLE, AccessSettings
from instance_manager.postgres.server import LocalPostgresError

__all__ = ["own_template", "servers"]

HOST = "localhost"
"""A name, because the programs of Postgres 14 compare a certificate with no address."""
BY_TLS = AccessSettings(application_networks=("127.0.0.1/32",), require_tls=True, replication_by_certificate=True)


class Files:
    """Certificates that Postgres's user can read."""

    def __init__(self, servers: Servers, one: OwnServer) -> None:
        self.root = servers.root / "certificates"
        self._owner = one.server.run_as
        self.make()

    def make(self, name: str = HOST) -> None:
        wanted = [certificates.member("a", [name]), certificates.REPLICATION, certificates.user("app")]
        certificates.make(self.root, wanted, cluster="tests", renew=False)
        for path in (self.root, *self.root.rglob("*")):
            if self._owner is not None:
                os.chown(path, self._owner.uid, self._owner.gid)

    def renew(self, name: str = HOST) -> None:
        shutil.rmtree(self.root / "members")
        self.make(name)

    @property
    def server(self) -> TlsFiles:
        member = self.root / "members/a"
        return TlsFiles(member / "tls.crt", member / "tls.key", member / "ca.crt")

    def client(self, place: str | None) -> ClientTls:
        shown = self.root / place if place is not None else None
        return ClientTls(
            sslmode="verify-full",
            root_certificate=self.root / "members/a/ca.crt",
            certificate=shown / "tls.crt" if shown else None,
            key=shown / "tls.key" if shown else None,
        )


async def with_tls(servers: Servers) -> tuple[OwnServer, Files]:
    one = await servers.primary()
    files = Files(servers, one)
    one.configure(tls=files.server, settings=BY_TLS)
    await reload(one)
    return one, files


async def reload(one: OwnServer) -> None:
    assert one.process is not None
    one.process.send_signal(signal.SIGHUP)
    await one.wait_for("select current_setting('ssl') = 'on'")


async def test_a_standby_is_cloned_and_streams_by_certificate_and_without_a_password(servers: Servers) -> None:
    one, files = await with_tls(servers)
    two = servers.new("b")
    two.passfile.unlink()
    await clone(
        two.server,
        replace(one.source(), host=HOST, tls=files.client("replication"), passfile=Path("/nowhere")),
        system_identifier=None,
    )
    conninfo = replication_conninfo(
        host=HOST,
        port=one.server.port,
        user=REPLICATION_ROLE,
        passfile=Path("/nowhere"),
        application_name="b_01234567",
        tls=files.client("replication"),
    )
    two.configure(
        replication=ReplicationSettings(synchronous_standby_names=NOTHING_SYNCHRONOUS, primary_conninfo=conninfo),
        tls=files.server,
        settings=BY_TLS,
    )
    create_standby_signal(two.server)
    await two.start()
    await two.wait_for("select exists(select from pg_stat_wal_receiver where status = 'streaming')")
    shown = "select client_dn from pg_stat_ssl s join pg_stat_replication r on r.pid = s.pid where s.ssl"
    assert await one.fetchval(shown) == "/CN=streaming_replica"


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        (None, "connection requires a valid client certificate"),
        ("control/app", "certificate authentication failed"),
    ],
)
async def test_neither_the_password_nor_another_certificate_replicates(
    servers: Servers, shown: str | None, told: str
) -> None:
    one, files = await with_tls(servers)
    two = servers.new("b")
    with pytest.raises(LocalPostgresError, match=told):
        await clone(two.server, replace(one.source(), host=HOST, tls=files.client(shown)), system_identifier=None)


async def test_a_member_does_not_clone_from_a_server_with_another_hosts_certificate(servers: Servers) -> None:
    one, files = await with_tls(servers)
    files.renew("192.0.2.1")
    await reload(one)

    async def refused() -> bool:
        try:
            await connect(one, files)
        except ssl.SSLCertVerificationError:
            return True
        return False

    await wait_until(refused, what="the other certificate")
    two = servers.new("b")
    with pytest.raises(LocalPostgresError, match="does not match host name"):
        await clone(
            two.server, replace(one.source(), host=HOST, tls=files.client("replication")), system_identifier=None
        )


async def test_applications_get_in_by_tls_only(servers: Servers) -> None:
    one, files = await with_tls(servers)
    await connect(one, files)
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match="no encryption"):
        await asyncpg.connect(
            host=HOST, port=one.server.port, user="app", password=APPLICATION_PASSWORD, database="app", ssl=False
        )


async def test_a_renewed_certificate_is_served_after_a_reload_and_sessions_stay(servers: Servers) -> None:
    one, files = await with_tls(servers)
    kept = await asyncpg.connect(
        host=HOST,
        port=one.server.port,
        user="app",
        password=APPLICATION_PASSWORD,
        database="app",
        ssl=files.client(None).for_asyncpg(),
    )
    before = await connect(one, files)
    files.renew()
    await reload(one)

    async def renewed() -> bool:
        return await connect(one, files) != before

    await wait_until(renewed, what="the new certificate")
    assert await kept.fetchval("select 1") == 1
    kept.terminate()


async def connect(one: OwnServer, files: Files) -> str:
    """The server's serial number, as an application that verifies it sees it."""
    connection = await asyncpg.connect(
        host=HOST,
        port=one.server.port,
        user="app",
        password=APPLICATION_PASSWORD,
        database="app",
        ssl=files.client(None).for_asyncpg(),
    )
    try:
        return str(connection._transport.get_extra_info("peercert")["serialNumber"])  # type: ignore[attr-defined]
    finally:
        connection.terminate()
