"""The tars of a backup into a directory: several at a time, streamed, every hash compared.

pg_control comes last, when all else is on disk: a directory without it cannot be started, so a half-restored one never is.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import posixpath
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from instance_manager.archive.backup.data_files import PG_CONTROL
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.backup.manifest import Manifest, TarEntry, read_members
from instance_manager.archive.backup.names import BackupNames, TarName, parse_tar_name
from instance_manager.archive.backup.tar_stream import Member
from instance_manager.archive.codecs import codec_of_suffix
from instance_manager.archive.stores.patience import Patience
from instance_manager.ports import ContentDamaged, ObjectInfo, ObjectStore
from instance_manager.postgres.files import fsync_directory, write_atomically
from instance_manager.postgres.server import RunAs

CHUNK_BYTES = 1 << 20
END_DEADLINE_S = 120.0
LIMIT_BYTES = 1 << 50
"""Of one tar: nothing that is read is unbounded."""

_TABLESPACE_MAP = "tablespace_map"
_NOT_RESTORED = frozenset({_TABLESPACE_MAP, "standby.signal", "recovery.signal", "postmaster.pid", "postmaster.opts"})


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the files go, and whose they are."""

    data_directory: Path
    tablespaces: dict[int, Path]
    """By oid."""
    run_as: RunAs | None

    def root_of(self, tar: TarName) -> Path:
        """ContentDamaged: a tablespace that backup.info does not name."""
        oid = tar.tablespace_oid
        if oid is None:
            return self.data_directory
        try:
            return self.tablespaces[oid]
        except KeyError:
            raise ContentDamaged(f"a tar of the tablespace {oid}, of which backup.info says nothing") from None


@dataclass(slots=True)
class Extracted:
    """What has been written."""

    files: int = 0
    size_bytes: int = 0
    control: bytes | None = None
    directories: set[Path] = field(default_factory=set)
    written: list[Path] = field(default_factory=list)


