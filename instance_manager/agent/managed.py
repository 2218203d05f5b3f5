"""What `managed` declares is kept on the primary: in the background, with deadlines, and in nobody's way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path

from instance_manager.agent.configuration_file import signature
from instance_manager.agent.context import Context
from instance_manager.config_managed import ManagedExtension, ManagedRole, ManagedSection
from instance_manager.core.roles import Role
from instance_manager.postgres import managed, sql
from instance_manager.postgres.bootstrap import read_secret
from instance_manager.postgres.server import LocalServer
from instance_manager.status import ManagedStatus
from instance_manager.threads import Threads, TooManyCalls

log = logging.getLogger("instance_manager.agent.managed")

LOOK_EVERY_S = 3.0
AGAIN_AFTER_S = 300.0
"""What was as declared is looked at again: somebody may have changed it by hand."""
RETRY_FIRST_S, RETRY_MAX_S = 5.0, 300.0
SECRET_DEADLINE_S = 5.0
STATEMENT_TIMEOUT_S = 120.0


class Managed:
    """`keep` runs for ever; `statuses` is what it last saw as primary."""

    def __init__(self, context: Context, server: LocalServer) -> None:
        self._c = context
        self._server = server
        self._threads = Threads("managed")
        self._outcomes: tuple[managed.Outcome, ...] = ()
        self._next_s = 0.0
        self._retry_s = RETRY_FIRST_S
        self._done_for: object = None

    def statuses(self) -> tuple[ManagedStatus, ...]:
        return tuple(ManagedStatus(what=o.what, state=o.state, problem=o.problem) for o in self._outcomes)

    async def keep(self) -> None:
        c = self._c
        while True:
            section = c.configuration.managed
            declares = bool(section.roles or section.databases or section.extensions)
            if declares and c.role is Role.PRIMARY and c.gate_open:
                await self._look(section)
            else:
                self._outcomes, self._done_for = (), None
                c.remarks.pop("managed", None)
            await c.clock.sleep(LOOK_EVERY_S)

    async def _look(self, section: ManagedSection) -> None:
        c = self._c
        now_s = c.clock.now_s()
        declared = (section, c.configuration.postgres, await self._signatures(section))
        if declared == self._done_for and now_s < self._next_s:
            return
        if declared != self._done_for:
            self._retry_s = RETRY_FIRST_S
        self._outcomes = await self.reconcile(section)
        changed = [o.what for o in self._outcomes if o.state == "changed"]
        if changed:
            c.journal.note("managed", f"as declared now: {', '.join(changed)}")
        problems = tuple(f"managed {o.what}: {o.problem}" for o in self._outcomes if o.problem is not None)
        for problem in problems:
            log.warning("%s", problem)
        c.remarks["managed"] = problems
        self._done_for = declared
        self._next_s = c.clock.now_s() + (self._retry_s if problems else AGAIN_AFTER_S)
        self._retry_s = min(2 * self._retry_s, RETRY_MAX_S) if problems else RETRY_FIRST_S

    async def _signatures(self, section: ManagedSection) -> object:
        """Of the files of passwords: one that has changed is taken over."""
        paths = tuple(role.password_file for role in section.roles if role.password_file is not None)
        try:
            return await self._threads.call(lambda: [signature(path) for path in paths], deadline_s=SECRET_DEADLINE_S)
        except (TimeoutError, TooManyCalls):
            return None

    async def reconcile(self, section: ManagedSection) -> tuple[managed.Outcome, ...]:
        """Everything once; the absent roles last, when what they owned may have been given away."""
        outcomes = []
        postgres = self._c.configuration.postgres
        for role in sorted(section.roles, key=lambda each: each.ensure == "absent"):
            outcomes.append(await managed.keep(f"role {role.name}", self._role(role)))
        for database in section.databases:
            wanted = managed.DatabaseWanted(name=database.name, owner=database.owner, encoding=database.encoding)
            outcomes.append(await managed.keep(f"database {database.name}", self._database(wanted)))
        extensions = [(postgres.application_database, extension) for extension in section.extensions]
        extensions += [(database.name, each) for database in section.databases for each in database.extensions]
        for name, extension in extensions:
            what = f"extension {extension.name} in {name}"
            outcomes.append(await managed.keep(what, self._extension(name, extension)))
        return tuple(outcomes)

    async def _role(self, declared: ManagedRole) -> bool:
        password = None
        path = declared.password_file
        if path is not None and declared.ensure == "present":
            password = await self._threads.call(_reader(path), deadline_s=SECRET_DEADLINE_S)
        wanted = managed.RoleWanted(
            name=declared.name,
            present=declared.ensure == "present",
            login=declared.login,
            createdb=declared.createdb,
            createrole=declared.createrole,
            inherit=declared.inherit,
            member_of=declared.member_of,
            password=password,
            connection_limit=declared.connection_limit,
            valid_until=datetime.fromisoformat(declared.valid_until) if declared.valid_until is not None else None,
        )
        async with self._open("postgres") as session:
            return await managed.keep_role(session, wanted)

    async def _database(self, wanted: managed.DatabaseWanted) -> bool:
        async with self._open("postgres") as session:
            return await managed.keep_database(session, wanted)

    async def _extension(self, database: str, declared: ManagedExtension) -> bool:
        wanted = managed.ExtensionWanted(name=declared.name, version=declared.version, schema=declared.schema)
        return await managed.keep_extension(self._open, database, wanted)

    @contextlib.asynccontextmanager
    async def _open(self, database: str) -> AsyncIterator[sql.Session]:
        async with sql.session(self._server, database=database, statement_timeout_s=STATEMENT_TIMEOUT_S) as session:
            yield session


def _reader(path: Path) -> Callable[[], str]:
    return lambda: read_secret(path)
