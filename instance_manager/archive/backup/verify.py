"""Is a backup still what was stored, and is the log there that makes it consistent? Everything is read, nothing is written."""

from __future__ import annotations

import asyncio
import hashlib
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from instance_manager.archive.backup.catalogue import Listed
from instance_manager.archive.backup.data_files import PG_CONTROL
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.backup.manifest import Manifest, read_members
from instance_manager.archive.backup.names import BackupNames, parse_tar_name
from instance_manager.archive.backup.tar_stream import Member
from instance_manager.archive.codecs import codec_of_suffix
from instance_manager.archive.layout import Layout, without_suffix
from instance_manager.archive.recovery.extract import TarReader, check_object, compare_tars, entry_of, tars_of
from instance_manager.archive.restore_file import Expected, verified
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.wal_names import Segment, SegmentSize
from instance_manager.ports import ContentDamaged, ObjectInfo, ObjectStore, ObjectStoreError

PROBLEMS_MAX = 100
PATIENCE = Patience(total_s=1800.0, attempt_s=6 * 3600.0, attempts_max=4)


@dataclass(slots=True)
class Verdict:
    """What was found."""

    files: int = 0
    file_bytes: int = 0
    segments: int = 0
    has_hashes: bool = True
    """False: barman's; its tars were read to their end, but there is nothing to compare their content with."""
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """What the store did not give: neither right nor wrong is known."""

    @property
    def is_good(self) -> bool:
        return not self.problems and not self.unread

    def add(self, problem: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)


