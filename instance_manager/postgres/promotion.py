"""Promotion to exactly the claimed timeline (P4), and whether a clean shutdown may be handed over (P12).

Postgres takes the first number after its own timeline for which it finds no history, and asks `restore_command` about
each. The takeover's write has claimed a number that was never used; `restore_command.sh` makes Postgres skip all below
it. That the claim was taken, from the recorded fork, is verified afterwards, before anybody is let in.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import asyncpg

from instance_manager.core.types import Timeline, TimelineChain, WalEnd, format_lsn
from instance_manager.postgres import sql
from instance_manager.postgres.control_data import ControlData
from instance_manager.postgres.deadlines import Deadline, Pause
from instance_manager.postgres.files import remove_if_present, write_atomically
from instance_manager.postgres.histories import (
    HistoryInvalid,
    ends_as,
    history_file_name,
    read_history,
    timelines_with_history,
)
from instance_manager.postgres.observation import identify_system
from instance_manager.postgres.server import DeadlinePassed, LocalPostgresError, LocalServer
from instance_manager.postgres.wal_dump import end_of_wal
from instance_manager.threads import InOrder

Relay = Callable[[], Awaitable[None]]
"""Port: SIGUSR1 to the postmaster, by whoever owns it (the supervisor)."""

SCRIPT = "restore_command.sh"
CLAIM = "claim"
PROMOTE_SIGNAL = "promote"
_CONFLICT_PATIENCE_S = 0.1


class PromotionFailed(LocalPostgresError):
    """Not promoted: `reason`. With `triggered` it may still happen: the caller stops Postgres."""

    def __init__(self, reason: str, *, triggered: bool) -> None:
        super().__init__(f"promotion failed: {reason}")
        self.reason = reason
        self.triggered = triggered


class PromotedWrong(LocalPostgresError):
    """It took another timeline than the claimed one, or left another point: the caller stops Postgres at once (P4)."""

    def __init__(self, claimed: Timeline, timeline: Timeline, reason: str) -> None:
        super().__init__(f"promoted to timeline {timeline} where {claimed} was claimed: {reason}")
        self.claimed = claimed
        self.timeline = timeline
        self.reason = reason


def install_restore_command(server: LocalServer, client_words: str = "") -> str:
    """Copy the script into the state directory; the value of `restore_command` that runs it. Blocks on the disk.

    `client_words`: the command line of the archive's client as it stands in a setting; empty: there is no archive.
    """
    text = importlib.resources.files(__package__).joinpath(SCRIPT).read_text()
    path = server.state_directory / SCRIPT
    write_atomically(path, text.encode(), mode=0o755, run_as=server.run_as)
    # Postgres replaces %p and %f, and %% by one %.
    script, state = (shlex.quote(str(each)).replace("%", "%%") for each in (path, server.state_directory))
    return f'/bin/sh {script} "%f" "%p" {state} {client_words}'.rstrip()


def write_claim(server: LocalServer, claim: Timeline) -> None:
    """From now on a promotion takes `claim`. Blocks on the disk."""
    write_atomically(server.state_directory / CLAIM, f"{claim}\n".encode(), mode=0o644, run_as=server.run_as)


def clear_claim(server: LocalServer) -> None:
    """No promotion is under way any more; to be called before every start too. Blocks on the disk.

    Also removes empty histories above the newest real one: Postgres may have kept an answer of the script, or have been
    stopped while it fetched. The next recovery would take such a one for its timeline, and end with "requested
    timeline is not a child of this server's history". Those below fill gaps, and stay: see `fill_gap`.
    """
    remove_if_present(server.state_directory / CLAIM)
    directory = server.data_directory / "pg_wal"
    if not directory.is_dir():
        return
    newest = max(timelines_with_history(directory), default=Timeline(1))
    for path in directory.glob("????????.history"):
        if path.stat().st_size == 0 and path.name > history_file_name(newest):
            remove_if_present(path)
            for suffix in ("ready", "done"):
                (directory / "archive_status" / f"{path.name}.{suffix}").unlink(missing_ok=True)


def forget_dead_ends(server: LocalServer, chain: TimelineChain) -> None:
    """Histories of timelines outside the accepted history become empty ones. Blocks on the disk.

    For a stopped log that lies within that history. A promotion that was cut off before its first record leaves its
    history behind, where it ran and where it was followed already. Recovery takes that timeline for its own, asks the
    primary for it, and refuses the primary's: "new timeline 5 is not a child of database system timeline 3".
    """
    directory = server.data_directory / "pg_wal"
    for timeline in timelines_with_history(directory):
        if not chain.knows(timeline):
            write_atomically(directory / history_file_name(timeline), b"", mode=0o600, run_as=server.run_as)


def fill_gap(server: LocalServer, parent: Timeline, claim: Timeline) -> None:
    """Give each number that the claim skipped an empty history, after the claim's own is there. Blocks on the disk.

    A standby that follows asks its primary for the history of *every* number from its own on, and fails at the first
    that is missing; and it finds the newest timeline by counting up to the first number without a history. So with a
    gap none could follow, and one that had would not start again. An empty history is no ancestor of anything.
    """
    directory = server.data_directory / "pg_wal"
    for number in range(claim - 1, parent, -1):
        path = directory / history_file_name(Timeline(number))
        if not path.exists():
            write_atomically(path, b"", mode=0o600, run_as=server.run_as)


@dataclass(frozen=True, slots=True)
class Promoted:
    timeline: Timeline
    took_s: float


async def promote(server: LocalServer, chain: TimelineChain, relay: Relay, *, deadline_s: float) -> Promoted:
    """Promote this standby to `chain.current`, which the takeover has claimed as forked from this very log (P4).

    `restore_command` must be the one of `install_restore_command`, and no walreceiver must run. Replay that waits for a
    standby's query gets its way: those sessions are terminated. Begun and not seen to its end, the claim file stays, so
    that a promotion that comes late is on the claimed timeline too; `clear_claim` before the next start.

    PromotionFailed, PromotedWrong. A CHECKPOINT is left to `checkpoint`.
    """
    deadline = Deadline(deadline_s)
    started_s = asyncio.get_running_loop().time()
    claim = chain.current
    if not chain.switches:
        raise ValueError("nothing was claimed: the chain has one timeline only")
    triggered = False
    files = InOrder()

    def ask() -> None:
        # This order: the script answers only while the claim is there and Postgres has consumed the signal file.
        write_atomically(server.data_directory / PROMOTE_SIGNAL, b"", run_as=server.run_as)
        write_claim(server, claim)

    try:
        try:
            await _require_parent_history(server, chain, deadline)
            with files.one(ask) as written:
                await asyncio.to_thread(written)
            triggered = True
            async with asyncio.timeout(deadline.left_s):
                await relay()
            await _wait_promoted(server, deadline)
            await _verify(server, chain, deadline)
        except TimeoutError:
            raise PromotionFailed("the supervisor did not answer", triggered=triggered) from None
        except (DeadlinePassed, sql.SqlUnavailable, asyncpg.PostgresError, OSError) as error:
            raise PromotionFailed(str(error), triggered=triggered) from error
    except BaseException:
        # Behind what a slow disk has not taken yet: else a signal file could come after this.
        await asyncio.to_thread(files.after(partial(_withdraw, server)))
        raise
    await asyncio.to_thread(fill_gap, server, chain.switches[-1].parent, claim)
    await asyncio.to_thread(clear_claim, server)
    return Promoted(claim, asyncio.get_running_loop().time() - started_s)


async def checkpoint(server: LocalServer, *, deadline_s: float) -> None:
    """CHECKPOINT at once, in a session of its own: after a promotion pg_rewind of others needs it; before a shutdown it
    shortens it. DeadlinePassed: it goes on in the server.
    """
    deadline = Deadline(deadline_s)
    async with sql.session(server, deadline_s=deadline.left_s, statement_timeout_s=deadline_s) as fresh:
        await fresh.execute("CHECKPOINT", deadline_s=deadline.left_s)


@dataclass(frozen=True, slots=True)
class NotHandedOver:
    """The directory is no clean end of the claimed timeline: start again as the holder, with a later epoch (P12)."""

    reason: str


async def shutdown_end(
    server: LocalServer, control: ControlData, chain: TimelineChain, *, deadline_s: float
) -> WalEnd | NotHandedOver:
    """Where this stopped primary's log ends: behind its shutdown checkpoint's record, the last that it wrote (P12).

    A release is stamped with it, and only a member whose log ends there may take over without promises. That the
    shutdown completed says nothing about any standby: one whose connection died was not waited for.
    """
    if not control.shut_down_cleanly:
        return NotHandedOver(f"pg_control says {control.state.value!r}, not 'shut down'")
    if control.timeline != chain.current:
        return NotHandedOver(f"shut down on timeline {control.timeline}, but {chain.current} is the claimed one")
    before = WalEnd(control.timeline, control.checkpoint_lsn)
    end = await end_of_wal(
        server,
        start=before,
        newest=chain.current,
        history=tuple((switch.parent, switch.switch_lsn) for switch in chain.switches),
        system_identifier=control.system_identifier,
        wal_segment_bytes=control.wal_segment_bytes,
        deadline_s=deadline_s,
    )
    if end.lsn <= control.checkpoint_lsn:
        return NotHandedOver(f"no record at the checkpoint {before} of pg_control")
    return end


def _withdraw(server: LocalServer) -> None:
    """After a failure: nothing that Postgres has not begun may happen later; what it has begun goes to the claim.

    While the signal file is there Postgres has not consumed it. Then the claim goes first: the script takes a claim
    without a signal file for a promotion that has begun.
    """
    signal_file = server.data_directory / PROMOTE_SIGNAL
    if signal_file.exists():
        clear_claim(server)
        remove_if_present(signal_file)


async def _require_parent_history(server: LocalServer, chain: TimelineChain, deadline: Deadline) -> None:
    """Postgres copies the parent's history into the new one: it must be there and right before it is asked to."""
    switch = chain.switches[-1]
    async with sql.session(server, deadline_s=deadline.left_s) as fresh:
        row = await fresh.fetchrow(
            "SELECT pg_is_in_recovery() AS recovery, current_setting('restore_command') AS restore",
            deadline_s=deadline.left_s,
        )
        if row is None or not row["recovery"]:
            raise PromotionFailed("not in recovery", triggered=False)
        if SCRIPT not in row["restore"]:
            raise PromotionFailed(f"restore_command is {row['restore']!r}: the claim would be ignored", triggered=False)
        # Paused, it would look for the signal only once a second.
        await fresh.execute("SELECT pg_wal_replay_resume()", deadline_s=deadline.left_s)
    wanted = tuple((each.parent, each.switch_lsn) for each in chain.switches[:-1])
    if not wanted:
        return
    try:
        history = await asyncio.to_thread(read_history, server.data_directory / "pg_wal", switch.parent)
    except HistoryInvalid as error:
        raise PromotionFailed(str(error), triggered=False) from error
    if not ends_as(history, wanted):
        raise PromotionFailed(
            f"{history_file_name(switch.parent)} in pg_wal is {history}, not {wanted}", triggered=False
        )


