"""The volume's memory: promises, epochs and the member's identity, persisted before anything is done by them (P6).

It lies beside the data directory, never in it, so that no clone or rewind copies or loses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec

from instance_manager.codec import from_json, to_json
from instance_manager.core.types import MemberId, MemberName, make_member_id
from instance_manager.core.voting import VolumeState
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.server import RunAs

WRITE_DEADLINE_S = 5.0
RESERVE_BYTES = 256 * 1024


class VolumeUnusable(Exception):
    """The volume's memory cannot be read or written: this member makes no promise and starts nothing."""


class VolumeStorage(Protocol):
    """Where the memory lies: one small file."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def identity(self) -> str:
        """Of this very volume: a copy of the file elsewhere has another."""
        ...

    def read(self) -> bytes | None:
        """None: there is none yet. OSError."""
        ...

    async def write(self, content: bytes) -> None:
        """Durable when it returns: the whole content, or what was there before. OSError: what was there before."""
        ...


class VolumeDirectory:
    """The real one: a file in the instance's state directory, with a reserve of space beside it."""

    def __init__(self, directory: Path, run_as: RunAs | None) -> None:
        self._file = directory / "volume.json"
        self._directory = directory
        self._run_as = run_as

    @property
    def name(self) -> str:
        return str(self._file)

    def identity(self) -> str:
        """The inode of the directory: a copied tree has another. The device's number would change with a reboot."""
        return f"{self._directory.stat().st_ino:x}"

    def read(self) -> bytes | None:
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return None

    async def write(self, content: bytes) -> None:
        await asyncio.to_thread(self._write, content)

    def _write(self, content: bytes) -> None:
        """On a full disk the reserve is given up: a voter whose disk is full must not block a failover."""
        reserve = self._directory / ".reserve"
        try:
            write_atomically(self._file, content, mode=0o600, run_as=self._run_as)
        except OSError as error:
            if error.errno != errno.ENOSPC or not reserve.exists():
                raise
            reserve.unlink()
            write_atomically(self._file, content, mode=0o600, run_as=self._run_as)
        else:
            if not reserve.exists():
                with contextlib.suppress(OSError):
                    write_atomically(reserve, secrets.token_bytes(RESERVE_BYTES), mode=0o600, run_as=self._run_as)


class Volume:
    """`state` is the last persisted one; it changes only once it is safely on disk."""

    def __init__(self, storage: VolumeStorage, *, boot_id: str, chance: random.Random) -> None:
        self._storage = storage
        self._boot_id = boot_id
        self._chance = chance
        self._turn = asyncio.Lock()
        self.state = VolumeState()
        self._persisted = False
        self._late: asyncio.Future[None] | None = None
        """A write that was given up, or whose operation was ended, and that has not come back."""
        self._late_until_s = 0.0
        """By the loop's clock: its own deadline."""

    def load(self, *, now_s: float, lease_duration_s: float) -> None:
        """Read the memory; VolumeUnusable if it is there and cannot be understood: it is never replaced by a guess."""
        identity = self._storage.identity()
        try:
            content = self._storage.read()
            if content is None:
                self.state = VolumeState(volume_id=identity, boot_id=self._boot_id)
                return
            self.state = from_json(content, VolumeState)
        except (OSError, msgspec.ValidationError, msgspec.DecodeError) as error:
            raise VolumeUnusable(
                f"{self._storage.name}: {error}; restore it, or remove the whole instance directory to clone anew"
            ) from error
        if self.state.volume_id != identity:
            # R6: a copy of the state on another volume is not this member; what it promised stays promised.
            self.state = replace(self.state, volume_id=identity, member_id=None)
        if self.state.extension_until_s > 0 and self.state.boot_id != self._boot_id:
            # Another boot counts from its own start: bound for the whole duration, from now (R11).
            self.state = replace(self.state, extension_until_s=now_s + lease_duration_s, boot_id=self._boot_id)

    async def save(self, change: Callable[[VolumeState], VolumeState]) -> None:
        """Persist the changed state (fsync of file and directory), then make it the state.

        Changes take turns, each on what the one before left: no promise is ever lost under another save. VolumeUnusable:
        not persisted for sure. ValueError: the change itself refuses, or would go back behind an epoch.
        """
        async with self._turn:
            before = self.state
            state = change(before)
            if state == before and self._persisted:
                return
            if (
                state.promised_epoch < before.promised_epoch
                or state.highest_epoch < before.highest_epoch
                or state.recorded_epoch < before.recorded_epoch
            ):
                raise ValueError("an epoch that was seen or promised is never forgotten")
            loop = asyncio.get_running_loop()
            if self._late is not None:
                await asyncio.wait({self._late}, timeout=max(0.0, self._late_until_s - loop.time()))
                if not self._late.done():
                    raise VolumeUnusable(f"{self._storage.name}: an earlier write has not come back from the disk yet")
                self._late = None
            ends_s = loop.time() + WRITE_DEADLINE_S
            writing = asyncio.ensure_future(self._storage.write(to_json(state)))
            # Neither at the deadline nor with its operation is it cancelled: it may reach the disk still, and nothing is
            # written beside it until then.
            try:
                await asyncio.wait({writing}, timeout=WRITE_DEADLINE_S)
            finally:
                if not writing.done():
                    self._late, self._late_until_s = writing, ends_s
                    writing.add_done_callback(_retrieve)
            if not writing.done():
                raise VolumeUnusable(f"{self._storage.name} cannot be written: no answer of the disk")
            error = writing.exception()
            if isinstance(error, OSError):
                raise VolumeUnusable(f"{self._storage.name} cannot be written: {error}") from error
            if error is not None:
                raise error
            self.state, self._persisted = state, True

    async def new_member(self, name: MemberName) -> MemberId:
        """A new id for a directory that was just made: initdb, clone or rewind (R6, P7)."""
        member_id = make_member_id(name, f"{self._chance.getrandbits(32):08x}")
        await self.save(lambda state: replace(state, member_id=member_id, was_primary=False, initialising=False))
        return member_id


def _retrieve(writing: asyncio.Future[None]) -> None:
    if not writing.cancelled():
        writing.exception()


def boot_id() -> str:
    """Changes with every boot, with which CLOCK_BOOTTIME starts anew."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
