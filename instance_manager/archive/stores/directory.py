"""A directory as an object store: for one machine, a demo, or a file system that all instances share.

An object is written beside its place, flushed, and given its name by a hard link, which fails where the name is taken:
that is the conditional create. What was given as metadata lies under `.metadata/`; an object may be without, after a crash
or when another tool wrote it, so metadata is never needed to read one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

from instance_manager.archive.content import CHUNK_BYTES
from instance_manager.archive.stores import CALLS_IN_FLIGHT_MAX, CALLS_KEPT_MAX
from instance_manager.archive.stores.names import check_name, check_prefix
from instance_manager.ports import (
    Content,
    ContentDamaged,
    ObjectExists,
    ObjectInfo,
    StoreForbidden,
    StoreMissing,
    StoreRefused,
    StoreUnreachable,
)
from instance_manager.postgres.files import fsync_directory
from instance_manager.threads import Threads, TooManyCalls, monotonic_s

T = TypeVar("T")

METADATA = ".metadata"
INCOMING = ".incoming"
PAGE_ENTRIES = 1000
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class DirectoryStore:
    """Objects below `root`, which must exist: one that is not mounted is StoreMissing, not empty."""

    def __init__(self, root: Path, *, page_entries: int = PAGE_ENTRIES) -> None:
        self._root = root
        self._page_entries = page_entries
        self._threads = Threads(f"the directory {root}", in_flight_max=CALLS_IN_FLIGHT_MAX, kept_max=CALLS_KEPT_MAX)

    async def learn(self, folder: str, *, deadline_s: float) -> None:
        return

    async def create(
        self, name: str, content: Content, *, metadata: Mapping[str, str] | None = None, deadline_s: float
    ) -> None:
        end_s = monotonic_s() + deadline_s
        await self._call(lambda: self._create(check_name(name), content, metadata or {}, end_s), deadline_s)

    async def receive(
        self,
        name: str,
        receiver: Callable[[ObjectInfo, Iterator[bytes]], T],
        *,
        byte_range: tuple[int, int] | None = None,
        deadline_s: float,
    ) -> T | None:
        end_s = monotonic_s() + deadline_s
        return await self._call(lambda: self._receive(check_name(name), receiver, byte_range, end_s), deadline_s)

    async def info(self, name: str, *, deadline_s: float) -> ObjectInfo | None:
        return await self._call(lambda: self._info(check_name(name)), deadline_s)

    async def entries(
        self, prefix: str, *, after: str = "", shallow: bool = False, deadline_s: float
    ) -> AsyncIterator[ObjectInfo]:
        walk = self._walk(check_prefix(prefix), after, shallow)

        def page() -> list[ObjectInfo]:
            return list(itertools.islice(walk, self._page_entries))

        while found := await self._call(page, deadline_s):
            for entry in found:
                yield entry

    async def delete(self, name: str, *, deadline_s: float) -> None:
        await self._call(lambda: self._delete(check_name(name)), deadline_s)

    async def close(self) -> None:
        return

    async def _call(self, function: Callable[[], T], deadline_s: float) -> T:
        def translated() -> T:
            try:
                return function()
            except OSError as error:
                raise self._translate(error) from error

        try:
            return await self._threads.call(translated, deadline_s=deadline_s)
        except TimeoutError:
            raise StoreUnreachable(f"{self._root}: no answer of the file system within {deadline_s:g} s") from None
        except TooManyCalls as error:
            raise StoreUnreachable(f"{self._root}: {error}") from error

    def _translate(self, error: OSError) -> Exception:
        if isinstance(error, TimeoutError):
            return StoreUnreachable(f"{self._root}: not done in time")
        if error.errno in (errno.EACCES, errno.EROFS):
            return StoreForbidden(f"{error}: the archive's directory must be writable for the instance manager's user")
        return StoreUnreachable(str(error))

    def _require_root(self) -> None:
        if not self._root.is_dir():
            raise StoreMissing(f"{self._root} is not there: mount it, or create it, and it is used at the next try")

    def _create(self, name: str, content: Content, metadata: Mapping[str, str], end_s: float) -> None:
        self._require_root()
        path = self._root / name
        if path.exists():
            # Whoever made it may have crashed before its name was durable, and the caller may now rely on it.
            fsync_directory(path.parent)
            raise ObjectExists(name)
        incoming = self._root / INCOMING
        incoming.mkdir(exist_ok=True)
        token = secrets.token_hex(8)
        temporary = incoming / token
        try:
            with temporary.open("xb", buffering=0) as file:
                for chunk in content.chunks():
                    _write_all(file, chunk)
                    _check_time(end_s)
                if content.size_bytes not in (None, file.tell()):
                    raise ContentDamaged(f"{name}: its content ended after {file.tell()} of {content.size_bytes} bytes")
                os.fsync(file.fileno())
            _make_directories(path.parent, self._root)
            _link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)
        self._write_metadata(name, metadata, incoming / f"{token}.metadata")

    def _write_metadata(self, name: str, metadata: Mapping[str, str], temporary: Path) -> None:
        if not metadata:
            return
        path = self._root / METADATA / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({key.lower(): value for key, value in metadata.items()}))
        temporary.replace(path)

    def _receive(
        self,
        name: str,
        receiver: Callable[[ObjectInfo, Iterator[bytes]], T],
        byte_range: tuple[int, int] | None,
        end_s: float,
    ) -> T | None:
        try:
            file = (self._root / name).open("rb", buffering=0)
        except _ABSENT:
            self._require_root()
            return None
        with file:
            size = os.fstat(file.fileno()).st_size
            first, behind = byte_range if byte_range is not None else (0, size)
            behind = min(behind, size)
            file.seek(first)
            return receiver(ObjectInfo(name, size, self._metadata(name)), _chunks(file, name, behind - first, end_s))

    def _info(self, name: str) -> ObjectInfo | None:
        return self._receive(name, lambda info, _: info, None, 0.0)

    def _metadata(self, name: str) -> dict[str, str]:
        try:
            read = json.loads((self._root / METADATA / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return {str(key): str(value) for key, value in read.items()} if isinstance(read, dict) else {}

    def _walk(self, prefix: str, after: str, shallow: bool) -> Iterator[ObjectInfo]:
        self._require_root()
        head, _, last = prefix.rpartition("/")
        base = f"{head}/" if head else ""
        yield from self._walk_below(base, last, after, shallow)

    def _walk_below(self, base: str, starts: str, after: str, shallow: bool) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(self._root / base) as found:
                entries = [(f"{each.name}/" if each.is_dir() else each.name, each) for each in found]
        except _ABSENT:
            return
        # With its `/` a directory stands where its content stands among the full names.
        for relative, entry in sorted(entries, key=lambda pair: pair[0]):
            name = base + relative
            if not relative.startswith(starts) or relative in (f"{METADATA}/", f"{INCOMING}/"):
                continue
            if not relative.endswith("/"):
                if name > after:
                    yield ObjectInfo(name, entry.stat().st_size, {})
            elif shallow:
                if name > after:
                    yield ObjectInfo(name, 0, {})
            elif name > after or after.startswith(name):
                yield from self._walk_below(name, "", after, shallow)

    def _delete(self, name: str) -> None:
        self._require_root()
        path = self._root / name
        with contextlib.suppress(*_ABSENT):
            (self._root / METADATA / name).unlink()
        with contextlib.suppress(*_ABSENT):
            path.unlink()
        if path.parent.is_dir():
            fsync_directory(path.parent)


def _link(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        fsync_directory(path.parent)
        raise ObjectExists(path.name) from None
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise StoreRefused(
                f"{path.parent}: this file system has no hard links ({error.strerror}), without which an object of the "
                "archive could be overwritten: use another file system, or S3"
            ) from error
        raise


def _make_directories(path: Path, root: Path) -> None:
    """Create `path` below `root`, durably."""
    missing = []
    while path != root and not path.is_dir():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            each.mkdir()
        fsync_directory(each.parent)


def _write_all(file: BinaryIO, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def _chunks(file: BinaryIO, name: str, length: int, end_s: float) -> Iterator[bytes]:
    while length > 0:
        _check_time(end_s)
        chunk = file.read(min(CHUNK_BYTES, length))
        if not chunk:
            raise ContentDamaged(f"{name}: {length} bytes are missing at its end")
        length -= len(chunk)
        yield chunk


def _check_time(end_s: float) -> None:
    if monotonic_s() > end_s:
        raise TimeoutError
