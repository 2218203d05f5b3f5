"""A second instance over a cold copy, which recovers from the archive alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from archiving_server import ArchivingServer, archiving
from harness import Cluster, wait_until


class Recovery:
    """A second instance over the copy, which recovers from the archive alone."""

    def __init__(self, made: ArchivingServer, system: int) -> None:
        self.made, self.server, self.system = made, made.server, system

    async def start(self, *, wait: bool = True) -> None:
        self.server.write("recovery.signal", "")
        self.server.configure(
            **self.made.restore_settings("recovery"), archive_mode="off", recovery_target_action="promote"
        )
        self.server.set_dynamic(synchronous_standby_names="", primary_conninfo="")
        if self.made.process is None:
            await self.made.start_archiver()
        self.made.order("standby", self.system)
        await self.server.start(wait=False)
        if wait:
            await wait_until(self._is_open, deadline_s=60, what="recovery ends")

    async def _is_open(self) -> bool:
        assert self.server.process is not None
        assert self.server.process.poll() is None, self.server.log_text()[-3000:]
        with contextlib.suppress(Exception):
            return not await self.server.fetchval("SELECT pg_is_in_recovery()")
        return False

    async def rows(self) -> set[int]:
        return {row["n"] for row in await self.server.fetch("SELECT n FROM t")}


@contextlib.asynccontextmanager
async def recovery_of(
    cluster: Cluster, copy: Path, archive: dict[str, Any], system: int, name: str = "r"
) -> AsyncIterator[Recovery]:
    server = cluster.add(name, copy)
    with archiving(server, archive) as made:
        yield Recovery(made, system)
