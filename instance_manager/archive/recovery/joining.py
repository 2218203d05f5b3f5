"""From the end of the source's history onto the cluster's own: the first of its log, streamed from the primary or from its own archive.

The cluster's record tells its history from its first timeline on. A directory whose log ends before that would be one of another
cluster; so this one goes on, without opening, until it has a restart point behind the fork.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

from instance_manager.archive.recovery.hidden_server import HiddenServer
from instance_manager.archive.recovery.replay import (
    FROM_THE_STORE,
    POLL_S,
    RESTART_PAUSE_S,
    UNREACHABLE_POLL_S,
    RecoveryStopped,
)
from instance_manager.archive.recovery.replica_choice import Fork
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.core.types import Lsn, format_lsn, parse_lsn
from instance_manager.postgres.control_data import ClusterState
from instance_manager.postgres.server import LocalServer

PATIENCE_S = 60.0
"""Without progress: a primary that fails over meanwhile is not waited for longer."""
AGAIN_PATIENCE_S = 3600.0
"""Until it takes connections at all: it replays again what it had since its last restart point."""
_TROUBLE = re.compile(r"(?:FATAL|ERROR|PANIC):\s+(.*)")


class Joining:
    """One directory, which was shut down where the source's history was left."""

    def __init__(
        self,
        server: LocalServer,
        fork: Fork,
        *,
        primary_conninfo: str,
        own: RecoveryArchive | None,
        work_directory: Path,
        on_progress: Callable[[str], None],
    ) -> None:
        """`own`: the cluster's archive, where it has one."""
        command = own.restore_command if own is not None else lambda: ""
        self._server = HiddenServer(server, work_directory, command, primary_conninfo=primary_conninfo)
        self._fork = fork
        self._own = own
        self._say = on_progress
        self._furthest, self._moved_s = fork.lsn, 0.0
        self._has_answered = False
        self.log_file = self._server.log_file

    async def run(self) -> None:
        """RecoveryStopped: nothing of the cluster's own log came. LocalPostgresError; OSError."""
        self._say(f"at {format_lsn(self._fork.lsn)} this cluster left its source: going on with its own log")
        self._moved_s = asyncio.get_running_loop().time()
        try:
            while True:
                await self._server.write_configuration({"recovery_target_timeline": "latest"})
                if self._own is not None:
                    await self._own.before_postgres_starts()
                await self._server.start()
                if await self._is_joined():
                    break
                await self._server.stop()
        finally:
            await asyncio.shield(self._server.stop())
        if (control := await self._server.control()).state is not ClusterState.SHUT_DOWN_IN_RECOVERY:
            raise RecoveryStopped(f"after its shutdown it is {control.state.value}")

    async def _is_joined(self) -> bool:
        """False: it is to be started again. RecoveryStopped."""
        loop = asyncio.get_running_loop()
        while not self._server.has_ended:
            row = await self._server.look()
            if row is not None and not self._has_answered:
                self._has_answered, self._moved_s = True, loop.time()
            lsn = parse_lsn(row["lsn"]) if row is not None and row["lsn"] else Lsn(0)
            if row is not None and not row["in_recovery"]:
                raise RecoveryStopped("Postgres has opened although nobody asked it to: do not use this directory")
            if lsn > self._furthest:
                self._furthest, self._moved_s = lsn, loop.time()
                self._say(f"replayed to {format_lsn(lsn)}")
                await self._server.restart_point()
                control = await self._server.control()
                if control.timeline >= self._fork.timeline:
                    return True
            self._require_patience()
            await asyncio.sleep(POLL_S if row is not None else UNREACHABLE_POLL_S)
        if FROM_THE_STORE.search(self._server.log_text()) is None:
            raise RecoveryStopped(f"Postgres ended: {self._trouble()}")
        self._require_patience()
        self._say(f"waiting for the archive: {self._trouble()}")
        await asyncio.sleep(RESTART_PAUSE_S)
        return False

    def _require_patience(self) -> None:
        patience_s = PATIENCE_S if self._has_answered else AGAIN_PATIENCE_S
        if asyncio.get_running_loop().time() - self._moved_s > patience_s:
            raise RecoveryStopped(
                f"nothing came of this cluster's log behind {format_lsn(self._furthest)} for {patience_s:g} s: {self._trouble()}"
            )

    def _trouble(self) -> str:
        found = _TROUBLE.findall(self._server.log_text())
        return found[-1] if found else "Postgres says nothing of it"