async def _wait_promoted(server: LocalServer, deadline: Deadline) -> None:
    loop = asyncio.get_running_loop()
    pause = Pause(0.01)
    next_look_s = loop.time() + _CONFLICT_PATIENCE_S
    async with sql.session(server, deadline_s=deadline.left_s) as fresh:
        while await fresh.fetchval("SELECT pg_is_in_recovery()", deadline_s=deadline.left_s):
            if deadline.passed:
                raise PromotionFailed(f"still in recovery after {deadline.whole_s:g} s", triggered=True)
            if loop.time() >= next_look_s:
                await fresh.execute(_END_CONFLICTS, deadline_s=deadline.left_s)
                next_look_s = loop.time() + _CONFLICT_PATIENCE_S
            await pause(deadline)


# No commit can wait for a standby here: it is still one itself. So nothing acknowledged is cut short.
_END_CONFLICTS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
  AND EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'startup'
    AND (wait_event LIKE 'RecoveryConflict%' OR wait_event_type IN ('Lock', 'BufferPin')))
"""


async def _verify(server: LocalServer, chain: TimelineChain, deadline: Deadline) -> None:
    switch = chain.switches[-1]
    identity = await identify_system(server, deadline_s=deadline.left_s)
    if identity.timeline != switch.timeline:
        raise PromotedWrong(switch.timeline, identity.timeline, "the claim was not taken")
    try:
        history = await asyncio.to_thread(read_history, server.data_directory / "pg_wal", identity.timeline)
    except HistoryInvalid as error:
        raise PromotedWrong(switch.timeline, identity.timeline, str(error)) from error
    wanted = tuple((each.parent, each.switch_lsn) for each in chain.switches)
    if not ends_as(history, wanted):
        shown = ", ".join(f"{parent}:{format_lsn(lsn)}" for parent, lsn in history or ())
        raise PromotedWrong(switch.timeline, identity.timeline, f"its history is {shown or 'missing'}")
