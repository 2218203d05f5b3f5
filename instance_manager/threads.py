"""File work off the event loop, with a deadline, and the knowledge of whether it may still take effect afterwards.

A call into a stalled disk never comes back and cannot be cancelled: its thread is left behind (a daemon, so that it does
not hold up the process's end either). The number of those is bounded, not their lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

CALLS_IN_FLIGHT_MAX = 16
KEPT_S = 10.0


class TooManyCalls(Exception):
    """So many calls hang already that another would not do better."""


class Attempt:
    """Between the caller with its deadline and the thread that does the work: who was first?

    The thread asks `begin` right before the step that takes effect. Given up before, it never takes it: the caller
    knows that nothing was applied. Given up after, the outcome is unknown.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._begun = False
        self._given_up = False

    @property
    def given_up(self) -> bool:
        return self._given_up

    def begin(self) -> None:
        """Called by the thread: TimeoutError if given up; else the outcome is unknown if it is given up from now on."""
        with self._mutex:
            if self._given_up:
                raise TimeoutError
            self._begun = True

    def give_up(self) -> bool:
        """Called by the waiting side: True if it is certain that nothing was and nothing will be applied."""
        with self._mutex:
            self._given_up = True
            return not self._begun


class InOrder:
    """Changes of one thing on the disk, each in a thread: one that is waited for no longer ends before the next, or never begins."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def one(self, change: Callable[[], object]) -> Iterator[Callable[[], None]]:
        """What the thread is to run; waited for within this block."""
        attempt = Attempt()

        def run() -> None:
            with self._turn:
                attempt.begin()
                change()

        try:
            yield run
        finally:
            attempt.give_up()


class Threads:
    """Runs blocking calls in threads of their own; up to `kept_max` that have ended a call wait `KEPT_S` for another.

    Worth it where calls follow one another closely: the start of a thread waits until it runs, and with busy threads beside it that held the
    archiver's event loop up for 3 ms.
    """

    def __init__(self, name: str, *, in_flight_max: int = CALLS_IN_FLIGHT_MAX, kept_max: int = 0) -> None:
        self._name = name
        self._in_flight_max = in_flight_max
        self._in_flight = 0
        self._kept_max = kept_max
        self._kept: list[queue.SimpleQueue[Callable[[], None]]] = []
        self._mutex = threading.Lock()

    async def call(self, function: Callable[[], T], *, deadline_s: float) -> T:
        """What `function` returns or raises; TimeoutError when it is not back in time. It is not ended by that."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        with self._mutex:
            if self._in_flight >= self._in_flight_max:
                raise TooManyCalls(f"{self._in_flight} calls of {self._name} do not come back")
            self._in_flight += 1
            inbox = self._kept.pop() if self._kept else None

        def deliver(result: T | None, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result: T | None = None
            error: BaseException | None = None
            try:
                result = function()
            except BaseException as caught:
                error = caught
            with self._mutex:
                self._in_flight -= 1
            try:
                loop.call_soon_threadsafe(deliver, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

        try:
            if inbox is None:
                # Not as an argument: a thread holds on to its arguments until it ends.
                inbox = queue.SimpleQueue()
                inbox.put(run)
                threading.Thread(target=self._work, args=(inbox,), name=self._name, daemon=True).start()
            else:
                inbox.put(run)
        except RuntimeError as error:  # no more threads
            with self._mutex:
                self._in_flight -= 1
            raise TooManyCalls(str(error)) from error
        async with asyncio.timeout(deadline_s):
            return await answer

    def _work(self, inbox: queue.SimpleQueue[Callable[[], None]]) -> None:
        work: Callable[[], None] | None = inbox.get()
        while work is not None:
            work()
            # What it was given and has returned is not kept until there is more to do.
            work = None
            with self._mutex:
                if len(self._kept) >= self._kept_max:
                    return
                self._kept.append(inbox)
            work = self._next_work(inbox)

    def _next_work(self, inbox: queue.SimpleQueue[Callable[[], None]]) -> Callable[[], None] | None:
        try:
            return inbox.get(timeout=KEPT_S)
        except queue.Empty:
            with self._mutex:
                if inbox in self._kept:
                    self._kept.remove(inbox)
                    return None
        return inbox.get()  # given in this very moment


def monotonic_s() -> float:
    """For waiting within this process only, as every deadline of a call is."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
