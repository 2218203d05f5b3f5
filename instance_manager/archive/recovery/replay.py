"""The replay of a restored directory by a Postgres that nobody can reach, until its target was reached, and only then the
opening; or, of a standby's directory, no opening.

It never opens by itself: neither at the end of the archive, nor at an error. Where the store fails it
stops (126 of restore_command), and is started again until the patience is over.

Most of the time it reads pg_wal alone (`serving`): its restore_command is then empty, which is changed by a reload.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from instance_manager.archive.recovery.hidden_server import STOP_DEADLINE_S, HiddenServer
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.recovery.target import Target, with_header
from instance_manager.core.types import Lsn, Timeline, TimelineChain, format_lsn, parse_lsn
from instance_manager.postgres.control_data import ClusterState
from instance_manager.postgres.server import LocalServer

log = logging.getLogger("instance_manager.archive.recovery")

POLL_S = 0.2
MOVING_POLL_S = 1.0
"""While replay goes on: each look is a connection, which costs as much as replay of a few MiB."""
UNREACHABLE_POLL_S = 0.5
RESTART_PAUSE_S = 2.0
ENDS_TO_BELIEVE = 2
"""So often Postgres must have come to the end of the archive without replaying anything in between."""

_STOPPING = re.compile(r"LOG:\s+recovery stopping (before|after|at) ")
ENDS_WITHOUT_AN_ANSWER = 100
"""So often it may come to the end of the archive and take no connection, some 20 s: before it is consistent it never does."""

FROM_THE_STORE = re.compile(r"FATAL:\s+could not restore file .* from archive")


class RecoveryStopped(Exception):
    """It has not opened. What was replayed stays: the same command goes on from there, once the cause is mended."""


class TargetNotReached(RecoveryStopped):
    """The archive ends before the target, or Postgres came to another end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """Of the Postgres that replays."""

    parameters: Mapping[str, str | int] | None = None
    """Besides ours, such as shared_buffers."""
    accept_end: bool = False
    """Open at the end of the archive where that is before the target."""
    outage_patience_s: float = 3600.0
    """How long without progress the store may fail."""
    start_deadline_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Reached:
    """Where the recovery ended, and that it opened."""

    lsn: Lsn
    time: str
    """Of the last transaction in it, as Postgres tells; empty: none was replayed."""
    timeline: Timeline
    """The new one."""
    by: str


@dataclass(slots=True)
class _Seen:
    """What the last looks at the server have shown."""

    lsn: Lsn = Lsn(0)
    time: str = ""
    ends_at: int = 0
    ends_when_answered: int = 0
    highest: Lsn = Lsn(0)
    moved_s: float = 0.0
    """When the highest position rose last."""


