"""Settings that change while Postgres runs: written, reloaded, and seen by a new connection.

What a new connection shows is what the postmaster has loaded. The postmaster loads the files and then sends SIGHUP to
each of its children before it forks anything else; so once a *new* connection shows a value, every child that exists
has been told (though it may not have looked yet: P1, P2, P5 are about that), and every later one begins with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

from instance_manager.postgres import sql
from instance_manager.postgres.configuration import HEADER, REPLICATION_CONF, parse_settings, render_settings
from instance_manager.postgres.files import read_if_present, write_atomically
from instance_manager.postgres.server import DeadlinePassed, LocalPostgresError, LocalServer

Reload = Callable[[], Awaitable[None]]
"""Port: SIGHUP to the postmaster, by whoever owns it (the supervisor)."""

_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.05


class SettingNotSeen(LocalPostgresError):
    """A new connection did not show what was written in time: not loaded, or overridden from elsewhere."""

    def __init__(self, wanted: Mapping[str, str], seen: Mapping[str, str | None], deadline_s: float) -> None:
        differing = {name: seen.get(name) for name in wanted if seen.get(name) != wanted[name]}
        super().__init__(f"after {deadline_s:g} s a new connection still shows {differing}")
        self.wanted = dict(wanted)
        self.seen = dict(seen)


class Deadline:
    """A point in time by the loop's clock. `left_s` is never 0, so that it can be handed on as a limit."""

    def __init__(self, deadline_s: float) -> None:
        self.whole_s = deadline_s
        self._until_s = asyncio.get_running_loop().time() + deadline_s

    @property
    def passed(self) -> bool:
        return asyncio.get_running_loop().time() >= self._until_s

    @property
    def left_s(self) -> float:
        return max(0.001, self._until_s - asyncio.get_running_loop().time())


class Pause:
    """Growing pauses between two looks at something that has no event."""

    def __init__(self, longest_s: float = _LONGEST_PAUSE_S) -> None:
        self._next_s = _FIRST_PAUSE_S
        self._longest_s = longest_s

    async def __call__(self, deadline: Deadline) -> None:
        await asyncio.sleep(min(self._next_s, deadline.left_s))
        self._next_s = min(self._next_s * 1.5, self._longest_s)


class DynamicSettings:
    """The one writer of `instance-manager.replication.conf` while Postgres runs. Changes take turns."""

    def __init__(self, server: LocalServer, reload: Reload) -> None:
        self._server = server
        self._reload = reload
        self._turn = asyncio.Lock()
        self.following = asyncio.Lock()
        """Held while it is changed whom this server follows, so that a vote and a late `follow` do not interleave."""

    async def read(self) -> dict[str, str]:
        """What the file holds now; nothing is said about what Postgres has loaded."""
        content = await asyncio.to_thread(read_if_present, self._path)
        return {} if content is None else parse_settings(content.decode())

    async def change(self, values: Mapping[str, str | None], *, deadline_s: float) -> None:
        """Write these settings (None: leave to postgresql.conf), reload, and see them in a new connection.

        The others in the file stay. SettingNotSeen: written, but not seen in time; the file keeps the new values.
        OSError: not written.
        """
        deadline = Deadline(deadline_s)
        try:
            async with asyncio.timeout(deadline_s), self._turn:
                settings: dict[str, str | None] = {**await self.read(), **values}
                text = HEADER + render_settings({name: value for name, value in settings.items() if value is not None})
                await asyncio.to_thread(
                    write_atomically, self._path, text.encode(), mode=0o600, run_as=self._server.run_as
                )
                await self._reload()
        except TimeoutError:
            raise DeadlinePassed(f"writing {REPLICATION_CONF} and reloading", deadline_s) from None
        await self.confirm({name: value for name, value in values.items() if value is not None}, deadline)

    async def confirm(self, values: Mapping[str, str], deadline: Deadline) -> None:
        """Return once a new connection shows `values`. SettingNotSeen."""
        pause = Pause()
        seen: dict[str, str | None] = {}
        while True:
            try:
                seen = await self.seen_by_new_connection(values, deadline)
            except DeadlinePassed:
                if not seen:
                    raise
            if all(seen.get(name) == value for name, value in values.items()):
                return
            if deadline.passed:
                raise SettingNotSeen(values, seen, deadline.whole_s)
            await pause(deadline)

    async def seen_by_new_connection(self, names: Iterable[str], deadline: Deadline) -> dict[str, str | None]:
        async with sql.session(self._server, deadline_s=deadline.left_s) as fresh:
            rows = await fresh.fetch(
                "SELECT name, current_setting(name, true) AS value FROM unnest($1::text[]) AS name",
                list(names),
                deadline_s=deadline.left_s,
            )
        return {row["name"]: row["value"] for row in rows}

    @property
    def _path(self) -> Path:
        return self._server.data_directory / REPLICATION_CONF
