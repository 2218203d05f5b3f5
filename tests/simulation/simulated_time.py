"""The kernel of the simulation: true time, hosts with clocks of their own, processes, and one order of everything.

A `World` is one heap of timers and one queue of callbacks, run in the order of (time, sequence), so that the same seed
gives the same run to the last event. A `Host` has its clocks: their rate, steps of the wall clock, suspension. A `Process`
has an event loop (`simulated_loop`) and can be paused, resumed and killed at any moment.

Modelled: clock rates, steps and suspension; processes that stand still or end between any two callbacks. Not modelled: the
time that computing takes (a callback takes none), and a pause or kill in the middle of one callback.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from heapq import heapify, heappop, heappush
from typing import Any, TypeVar

from simulated_loop import TIMER_SLACK_S, ProcessLoop, Timer

__all__ = ["Host", "HostClock", "Livelock", "Process", "ProcessLoop", "Timer", "Trace", "World"]

T = TypeVar("T")

EVENTS_AT_ONE_TIME_MAX = 1_000_000
EVENTS_PER_COLLECTION = 200_000
CANCELLED_IN_HEAP_MAX = 1000
WALL_CLOCK_BEGINS_S = 1_750_000_000.0


class Livelock(Exception):
    """Callbacks follow one another and time stands still."""


class Trace:
    """What happened, in order; rendered only when somebody looks. With `limit` the last so many entries."""

    __slots__ = ("_world", "entries")

    def __init__(self, world: World, limit: int | None) -> None:
        self._world = world
        self.entries: deque[tuple[float, str, str, tuple[Any, ...]]] = deque(maxlen=limit)

    def add(self, who: str, what: str, *args: object) -> None:
        """`what` is a %-format for `args`, which must not change afterwards."""
        self.entries.append((self._world.now_s, who, what, args))

    def lines(self) -> Iterator[str]:
        for now_s, who, what, args in self.entries:
            yield f"{now_s:13.6f}  {who:<12} {what % args if args else what}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


class World:
    """True time, the only source of randomness, and the schedule of everything."""

    def __init__(self, seed: int | str = 0, *, trace_limit: int | None = None) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.counters: Counter[str] = Counter()
        """How often each fault and branch was exercised."""
        self.trace = Trace(self, trace_limit)
        self.events = 0
        """Callbacks run so far."""
        self.hosts: list[Host] = []
        self.processes: list[Process] = []
        self.ready: deque[Timer] = deque()
        self.heap: list[tuple[float, int, Timer]] = []
        self.cancelled_in_heap = 0
        self.next_sequence = itertools.count().__next__
        self.next_number = itertools.count().__next__
        self.running = False
        self.closed = False
        self._error: BaseException | None = None
        self._collected_at_event = 0
        self._generators: dict[int, Process] = {}
        """By address: where an asynchronous generator was begun. An entry is valid while its generator lives."""

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        """Run `callback` as the world itself, after what is due already."""
        timer = Timer(self, None, callback, args, None)
        if not self.closed:
            self.ready.append(timer)
        return timer

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Run `callback` as the world itself after `delay_s` of true time."""
        timer = Timer(self, None, callback, args, None)
        if self.closed:
            return timer
        if delay_s <= 0:
            self.ready.append(timer)
        else:
            timer._in_heap = True
            heappush(self.heap, (self.now_s + delay_s, self.next_sequence(), timer))
        return timer

    def stop(self, error: BaseException) -> None:
        """End `run` with `error` after the callback that runs now; the first one counts."""
        if self._error is None:
            self._error = error

    def run(self, until_s: float) -> None:
        """Run everything that is due until true time `until_s`, which is the time afterwards."""
        assert not self.running, "the world runs already"
        assert not self.closed, "the world is closed"
        with self._as_the_running_world():
            while True:
                self._run_ready()
                if not self.heap or self.heap[0][0] > until_s:
                    break
                self._go_to_next_time()
            self.now_s = max(self.now_s, until_s)

    def _go_to_next_time(self) -> None:
        heap, ready = self.heap, self.ready
        if self.cancelled_in_heap > CANCELLED_IN_HEAP_MAX and 2 * self.cancelled_in_heap > len(heap):
            self._tidy_heap()
            if not heap:
                return
        self.now_s = now_s = heap[0][0]
        while heap and heap[0][0] == now_s:
            timer = heappop(heap)[2]
            timer._in_heap = False
            if timer.callback is None:
                self.cancelled_in_heap -= 1
            else:
                ready.append(timer)

    def _run_ready(self) -> None:
        """Run what is due now. Everything that takes the simulation's time is in this loop: no calls that it can spare."""
        ready = self.ready
        popleft = ready.popleft
        set_running_loop = asyncio._set_running_loop
        current: ProcessLoop | None = None
        left = EVENTS_AT_ONE_TIME_MAX
        try:
            while ready:
                timer = popleft()
                callback = timer.callback
                if callback is None:
                    continue
                left -= 1
                process = timer.process
                if process is None:
                    if current is not None:
                        set_running_loop(None)
                        current = None
                    callback(*timer.args)
                elif process.held:
                    process.hold(timer)
                else:
                    if process.loop is not current:
                        current = process.loop
                        set_running_loop(current)
                    try:
                        timer.context.run(callback, *timer.args)  # type: ignore[union-attr]
                    except KeyboardInterrupt:
                        raise
                    except BaseException as error:
                        process.failed(error)
                if self._error is not None:
                    raise self._error
                if not left:
                    raise Livelock(f"{EVENTS_AT_ONE_TIME_MAX} callbacks at {self.now_s:.6f} s, the last: {callback}")
        finally:
            set_running_loop(None)
            self.events += EVENTS_AT_ONE_TIME_MAX - left
        if self.events - self._collected_at_event > EVENTS_PER_COLLECTION:
            self._collected_at_event = self.events
            gc.collect(1)

    def _tidy_heap(self) -> None:
        self.heap[:] = [entry for entry in self.heap if entry[2].callback is not None]
        heapify(self.heap)
        self.cancelled_in_heap = 0

    @contextmanager
    def _as_the_running_world(self) -> Iterator[None]:
        """The garbage is collected at fixed events, not at some allocation: finalizers are part of the order too."""
        loop_before = asyncio._get_running_loop()
        hooks_before = sys.get_asyncgen_hooks()
        collecting_before = gc.isenabled()
        asyncio._set_running_loop(None)
        sys.set_asyncgen_hooks(firstiter=self._generator_begins, finalizer=self._generator_dropped)
        gc.disable()
        self.running = True
        try:
            yield
        finally:
            self.running = False
            if collecting_before:
                gc.enable()
            sys.set_asyncgen_hooks(*hooks_before)
            asyncio._set_running_loop(loop_before)

    def _generator_begins(self, generator: Any) -> None:
        loop = asyncio._get_running_loop()
        if isinstance(loop, ProcessLoop):
            self._generators[id(generator)] = loop.process

    def _generator_dropped(self, generator: Any) -> None:
        """Its process closes it, as asyncio does; of a dead process nothing runs."""
        process = self._generators.pop(id(generator), None)
        if process is not None and process.alive:
            process.loop.create_task(generator.aclose())

    def close(self) -> None:
        """End all processes and drop everything. Not one callback, and no `on_exit`, runs any more.

        Python closes a coroutine only by running its `finally` blocks. Here they do, and meet a world in which nothing
        is carried out; but what they change in memory is changed, so look at results before.
        """
        assert not self.running, "a world is closed from outside"
        if self.closed:
            return
        self.closed = True
        logging_before = logging.root.manager.disable
        hook_before = sys.unraisablehook
        logging.disable(logging.CRITICAL)
        sys.unraisablehook = _say_nothing
        try:
            for process in self.processes:
                process.end()
            for process in self.processes:
                process.loop.forget()
            self._drop_everything()
        finally:
            sys.unraisablehook = hook_before
            logging.disable(logging_before)

    def _drop_everything(self) -> None:
        self.ready.clear()
        self.heap.clear()
        self._generators.clear()
        for process in self.processes:
            process.on_exit.clear()
        for host in self.hosts:
            host.frozen.clear()
            host.processes.clear()
        self.processes.clear()
        self.hosts.clear()


