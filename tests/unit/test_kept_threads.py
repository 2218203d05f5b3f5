"""Threads that are kept for the next call: one call's delay is nobody else's, and none is kept for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from instance_manager import threads as module
from instance_manager.threads import Threads, TooManyCalls

DEADLINE_S = 10.0


def running(name: str) -> list[int | None]:
    return [thread.ident for thread in threading.enumerate() if thread.name == name]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():  # noqa: ASYNC110 - nothing tells of a thread's end
            await asyncio.sleep(0.005)


async def test_the_next_call_finds_the_thread_of_the_last_one() -> None:
    threads = Threads("kept", kept_max=2)
    first = await threads.call(threading.get_ident, deadline_s=DEADLINE_S)
    await until(lambda: len(threads._kept) == 1)
    assert await threads.call(threading.get_ident, deadline_s=DEADLINE_S) == first
    assert running("kept") == [first]


async def test_what_is_not_kept_ends_with_its_call() -> None:
    threads = Threads("not kept")
    await threads.call(lambda: None, deadline_s=DEADLINE_S)
    await until(lambda: running("not kept") == [])


async def test_a_call_that_hangs_holds_up_no_other_and_counts_against_the_bound() -> None:
    threads = Threads("hanging", in_flight_max=2, kept_max=2)
    goes_on = threading.Event()
    await threads.call(lambda: None, deadline_s=DEADLINE_S)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await threads.call(goes_on.wait, deadline_s=0.05)
        if threads._in_flight < 2:
            assert await threads.call(lambda: 7, deadline_s=DEADLINE_S) == 7
    with pytest.raises(TooManyCalls):
        await threads.call(lambda: None, deadline_s=DEADLINE_S)
    goes_on.set()
    await until(lambda: threads._in_flight == 0)
    assert await threads.call(lambda: 8, deadline_s=DEADLINE_S) == 8


async def test_an_error_is_its_callers_and_the_thread_goes_on() -> None:
    threads = Threads("failing", kept_max=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await threads.call(lambda: 1 // 0, deadline_s=DEADLINE_S)
    await until(lambda: len(threads._kept) == 1)


async def test_no_more_are_kept_than_asked_for_and_none_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_S", 0.2)
    threads = Threads("many", kept_max=3)
    together = threading.Barrier(8)
    await asyncio.gather(*(threads.call(together.wait, deadline_s=DEADLINE_S) for _ in range(8)))
    await until(lambda: len(running("many")) <= 3)
    await until(lambda: running("many") == [] and threads._kept == [])
    assert await threads.call(lambda: 9, deadline_s=DEADLINE_S) == 9


async def test_a_kept_thread_keeps_nothing_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        pass

    monkeypatch.setattr(module, "KEPT_S", 10 * DEADLINE_S)
    threads = Threads("empty-handed", kept_max=1)
    gone = weakref.ref(await threads.call(Large, deadline_s=DEADLINE_S))
    await until(lambda: len(threads._kept) == 1 and gc.collect() >= 0 and gone() is None)
