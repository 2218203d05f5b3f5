"""The synchronous list of a primary, and the barrier: what must be *seen* before it counts (P1, P5, P7, P10).

Who decides that a commit may return? Three kinds of processes, each by its own copy of the list, loaded at its own time:

- A backend waits only if a flag in shared memory says that there is a list. The **checkpointer** alone sets it, when it
  looks at SIGHUP, which may be minutes later (P1). Every change between two lists that are not empty leaves it on.
- A **walsender** counts for others once it has published its priority: names work by what each walsender published of
  *itself*. So a dropped name is gone once its walsender shows priority 0. The view also shows 0 where there is no
  flush position yet, whatever the process has loaded: that is no evidence, and such a walsender is waited for, or ended.
- Each walsender releases waiters by its own **k**, which no view shows (P5). A walsender looks at SIGHUP at the
  top of its loop, before it reads replies. A mark that is written after SIGHUP was sent is sent in one turn of
  the loop, and the reply that it is flushed is read in a later one: who shows flush past the mark has the new k. Any
  walsender not yet listed when the new list was confirmed enters its loop later, and looks first. Until the last one
  has shown it, commits *behind* that mark may have been released by the smaller k, on fewer members: so a second mark is
  written then, and k members must pass that one too.

Leaving the empty list. That a commit returns proves nothing: with healthy standbys it may just have been fast. So first
a canary's commit must be seen *not* to wait (no walsender can have released it: each shows that it has let go of every
name): the flag is off. Then comes a list that nobody can satisfy; the next canary's, seen waiting in `SyncRep`, proves
that the flag was switched on since; then comes the real list. Clients' commits wait for those few milliseconds. (Two
CHECKPOINTs would prove it too, one would not if the checkpointer had just looked, but may take minutes.) The canary is
ended by ending its session. No wait of a client is ever cancelled.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import asyncpg

from instance_manager.core.quorum import ALONE, SynchronousSet
from instance_manager.core.types import MEMBER_ID_PATTERN, Lsn, MemberId, Timeline, format_lsn
from instance_manager.postgres import sql
from instance_manager.postgres.configuration import NOBODY_CAN_SATISFY, render_synchronous_standby_names
from instance_manager.postgres.deadlines import Deadline, Pause
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.running import Process, ReplicationSession, RunningServer, Sender
from instance_manager.postgres.server import DeadlinePassed, LocalPostgresError

_SETTING = "synchronous_standby_names"
TERMINATE_AFTER_S = 1.0
"""A walsender that has not looked at its settings by then is ended."""


class NotConfirmed(LocalPostgresError):
    """The list was written but is not known to be what commits wait for; nothing may be recorded as if it were.

    The written list stays. Ask again; or, while the record says q = 0 still, go back to the empty one.
    `lingering`: walsenders that may release commits by an older list.
    """

    def __init__(self, reason: str, lingering: tuple[int, ...] = ()) -> None:
        super().__init__(f"synchronous list not confirmed: {reason}")
        self.reason = reason
        self.lingering = lingering


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierState:
    """Who has flushed everything up to `mark`, and what stands in the way."""

    mark: Lsn
    needed: int
    passed: tuple[str, ...]
    missing: tuple[str, ...]
    duplicates: tuple[str, ...] = ()
    """Names that more than one walsender has: Postgres would count each (P7)."""
    without_slot: tuple[str, ...] = ()
    """Members that do not stream through the slot of their own name (P7)."""
    suspects: tuple[int, ...] = ()
    """Walsenders that may still release commits by a smaller k (P5)."""

    @property
    def is_passed(self) -> bool:
        return len(self.passed) >= self.needed and not self.duplicates and not self.suspects

    def __str__(self) -> str:
        parts = [f"{len(self.passed)} of {self.needed} members have flushed {format_lsn(self.mark)}"]
        for words, found in (
            ("missing", self.missing),
            ("seen twice", self.duplicates),
            ("without their slot", self.without_slot),
            ("perhaps with an older k", self.suspects),
        ):
            if found:
                parts.append(f"{words}: {', '.join(str(each) for each in found)}")
        return "; ".join(parts)


class BarrierNotPassed(LocalPostgresError):
    """Not in time, or not on the claimed timeline. `state` is None where there was no mark."""

    def __init__(self, reason: str, state: BarrierState | None = None) -> None:
        super().__init__(f"barrier not passed: {reason}")
        self.reason = reason
        self.state = state


def judge_barrier(
    senders: Iterable[Sender],
    *,
    members: frozenset[MemberId],
    needed: int,
    mark: Lsn,
    suspects: frozenset[Process] = frozenset(),
    require_slots: bool = True,
) -> BarrierState:
    """Has the barrier been passed? Pure, so that each rule has its table of tests."""
    listed = [each for each in senders if each.name in members]
    counted = Counter(each.name for each in listed)
    duplicates = {name for name, count in counted.items() if count > 1}
    without_slot = {each.name for each in listed if each.slot != each.name} if require_slots else set()
    passed = {
        each.name
        for each in listed
        if each.state == "streaming" and each.has_flushed(mark) and each.name not in duplicates | without_slot
    }
    return BarrierState(
        mark=mark,
        needed=needed,
        passed=tuple(sorted(passed)),
        missing=tuple(sorted(members - passed)),
        duplicates=tuple(sorted(duplicates)),
        without_slot=tuple(sorted(without_slot)),
        suspects=tuple(sorted(each.pid for each in listed if each.process in suspects and not each.has_flushed(mark))),
    )


def judge_dropped(
    senders: Iterable[Sender], *, members: frozenset[MemberId], before: frozenset[Process]
) -> tuple[int, ...]:
    """Walsenders that may still count under a name which is listed no more (P5).

    `before`: those that existed when the new list was confirmed; later ones look at it first. Priority 0 is evidence
    only with a flush position. A name that cannot be a member's was never listed.
    """
    return tuple(
        each.pid
        for each in senders
        if each.name not in members
        and each.process in before
        and MEMBER_ID_PATTERN.fullmatch(each.name) is not None
        and (each.sync_priority != 0 or each.flush_lsn is None)
    )


@dataclass(frozen=True, slots=True)
class Confirmed:
    """This set is what commits wait for, by everybody's view, but for k: `suspects` must yet pass a barrier (P5)."""

    synchronous: SynchronousSet
    postmaster_start: str
    suspects: frozenset[Process]
    took_s: float


