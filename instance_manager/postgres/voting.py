"""To vote: stop receiving for certain, then tell where the log ends; and to follow again (P2, P3, P9).

**Why a stopped walreceiver stays stopped.** The startup process asks the postmaster for a walreceiver with the
`primary_conninfo` that *it* has loaded, and it may load a new one late: it looks at SIGHUP between two records, not while
it waits for a query that conflicts, for a delay, or in a long redo. Even "it is seen busy" proves nothing about what
follows: after a record that it read from pg_wal it goes from "no more in pg_wal" to "start streaming" inside one call
(WaitForWALToBecomeAvailable), without looking at SIGHUP in between, and starts a walreceiver with the old value (P2).

So the proof rests not on the startup process, but on the postmaster, which forks every walreceiver:

1. One write of the settings file empties `primary_conninfo` and puts a directory of ours at the head of
   `dynamic_library_path`. In it lies an empty file by the name of `libpqwalreceiver`, the one library by which a
   walreceiver talks to a primary: WalReceiverMain loads it by that bare name before it connects (14 to 18).
2. A new connection shows both values: the postmaster has loaded them. Any walreceiver that it forks from now on
   inherits them and ends with "file too short" before it connects. All other libraries are found where they were.
3. A walreceiver forked before is a child of the postmaster: each child is classified by pg_stat_activity and by its
   title in /proc; one too young to have either is waited for. A walreceiver gets SIGTERM through its pidfd, and is seen
   gone. On its way out it flushes what it has received and sends no reply.

From then on this server acknowledges nothing, whatever the startup process does; replay goes on, and a promotion needs
nothing undone. A wrong assumption anywhere ends in NotStopped, never in a vote.

**To follow again**, the block goes, so now the startup process itself must have let go of the old value: it is asked to
pause, twice. It confirms a pause only in a loop (recoveryPausesHere) that looks at SIGHUP, confirms, sleeps, looks again;
between two confirmations, each of a request made after the one before was seen, lies a look at SIGHUP. Confirmed
once, the look may have been before the signal. While it is busy, following waits; it would receive nothing anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import asyncpg

from instance_manager.core.types import Lsn, MemberId, Timeline, TimelineChain, WalEnd, format_lsn, parse_lsn
from instance_manager.postgres import sql
from instance_manager.postgres.deadlines import Deadline, Pause
from instance_manager.postgres.dynamic_settings import DynamicSettings, SettingNotSeen
from instance_manager.postgres.files import fsync_file
from instance_manager.postgres.histories import history_file_name, history_of_chain, read_history
from instance_manager.postgres.observation import IdentifyFailed, identify_system
from instance_manager.postgres.running import NoProcesses, RunningServer
from instance_manager.postgres.server import DeadlinePassed, LocalPostgresError, LocalServer
from instance_manager.postgres.wal_dump import PositionUnknown, end_of_wal, segment_file_name

__all__ = [
    "NotFollowing",
    "NotStopped",
    "PositionUnknown",
    "Stopped",
    "follow",
    "position",
    "stop_following",
]

_DEFAULT_LIBRARY_PATH = "$libdir"
_RESUME_S = 1.0


class NotStopped(LocalPostgresError):
    """It is not proven that this server receives nothing any more: no promise may be made (P2).

    `walreceivers` still live, or `unclassified` children of the postmaster may be some.
    """

    def __init__(self, reason: str, walreceivers: tuple[int, ...] = (), unclassified: tuple[int, ...] = ()) -> None:
        super().__init__(f"still able to receive: {reason}")
        self.walreceivers = walreceivers
        self.unclassified = unclassified


class NotFollowing(LocalPostgresError):
    """The new primary is not followed yet: `reason`. Nothing is received meanwhile; ask again."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not following: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Stopped:
    """No walreceiver of this postmaster lives, and none can start until `follow`."""

    postmaster_pid: int
    ended: tuple[int, ...]
    """Walreceivers that were ended for it."""


async def stop_following(server: RunningServer, settings: DynamicSettings, *, deadline_s: float) -> Stopped:
    """Stop receiving, and prove it (P2). To be called after the promise is persisted. May be repeated.

    NotStopped: not proven in time; what was begun stays (the settings are emptied), and nothing may be promised.
    """
    deadline = Deadline(deadline_s)
    try:
        async with _turn(settings, deadline):
            return await _stop(server, settings, deadline)
    except (SettingNotSeen, DeadlinePassed, NoProcesses, sql.SqlUnavailable, asyncpg.PostgresError, OSError) as error:
        raise NotStopped(str(error)) from error


