"""Processes of one server, and the sessions of its clients.

A server is one process for the kernel of the simulation; its children here are names under which work is held back or
dropped while the whole goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simulated_time import Process, Timer

if TYPE_CHECKING:
    from simulated_server import PostgresServer


class Child:
    """One process of a server: what it is asked to do waits while it stands still (SIGSTOP), and is dropped when it ended."""

    __slots__ = ("_held", "alive", "on_resume", "paused", "pid", "process")

    def __init__(self, process: Process, pid: int) -> None:
        self.process = process
        self.pid = pid
        self.alive = True
        self.paused = False
        self.on_resume: list[Callable[[], object]] = []
        """Run once it goes on, after all that was held."""
        self._held: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def run(self, callback: Callable[..., object], *args: Any) -> None:
        """At once if it runs and nothing waits before it; otherwise when it runs again, in order."""
        process = self.process
        if not self.alive or not process.alive:
            return
        if not self.paused and not self._held and not process.held:
            callback(*args)
            return
        self._held.append((callback, args))
        if len(self._held) == 1 and not self.paused:
            process.call_soon(self._go_on)

    def later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        return self.process.call_later(delay_s, self.run, callback, *args)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        self.process.call_soon(self._go_on)

    def _go_on(self) -> None:
        while self._held and not self.paused:
            if self.process.held:
                self.process.call_soon(self._go_on)
                return
            callback, args = self._held[0]
            # What it asks for while others wait comes after them.
            try:
                callback(*args)
            finally:
                if self._held:
                    self._held.popleft()
        if not self.paused:
            callbacks, self.on_resume = self.on_resume, []
            for after in callbacks:
                self.process.call_soon(self.run, after)

    def end(self) -> None:
        self.alive = False
        self._held.clear()


class Session:
    """One backend with its client. It stays when the access rules change; a former primary goes on through such ones."""

    __slots__ = ("child", "server")

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.child = Child(server.process, server.cluster.new_pid())

    @property
    def alive(self) -> bool:
        return self.child.alive and self.server.process.alive

    @property
    def pid(self) -> int:
        return self.child.pid