class Host:
    """One machine: its clocks, and what runs on it.

    CLOCK_MONOTONIC and CLOCK_BOOTTIME run at `rate` against true time and begin at `boot_s`, by default anywhere: nobody
    may compare the clocks of two hosts.
    """

    def __init__(self, world: World, name: str, *, rate: float = 1.0, boot_s: float | None = None) -> None:
        self.world = world
        self.name = name
        self.processes: list[Process] = []
        self.speed = rate
        """Of CLOCK_MONOTONIC just now: 0 while suspended."""
        self.frozen: list[Timer] = []
        """The timers of a suspended host."""
        self._rate = rate
        self._since_s = world.now_s
        """When speed or rate last changed: the clocks are reckoned from there."""
        self._monotonic_s = self._boottime_s = world.random.uniform(60.0, 100_000.0) if boot_s is None else boot_s
        self._wall_s = WALL_CLOCK_BEGINS_S + world.now_s
        self._awake_at_s = world.now_s
        world.hosts.append(self)

    def monotonic_s(self) -> float:
        return self._monotonic_s + (self.world.now_s - self._since_s) * self.speed

    def boottime_s(self) -> float:
        return self._boottime_s + (self.world.now_s - self._since_s) * self._rate

    def wall_s(self) -> float:
        return self._wall_s + (self.world.now_s - self._since_s) * self._rate

    def step_wall(self, seconds: float) -> None:
        self._wall_s += seconds

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        assert rate > 0
        self._reckon()
        self._rate = rate
        if self.speed:
            timers = self._take_timers()
            self.speed = rate
            self._put_timers(timers)

    @property
    def suspended(self) -> bool:
        return self.speed == 0

    def suspend(self, true_seconds: float) -> None:
        """All processes stand still; a second call can only make it longer."""
        self._awake_at_s = max(self._awake_at_s, self.world.now_s + true_seconds)
        if not self.suspended:
            self._reckon()
            self.frozen = self._take_timers()
            self.speed = 0.0
            self._update_processes()
        self.world.call_later(true_seconds, self._wake)

    def reboot(self) -> None:
        """The machine loses power and starts again at once: nothing of before runs, and its clocks begin anew."""
        for process in self.processes:
            process.kill()
        self._awake_at_s = self.world.now_s
        self._wake()
        self._reckon()
        self._monotonic_s = self._boottime_s = self.world.random.uniform(5.0, 60.0)

    def _wake(self) -> None:
        if not self.suspended or self.world.now_s < self._awake_at_s:
            return
        self._reckon()
        self.speed = self._rate
        timers, self.frozen = self.frozen, []
        self._put_timers(timers)
        self._update_processes()

    def _reckon(self) -> None:
        self._monotonic_s, self._boottime_s, self._wall_s = self.monotonic_s(), self.boottime_s(), self.wall_s()
        self._since_s = self.world.now_s

    def _take_timers(self) -> list[Timer]:
        """Out of the heap, in their order."""
        world = self.world
        mine = sorted(entry for entry in world.heap if entry[2].process is not None and entry[2].process.host is self)
        world.heap[:] = [entry for entry in world.heap if entry[2].process is None or entry[2].process.host is not self]
        heapify(world.heap)
        timers = []
        for _, _, timer in mine:
            timer._in_heap = False
            if timer.callback is None:
                world.cancelled_in_heap -= 1
            else:
                timers.append(timer)
        return timers

    def _put_timers(self, timers: list[Timer]) -> None:
        world, now_s = self.world, self.monotonic_s()
        for timer in timers:
            if timer.callback is not None:
                timer._in_heap = True
                due_s = world.now_s + max(0.0, timer.when_s - now_s) / self.speed + TIMER_SLACK_S
                heappush(world.heap, (due_s, world.next_sequence(), timer))

    def _update_processes(self) -> None:
        for process in self.processes:
            process.update_held()


