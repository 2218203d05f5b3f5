"""What runs beside the agent's loop, and what it never waits for: certificates, secrets, what is declared inside Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from instance_manager.agent.agent import Agent
from instance_manager.agent.installed_postgres import InstalledPostgres
from instance_manager.agent.managed import Managed
from instance_manager.agent.secret_files import SecretFiles, keep_certificates, supervised
from instance_manager.certificate_sets import Certificates
from instance_manager.config import Configuration
from instance_manager.http.server import Listeners
from instance_manager.postgres.server import LocalServer
from instance_manager.wall_clock import now_utc


def certificates_of(configuration: Configuration, server: LocalServer) -> Certificates | None:
    """Proven and copied for Postgres's user. CertificateUnusable: there is no usable one. Blocks on the disk."""
    if configuration.tls is None:
        return None
    run_as = server.run_as

    def own(path: Path) -> None:
        if run_as is not None:
            os.chown(path, run_as.uid, run_as.gid)

    certificates = Certificates(configuration.tls, configuration.control, configuration.certificates_directory, own)
    certificates.load()
    return certificates


@contextlib.asynccontextmanager
async def running_beside(
    agent: Agent,
    postgres: InstalledPostgres,
    server: LocalServer,
    listeners: Listeners,
    certificates: Certificates | None,
) -> AsyncIterator[None]:
    """Until the block is left. None of it can end the agent."""
    c = agent.context
    managed = Managed(c, server)
    c.managed = managed.statuses
    duties = {"managed": managed.keep, "secrets": SecretFiles(c, postgres).keep}
    if certificates is not None:
        kept = certificates
        c.certificates = lambda: kept.statuses(now_utc().timestamp())

        async def reload() -> None:
            await c.link.signal("HUP")

        duties["certificates"] = lambda: keep_certificates(c, kept, listeners.renew, reload)
    tasks = [asyncio.create_task(supervised(name, keep, c.clock), name=name) for name, keep in duties.items()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
