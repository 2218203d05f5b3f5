"""The kernel: time and order, what a process may stand still or end in, and asyncio on top of it."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import pytest
from simulated_time import Host, HostClock, Livelock, Process, World

from instance_manager.ports import Clock

SLACK_S = 1e-4


@pytest.fixture
def world() -> Iterator[World]:
    world = World(1)
    yield world
    world.close()


@pytest.fixture
def process(world: World) -> Process:
    return Process(Host(world, "a"), "agent")


def _about(seconds: float) -> object:
    return pytest.approx(seconds, abs=SLACK_S)


# Time and order.


def test_events_run_in_the_order_of_their_time_and_then_of_their_making(world: World) -> None:
    seen: list[object] = []
    world.call_later(2.0, seen.append, "second")
    world.call_later(1.0, seen.append, "first")
    world.call_later(1.0, lambda: world.call_soon(seen.append, "made last, at the same time"))
    world.call_later(1.0, seen.append, "first, made later")
    world.run(3.0)
    assert seen == ["first", "first, made later", "made last, at the same time", "second"]
    assert world.now_s == 3.0


def test_a_run_ends_at_its_time_and_goes_on_later(world: World) -> None:
    seen: list[float] = []
    for after_s in (1.0, 2.0, 3.0):
        world.call_later(after_s, lambda: seen.append(world.now_s))
    world.run(2.0)
    assert seen == [1.0, 2.0]
    world.run(10.0)
    assert seen == [1.0, 2.0, 3.0]


def test_a_cancelled_timer_does_not_run_and_is_tidied_away(world: World) -> None:
    timers = [world.call_later(1000.0, pytest.fail) for _ in range(10_000)]
    for timer in timers:
        timer.cancel()
    world.call_later(1.0, lambda: None)
    world.call_later(2.0, lambda: None)
    world.run(1.5)
    assert len(world.heap) == 1
    world.run(2000.0)


@pytest.mark.parametrize("boot_s", [0.1, 98_765.4321])
def test_a_process_timer_never_fires_early(world: World, boot_s: float) -> None:
    host = Host(world, "a", rate=1.00437, boot_s=boot_s)
    process = Process(host, "agent")
    early: list[float] = []

    async def wait_again_and_again() -> None:
        for index in range(1000):
            ends_s = host.boottime_s() + 0.001 * index / 7
            await asyncio.sleep(ends_s - host.boottime_s())
            if host.boottime_s() < ends_s:
                early.append(ends_s)

    task = process.spawn(wait_again_and_again())
    world.run(200.0)
    assert task.done()
    assert early == []


def test_a_livelock_is_an_error_and_not_a_hang(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulated_time.EVENTS_AT_ONE_TIME_MAX", 1000)

    def again() -> None:
        world.call_soon(again)

    again()
    with pytest.raises(Livelock):
        world.run(1.0)


def test_an_error_of_the_world_and_a_stop_end_the_run(world: World, process: Process) -> None:
    def stop() -> None:
        world.stop(ValueError("violated"))

    process.call_later(1.0, stop)
    world.call_later(2.0, pytest.fail)
    with pytest.raises(ValueError, match="violated"):
        world.run(10.0)
    assert world.now_s == _about(1.0)


# The clocks of a host.


def test_a_fast_clock_lets_timers_fire_early_in_true_time(world: World) -> None:
    host = Host(world, "fast", rate=1.25, boot_s=1000.0)
    process = Process(host, "agent")
    fired: list[tuple[float, float]] = []
    process.call_later(10.0, lambda: fired.append((world.now_s, host.monotonic_s())))
    world.run(20.0)
    assert fired == [(_about(8.0), _about(1010.0))]
    assert host.boottime_s() == _about(1025.0)


def test_a_changed_rate_moves_the_pending_timers(world: World) -> None:
    host = Host(world, "a", boot_s=0.0)
    fired: list[tuple[float, float]] = []
    Process(host, "agent").call_later(10.0, lambda: fired.append((world.now_s, host.monotonic_s())))
    other = Host(world, "other", boot_s=0.0)
    Process(other, "agent").call_later(10.0, lambda: fired.append((world.now_s, other.monotonic_s())))
    world.call_later(5.0, lambda: setattr(host, "rate", 2.0))
    world.run(20.0)
    assert fired == [(_about(7.5), _about(10.0)), (_about(10.0), _about(10.0))]
    assert host.monotonic_s() == _about(35.0)


def test_while_suspended_boottime_goes_on_and_monotonic_with_its_timers_stands_still(world: World) -> None:
    host = Host(world, "a", boot_s=100.0)
    process = Process(host, "agent")
    fired: list[float] = []
    process.call_later(10.0, lambda: fired.append(world.now_s))
    world.call_later(4.0, host.suspend, 30.0)
    world.call_later(5.0, process.call_later, 1.0, lambda: fired.append(-world.now_s))
    world.run(20.0)
    assert (host.monotonic_s(), host.boottime_s()) == (_about(104.0), _about(120.0))
    world.run(50.0)
    assert (host.monotonic_s(), host.boottime_s()) == (_about(120.0), _about(150.0))
    assert fired == [_about(-35.0), _about(40.0)]


def test_a_process_that_is_started_on_a_suspended_host_begins_after_it(world: World) -> None:
    host = Host(world, "a")
    host.suspend(5.0)
    began: list[float] = []
    Process(host, "agent").call_soon(lambda: began.append(world.now_s))
    world.run(10.0)
    assert began == [5.0]


def test_a_second_suspension_makes_the_first_longer(world: World) -> None:
    host = Host(world, "a", boot_s=0.0)
    host.suspend(5.0)
    world.call_later(3.0, host.suspend, 10.0)
    world.call_later(4.0, host.suspend, 1.0)
    world.run(12.9)
    assert host.suspended
    world.run(20.0)
    assert host.monotonic_s() == _about(7.0)


@pytest.mark.parametrize("suspended", [False, True])
def test_after_a_reboot_the_clocks_begin_anew_and_nothing_of_before_runs(world: World, suspended: bool) -> None:
    host = Host(world, "a", boot_s=5000.0)
    Process(host, "agent").call_later(5.0, pytest.fail)
    if suspended:
        host.suspend(100.0)
    world.call_later(1.0, host.reboot)
    world.run(2.0)
    assert 6.0 <= host.monotonic_s() == host.boottime_s() <= 61.0
    fired: list[float] = []
    Process(host, "agent").call_later(1.0, lambda: fired.append(world.now_s))
    world.run(200.0)
    assert fired == [_about(3.0)]


def test_a_step_of_the_wall_clock_moves_nothing_else(world: World) -> None:
    host = Host(world, "a", boot_s=0.0)
    before_s = host.wall_s()
    host.step_wall(-3600.0)
    world.run(10.0)
    assert host.wall_s() == pytest.approx(before_s - 3590.0)
    assert host.boottime_s() == host.monotonic_s() == 10.0


def test_the_clock_port_reads_boottime_and_sleeps_by_monotonic(world: World) -> None:
    host = Host(world, "a", boot_s=100.0)
    process = Process(host, "agent")
    clock: Clock = HostClock(process)
    woke: list[float] = []

    async def sleeper() -> None:
        await clock.sleep(2.0)
        woke.append(clock.now_s())

    process.spawn(sleeper())
    world.call_later(1.0, host.suspend, 5.0)
    world.run(10.0)
    assert woke == [_about(107.0)]


# Processes.


def _ticking(process: Process, seen: list[float]) -> None:
    async def tick() -> None:
        while True:
            await asyncio.sleep(1.0)
            seen.append(round(process.world.now_s, 3))

    process.spawn(tick())


def test_a_paused_process_does_nothing_and_catches_up_when_resumed(world: World, process: Process) -> None:
    seen: list[float] = []
    _ticking(process, seen)
    world.call_later(2.5, process.pause)
    world.call_later(3.0, process.call_soon, lambda: seen.append(-1.0))
    world.call_later(7.25, process.resume)
    world.run(9.0)
    # What came first while it was paused runs first.
    assert seen == [1.0, 2.0, -1.0, 7.25, 8.25]


def test_a_pause_inside_a_suspension_holds_on_after_it(world: World, process: Process) -> None:
    seen: list[float] = []
    process.call_soon(lambda: seen.append(world.now_s))
    process.pause()
    process.host.suspend(5.0)
    world.call_later(2.0, process.resume)
    world.call_later(3.0, process.pause)
    world.call_later(9.0, process.resume)
    world.run(10.0)
    assert seen == [9.0]


def test_nothing_of_a_killed_process_runs_again(world: World, process: Process) -> None:
    seen: list[object] = []
    exits: list[float] = []
    queue: asyncio.Queue[int] = asyncio.Queue()

    async def hopes_to_clean_up(wait: Callable[[], object]) -> None:
        try:
            await wait()  # type: ignore[misc]
        except BaseException as error:
            seen.append(error)
            raise
        finally:
            seen.append("finally")
            await asyncio.sleep(0)

    async def in_a_group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hopes_to_clean_up(lambda: asyncio.sleep(3.0)))
            tasks.create_task(hopes_to_clean_up(queue.get))
            tasks.create_task(hopes_to_clean_up(lambda: asyncio.to_thread(seen.append, "thread")))

    process.loop.executor_delay_s = lambda: 5.0
    process.spawn(in_a_group())
    process.call_later(4.0, seen.append, "timer")
    process.on_exit.append(lambda: exits.append(world.now_s))
    world.call_later(2.0, process.kill)
    world.call_later(3.0, queue.put_nowait, 1)
    world.call_later(3.5, process.kill)
    world.call_later(3.6, process.call_soon, seen.append, "asked after its death")
    world.call_later(3.6, process.resume)
    world.run(4.0)
    gc.collect()
    world.run(20.0)
    assert seen == []
    assert exits == [2.0]
    assert not process.alive


def test_a_process_that_kills_itself_goes_no_further_than_its_next_await(world: World, process: Process) -> None:
    seen: list[str] = []

    async def die() -> None:
        process.kill()
        seen.append("the same callback goes on")
        await asyncio.sleep(0)
        seen.append("never")

    process.spawn(die())
    world.run(1.0)
    assert seen == ["the same callback goes on"]


def test_the_error_of_a_main_task_ends_the_world_or_goes_to_the_hook(world: World, process: Process) -> None:
    async def fail() -> None:
        raise ValueError("so it is")

    failures: list[BaseException] = []
    other = Process(process.host, "other")
    other.on_failure = failures.append
    other.spawn(fail())
    world.run(1.0)
    assert [str(error) for error in failures] == ["so it is"]
    process.spawn(fail())
    with pytest.raises(ValueError, match="so it is"):
        world.run(2.0)


def test_the_error_of_a_callback_and_an_exit_reach_the_hook_once(world: World, process: Process) -> None:
    failures: list[str] = []
    process.on_failure = lambda error: failures.append(type(error).__name__)

    async def leave() -> None:
        await asyncio.sleep(1.0)
        raise SystemExit(3)

    def break_down() -> None:
        raise KeyError

    process.spawn(leave())
    process.call_soon(break_down)
    world.run(2.0)
    assert failures == ["KeyError", "SystemExit"]


def test_the_running_loop_is_that_of_the_process_whose_callback_runs(world: World) -> None:
    processes = [Process(Host(world, name), name) for name in "abc"]
    wrong: list[str] = []

    async def look(process: Process) -> None:
        for _ in range(50):
            if asyncio.get_running_loop() is not process.loop:
                wrong.append(process.name)
            await asyncio.sleep(0.01 * (ord(process.name) - 96))

    def look_as_the_world() -> None:
        if asyncio._get_running_loop() is not None:
            wrong.append("world")

    for process in processes:
        process.spawn(look(process))
    for step in range(50):
        world.call_later(0.01 * step, look_as_the_world)
    world.run(3.0)
    assert wrong == []
    assert asyncio._get_running_loop() is None


# asyncio on a ProcessLoop.


def test_timeouts_locks_queues_groups_and_waits_work_as_in_asyncio(world: World, process: Process) -> None:
    lines: list[str] = []

    async def under_a_timeout() -> None:
        try:
            async with asyncio.timeout(1.5):
                await asyncio.Event().wait()
        except TimeoutError:
            lines.append(f"timeout at {world.now_s:.1f}")

    async def with_the_lock(lock: asyncio.Lock, name: str) -> None:
        async with lock:
            await asyncio.sleep(1.0)
            lines.append(f"{name} left at {world.now_s:.1f}")

    async def main() -> None:
        lock = asyncio.Lock()
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=1)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(under_a_timeout())
            tasks.create_task(with_the_lock(lock, "first"))
            tasks.create_task(with_the_lock(lock, "second"))
        await queue.put("item")
        lines.append(await queue.get())
        sleeping = asyncio.ensure_future(asyncio.sleep(5.0))
        done, pending = await asyncio.wait({sleeping}, timeout=1.0)
        lines.append(f"{len(done)} done, {len(pending)} pending at {world.now_s:.1f}")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(sleeping), 0.5)
        assert not sleeping.cancelled()
        assert list(await asyncio.gather(asyncio.sleep(0.1, 1), asyncio.sleep(0.2, 2))) == [1, 2]
        assert asyncio.current_task() in asyncio.all_tasks()

    task = process.spawn(main())
    world.run(10.0)
    assert task.done()
    assert lines == [
        "first left at 1.0",
        "timeout at 1.5",
        "second left at 2.0",
        "item",
        "0 done, 1 pending at 3.0",
    ]


def test_the_failure_of_one_task_of_a_group_cancels_the_others_in_their_order(world: World, process: Process) -> None:
    cancelled: list[int] = []
    caught: list[str] = []

    async def wait(number: int) -> None:
        try:
            await asyncio.sleep(100.0)
        finally:
            cancelled.append(number)

    async def fail() -> None:
        await asyncio.sleep(1.0)
        raise ValueError("one failed")

    async def main() -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(20):
                    tasks.create_task(wait(number))
                tasks.create_task(fail())
        except* ValueError as errors:
            caught.extend(str(error) for error in errors.exceptions)

    process.spawn(main())
    world.run(2.0)
    assert caught == ["one failed"]
    assert cancelled == list(range(20))


def test_context_variables_follow_the_task(world: World, process: Process) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    seen: list[str] = []

    async def child() -> None:
        seen.append(variable.get())
        variable.set("child")

    async def main() -> None:
        variable.set("main")
        await asyncio.create_task(child())
        await asyncio.to_thread(lambda: seen.append(variable.get()))

    async def other() -> None:
        seen.append(variable.get())

    variable.set("whoever started the process")
    process.spawn(main())
    world.run(1.0)
    process.call_soon(lambda: seen.append(variable.get()))
    process.call_later(0.1, lambda: seen.append(variable.get()))
    process.spawn(other())
    world.run(2.0)
    assert seen == ["main", "main", "unset", "unset", "unset"]


def test_a_thread_takes_its_latency_and_its_error_comes_back(world: World, process: Process) -> None:
    process.loop.executor_delay_s = lambda: 0.25
    seen: list[object] = []

    def loop_of_the_thread() -> object:
        return asyncio._get_running_loop()

    def fail() -> None:
        raise OSError("disk")

    async def main() -> None:
        seen.append(await asyncio.to_thread(loop_of_the_thread))
        seen.append(round(world.now_s, 3))
        with pytest.raises(OSError, match="disk"):
            await asyncio.to_thread(fail)
        assert asyncio.get_running_loop() is process.loop

    task = process.spawn(main())
    world.run(1.0)
    assert task.done()
    assert seen == [None, 0.25]


def test_a_stalled_disk_holds_a_thread_until_the_stall_ends(world: World, process: Process) -> None:
    stalled = [True]
    process.loop.executor_delay_s = lambda: None if stalled[0] else 0.001
    done: list[float] = []

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.to_thread(lambda: done.append(world.now_s))

    task = process.spawn(main())
    world.run(5.0)
    assert task.done()
    assert done == []
    stalled[0] = False
    world.run(6.0)
    # A thread is not ended by the cancellation of whoever waits for it.
    assert len(done) == 1


def test_an_abandoned_generator_is_closed_by_its_own_process(world: World) -> None:
    closed: list[tuple[str, float]] = []

    async def forever() -> AsyncIterator[int]:
        try:
            while True:
                await asyncio.sleep(0.1)
                yield 1
        finally:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(1.0)
            closed.append((next(p.name for p in processes if p.loop is loop), round(world.now_s, 2)))

    async def take_one() -> None:
        async for _ in forever():
            return

    processes = [Process(Host(world, name), name) for name in ("first", "second", "killed")]
    for process in processes:
        process.spawn(take_one())
    world.call_later(0.5, processes[2].kill)
    world.run(5.0)
    assert closed == [("first", 1.1), ("second", 1.1)]


# One seed, one run; nothing is left behind.

LITTLE_WORLD = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from simulated_time import Host, Process, World

def trace_of(seed):
    world = World(seed)
    hosts = [Host(world, name, rate=world.random.uniform(0.99, 1.01)) for name in ("a", "b", "c")]

    async def worker(process, number):
        while True:
            try:
                async with asyncio.timeout(world.random.uniform(0.01, 0.2)):
                    await asyncio.to_thread(lambda: None)
                    await asyncio.sleep(world.random.uniform(0.0, 0.2))
                    world.trace.add(process.name, "%d slept", number)
            except TimeoutError:
                world.trace.add(process.name, "%d timed out", number)
            waits = {asyncio.ensure_future(asyncio.sleep(world.random.uniform(0.0, 0.05), n)) for n in range(5)}
            done, pending = await asyncio.wait(waits, timeout=0.02)
            world.trace.add(process.name, "%s", [task.result() for task in done])
            for task in pending:
                task.cancel()

    async def main(process):
        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(worker(process, number))

    def fault():
        process = world.random.choice(world.processes)
        process.host.rate = world.random.uniform(0.9, 1.1)
        world.random.choice([process.pause, process.resume, process.kill, lambda: process.host.suspend(0.3)])()
        if not process.alive:
            start(process.host)
        world.call_later(0.5, fault)

    def start(host):
        process = Process(host, host.name)
        process.loop.executor_delay_s = lambda: world.random.choice([None, 0.001, 0.01])
        process.spawn(main(process))

    for host in hosts:
        start(host)
    world.call_later(0.5, fault)
    world.run(20.0)
    text = str(world.trace)
    world.close()
    return text

if __name__ == "__main__":
    print(trace_of(7))
"""


