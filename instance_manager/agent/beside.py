"""What runs beside the agent's loop, and what it never waits for: certificates, secrets, what is declared inside Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

from instance_manager.agent.agent import Agent
from instance_manager.agent.context import Context
from instance_manager.agent.installed_postgres import InstalledPostgres
from instance_manager.agent.managed import Managed
from instance_manager.agent.secret_files import EXPECTED, SecretFiles, keep_certificates, supervised
from instance_manager.certificate_sets import Certificates
from instance_manager.config import Configuration
from instance_manager.http.server import Listeners
from instance_manager.postgres.server import LocalServer
from instance_manager.wall_clock import now_utc

log = logging.getLogger("instance_manager.agent.beside")


def certificates_of(configuration: Configuration, server: LocalServer) -> Certificates | None:
    """Proven and copied for Postgres's user. CertificateUnusable: there is no usable one. Blocks on the disk."""
    if configuration.tls is None:
        return None
    run_as = server.run_as

    def own(path: Path) -> None:
        if run_as is not None:
            os.chown(path, run_as.uid, run_as.gid)

    certificates = Certificates(
        configuration.tls,
        configuration.control,
        configuration.certificates_directory,
        own,
        host=configuration.me.host,
    )
    certificates.load()
    return certificates


async def pay_owed_reload(c: Context, *, look_every_s: float = 1.0) -> None:
    """Once: an agent that died between writing a file and the reload left a server that knows nothing of it, for ever.

    What is in the files is what was decided, and a reload at any time is harmless; so a server that outlived an agent gets one,
    with settings and access rules as this agent's configuration has them, the gate as it is (P8), without asking a clock which of
    the two is newer.
    """
    while True:
        # Before its start is done a HUP ends it.
        if c.database.answers:
            if c.link.agent_restarts == 0:
                return
            try:
                restart = await c.database.reload_configuration(c.configuration)
            except EXPECTED as error:
                log.warning("what an agent before may not have told Postgres: %s; tried again", error)
            else:
                if restart:
                    c.journal.note("configuration", f"these need a restart of Postgres: {', '.join(restart)}")
                return
        await c.clock.sleep(look_every_s)


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
    tasks.append(asyncio.create_task(pay_owed_reload(c), name="owed reload"))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
