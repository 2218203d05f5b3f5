"""Settings that change while Postgres runs: written, reloaded, and seen by a new connection.

What a new connection shows is what the postmaster has loaded. The postmaster loads the files and then sends SIGHUP to
each of its children before it forks anything else; so once a *new* connection shows a value, every child that exists
has been told (though it may not have looked yet: P1, P2, P5 are about that), and every later one begins with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from instance_manager.postgres.configuration import REPLICATION_CONF
from instance_manager.postgres.deadlines import Deadline, Pause
from instance_manager.postgres.running import SettingsFile
from instance_manager.postgres.server import DeadlinePassed, LocalPostgresError


class SettingNotSeen(LocalPostgresError):
    """A new connection did not show what was written in time: not loaded, or overridden from elsewhere."""

    def __init__(self, wanted: Mapping[str, str], seen: Mapping[str, str | None], deadline_s: float) -> None:
        differing = {name: seen.get(name) for name in wanted if seen.get(name) != wanted[name]}
        super().__init__(f"after {deadline_s:g} s a new connection still shows {differing}")
        self.wanted = dict(wanted)
        self.seen = dict(seen)


class DynamicSettings:
    """The one writer of `instance-manager.replication.conf` while Postgres runs. Changes take turns."""

    def __init__(self, file: SettingsFile) -> None:
        self.file = file
        self._turn = asyncio.Lock()
        self.following = asyncio.Lock()
        """Held while it is changed whom this server follows, so that a vote and a late `follow` do not interleave."""

    async def change(self, values: Mapping[str, str | None], *, deadline_s: float) -> None:
        """Write these settings (None: leave to postgresql.conf), reload, and see them in a new connection.

        The others in the file stay. SettingNotSeen: written, but not seen in time; the file keeps the new values.
        OSError: not written.
        """
        deadline = Deadline(deadline_s)
        try:
            async with asyncio.timeout(deadline_s), self._turn:
                settings: dict[str, str | None] = {**await self.file.read(), **values}
                await self.file.write({name: value for name, value in settings.items() if value is not None})
                await self.file.reload()
        except TimeoutError:
            raise DeadlinePassed(f"writing {REPLICATION_CONF} and reloading", deadline_s) from None
        await self.confirm({name: value for name, value in values.items() if value is not None}, deadline)

    async def confirm(self, values: Mapping[str, str], deadline: Deadline) -> None:
        """Return once a new connection shows `values`. SettingNotSeen."""
        pause = Pause()
        seen: dict[str, str | None] = {}
        while True:
            try:
                seen = await self.file.shown(values, deadline)
            except DeadlinePassed:
                if not seen:
                    raise
            if all(seen.get(name) == value for name, value in values.items()):
                return
            if deadline.passed:
                raise SettingNotSeen(values, seen, deadline.whole_s)
            await pause(deadline)