async def position(server: LocalServer, chain: TimelineChain, *, deadline_s: float) -> WalEnd:
    """The end of the last complete record that this standby holds on disk, whatever it has replayed (P3, P11).

    To be called after `stop_following`, else it is a lower bound. The files that hold it are flushed. What
    the server says about receiving is not used: after a restart it is null, then a segment's start, and it may be
    amid a record. The result may have diverged from `chain`: see `TimelineChain.contains`.

    PositionUnknown: also for a log on a timeline that nobody claimed, or whose history is not the recorded one (P4).
    """
    deadline = Deadline(deadline_s)
    try:
        start, system_identifier, segment_bytes = await _replay_position(server, deadline)
        await asyncio.to_thread(_require_claimed, server, chain, start.timeline)
        end = await end_of_wal(
            server,
            start=start,
            newest=chain.current,
            history=history_of_chain(chain),
            system_identifier=system_identifier,
            wal_segment_bytes=segment_bytes,
            deadline_s=deadline.left_s,
        )
        await asyncio.to_thread(_flush, server, chain, start, end, segment_bytes)
    except (DeadlinePassed, sql.SqlUnavailable, IdentifyFailed, asyncpg.PostgresError, OSError) as error:
        raise PositionUnknown(f"the end of the log cannot be told: {error}") from error
    return end


async def follow(
    server: RunningServer, settings: DynamicSettings, conninfo: str, slot: MemberId | None, *, deadline_s: float
) -> None:
    """Follow this primary and no other, through this slot. To be called after its epoch is persisted as promised (R5).

    Already followed with these very settings: nothing happens. Otherwise replay that was paused goes on: a paused startup
    process asks for no walreceiver.
    NotFollowing: not yet, because the startup process is busy, or something did not answer in time.
    """
    deadline = Deadline(deadline_s)
    wanted = {"primary_conninfo": conninfo, "primary_slot_name": slot or ""}
    try:
        async with _turn(settings, deadline):
            current = await settings.file.read()
            block = await server.block_directory()
            if all(current.get(name) == value for name, value in wanted.items()) and not _is_blocked(block, current):
                await settings.confirm(wanted, deadline)
                return
            await _stop(server, settings, deadline)
            await _startup_has_looked(server, deadline)
            underlying = await _underlying_library_path(block, settings, deadline)
            path = None if underlying == _DEFAULT_LIBRARY_PATH else underlying
            await settings.change({**wanted, "dynamic_library_path": path}, deadline_s=deadline.left_s)
    except (LocalPostgresError, NoProcesses, asyncpg.PostgresError, OSError) as error:
        raise NotFollowing(str(error)) from error


@contextlib.asynccontextmanager
async def _turn(settings: DynamicSettings, deadline: Deadline) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(deadline.left_s):
            await settings.following.acquire()
    except TimeoutError:
        raise DeadlinePassed("waiting for another change of whom to follow", deadline.whole_s) from None
    try:
        yield
    finally:
        settings.following.release()


async def _stop(server: RunningServer, settings: DynamicSettings, deadline: Deadline) -> Stopped:
    block = await server.block_directory()
    underlying = await _underlying_library_path(block, settings, deadline)
    await settings.change(
        {"primary_conninfo": "", "primary_slot_name": "", "dynamic_library_path": f"{block}:{underlying}"},
        deadline_s=deadline.left_s,
    )
    return await _end_walreceivers(server, deadline)


def _is_blocked(block: str, settings: Mapping[str, str]) -> bool:
    return settings.get("dynamic_library_path", "").startswith(f"{block}:")


async def _underlying_library_path(block: str, settings: DynamicSettings, deadline: Deadline) -> str:
    seen = await settings.file.shown(["dynamic_library_path"], deadline)
    value = seen["dynamic_library_path"] or ""
    return value.removeprefix(f"{block}:") or _DEFAULT_LIBRARY_PATH