class Writing:
    """The store's threads that write files: they outlive a cancelled call, and must have ended before their files are removed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_over = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """ContentDamaged: it is over."""
        with self._changed:
            self.check()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def check(self) -> None:
        if self._is_over:
            raise ContentDamaged("the restore has ended")

    def end(self) -> None:
        """Blocks until nobody writes any more, or the disk has hung for too long."""
        with self._changed:
            self._is_over = True
            self._changed.wait_for(lambda: self._inside == 0, END_DEADLINE_S)


class TarReader:
    """The members of one object, from its chunks, with the digest of the object itself."""

    def __init__(self, object_name: str, chunks: Iterator[bytes]) -> None:
        self._digest = hashlib.sha256()
        self._chunks = codec_of_suffix(object_name).decompressed(self._counted(chunks), limit_bytes=LIMIT_BYTES)
        self._left = b""
        self.object_bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def read(self, size: int) -> bytes:
        """What tarfile asks for: `size` bytes, fewer only at the end."""
        parts, length = [self._left], len(self._left)
        while length < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            parts.append(chunk)
            length += len(chunk)
        joined = b"".join(parts)
        self._left = joined[size:]
        return joined[:size]

    def members(self) -> Iterator[tuple[tarfile.TarInfo, Iterator[bytes]]]:
        """Each with its content, which must be read before the next. Reads the object to its end. ContentDamaged."""
        try:
            with tarfile.open(fileobj=self, mode="r|", bufsize=CHUNK_BYTES) as tar:  # type: ignore[call-overload]
                for info in tar:
                    opened = tar.extractfile(info) if info.isreg() else None
                    yield info, iter(()) if opened is None else iter(lambda: opened.read(CHUNK_BYTES), b"")  # noqa: B023
        except (tarfile.TarError, EOFError) as error:
            raise ContentDamaged(f"not a whole tar: {error}") from error
        while self.read(CHUNK_BYTES):
            pass

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._digest.update(chunk)
            self.object_bytes += len(chunk)
            yield chunk


async def tars_of(store: ObjectStore, names: BackupNames, info: BackupInfo, *, deadline_s: float) -> list[str]:
    """Names of the objects of a backup. ContentDamaged: one that there must be is missing."""
    found = [
        entry.name
        async for entry in store.entries(names.folder, deadline_s=deadline_s)
        if "/" not in entry.name.removeprefix(names.folder) and parse_tar_name(entry.name) is not None
    ]
    there = {(tar.stem, tar.part) for name in found if (tar := parse_tar_name(name)) is not None}
    for stem in ("data", *(str(each.oid) for each in info.tablespaces)):
        parts = sorted(part for each, part in there if each == stem)
        if parts != list(range(len(parts))) or not parts:
            raise ContentDamaged(
                f"backup {info.backup_id}: of {stem}.tar there are the parts {parts}: some are missing"
            )
    return found


def compare_tars(found: list[str], manifest: Manifest) -> None:
    """ContentDamaged: the objects are not those of the manifest."""
    names = {name.rpartition("/")[2] for name in found}
    if missing := sorted({entry.object_name for entry in manifest.tars} - names):
        raise ContentDamaged(f"backup {manifest.backup_id} has lost {', '.join(missing)}")


async def extract_backup(
    store: ObjectStore,
    names: BackupNames,
    info: BackupInfo,
    manifest: Manifest | None,
    destination: Destination,
    *,
    parallel: int,
    patience: Patience,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Extracted:
    """All of it but pg_control, which is in the answer. ContentDamaged; ObjectStoreError; OSError.

    What is written is not flushed yet: see `make_durable`.
    """
    objects = await tars_of(store, names, info, deadline_s=patience.attempt_s)
    if manifest is not None:
        compare_tars(objects, manifest)
    extracted = Extracted()
    turns, writing = asyncio.Semaphore(parallel), Writing()

    async def one(object_name: str) -> None:
        async with turns:
            await _extract_one(store, names, object_name, manifest, destination, extracted, patience, writing)
            on_progress(extracted.size_bytes)

    tasks = [asyncio.create_task(one(name)) for name in objects]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.shield(asyncio.to_thread(writing.end))
    if extracted.control is None:
        raise ContentDamaged(f"backup {info.backup_id} holds no {PG_CONTROL}")
    if not (destination.data_directory / "backup_label").exists():
        raise ContentDamaged(f"backup {info.backup_id} holds no backup_label: recovery would begin at a wrong position")
    return extracted


async def _extract_one(
    store: ObjectStore,
    names: BackupNames,
    object_name: str,
    manifest: Manifest | None,
    destination: Destination,
    extracted: Extracted,
    patience: Patience,
    writing: Writing,
) -> None:
    tar = parse_tar_name(object_name)
    if tar is None:
        return
    root = destination.root_of(tar)
    entry = entry_of(manifest, object_name)
    expected = None if entry is None else await read_members(store, names, entry.name, deadline_s=30)

    def receive(_: ObjectInfo, chunks: Iterator[bytes]) -> Extracted:
        with writing.inside():
            return read(chunks)

    def read(chunks: Iterator[bytes]) -> Extracted:
        reader, done = TarReader(object_name, chunks), Extracted()
        for member, content in reader.members():
            writing.check()
            _write_member(member, content, root, destination, done, expected)
        check_object(reader, object_name, entry)
        if expected is not None and done.files != sum(member.sha256 is not None for member in expected.values()):
            raise ContentDamaged(f"{object_name} holds {done.files} files, other than its list says")
        return done

    done = await patience.call(lambda left_s: store.receive(object_name, receive, deadline_s=left_s))
    if done is None:
        raise ContentDamaged(f"{object_name} was listed and is gone: the backup is being deleted")
    extracted.files += done.files
    extracted.size_bytes += done.size_bytes
    extracted.control = extracted.control or done.control
    extracted.directories |= done.directories
    extracted.written += done.written


def entry_of(manifest: Manifest | None, object_name: str) -> TarEntry | None:
    """None: another tool's backup, without hashes. ContentDamaged: not in the manifest."""
    if manifest is None:
        return None
    short = object_name.rpartition("/")[2]
    found = next((entry for entry in manifest.tars if entry.object_name == short), None)
    if found is None:
        raise ContentDamaged(f"{object_name} is not in the manifest of its backup")
    return found