class Replay:
    """One recovery of one directory. `work_directory` holds its socket, its configuration and its log."""

    def __init__(
        self,
        server: LocalServer,
        archive: RecoveryArchive,
        target: Target,
        chain: TimelineChain,
        settings: ReplaySettings,
        *,
        work_directory: Path,
        last_known: Lsn | None,
        enough: Lsn | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`enough`: from there on it has not to come to the archive's end, which may grow as fast as it is replayed."""
        self._server = HiddenServer(
            server, work_directory, archive.restore_command, reads_alone=lambda: archive.reads_alone
        )
        self._archive = archive
        self._target = target
        self._chain = chain
        self._settings = settings
        self._last_known = last_known
        self._enough = enough
        self._say = on_progress
        self._is_paused = False
        self._cut: Lsn | None = None
        """Where the archive ended, and will be opened although the target was not met there."""
        self._why = ""
        self._was_raised = False
        self.log_file = self._server.log_file

    async def run(self) -> Reached:
        """Reached and opened, then shut down cleanly. RecoveryStopped: it has not opened. LocalPostgresError; OSError."""
        try:
            seen, by = await self._until_there()
            return await self._open(seen, by)
        finally:
            await asyncio.shield(self._server.stop())

    async def run_without_opening(self) -> Lsn:
        """All of the archive replayed, and shut down as a standby; where it ended. Errors as of `run`."""
        try:
            seen, by = await self._until_there()
            self._say(f"{by}: shutting down")
            await self._archive.before_it_opens()
        finally:
            await asyncio.shield(self._server.stop())
        control = await self._server.control()
        if control.state is not ClusterState.SHUT_DOWN_IN_RECOVERY:
            raise RecoveryStopped(f"after its shutdown it is {control.state.value}; see {self.log_file}")
        return seen.lsn

    async def _until_there(self) -> tuple[_Seen, str]:
        """The server runs, in recovery, where it should be; and what says so."""
        await self._write_configuration()
        self._archive.on_change = self._server.change_way
        seen = _Seen(moved_s=asyncio.get_running_loop().time())
        while True:
            await self._archive.before_postgres_starts()
            await self._server.start()
            by = await self._watch(seen)
            if by is not None and (self._target.kind == "latest" or self._is_paused or self._cut is not None):
                return seen, by
            if by is not None:
                # With a target that it has not met Postgres does not promote: once more without one, and to here only.
                await self._server.stop()
                self._cut, self._why = seen.lsn, by
                self._archive.cut_at(seen.lsn)
                await self._write_configuration()
            elif self._was_raised:
                self._was_raised = False
                await self._write_configuration()
            else:
                await self._after_a_stop(seen)

    async def _write_configuration(self) -> None:
        target = self._target if self._cut is None else Target()
        await self._server.write_configuration(
            {**target.settings(self._chain.current), **(self._settings.parameters or {})}
        )

    async def _watch(self, seen: _Seen) -> str | None:
        """Until it is where it should be: what says so. None: Postgres has ended. TargetNotReached."""
        loop = asyncio.get_running_loop()
        while not self._server.has_ended:
            self._archive.look()
            unreadable = self._archive.unreadable
            if unreadable is not None:
                raise TargetNotReached(
                    f"replay stopped at {format_lsn(seen.lsn)}: a record in {unreadable}, or one that begins right before it, cannot be "
                    f"read, although the segment is the one that was archived. Nothing was opened; see {self.log_file}"
                )
            row = await self._server.look()
            if row is None:
                if self._archive.ends_seen - seen.ends_when_answered >= ENDS_WITHOUT_AN_ANSWER:
                    raise TargetNotReached(
                        f"the archive ends before the backup is consistent: some of the log behind it is gone; see {self.log_file}"
                    )
                await asyncio.sleep(UNREACHABLE_POLL_S)
                continue
            seen.ends_when_answered = self._archive.ends_seen
            lsn = parse_lsn(row["lsn"]) if row["lsn"] else Lsn(0)
            is_moving = lsn != seen.lsn
            if is_moving:
                seen.lsn, seen.ends_at = lsn, self._archive.ends_seen
                if lsn > seen.highest:
                    seen.highest, seen.moved_s = lsn, loop.time()
                seen.time = "" if row["time"] is None else row["time"].isoformat(sep=" ")
                self._say(f"replayed to {format_lsn(lsn)}" + (f", {seen.time}" if seen.time else ""))
            if not row["in_recovery"]:
                raise RecoveryStopped("Postgres has opened although nobody asked it to: do not use this directory")
            if row["pause"] == "paused":
                if _STOPPING.search(self._server.log_text()):
                    self._is_paused = True
                    return f"Postgres stopped at the target, {self._target}"
                if self._server.raise_settings():
                    self._was_raised = True
                    await self._server.stop()
                    self._say("settings of the source have risen since the backup: starting with them")
                    return None
                raise RecoveryStopped(f"Postgres has paused for a reason of its own: see {self.log_file}")
            if self._enough is not None and lsn >= self._enough:
                return f"replayed to {format_lsn(lsn)}, which is enough"
            if self._archive.ends_seen - seen.ends_at >= ENDS_TO_BELIEVE and lsn:
                return self._at_the_end(seen)
            await asyncio.sleep(MOVING_POLL_S if is_moving else POLL_S)
        return None

    def _at_the_end(self, seen: _Seen) -> str:
        """The archive has no more: is that what was asked for? TargetNotReached."""
        if self._cut is not None:
            if seen.lsn != self._cut:
                raise TargetNotReached(
                    f"replay ended at {format_lsn(seen.lsn)}, and the time before at {format_lsn(self._cut)}: see {self.log_file}"
                )
            return self._why
        where = f"the archive ends at {format_lsn(seen.lsn)}" + (
            f", after the transaction of {seen.time}" if seen.time else ""
        )
        if self._last_known is not None and seen.lsn <= self._last_known:
            raise TargetNotReached(
                f"replay stopped at {format_lsn(seen.lsn)}, although the archive goes on to {format_lsn(self._last_known)} "
                f"and beyond: a record there cannot be read. Nothing was opened; see {self.log_file}"
            )
        target_lsn = self._target.lsn
        if target_lsn is not None and with_header(seen.lsn, self._archive.segment_bytes) >= target_lsn:
            return f"the log is replayed to {format_lsn(target_lsn)}"
        if self._target.kind == "latest" or self._settings.accept_end:
            return where
        raise TargetNotReached(
            f"{where}, which is before the target, {self._target}. Nothing was opened. If that is the state that you want (nothing "
            "was committed between them), give --accept-end; else choose a target before it"
        )

    async def _after_a_stop(self, seen: _Seen) -> None:
        """Postgres has ended by itself: a store that fails is waited for, anything else is told."""
        text, said = self._server.log_text(), self._server.last_fatal()
        if "requested recovery stop point is before consistent recovery point" in text:
            raise TargetNotReached(
                f"the target, {self._target}, is before the backup is consistent: choose an earlier one with --backup"
            )
        failed = self._archive.status.fetch.last_error
        if not FROM_THE_STORE.search(text):
            raise RecoveryStopped(f"Postgres ended: {said or 'without a word'}; see {self.log_file}")
        loop = asyncio.get_running_loop()
        if loop.time() - seen.moved_s > self._settings.outage_patience_s:
            raise RecoveryStopped(
                f"the archive could not be read for {self._settings.outage_patience_s:g} s: {failed}. Nothing was opened: "
                "give the same command again, and it goes on from here"
            )
        self._say(f"waiting for the archive: {failed}")
        await asyncio.sleep(RESTART_PAUSE_S)

    async def _open(self, seen: _Seen, by: str) -> Reached:
        """The only place where it becomes a primary."""
        self._say(f"{by}: opening")
        await self._archive.before_it_opens()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + STOP_DEADLINE_S
        while not await self._server.promote():
            if loop.time() > end_s or self._server.has_ended:
                raise RecoveryStopped(f"it was to open, and has not: {self._server.last_fatal()}; see {self.log_file}")
            await asyncio.sleep(POLL_S)
        await self._server.stop()
        control = await self._server.control()
        if control.state is not ClusterState.SHUT_DOWN or control.timeline <= self._chain.current:
            raise RecoveryStopped(
                f"after the promotion it is {control.state.value} on timeline {control.timeline}; see {self.log_file}"
            )
        return Reached(seen.lsn, seen.time, control.timeline, by)