async def _end_walreceivers(server: RunningServer, deadline: Deadline) -> Stopped:
    ended: set[int] = set()
    pause = Pause(0.02)
    late: NotStopped | None = None
    async with server.processes(deadline) as processes:
        while True:
            try:
                kinds = await processes.children(deadline)
            except DeadlinePassed as error:
                # The look before has told who lives, which a query without an answer does not.
                raise late or error from None
            receivers = tuple(pid for pid, kind in kinds.items() if kind == "walreceiver")
            unclassified = tuple(pid for pid, kind in kinds.items() if kind == "unclassified")
            if not receivers and not unclassified:
                return Stopped(processes.postmaster, tuple(sorted(ended)))
            for pid in receivers:
                if pid not in ended and processes.terminate(pid):
                    ended.add(pid)
            late = NotStopped(
                f"after {deadline.whole_s:g} s walreceivers {receivers} live and {unclassified} may be some",
                receivers,
                unclassified,
            )
            if deadline.passed:
                raise late
            await pause(deadline)


async def _startup_has_looked(server: RunningServer, deadline: Deadline) -> None:
    """Return once the startup process has loaded the settings that are loaded now; see the head of the module.

    Replay goes on in any case: paused, it would never ask for a walreceiver. A pause that was there before is lost.
    """
    try:
        async with server.processes(deadline) as processes:
            for _ in range(2):
                await processes.resume_replay(deadline)
                await processes.pause_replay(deadline)
                pause = Pause(0.02)
                while not await processes.replay_is_paused(deadline):
                    if deadline.passed:
                        raise NotFollowing(f"the startup process is busy: no pause within {deadline.whole_s:g} s")
                    await pause(deadline)
    finally:
        last = Deadline(_RESUME_S)
        async with server.processes(last) as another:
            await another.resume_replay(last)


async def _replay_position(server: LocalServer, deadline: Deadline) -> tuple[WalEnd, int, int]:
    """End of the last record replayed with its timeline, the system identifier, and the size of segments."""
    pause = Pause()
    while True:
        before = await identify_system(server, deadline_s=deadline.left_s)
        async with sql.session(server, deadline_s=deadline.left_s) as fresh:
            row = await fresh.fetchrow(
                "SELECT pg_is_in_recovery() AS recovery, pg_last_wal_replay_lsn()::text AS replay, "
                "pg_size_bytes(current_setting('wal_segment_size')) AS segment_bytes",
                deadline_s=deadline.left_s,
            )
        after = await identify_system(server, deadline_s=deadline.left_s)
        if row is None or not row["recovery"] or row["replay"] is None:
            raise PositionUnknown("this server is not in recovery")
        if before == after:
            start = WalEnd(after.timeline, parse_lsn(row["replay"]))
            return start, after.system_identifier, int(row["segment_bytes"])
        if deadline.passed:
            raise PositionUnknown("replay went through timelines all the time")
        await pause(deadline)


def _require_claimed(server: LocalServer, chain: TimelineChain, timeline: Timeline) -> None:
    """A log on an unclaimed timeline, or with another history than the recorded one, has no rank (P4)."""
    claimed = {chain.first, *(switch.timeline for switch in chain.switches)}
    if timeline not in claimed:
        raise PositionUnknown(f"timeline {timeline} was never claimed, or the accepted history left its parent earlier")
    if timeline == chain.first:
        return
    history = read_history(server.data_directory / "pg_wal", timeline)
    if history is None:
        raise PositionUnknown(f"{history_file_name(timeline)} is missing")
    since_first = tuple(each for each in history if each[0] >= chain.first)
    if not chain.matches(since_first):
        shown = ", ".join(f"{parent}:{format_lsn(lsn)}" for parent, lsn in history)
        raise PositionUnknown(f"timeline {timeline} has another history than the recorded one: {shown}")


def _flush(server: LocalServer, chain: TimelineChain, start: WalEnd, end: WalEnd, segment_bytes: int) -> None:
    """Flush the segments from `start` to `end`: what an earlier life of the server wrote may be in memory only."""
    timelines = {chain.first, *(switch.timeline for switch in chain.switches)}
    for segment in range(start.lsn // segment_bytes, max(start.lsn, Lsn(end.lsn - 1)) // segment_bytes + 1):
        for timeline in timelines:
            with contextlib.suppress(FileNotFoundError):
                fsync_file(server.data_directory / "pg_wal" / segment_file_name(timeline, segment, segment_bytes))