def _little_world_in_another_process(hash_seed: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", LITTLE_WORLD, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    assert run.stderr == ""
    return run.stdout


def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed_is() -> None:
    namespace: dict[str, Callable[[int], str]] = {"__name__": "little_world"}  # type: ignore[dict-item]
    sys.argv[1:1] = [str(Path(__file__).parent)]
    try:
        exec(LITTLE_WORLD, namespace)  # noqa: S102 - the very text that the other processes run
    finally:
        del sys.argv[1]
    first = namespace["trace_of"](7)
    assert len(first.splitlines()) > 1000
    assert namespace["trace_of"](7) == first
    assert namespace["trace_of"](8) != first
    for hash_seed in ("1", "4711"):
        assert _little_world_in_another_process(hash_seed).rstrip("\n") == first


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _small_world(seed: int) -> None:
    world = World(seed)

    async def hopes_to_clean_up(ballast: bytearray) -> None:
        try:
            await asyncio.sleep(100.0)
        finally:
            try:
                await asyncio.sleep(0)
                pytest.fail(f"never reached with {len(ballast)} bytes")
            finally:
                await asyncio.sleep(0)

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(10):
                tasks.create_task(hopes_to_clean_up(bytearray(10_000)))

    processes = [Process(Host(world, name), name) for name in "abc"]
    for process in processes:
        process.spawn(main())
    world.call_later(0.5, processes[0].kill)
    world.call_later(0.5, processes[1].pause)
    world.run(1.0)
    world.close()


@pytest.mark.filterwarnings("error")
def test_hundreds_of_worlds_leave_neither_memory_nor_noise(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(50):
        _small_world(seed)
    gc.collect()
    before_bytes = _resident_bytes()
    for seed in range(300):
        _small_world(seed)
    gc.collect()
    grown_bytes = _resident_bytes() - before_bytes
    # The ballast of the 300 worlds alone is 90 MB.
    assert grown_bytes < 4_000_000
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_the_kernel_is_fast(capsys: pytest.CaptureFixture[str]) -> None:
    """Three processes that each sleep 1 ms in a loop; the bound is far below what an idle core does."""
    world = World(1)

    async def sleep_again_and_again() -> None:
        for _ in range(100_000):
            await asyncio.sleep(0.001)

    for name in "abc":
        Process(Host(world, name), name).spawn(sleep_again_and_again())
    began_s = time.process_time()
    world.run(20.0)
    took_s = time.process_time() - began_s
    events = world.events
    world.close()
    with capsys.disabled():
        print(
            f"\n{events / took_s:,.0f} callbacks and {60_000 / took_s:,.0f} sleeps per second; {20 / took_s:.0f} times real time"
        )
    assert events / took_s > 100_000