class Process:
    """One operating system process with an event loop of its own."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.world = host.world
        self.name = name
        self.alive = True
        self.paused = False
        self.held = host.suspended
        """Nothing of it may run now: it is dead, paused, or its host is suspended."""
        self.on_exit: list[Callable[[], object]] = []
        """What others notice when it is killed: run once, as the world, in order."""
        self.on_failure: Callable[[BaseException], None] = self.world.stop
        """Called with the error that escaped a spawned task or a callback."""
        # What agent code never asks of a loop is not there.
        self.loop = ProcessLoop(self)  # type: ignore[abstract]
        self._context = Context()
        self._waiting: deque[Timer] = deque()
        """Came due while it was held."""
        host.processes.append(self)
        self.world.processes.append(self)

    def spawn(self, coroutine: Coroutine[Any, Any, T], *, name: str = "") -> asyncio.Task[T]:
        """A main task of this process: an error that escapes it goes to `on_failure`."""
        assert self.alive, f"{self.name} is dead"
        task = self.loop.create_task(coroutine, name=name or self.name, context=self._context.copy())
        task.add_done_callback(self._main_task_ended)
        return task

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        return self.loop.call_soon(callback, *args, context=self._context.copy())

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        """After `delay_s` by the host's monotonic clock; held back while paused or suspended, dropped when dead."""
        return self.loop.call_later(delay_s, callback, *args, context=self._context.copy())

    def pause(self) -> None:
        """SIGSTOP: its clock goes on, and what comes due waits."""
        self.paused = True
        self.update_held()

    def resume(self) -> None:
        self.paused = False
        self.update_held()

    def kill(self) -> None:
        """SIGKILL. If it is this process' own code that calls: that goes on to its next await, and no further."""
        if not self.alive:
            return
        self.end()
        exits, self.on_exit = self.on_exit, []
        for callback in exits:
            callback()

    # For the kernel only.

    def end(self) -> None:
        """Its tasks stay referenced by the loop until the world is closed, so that no `finally` of theirs runs."""
        self.alive = False
        self.held = True
        self._waiting.clear()
        self.loop.end()

    def update_held(self) -> None:
        self.held = not self.alive or self.paused or self.host.suspended
        if not self.held:
            self.world.ready.extend(self._waiting)
            self._waiting.clear()

    def hold(self, timer: Timer) -> None:
        if self.alive:
            self._waiting.append(timer)

    def failed(self, error: BaseException) -> None:
        if self.alive:
            self.on_failure(error)

    def _main_task_ended(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        # SystemExit and its like have come through the callback that ran the task.
        if error is not None and not isinstance(error, SystemExit):
            self.failed(error)


class HostClock:
    """The Clock port of an agent: reads CLOCK_BOOTTIME, sleeps by CLOCK_MONOTONIC, as the real one does."""

    __slots__ = ("_host",)

    def __init__(self, process: Process) -> None:
        self._host = process.host

    def now_s(self) -> float:
        return self._host.boottime_s()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _say_nothing(_: Any) -> None:
    return None
