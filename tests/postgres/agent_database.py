"""The agent's view of a real server of these tests, whoever started it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import cast

from harness import PostgresProcess

from instance_manager.agent.beat import Beat
from instance_manager.agent.database import Database
from instance_manager.agent.installed_postgres import InstalledPostgres
from instance_manager.agent.supervisor_link import SupervisorLink
from instance_manager.config import Configuration
from instance_manager.config_sections import (
    ArchiveSection,
    ClusterSection,
    CoordinationSection,
    InstanceSection,
    LocalCoordinationSection,
    MemberSection,
    SecretsSection,
)
from instance_manager.postgres.binaries import server_version


class BootClock:
    def now_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("these verbs wait for nothing")


def configuration_of(process: PostgresProcess) -> Configuration:
    """With an archive that nobody looks at."""
    secret = process.root / "secret"
    return Configuration(
        cluster=ClusterSection(name="demo", uid="uid-1"),
        instance=InstanceSection(name="a", directory=process.root),
        members=(MemberSection(name="a", host="127.0.0.1", postgres_port=process.port, http_port=8008),),
        coordination=CoordinationSection(
            local=LocalCoordinationSection(directory=process.root, locks_directory=process.root)
        ),
        secrets=SecretsSection(
            peer_token=secret, replication_password=secret, application_password=secret, monitoring_password=secret
        ),
        archive=ArchiveSection(directory=process.root / "archive"),
    )


async def installed_postgres_of(process: PostgresProcess) -> InstalledPostgres:
    return InstalledPostgres(
        configuration_of(process), process.server, await server_version(process.server), process.reload
    )


async def database_of(process: PostgresProcess) -> Database:
    """For what needs no supervisor: a stopped directory, and new connections."""
    return Database(
        configuration_of(process),
        await installed_postgres_of(process),
        cast(SupervisorLink, SimpleNamespace(postgres=None)),
        BootClock(),
        Beat(BootClock()),
        on_change=lambda: None,
    )
