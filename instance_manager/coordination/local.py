"""The Lease of a cluster on one machine: a file, with the semantics of the Kubernetes Lease.

`lease.json` holds the record and its version. A write prepares the next state in a file of its own and makes it durable;
then, under an exclusive lock on `lease.lock`, it compares the version and renames. Only these two short steps are under
the lock, so that a writer that is frozen or has a stalled disk hardly ever holds up the others. A killed writer leaves
either the old state or the new one, never a part.

A write whose deadline passes after its rename began is OutcomeUnknown and may still land later, as a request to an API
server may; before, it is StoreUnavailable and certainly never lands.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from instance_manager.codec import from_json, to_json
from instance_manager.core.record import ClusterRecord, Holder, StoredRecord
from instance_manager.ports import Conflict, OutcomeUnknown, RecordUnreadable, StoreUnavailable
from instance_manager.threads import Attempt, Threads, TooManyCalls, monotonic_s

T = TypeVar("T")

RECORD_FILE = "lease.json"
LOCK_FILE = "lease.lock"
RECORD_BYTES_MAX = 1024 * 1024
LOCK_FILE_BYTES_MAX = 4096
LOCK_POLL_S = 0.002
CHANGES_POLL_S = 0.1
_VERSION_PATTERN = re.compile(r"([1-9][0-9]{0,17})-[0-9a-f]{16}")
_INCARNATION_PATTERN = re.compile(r"[0-9A-Za-z_-]{4,64}")
_PREPARED_FILE_PATTERN = re.compile(r"lease\.json\.[0-9a-f]{16}\.new")
_FORGOTTEN_AFTER_S = 3600.0
_CLEAN_EVERY_VERSIONS = 100


class UnreadableFile(RecordUnreadable):
    """The file is there and is no record. By `version` its repair (R3) can be a conditional write like every other."""

    def __init__(self, reason: str, version: str) -> None:
        super().__init__(reason)
        self.version = version


class _StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: str
    record: ClusterRecord


class LocalCoordination:
    """`ports.Coordination` on a directory that all instances of this machine share.

    A missing directory is a store that cannot be reached. `locks_directory` holds `<instance>.lock` of each instance; the
    files in it must never be removed while an instance runs.
    """

    def __init__(self, directory: Path, locks_directory: Path) -> None:
        self._directory = directory
        self._locks_directory = locks_directory
        self._threads = Threads("lease file")
        self._durable_version = ""

    async def read(self, *, deadline_s: float) -> StoredRecord | None:
        """The current record, durable; None when the directory is there and holds none."""
        return await self._call(self._read, deadline_s=deadline_s)

    async def create(self, record: ClusterRecord, *, deadline_s: float) -> StoredRecord:
        """Write the first record; Conflict if there is a file, readable or not."""
        return await self._write(record, None, deadline_s)

    async def replace(self, record: ClusterRecord, *, version: str, deadline_s: float) -> StoredRecord:
        """Write `record` if the store still holds exactly `version`; also the version of an `UnreadableFile`."""
        return await self._write(record, version, deadline_s)

    async def changes(self) -> AsyncIterator[None]:
        """One hint at once, then one within 100 ms of whatever happens to the file or its directory."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        changed.set()
        stopped = threading.Event()
        path = self._directory / RECORD_FILE

        def watch() -> None:
            last = _signature(path)
            while not stopped.wait(CHANGES_POLL_S):
                now = _signature(path)
                if now != last:
                    last = now
                    try:
                        loop.call_soon_threadsafe(changed.set)
                    except RuntimeError:
                        return

        threading.Thread(target=watch, name="lease changes", daemon=True).start()
        try:
            while True:
                await changed.wait()
                changed.clear()
                yield
        finally:
            stopped.set()

    async def is_proven_dead(self, holder: Holder, *, deadline_s: float) -> bool:
        """The kernel dropped the lock of this life, or a later life of the same instance has taken it since (R9)."""
        path = self._locks_directory / f"{holder.name}.lock"
        try:
            return await self._threads.call(lambda: _is_lock_dropped(path, holder.incarnation), deadline_s=deadline_s)
        except (OSError, TimeoutError, TooManyCalls):
            return False

    async def close(self) -> None:
        """Nothing is held between calls."""

    async def _call(self, function: Callable[[], T], *, deadline_s: float) -> T:
        try:
            return await self._threads.call(function, deadline_s=deadline_s)
        except TimeoutError as error:
            raise StoreUnavailable(f"{self._directory}: no answer within {deadline_s:g} s") from error
        except TooManyCalls as error:
            raise StoreUnavailable(f"{self._directory}: {error}") from error
        except OSError as error:
            raise StoreUnavailable(f"{self._directory}: {error.strerror or error}") from error

    async def _write(self, record: ClusterRecord, expected: str | None, deadline_s: float) -> StoredRecord:
        attempt = Attempt()
        ends_s = monotonic_s() + deadline_s
        try:
            return await self._threads.call(
                lambda: self._write_blocking(record, expected, attempt, ends_s), deadline_s=deadline_s
            )
        except TimeoutError as error:
            if attempt.give_up():
                raise StoreUnavailable(f"{self._directory}: not written within {deadline_s:g} s") from error
            raise OutcomeUnknown(f"{self._directory}: writing took longer than {deadline_s:g} s") from error
        except asyncio.CancelledError:
            attempt.give_up()
            raise
        except TooManyCalls as error:
            raise StoreUnavailable(f"{self._directory}: {error}") from error
        except OSError as error:
            if attempt.give_up():
                raise StoreUnavailable(f"{self._directory}: {error.strerror or error}") from error
            raise OutcomeUnknown(f"{self._directory}: {error.strerror or error}") from error

    def _read(self) -> StoredRecord | None:
        with _opened_directory(self._directory) as directory_fd:
            content = _content(directory_fd)
            if content is None:
                return None
            stored = _decoded(content)
            if stored.version != self._durable_version:
                # Whoever acts on an answer may rely on it after a power failure: the writer may be before its own fsync.
                os.fsync(directory_fd)
                self._durable_version = stored.version
            return stored

    def _write_blocking(
        self, record: ClusterRecord, expected: str | None, attempt: Attempt, ends_s: float
    ) -> StoredRecord:
        version = _next_version(expected)
        content = msgspec.json.format(to_json(_StoredFile(version, record)), indent=2) + b"\n"
        with _opened_directory(self._directory) as directory_fd:
            _compare(_content(directory_fd), expected)
            prepared = f"{RECORD_FILE}.{secrets.token_hex(8)}.new"
            try:
                _write_durably(directory_fd, prepared, content)
                with _locked(directory_fd, attempt, ends_s):
                    _compare(_content(directory_fd), expected)
                    attempt.begin()
                    os.rename(prepared, RECORD_FILE, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(prepared, dir_fd=directory_fd)
                raise
            os.fsync(directory_fd)
            if int(version.split("-")[0]) % _CLEAN_EVERY_VERSIONS == 1:
                _remove_forgotten(directory_fd)
        return StoredRecord(record, version)


def _next_version(expected: str | None) -> str:
    """Counts up, for people; never comes again, even if the file is deleted or an old one is put in its place."""
    match = _VERSION_PATTERN.fullmatch(expected) if expected is not None else None
    return f"{int(match[1]) + 1 if match else 1}-{secrets.token_hex(8)}"


def _decoded(content: bytes) -> StoredRecord:
    if len(content) > RECORD_BYTES_MAX:
        raise UnreadableFile(f"{RECORD_FILE}: longer than {RECORD_BYTES_MAX} bytes", _unreadable_version(content))
    try:
        stored = from_json(content, _StoredFile)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise UnreadableFile(f"{RECORD_FILE}: {error}", _unreadable_version(content)) from error
    if _VERSION_PATTERN.fullmatch(stored.version) is None:
        raise UnreadableFile(f"{RECORD_FILE}: {stored.version!r} is no version", _unreadable_version(content))
    return StoredRecord(stored.record, stored.version)


def _unreadable_version(content: bytes) -> str:
    return f"unreadable-{hashlib.sha256(content).hexdigest()[:32]}"


def _compare(content: bytes | None, expected: str | None) -> None:
    if content is None:
        if expected is not None:
            raise Conflict(f"the record is gone; version {expected} was expected")
        return
    if expected is None:
        raise Conflict("there is a record already")
    if expected == _unreadable_version(content):
        return
    version = _decoded(content).version
    if version != expected:
        raise Conflict(f"the record is at version {version}; {expected} was expected")


@contextlib.contextmanager
def _opened_directory(path: Path) -> Iterator[int]:
    """Everything of one call goes to the same directory, even if it is renamed meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _content(directory_fd: int) -> bytes | None:
    try:
        descriptor = os.open(RECORD_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory_fd)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read(RECORD_BYTES_MAX + 1)


def _write_durably(directory_fd: int, name: str, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(name, flags, 0o600, dir_fd=directory_fd)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(directory_fd: int, attempt: Attempt, ends_s: float) -> Iterator[None]:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(LOCK_FILE, flags, 0o600, dir_fd=directory_fd)
        try:
            if _try_lock(descriptor, fcntl.LOCK_EX) and _is_still_there(descriptor, directory_fd):
                try:
                    yield
                finally:
                    # Not by closing alone: a child that is just being forked holds a copy until it executes.
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                return
        finally:
            os.close(descriptor)
        if attempt.given_up or monotonic_s() >= ends_s:
            raise OSError(errno.ETIMEDOUT, f"{LOCK_FILE} is held by another writer")
        time.sleep(LOCK_POLL_S)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still_there(descriptor: int, directory_fd: int) -> bool:
    """A lock on a removed file excludes nobody."""
    try:
        return os.path.samestat(os.stat(LOCK_FILE, dir_fd=directory_fd), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_forgotten(directory_fd: int) -> None:
    """Prepared files of writers that were killed, and are long dead."""
    with contextlib.suppress(OSError):
        now_s = os.fstat(directory_fd).st_mtime
        for name in os.listdir(directory_fd):
            if _PREPARED_FILE_PATTERN.fullmatch(name) is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                if now_s - os.stat(name, dir_fd=directory_fd).st_mtime > _FORGOTTEN_AFTER_S:
                    os.unlink(name, dir_fd=directory_fd)


def _signature(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _is_lock_dropped(path: Path, incarnation: str) -> bool:
    """A supervisor writes its incarnation under the lock before its agent can become holder.

    So if the file names another one, that came later, and had the lock; if it names this one, the lock tells. A shared
    lock, for a moment: a starting supervisor that meets it tries again.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        named = _named_incarnation(os.pread(descriptor, LOCK_FILE_BYTES_MAX, 0))
        if named is None:
            return False
        if named != incarnation:
            return True
        if not _try_lock(descriptor, fcntl.LOCK_SH):
            return False
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return True
    finally:
        os.close(descriptor)


def _named_incarnation(content: bytes) -> str | None:
    """From `<incarnation> <pid>`, as the supervisor writes it, or a JSON object with `incarnation`; None when in doubt."""
    if not content.endswith(b"\n") and not content.endswith(b"}"):
        return None  # being written
    text = content.decode("utf-8", errors="replace").strip()
    named: object
    if text.startswith("{"):
        try:
            named = json.loads(text).get("incarnation")
        except ValueError:
            return None
    else:
        named = text.split(" ", 1)[0]
    return named if isinstance(named, str) and _INCARNATION_PATTERN.fullmatch(named) else None