@dataclass(frozen=True, slots=True)
class BarrierPassed:
    """Everything that the log held when the barrier began is on k members, and everybody has the confirmed k."""

    state: BarrierState
    timeline: Timeline
    took_s: float


class SynchronousReplication:
    """The list of the local primary. One for a life of the agent: it remembers what it has seen proven, and of which
    postmaster, and takes everything else for unproven.
    """

    def __init__(self, server: RunningServer, settings: DynamicSettings, *, require_slots: bool = True) -> None:
        self._server = server
        self._settings = settings
        self._require_slots = require_slots
        self._switched_on_for: str | None = None
        """Start of the postmaster whose checkpointer was seen to have a list."""
        self._lowest_k = 0
        """The smallest k that a walsender may have; 0: unknown."""
        self._confirmed: Confirmed | None = None

    @property
    def confirmed(self) -> Confirmed | None:
        return self._confirmed

    async def apply(
        self, wanted: SynchronousSet, *, deadline_s: float, terminate_after_s: float = TERMINATE_AFTER_S
    ) -> Confirmed:
        """Make Postgres wait for `wanted`, and see that it does (P1, P5).

        Walsenders of dropped names that do not let go within `terminate_after_s` are terminated. NotConfirmed.
        """
        deadline = Deadline(deadline_s)
        started_s = asyncio.get_running_loop().time()
        self._confirmed = None
        try:
            async with self._server.replication(deadline) as watch:
                start = await self._primary_since(watch, deadline)
                if wanted.acknowledges_alone:
                    self._switched_on_for = None
                    self._lowest_k = 0
                    await self._settings.change({_SETTING: ""}, deadline_s=deadline.left_s)
                    suspects: frozenset[Process] = frozenset()
                else:
                    if self._switched_on_for != start:
                        await self._switch_on(watch, deadline)
                        self._switched_on_for = start
                    names = (
                        NOBODY_CAN_SATISFY
                        if wanted.never_acknowledges
                        else render_synchronous_standby_names(wanted.k, wanted.members)
                    )
                    raised = self._lowest_k < wanted.k
                    self._lowest_k = min(self._lowest_k, wanted.k)
                    await self._settings.change({_SETTING: names}, deadline_s=deadline.left_s)
                    senders = await watch.senders(deadline)
                    before = frozenset(each.process for each in senders)
                    await self._dropped_are_gone(watch, wanted, before, deadline, terminate_after_s)
                    listed = frozenset(each.process for each in senders if each.name in wanted.members)
                    suspects = listed if raised else frozenset()
        except (DeadlinePassed, sql.SqlUnavailable, asyncpg.PostgresError, OSError) as error:
            raise NotConfirmed(str(error)) from error
        except NotConfirmed:
            raise
        except LocalPostgresError as error:
            raise NotConfirmed(str(error)) from error
        self._confirmed = Confirmed(wanted, start, suspects, asyncio.get_running_loop().time() - started_s)
        return self._confirmed

    async def barrier(
        self, timeline: Timeline, *, deadline_s: float, terminate_after_s: float = TERMINATE_AFTER_S
    ) -> BarrierPassed:
        """Wait until all that the log holds now is on k members of the confirmed set, on the claimed `timeline` (P10).

        Suspects (P5) and the older of two walsenders of one name (P7) are terminated after `terminate_after_s`; while one
        of them lives the barrier is not passed. BarrierNotPassed.
        """
        confirmed = self._confirmed
        if confirmed is None or confirmed.synchronous.acknowledges_alone or confirmed.synchronous.never_acknowledges:
            raise BarrierNotPassed("no list is confirmed that a barrier could be for")
        deadline = Deadline(deadline_s)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        try:
            async with self._server.replication(deadline) as watch:
                if await self._primary_since(watch, deadline) != confirmed.postmaster_start:
                    raise BarrierNotPassed("Postgres was started again since the list was confirmed")
                suspects = confirmed.suspects
                while True:
                    mark = await _write_mark(watch, timeline, deadline)
                    state = await self._passed(
                        watch, confirmed.synchronous, mark, suspects, deadline, terminate_after_s
                    )
                    if not suspects:
                        break
                    # Until the last of them was seen with the new k, it may have released commits behind this mark.
                    suspects = frozenset()
        except (DeadlinePassed, sql.SqlUnavailable, NotConfirmed, asyncpg.PostgresError) as error:
            raise BarrierNotPassed(str(error)) from error
        if self._confirmed is not confirmed:
            raise BarrierNotPassed("the list was changed meanwhile", state)
        self._lowest_k = confirmed.synchronous.k
        self._confirmed = Confirmed(confirmed.synchronous, confirmed.postmaster_start, frozenset(), confirmed.took_s)
        return BarrierPassed(state, timeline, loop.time() - started_s)

    async def _passed(
        self,
        watch: ReplicationSession,
        synchronous: SynchronousSet,
        mark: Lsn,
        suspects: frozenset[Process],
        deadline: Deadline,
        terminate_after_s: float,
    ) -> BarrierState:
        """Return once k members have flushed `mark`, and no suspect may have an older k."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        pause = Pause(0.02)
        state: BarrierState | None = None
        try:
            while True:
                senders = await watch.senders(deadline)
                state = judge_barrier(
                    senders,
                    members=synchronous.members,
                    needed=synchronous.k,
                    mark=mark,
                    suspects=suspects,
                    require_slots=self._require_slots,
                )
                if state.is_passed:
                    return state
                if deadline.passed:
                    raise BarrierNotPassed(str(state), state)
                if loop.time() - started_s >= terminate_after_s:
                    await watch.terminate_senders({*state.suspects, *_older_twins(senders, state)}, deadline)
                await pause(deadline)
        except (DeadlinePassed, sql.SqlUnavailable, asyncpg.PostgresError) as error:
            raise BarrierNotPassed(str(error), state) from error

    async def _switch_on(self, watch: ReplicationSession, deadline: Deadline) -> None:
        """Return once a commit was seen to wait: the checkpointer has switched waiting on (P1).

        From the empty list, waiting must first be seen off: a checkpointer that stood still since before the list was
        emptied would switch it off later. No walsender may have released that canary by an older list.
        """
        if (await self._settings.file.read()).get(_SETTING) == "":
            before = frozenset(each.process for each in await watch.senders(deadline))
            await self._dropped_are_gone(watch, ALONE, before, deadline, TERMINATE_AFTER_S)
            pause = Pause()
            while await watch.canary_waits(deadline):
                if deadline.passed:
                    raise NotConfirmed(f"commits wait still after {deadline.whole_s:g} s: the checkpointer is busy")
                await pause(deadline)
        await self._settings.change({_SETTING: NOBODY_CAN_SATISFY}, deadline_s=deadline.left_s)
        pause = Pause()
        while not await watch.canary_waits(deadline):
            if deadline.passed:
                raise NotConfirmed(f"commits do not wait yet after {deadline.whole_s:g} s: the checkpointer is busy")
            await pause(deadline)

    async def _dropped_are_gone(
        self,
        watch: ReplicationSession,
        wanted: SynchronousSet,
        before: frozenset[Process],
        deadline: Deadline,
        terminate_after_s: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        pause = Pause(0.02)
        lingering: tuple[int, ...] = ()
        try:
            while lingering := judge_dropped(await watch.senders(deadline), members=wanted.members, before=before):
                if deadline.passed:
                    raise NotConfirmed("walsenders of dropped names live", lingering)
                if loop.time() - started_s >= terminate_after_s:
                    await watch.terminate_senders(lingering, deadline)
                await pause(deadline)
        except (DeadlinePassed, sql.SqlUnavailable, asyncpg.PostgresError) as error:
            raise NotConfirmed(f"walsenders of dropped names: {error}", lingering) from error

    async def _primary_since(self, watch: ReplicationSession, deadline: Deadline) -> str:
        start = await watch.primary_since(deadline)
        if start is None:
            raise NotConfirmed("this server is in recovery: its list is the one that nobody can satisfy")
        return start


async def _write_mark(watch: ReplicationSession, timeline: Timeline, deadline: Deadline) -> Lsn:
    own, mark = await watch.write_mark(deadline)
    if own != timeline:
        raise BarrierNotPassed(f"Postgres writes timeline {own}, not the claimed {timeline}")
    return mark


def _older_twins(senders: Iterable[Sender], state: BarrierState) -> set[int]:
    """Of each name seen twice all walsenders but the one that started last."""
    found = set()
    for name in state.duplicates:
        twins = sorted((each for each in senders if each.name == name), key=lambda each: each.backend_start)
        found |= {each.pid for each in twins[:-1]}
    return found
