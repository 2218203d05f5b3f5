"""Secrets and certificates that are replaced while the instance runs: taken over without a restart.

What the kubelet (or a person) puts in a file's place is seen within some seconds. A password becomes the role's verifier on
the primary and the password file of replication everywhere; sessions that are there go on, new ones need the new password.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from instance_manager.agent.configuration_file import Signature, signature
from instance_manager.agent.context import Context, OperationFailed
from instance_manager.agent.supervisor_link import SupervisorError
from instance_manager.certificate_sets import Certificates
from instance_manager.core.roles import Role
from instance_manager.ports import Clock
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.threads import Threads, TooManyCalls
from instance_manager.wall_clock import now_utc

log = logging.getLogger("instance_manager.agent.secrets")

LOOK_EVERY_S = 10.0
LOOK_DEADLINE_S = 5.0
FOR_POSTGRES = frozenset({"postgres", "replication"})

EXPECTED = (LocalPostgresError, SupervisorError, OperationFailed, OSError, ValueError, TimeoutError, TooManyCalls)


class PasswordFile(Protocol):
    def write_passfile(self) -> None: ...


async def keep_certificates(
    context: Context,
    certificates: Certificates,
    renew: Callable[[], Awaitable[None]],
    reload_postgres: Callable[[], Awaitable[None]],
    *,
    look_every_s: float = LOOK_EVERY_S,
) -> None:
    """For ever: look at the files, and let what is new be used. `renew`: of the listeners."""
    c = context
    threads = Threads("certificates")
    found: queue.SimpleQueue[tuple[str, ...]] = queue.SimpleQueue()
    owed = set(certificates.replaced_at_start)

    def look() -> None:
        # Not as the call's result: what was replaced is to be used also when nobody waits for the call any more.
        found.put(certificates.look())

    while True:
        try:
            await threads.call(look, deadline_s=LOOK_DEADLINE_S)
            while not found.empty():
                owed.update(found.get_nowait())
            if owed - FOR_POSTGRES:
                await renew()
                _note(c, owed - FOR_POSTGRES)
                owed &= FOR_POSTGRES
            # Owed until it answers: this agent may not know yet that it runs, and before its start is done a HUP ends it.
            if owed and c.database.answers:
                await reload_postgres()
                _note(c, owed)
                owed.clear()
        except EXPECTED as error:
            log.warning("certificates: %s; tried again", str(error) or type(error).__name__)
        c.remarks["certificates"] = certificates.remarks(now_utc().timestamp())
        await c.clock.sleep(look_every_s)


def _note(c: Context, uses: set[str]) -> None:
    c.journal.note("certificates", f"new ones are used for {', '.join(sorted(uses))}")


class SecretFiles:
    """The files of `secrets`, as they were when they were last taken over."""

    def __init__(self, context: Context, files: PasswordFile) -> None:
        self._c = context
        self._files = files
        self._threads = Threads("secrets")
        self._written: dict[Path, Signature | None] = {}
        """What the password file of replication was made of."""
        self._in_postgres: dict[Path, Signature | None] = {}
        """What the roles were made of, by this agent as primary."""

    async def keep(self, *, look_every_s: float = LOOK_EVERY_S) -> None:
        """For ever."""
        c = self._c
        while True:
            try:
                await self.look()
                c.remarks["secrets"] = ()
            except EXPECTED as error:
                text = f"secrets: {str(error) or type(error).__name__}"
                if c.remarks.get("secrets") != (text,):
                    log.warning("%s; tried again", text)
                c.remarks["secrets"] = (text,)
            await c.clock.sleep(look_every_s)

    async def look(self) -> None:
        """Once. Raises what `EXPECTED` names; what was not done is done the next time."""
        c = self._c
        paths = tuple(c.configuration.secrets.files.values())
        now = await self._threads.call(lambda: {path: signature(path) for path in paths}, deadline_s=LOOK_DEADLINE_S)
        if now != self._written:
            await self._threads.call(self._files.write_passfile, deadline_s=LOOK_DEADLINE_S)
            if self._written:
                c.journal.note("secrets", "a file has changed: the password of replication is written anew")
            self._written = now
        serves = c.role is Role.PRIMARY and c.gate_open
        if not serves:
            # Whoever is primary meanwhile may have set others.
            self._in_postgres = {}
        elif now != self._in_postgres:
            await c.database.create_roles()
            self._in_postgres = now


async def supervised(name: str, keep: Callable[[], Awaitable[None]], clock: Clock) -> None:
    """For ever: what fails unexpectedly beside the agent's loop is told and begun again, and never ends the agent."""
    pause_s = 1.0
    while True:
        try:
            await keep()
        except Exception:
            log.exception("%s failed; begun again in %.0f s", name, pause_s)
        await clock.sleep(pause_s)
        pause_s = min(2 * pause_s, 60.0)