async def verify_chain(
    store: ObjectStore,
    layout: Layout,
    chain: Sequence[Listed],
    *,
    parallel: int = 2,
    tell: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """The last of them, and of all that it stands on the objects; their WAL it does not need."""
    *before, last = chain
    verdict = await verify_backup(store, layout, last, parallel=parallel, tell=tell)
    for each in reversed(before):
        tell(f"it stands on backup {each.backup_id}")
        found = await verify_backup(store, layout, each, parallel=parallel, tell=tell, with_wal=False)
        verdict.files += found.files
        verdict.file_bytes += found.file_bytes
        verdict.has_hashes &= found.has_hashes
        for problem in found.problems:
            verdict.add(problem)
        verdict.unread += found.unread
    return verdict


async def verify_backup(
    store: ObjectStore,
    layout: Layout,
    listed: Listed,
    *,
    parallel: int = 2,
    tell: Callable[[str], None] = lambda _: None,
    with_wal: bool = True,
) -> Verdict:
    """All of its objects, and the WAL from its begin to its end. What is wrong is in the verdict."""
    verdict = Verdict(has_hashes=listed.manifest is not None)
    info, manifest = listed.info, listed.manifest
    if info is None or not listed.is_restorable:
        verdict.add(f"{listed.backup_id} is no whole backup: {listed.problem}")
        return verdict
    if listed.state == "damaged":
        verdict.add(listed.problem)
    names = BackupNames(layout, listed.backup_id)
    seen: set[str] = set()
    turns = asyncio.Semaphore(parallel)

    async def one(object_name: str) -> None:
        async with turns:
            try:
                seen.update(await _read_tar(store, names, object_name, manifest, verdict))
            except ContentDamaged as error:
                verdict.add(str(error))
            except ObjectStoreError as error:
                verdict.unread.append(str(error))
            else:
                tell(f"{object_name.rpartition('/')[2]} is right")

    try:
        objects = await tars_of(store, names, info, deadline_s=60)
        if manifest is not None:
            compare_tars(objects, manifest)
        await asyncio.gather(*(one(name) for name in objects))
        for name in (PG_CONTROL, "backup_label", "PG_VERSION"):
            if name not in seen and not verdict.unread:
                verdict.add(f"it holds no {name}")
    except ContentDamaged as error:
        verdict.add(str(error))
    except ObjectStoreError as error:
        verdict.unread.append(str(error))
    if with_wal:
        await verify_segments(
            store, layout, info, info.begin_segment, info.end_segment.number, verdict, parallel=parallel, tell=tell
        )
    return verdict


async def _read_tar(
    store: ObjectStore, names: BackupNames, object_name: str, manifest: Manifest | None, verdict: Verdict
) -> set[str]:
    """Names of its files that stand at the top of the data directory, and pg_control."""
    entry = entry_of(manifest, object_name)
    expected = None if entry is None else await read_members(store, names, entry.name, deadline_s=60)
    tar = parse_tar_name(object_name)
    if entry is not None and expected is None:
        raise ContentDamaged(f"{names.members(entry.name)} is gone")

    def receive(_: ObjectInfo, chunks: Iterator[bytes]) -> tuple[set[str], int, int]:
        reader = TarReader(object_name, chunks)
        top, files, length = set(), 0, 0
        for info, content in reader.members():
            size, sha256 = _digest(content)
            if not info.isreg():
                continue
            files, length = files + 1, length + size
            if size != info.size:
                raise ContentDamaged(f"{object_name}: {info.name} ends after {size} of {info.size} bytes")
            if expected is not None and expected.get(info.name, Member("", 0, 0, "")).sha256 != sha256:
                raise ContentDamaged(f"{object_name}: {info.name} is not the file that was backed up")
            if tar is not None and tar.tablespace_oid is None:
                name = posixpath.normpath(info.name)
                top |= {name} if "/" not in name or name == PG_CONTROL else set()
        check_object(reader, object_name, entry)
        if entry is not None and files != sum(each.sha256 is not None for each in (expected or {}).values()):
            raise ContentDamaged(f"{object_name} holds {files} files, other than its list says")
        return top, files, length

    found = await PATIENCE.call(lambda left_s: store.receive(object_name, receive, deadline_s=left_s))
    if found is None:
        raise ContentDamaged(f"{object_name} is gone")
    top, files, length = found
    verdict.files += files
    verdict.file_bytes += length
    return top


def _digest(content: Iterator[bytes]) -> tuple[int, str]:
    digest, length = hashlib.sha256(), 0
    for chunk in content:
        digest.update(chunk)
        length += len(chunk)
    return length, digest.hexdigest()


async def verify_segments(
    store: ObjectStore,
    layout: Layout,
    info: BackupInfo,
    first: Segment,
    last_number: int,
    verdict: Verdict,
    *,
    parallel: int = 2,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Each whole segment of a timeline from `first` to `last_number`: there, of this system, and with its own hash."""
    size, system = info.segment_size, int(info.system_identifier or 0)
    turns = asyncio.Semaphore(parallel)

    async def one(number: int) -> None:
        async with turns:
            name = size.name(Segment(first.timeline, number))
            try:
                if await _read_segment(store, layout, name, size, system):
                    verdict.segments += 1
                else:
                    verdict.add(f"the segment {name} is not in the archive")
            except ContentDamaged as error:
                verdict.add(str(error))
            except ObjectStoreError as error:
                verdict.unread.append(str(error))

    for begin in range(first.number, last_number + 1, 64):
        numbers = range(begin, min(begin + 64, last_number + 1))
        await asyncio.gather(*(one(number) for number in numbers))
        tell(f"WAL is read to {size.name(Segment(first.timeline, numbers[-1]))}")


async def _read_segment(store: ObjectStore, layout: Layout, name: str, size: SegmentSize, system: int) -> bool:
    """False: it is not there in any codec. ContentDamaged."""
    stem = layout.wal_stem(name)
    async for entry in store.entries(stem, deadline_s=60):
        if without_suffix(entry.name) == stem:
            receiver = partial(_read_through, entry.name, Expected(name, size, system, size.size_bytes))
            return bool(await PATIENCE.call(partial(_receive, store, entry.name, receiver)))
    return False


def _read_through(object_name: str, expected: Expected, info: ObjectInfo, chunks: Iterator[bytes]) -> bool:
    content = codec_of_suffix(object_name).decompressed(chunks, limit_bytes=expected.limit_bytes)
    for _ in verified(content, info, expected):
        pass
    return True


async def _receive(
    store: ObjectStore, name: str, receiver: Callable[[ObjectInfo, Iterator[bytes]], bool], left_s: float
) -> bool | None:
    return await store.receive(name, receiver, deadline_s=min(left_s, 600.0))
