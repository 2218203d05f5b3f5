"""The event loop of one simulated process: asyncio's interface on the world's schedule and the host's clock.

No selector, no threads, no waiting: a callback is put into the world's queue, a timer into the world's heap. Tasks and
futures are asyncio's own, in C. What agent code never uses (sockets, pipes, subprocesses, signals) is not there and
raises NotImplementedError.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from heapq import heappush
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from simulated_time import Process, World

T = TypeVar("T")

TIMER_SLACK_S = 1e-6
"""A timer of a process fires so much late, never early: a loop that waits for a time always finds it reached."""
STALLED_ASKS_AGAIN_S = 0.01
COMPLAINTS_MAX = 100


class Timer:
    """One callback to come. `process` is None for what the world itself does."""

    __slots__ = ("_in_heap", "args", "callback", "context", "process", "when_s", "world")

    def __init__(
        self,
        world: World,
        process: Process | None,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
    ) -> None:
        self.world = world
        self.process = process
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = context
        self._in_heap = False

    when_s: float
    """Of a process' timer: when it is due by the host's monotonic clock."""

    def cancel(self) -> None:
        """It will not run. Its place in the heap is left until its time or the next tidying."""
        if self.callback is not None:
            self.callback = None
            self.args = ()
            if self._in_heap:
                self.world.cancelled_in_heap += 1

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.when_s


class SimulatedTask(asyncio.Task[T]):
    """Hashed by its number: asyncio keeps tasks in sets and cancels them in the order of a set."""

    __slots__ = ("number",)

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        loop: ProcessLoop,
        name: str,
        context: Context | None,
    ) -> None:
        self.number = loop.process.world.next_number()
        super().__init__(coroutine, loop=loop, name=name, context=context)

    def __hash__(self) -> int:
        return self.number


class ProcessLoop(asyncio.AbstractEventLoop):
    """What asyncio needs of a loop. `time()` is CLOCK_MONOTONIC of the host."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.host = process.host
        self.world = process.world
        self.executor_delay_s: Callable[[], float | None] = lambda: 0.0
        """Latency of one call into a thread; None: it hangs, and the hook is asked again a little later."""
        self.complaints: deque[dict[str, Any]] = deque(maxlen=COMPLAINTS_MAX)
        """What asyncio would have logged. When they come depends on the garbage collector: nothing may follow from them."""
        self._append: Callable[[Timer], object] = self.world.ready.append
        self._tasks: list[asyncio.Task[Any]] = []
        self._live_tasks_max = 64

    # Time and callbacks.

    def time(self) -> float:
        return self.host.monotonic_s()

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Timer:
        timer = Timer(self.world, self.process, callback, args, copy_context() if context is None else context)
        self._append(timer)
        return timer

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Timer:
        return self._at(self.host.monotonic_s() + delay, delay, callback, args, context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Timer:
        return self._at(when, when - self.host.monotonic_s(), callback, args, context)

    def _at(
        self,
        when_s: float,
        delay_s: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
    ) -> Timer:
        world = self.world
        timer = Timer(world, self.process, callback, args, copy_context() if context is None else context)
        timer.when_s = when_s
        speed = self.host.speed
        if delay_s <= 0:
            self._append(timer)
        elif not self.process.alive:
            pass
        elif speed:
            timer._in_heap = True
            heappush(world.heap, (world.now_s + delay_s / speed + TIMER_SLACK_S, world.next_sequence(), timer))
        else:
            self.host.frozen.append(timer)
        return timer

    # Futures and tasks.

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: str | None = None,
        context: Context | None = None,
        **_: Any,
    ) -> asyncio.Task[T]:
        task = SimulatedTask(coro, self, name or self.process.name, context)
        # Held here, because a task that only its own cycle holds would be ended by the garbage collector, some time.
        self._tasks.append(task)
        if len(self._tasks) > self._live_tasks_max:
            self._live_tasks_max = 64 + 2 * len(self.live_tasks())
        return task

    def live_tasks(self) -> list[asyncio.Task[Any]]:
        """In the order of their creation."""
        self._tasks = [task for task in self._tasks if not task.done()]
        return list(self._tasks)

    # Threads.

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """The function runs at once and whole, at the end of its latency; as a thread it is not ended by a cancellation."""
        answer: asyncio.Future[T] = self.create_future()
        self._start_in_thread(answer, func, args)
        return answer

    def _start_in_thread(self, answer: asyncio.Future[T], function: Callable[..., T], args: tuple[Any, ...]) -> None:
        delay_s = self.executor_delay_s()
        if delay_s is None:
            self.call_later(STALLED_ASKS_AGAIN_S, self._start_in_thread, answer, function, args)
        else:
            self.call_later(delay_s, self._run_as_thread, answer, function, args)

    def _run_as_thread(self, answer: asyncio.Future[T], function: Callable[..., T], args: tuple[Any, ...]) -> None:
        asyncio._set_running_loop(None)
        try:
            result = function(*args)
        except BaseException as error:
            if self.process.alive and not answer.done():
                answer.set_exception(error)
        else:
            if self.process.alive and not answer.done():
                answer.set_result(result)
        finally:
            asyncio._set_running_loop(self)

    # The rest of what asyncio asks a loop.

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        return not self.process.alive

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A task's error that nobody took, a task that was dropped: asyncio only logs these, so nothing ends by them."""
        if self.process.alive:
            self.complaints.append(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    async def shutdown_asyncgens(self) -> None:
        return None

    async def shutdown_default_executor(self) -> None:
        return None

    # For the kernel only.

    def end(self) -> None:
        """Nothing runs here any more: what is still asked to run is dropped."""
        self._append = _drop

    def forget(self) -> None:
        """Close every coroutine, after the world has ended; whatever they do while closing meets nobody."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            if not task.done():
                _close_coroutine(task.get_coro())
        self.complaints.clear()


CLOSING_ATTEMPTS_MAX = 100


def _drop(_: Timer) -> None:
    return None


def _close_coroutine(coroutine: Any) -> None:
    """A coroutine that awaits in its `finally` refuses to close once for each such await."""
    for _ in range(CLOSING_ATTEMPTS_MAX):
        try:
            coroutine.close()
        except BaseException:  # noqa: S112 - whatever it says, its world is over
            continue
        return
