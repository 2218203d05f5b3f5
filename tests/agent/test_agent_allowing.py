"""What the archive's commands may do: one word at a time, and none that a promise has overtaken."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from instance_manager.agent.allowing import Allowing, NotWithheld
from instance_manager.agent.postgres_port import LocalPostgres
from instance_manager.postgres.archive_commands import Allowed, StillRestoring


class FakeCommands:
    """`fails`: what the disk does; `restoring`: whether a restore_command still runs."""

    def __init__(self) -> None:
        self.written: list[Allowed | None] = []
        self.fails: Exception | None = None
        self.restoring = False
        self.looked = 0
        self.slow: asyncio.Event | None = None

    async def allow_archive(self, what: Allowed | None, *, deadline_s: float) -> None:
        if self.slow is not None:
            await self.slow.wait()
        if self.fails is not None:
            raise self.fails
        self.written.append(what)

    async def nothing_is_restored(self, postmaster_pid: int, *, deadline_s: float) -> None:
        self.looked += 1
        if self.restoring:
            raise StillRestoring("it hangs")


class Desk:
    def __init__(self) -> None:
        self.commands = FakeCommands()
        self.may_fetch = True
        self.allowing = Allowing(cast(LocalPostgres, self.commands), may_fetch=lambda: self.may_fetch)


async def test_the_same_word_is_written_once_and_a_new_agent_writes_its_first() -> None:
    desk = Desk()
    words: tuple[Allowed | None, ...] = (None, None, "push", "push", None)
    for what in words:
        assert await desk.allowing.allow(what)
    assert desk.commands.written == [None, "push", None]


async def test_p9_what_was_decided_before_a_promise_does_not_come_after_it() -> None:
    desk = Desk()
    desk.commands.slow = asyncio.Event()
    withholding = asyncio.create_task(desk.allowing.withhold(1, deadline_s=1))
    await asyncio.sleep(0)
    late = asyncio.create_task(desk.allowing.allow("fetch"))
    await asyncio.sleep(0)
    desk.may_fetch = False
    desk.commands.slow.set()
    await asyncio.gather(withholding, late)
    assert desk.commands.written == [None]


async def test_p9_a_promise_is_refused_while_a_restore_may_yet_bring_wal() -> None:
    desk = Desk()
    await desk.allowing.allow("fetch")
    desk.commands.restoring = True
    with pytest.raises(StillRestoring):
        await desk.allowing.withhold(1, deadline_s=1)
    with pytest.raises(StillRestoring):
        await desk.allowing.withhold(1, deadline_s=1)
    desk.commands.restoring = False
    await desk.allowing.withhold(1, deadline_s=1)


async def test_p9_a_promise_is_refused_when_the_word_cannot_be_taken_back() -> None:
    desk = Desk()
    await desk.allowing.allow("fetch")
    desk.commands.fails = TimeoutError()
    with pytest.raises(NotWithheld):
        await desk.allowing.withhold(1, deadline_s=1)


async def test_where_nothing_was_allowed_a_promise_waits_for_no_look() -> None:
    desk = Desk()
    await desk.allowing.allow(None, server_runs=False)
    await desk.allowing.withhold(1, deadline_s=1)
    assert desk.commands.looked == 0
    await desk.allowing.allow("fetch")
    await desk.allowing.allow(None)
    await desk.allowing.withhold(1, deadline_s=1)
    await desk.allowing.withhold(1, deadline_s=1)
    assert desk.commands.looked == 1, "and once it was looked, not again"


async def test_p9_a_change_that_was_cut_off_may_have_reached_the_disk_and_is_taken_back() -> None:
    """An operation is ended amid its write, which goes on in its thread."""
    desk = Desk()
    await desk.allowing.allow(None)
    desk.commands.slow = asyncio.Event()
    cut_off = asyncio.create_task(desk.allowing.allow("fetch"))
    await asyncio.sleep(0)
    cut_off.cancel()
    await asyncio.gather(cut_off, return_exceptions=True)
    desk.commands.slow = None
    await desk.allowing.withhold(1, deadline_s=1)
    assert desk.commands.written == [None, None]
    assert desk.commands.looked == 1


async def test_a_word_that_was_cut_off_when_it_was_taken_back_is_given_again() -> None:
    """Else a primary's archive_command would be refused for as long as this agent lives."""
    desk = Desk()
    await desk.allowing.allow("push")
    desk.commands.slow = asyncio.Event()
    cut_off = asyncio.create_task(desk.allowing.allow(None))
    await asyncio.sleep(0)
    cut_off.cancel()
    await asyncio.gather(cut_off, return_exceptions=True)
    desk.commands.slow = None
    assert await desk.allowing.allow("push")
    assert desk.commands.written == ["push", "push"]


async def test_p9_a_start_that_could_not_take_the_word_back_proves_nothing() -> None:
    """The server starts all the same, and may restore something before the word is gone."""
    desk = Desk()
    desk.commands.fails = TimeoutError()
    assert not await desk.allowing.allow(None, server_runs=False)
    desk.commands.fails = None
    assert await desk.allowing.allow(None)
    await desk.allowing.withhold(1, deadline_s=1)
    assert desk.commands.looked == 1
