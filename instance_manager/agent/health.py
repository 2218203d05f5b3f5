"""Proof of local health: SQL answers on a new connection, and a small write and fsync on the volume comes back.

Both run apart from the lease task, in tasks and threads of their own: what hangs here ends the renewals by its age, and
nothing else (cloudnative-pg#10678, patroni#2380).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from instance_manager.agent.beat import Beat
from instance_manager.ports import Clock


class DiskHealth(Protocol):
    """What is known of the volumes of this instance."""

    @property
    def last_good_s(self) -> float:
        """When a write and flush *began* that came back, CLOCK_BOOTTIME."""
        ...

    @property
    def last_error(self) -> str | None: ...

    @property
    def free_bytes(self) -> int | None:
        """What an unprivileged program may still write on the fullest of them; None: not known yet."""
        ...


class DiskProbe:
    """One thread that writes and flushes a small file again and again; `last_good_s` is when a round *began* that ended well."""

    def __init__(self, directories: tuple[Path, ...], clock: Clock, interval_s: float) -> None:
        self._directories = directories
        self._clock = clock
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disk-probe", daemon=True)
        self.last_good_s = clock.now_s()
        self.last_error: str | None = None
        self.free_bytes: int | None = None
        """What an unprivileged program may still write on the fullest of the volumes."""
        self.size_bytes: int | None = None
        """Of the fullest of them."""
        self.flush_s: float | None = None
        """How long the last write and flush took, of all of them."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Not waited for: a stalled disk never answers, and the thread ends with the process."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            began_s = self._clock.now_s()
            try:
                for directory in self._directories:
                    _write_and_flush(directory / ".disk-probe")
                self.flush_s = self._clock.now_s() - began_s
                volumes = [os.statvfs(directory) for directory in self._directories]
                self.free_bytes, self.size_bytes = min(
                    (volume.f_bavail * volume.f_frsize, volume.f_blocks * volume.f_frsize) for volume in volumes
                )
            except OSError as error:
                self.last_error = f"{error.strerror}: {error.filename or self._directories[0]}"
            else:
                self.last_good_s, self.last_error = began_s, None
            self._stop.wait(self._interval_s)


def _write_and_flush(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.pwrite(descriptor, os.urandom(4096), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Health:
    """Ages of the last good answers. `unhealthy` speaks only once something has been bad for `health_timeout_s`."""

    def __init__(
        self,
        clock: Clock,
        beat: Beat,
        disk: DiskHealth,
        ask_sql: Callable[[float], Awaitable[None]],
        *,
        timeout_s: float,
        interval_s: float,
        minimum_free_bytes: int,
    ) -> None:
        self._clock = clock
        self._beat = beat
        self._disk = disk
        self._minimum_free_bytes = minimum_free_bytes
        self._ask_sql = ask_sql
        self._timeout_s = timeout_s
        self._interval_s = interval_s
        self._resumed_s = float("-inf")
        self._sql_expected = False
        self._sql_good_s = clock.now_s()
        self.sql_error: str | None = None

    def expect_sql(self, expected: bool) -> None:
        """Whether Postgres should answer now. The clock of its silence starts when it first should."""
        if expected and not self._sql_expected:
            self._sql_good_s = self._clock.now_s()
        self._sql_expected = expected

    @property
    def is_full(self) -> bool:
        """Too little space for Postgres to go on: clients get errors, or will soon (cloudnative-pg#7150)."""
        return self._disk.free_bytes is not None and self._disk.free_bytes < self._minimum_free_bytes

    def was_paused(self) -> None:
        """This process itself was not scheduled for a while: the ages say nothing of disk and SQL and begin anew."""
        self._resumed_s = self._clock.now_s()

    @property
    def is_fresh(self) -> bool:
        """Each proof is younger than half of what makes it bad."""
        oldest_s = self._clock.now_s() - self._timeout_s / 2
        return self._disk.last_good_s > oldest_s and (not self._sql_expected or self._sql_good_s > oldest_s)

    def unhealthy(self) -> str | None:
        now_s = self._clock.now_s()
        disk_age_s = now_s - max(self._disk.last_good_s, self._resumed_s)
        if disk_age_s > self._timeout_s:
            return f"no write to the volume has come back for {disk_age_s:.1f} s" + (
                f" ({self._disk.last_error})" if self._disk.last_error else ""
            )
        sql_age_s = now_s - max(self._sql_good_s, self._resumed_s)
        if self._sql_expected and sql_age_s > self._timeout_s:
            return f"Postgres has answered no new connection for {sql_age_s:.1f} s" + (
                f" ({self.sql_error})" if self.sql_error else ""
            )
        return None

    async def run(self) -> None:
        """Ask Postgres over a new connection each time: a stopped postmaster still serves old ones."""
        while True:
            began_s = self._clock.now_s()
            if self._sql_expected:
                try:
                    await self._ask_sql(self._timeout_s / 2)
                except Exception as error:  # whatever went wrong, it was no proof
                    self.sql_error = str(error)
                else:
                    self._sql_good_s, self.sql_error = began_s, None
            with contextlib.suppress(TimeoutError):
                took_s = self._clock.now_s() - began_s
                if took_s < self._interval_s / 2:
                    await self._beat.sleep(self._interval_s - took_s)
                else:
                    await self._clock.sleep(max(0.05, self._interval_s - took_s))
