"""What Postgres's archive_command and restore_command may do now, as the agent decides it; see `postgres.archive_commands`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Literal

from instance_manager.agent.postgres_port import LocalPostgres
from instance_manager.core.types import Lsn
from instance_manager.postgres.archive_commands import Allowed
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.threads import TooManyCalls

log = logging.getLogger("instance_manager.agent.allowing")

ALLOW_DEADLINE_S = 0.5


class NotWithheld(LocalPostgresError):
    """What restore_command may do could not be written: it may yet bring WAL, so there is no promise (P9)."""


class Allowing:
    """One word on the disk, changed one at a time; an agent before this one may have written it."""

    def __init__(self, postgres: LocalPostgres, *, may_fetch: Callable[[], bool]) -> None:
        self._postgres = postgres
        self._may_fetch = may_fetch
        """Asked when it is this change's turn: what was decided before a promise does not count after it."""
        self._turn = asyncio.Lock()
        self._allowed: Allowed | Literal["unknown"] | None = "unknown"
        self._is_clear = False
        """Nothing that was asked for while it was allowed can arrive any more."""

    async def allow(self, what: Allowed | None, *, server_runs: bool = True) -> bool:
        """False: it did not reach the disk in time."""
        async with self._turn:
            self._is_clear = self._is_clear or not server_runs
            if what == "fetch" and not self._may_fetch():
                what = None
            if what == self._allowed:
                return True
            # Known again only once it was written: whoever is cut off or fails here leaves either on the disk.
            was_clear, self._is_clear, self._allowed = self._is_clear, False, "unknown"
            try:
                await self._postgres.allow_archive(what, deadline_s=ALLOW_DEADLINE_S)
            except (TimeoutError, TooManyCalls, OSError) as error:
                log.warning(
                    "what the archive's commands may do cannot be written: %s", str(error) or type(error).__name__
                )
                return False
            self._is_clear = was_clear and what != "fetch"
            self._allowed = what
            return True

    async def withhold(self, postmaster_pid: int, *, deadline_s: float) -> None:
        """P9: nothing comes from the archive any more, whatever was asked for. LocalPostgresError: not proven in time."""
        if self._allowed is None and self._is_clear:
            return
        if not await self.allow(None):
            raise NotWithheld("what restore_command may do cannot be written: it may yet bring WAL (P9)")
        await self._postgres.nothing_is_restored(postmaster_pid, deadline_s=deadline_s)
        self._is_clear = self._allowed is None

    async def ask_to_archive_again(self, archived_to: Lsn | None) -> None:
        """Of what a primary before this one wrote. `archived_to`: as it told; None: nothing is known."""
        try:
            await self._postgres.ask_to_archive_again(archived_to, deadline_s=ALLOW_DEADLINE_S)
        except (TimeoutError, TooManyCalls, OSError) as error:
            # No promotion waits for the archive: its backfill looks for the same, as long as it is there.
            log.warning(
                "what the last primary had not archived is not asked for again: %s", str(error) or type(error).__name__
            )