def check_object(reader: TarReader, object_name: str, entry: TarEntry | None) -> None:
    """ContentDamaged: not what was stored."""
    if entry is not None and (reader.object_bytes, reader.sha256) != (entry.object_bytes, entry.object_sha256):
        raise ContentDamaged(f"{object_name} holds other content than was stored: sha256 {reader.sha256}")


def _write_member(
    info: tarfile.TarInfo,
    content: Iterator[bytes],
    root: Path,
    destination: Destination,
    done: Extracted,
    expected: dict[str, Member] | None,
) -> None:
    name = posixpath.normpath(info.name)
    if name.startswith(("/", "../")) or name == "..":
        raise ContentDamaged(f"a tar holds {info.name!r}, which would lie outside of the directory")
    if info.isdir():
        _make_directory(root / name, destination, done, info.mode)
        return
    if not info.isreg():
        raise ContentDamaged(f"a tar holds {info.name!r}, which is neither a file nor a directory")
    digest, length = hashlib.sha256(), 0
    is_control = root == destination.data_directory and name == PG_CONTROL
    is_dropped = root == destination.data_directory and name in _NOT_RESTORED
    control = bytearray()
    path = root / name
    file = None
    if not is_control and not is_dropped:
        _make_directory(path.parent, destination, done, 0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        file = os.fdopen(descriptor, "wb", buffering=0)
    try:
        for chunk in content:
            digest.update(chunk)
            length += len(chunk)
            if file is not None:
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
            elif is_control:
                control += chunk
        if file is not None:
            os.fchmod(file.fileno(), (info.mode & 0o770) | 0o600)
            if destination.run_as is not None:
                os.fchown(file.fileno(), destination.run_as.uid, destination.run_as.gid)
            done.written.append(path)
    finally:
        if file is not None:
            file.close()
    if length != info.size:
        raise ContentDamaged(f"{info.name} ends after {length} of {info.size} bytes")
    if expected is not None:
        told = expected.get(info.name)
        if told is None or told.sha256 != digest.hexdigest():
            raise ContentDamaged(f"{info.name} is not the file that was backed up: sha256 {digest.hexdigest()}")
    if is_control:
        done.control = bytes(control)
    done.files += 1
    done.size_bytes += length


def _make_directory(path: Path, destination: Destination, done: Extracted, mode: int) -> None:
    if path in done.directories:
        return
    missing = []
    each = path
    while not each.is_dir():
        missing.append(each)
        each = each.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
        if destination.run_as is not None:
            os.chown(each, destination.run_as.uid, destination.run_as.gid)
        done.directories.add(each)
    if missing:
        path.chmod((mode & 0o770) | 0o700)
    done.directories.add(path)


def make_durable(extracted: Extracted) -> None:
    """Flush every file and directory. Blocks, for as long as the disk takes."""
    for path in extracted.written:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for path in sorted(extracted.directories, reverse=True):
        fsync_directory(path)


def link_tablespaces(destination: Destination) -> None:
    """pg_tblspc/<oid> to where each tablespace is now."""
    folder = destination.data_directory / "pg_tblspc"
    for oid, location in destination.tablespaces.items():
        link = folder / str(oid)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(location)
        if destination.run_as is not None:
            os.chown(link, destination.run_as.uid, destination.run_as.gid, follow_symlinks=False)
    fsync_directory(folder)


def write_control(destination: Destination, control: bytes) -> None:
    """The last file: from now on the directory can be started."""
    path = destination.data_directory / PG_CONTROL
    write_atomically(path, control, run_as=destination.run_as)
