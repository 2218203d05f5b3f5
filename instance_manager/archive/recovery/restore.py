"""Recovery of one machine: from nothing to a data directory that is shut down cleanly on a timeline of its own.

| phase | a failure, or a kill, leaves |
|---|---|
| files | nothing; after a kill a directory without pg_control, which cannot be started, and which the next try removes |
| replay | a directory that resumes where it was, by the same command |
| opening | the same; from when Postgres has begun to promote, a directory that is refused, and has to be removed |

The archive is only read. Whoever starts the result archives under another name: lineage.py refuses anything else.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from instance_manager.archive.backup.catalogue import Listed, Window, chain_of, find_backup, list_backups, window_of
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.commands import NoInterpreter
from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.layout import Layout
from instance_manager.archive.recovery.combine import CannotCombine, extract_chain, require_means
from instance_manager.archive.recovery.extract import (
    Destination,
    Extracted,
    extract_backup,
    link_tablespaces,
    make_durable,
    write_control,
)
from instance_manager.archive.recovery.replay import Reached, RecoveryStopped, Replay, ReplaySettings
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.recovery.target import NoBackupForTarget, Target, TargetInvalid, choose_backup, is_before
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.tail import chain_of_archive, histories_in
from instance_manager.codec import from_json, to_json
from instance_manager.core.archive_state import GAP
from instance_manager.core.types import Lsn, Timeline, TimelineChain, WalEnd
from instance_manager.ports import ContentDamaged, ObjectStore, ObjectStoreError
from instance_manager.postgres.directory import STANDBY_SIGNAL, create_standby_signal, remove_files_of_source
from instance_manager.postgres.files import read_if_present, write_atomically
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.tablespaces import UNFINISHED, empty, unfinished_places

log = logging.getLogger("instance_manager.archive.recovery")

MARKER = "instance-manager.recovery.json"
LOG_FILE = "instance-manager.recovery.log"
LIST_DEADLINE_S = 60.0


class RestoreFailed(Exception):
    """There is no new server; the text says what is left, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSettings:
    """How."""

    parallel: int = 4
    patience: Patience = Patience(total_s=3600.0, attempt_s=6 * 3600.0, attempts_max=20)
    fetch: FetchSettings = field(default_factory=FetchSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    tablespaces: Mapping[str, Path] = field(default_factory=dict)
    """New places by the tablespace's name; where none is given it is the old one."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A server that may be started."""

    info: BackupInfo
    reached: Reached


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done, found before anything is written."""

    backup: Listed
    info: BackupInfo
    chain: TimelineChain
    window: Window
    stack: tuple[Listed, ...]
    """The full backup and all incremental ones up to `backup`; of a full one itself alone."""


@dataclass(frozen=True, slots=True)
class _Marker:
    """In a directory whose files are all there, and which has not opened yet."""

    backup_id: str
    system_identifier: str
    target: Target


async def make_plan(store: ObjectStore, layout: Layout, target: Target, *, backup: str | None = None) -> Plan:
    """RestoreFailed: it cannot be; ObjectStoreError."""
    try:
        listed = await list_backups(store, layout, deadline_s=LIST_DEADLINE_S)
        chain = await _history_for(store, layout, target)
        chosen = choose_backup(listed, target, chain) if backup is None else find_backup(listed, backup)
        stack = chain_of(listed, chosen)
    except (NoBackupForTarget, TargetInvalid, LookupError) as error:
        raise RestoreFailed(str(error)) from error
    info = chosen.info
    if not chosen.is_restorable or info is None:
        raise RestoreFailed(f"backup {chosen.backup_id} cannot be restored: {chosen.problem}")
    if backup is not None and not is_before(info, target):
        raise RestoreFailed(f"backup {info.backup_id} is complete only at {info.end_time}, behind the target, {target}")
    window = await window_of(store, layout, info, chain=chain, deadline_s=LIST_DEADLINE_S)
    if target.kind == "immediate":
        chain = await chain_of_archive(store, layout, timeline=info.timeline, deadline_s=LIST_DEADLINE_S)
    return Plan(chosen, info, chain, window, stack)


async def _history_for(store: ObjectStore, layout: Layout, target: Target) -> TimelineChain:
    """Of the timeline that was asked for; the newest, where that one goes through the same position.

    An old timeline's last segment is often only in the archive as the next one's copy of it.
    """
    newest = await chain_of_archive(store, layout, deadline_s=LIST_DEADLINE_S)
    if target.timeline is None or target.timeline == newest.current:
        return newest
    if target.lsn is not None and newest.contains(WalEnd(target.timeline, target.lsn)):
        return newest
    histories = await histories_in(store, layout, deadline_s=LIST_DEADLINE_S)
    if target.timeline not in (newest.first, *histories):
        raise RestoreFailed(
            f"there is no timeline {target.timeline} in the archive; there are: {_timelines(newest, histories)}"
        )
    return await chain_of_archive(store, layout, timeline=target.timeline, deadline_s=LIST_DEADLINE_S)


def _timelines(newest: TimelineChain, histories: Iterable[Timeline]) -> str:
    return ", ".join(str(each) for each in sorted({newest.first, *histories}))


async def restore(
    server: LocalServer,
    store: ObjectStore,
    layout: Layout,
    target: Target,
    settings: RestoreSettings,
    *,
    backup: str | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Restored:
    """Into `server.data_directory`, which must be missing, empty, or left by the same restore.

    RestoreFailed: nothing has opened. Cancelled, it stops Postgres first.
    """
    try:
        plan = await make_plan(store, layout, target, backup=backup)
        with _alone_in(server.data_directory):
            for place in await asyncio.to_thread(_remove_unfinished, server.data_directory):
                on_progress(f"a restore that was killed had left its files in {place}: they are removed")
            resumed = await asyncio.to_thread(_find_marker, server.data_directory)
            if resumed is not None:
                plan = await _resumed_plan(store, layout, target, resumed)
                on_progress(f"going on with the restore of backup {plan.info.backup_id}")
            else:
                on_progress(
                    f"restoring backup {plan.info.backup_id} ({plan.info.end_time:%Y-%m-%d %H:%M:%S%z}), target: {target}"
                )
                _tell_gap(plan, on_progress)
                await restore_files(server, store, layout, target, settings, plan, on_progress)
            return await _replay(server, store, layout, target, settings, plan, on_progress)
    except (ObjectStoreError, LocalPostgresError, OSError, RecoveryStopped, NoInterpreter) as error:
        raise RestoreFailed(str(error)) from error


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """RestoreFailed: another restore works there; it may be the last one's, still ending, which removes what it wrote."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RestoreFailed(f"another restore is at work in {directory}: wait for its end") from None
        yield
    finally:
        os.close(descriptor)


def _remove_unfinished(data_directory: Path) -> list[Path]:
    """The files of a restore that was killed before all were there; what is nobody's of ours stays. Where there were any."""
    if not (data_directory / UNFINISHED).exists() or (data_directory / "global" / "pg_control").exists():
        return []
    # The data directory last: it names the others.
    places = [*unfinished_places(data_directory), data_directory]
    empty(places)
    return places


def _tell_gap(plan: Plan, on_progress: Callable[[str], None]) -> None:
    """Before hours are spent: replay will stop there, unless the target is before it."""
    missing = plan.window.reach.missing
    if missing is not None and plan.window.chain == plan.chain:
        on_progress(
            f"{GAP}: {plan.info.segment_size.name(missing)} is missing, and later segments are there. Unless the target is before it, replay "
            "stops there: put it back meanwhile (a standby or an old primary may have it in pg_wal), or choose a target before it"
        )


async def _resumed_plan(store: ObjectStore, layout: Layout, target: Target, marker: _Marker) -> Plan:
    if marker.target != target:
        raise RestoreFailed(
            f"the directory was begun for another target, {marker.target}: what is replayed cannot be taken back. "
            "Give that target, or another directory"
        )
    return await make_plan(store, layout, target, backup=marker.backup_id)


def _find_marker(data_directory: Path) -> _Marker | None:
    """RestoreFailed: the place is taken by something else."""
    if not data_directory.exists() or not any(data_directory.iterdir()):
        return None
    try:
        content = read_if_present(data_directory / MARKER)
        marker = None if content is None else from_json(content, _Marker)
    except (ValueError, msgspec.MsgspecError):
        marker = None
    if marker is None or not (data_directory / "global" / "pg_control").exists():
        raise RestoreFailed(
            f"{data_directory} is not empty, and not from a restore that can go on: nothing is ever overwritten. "
            "Give another directory, or remove what is there"
        )
    if not (data_directory / STANDBY_SIGNAL).exists():
        raise RestoreFailed(
            f"{data_directory} was killed as it opened: whether that was whole is not known, and started again it would open by itself. "
            "Remove it, and give the same command again"
        )
    return marker


async def restore_files(
    server: LocalServer,
    store: ObjectStore,
    layout: Layout,
    target: Target,
    settings: RestoreSettings,
    plan: Plan,
    on_progress: Callable[[str], None],
) -> None:
    info = plan.info
    places = {each.oid: settings.tablespaces.get(each.name, Path(each.location)) for each in info.tablespaces}
    if unknown := sorted(set(settings.tablespaces) - {each.name for each in info.tablespaces}):
        raise RestoreFailed(f"the backup has no tablespace {', '.join(unknown)}")
    for place in places.values():
        if place.exists() and any(place.iterdir()):
            raise RestoreFailed(
                f"the tablespace's place {place} is not empty: give another with --tablespace NAME=DIRECTORY"
            )
    destination = Destination(server.data_directory, places, server.run_as)
    if len(plan.stack) > 1:
        try:
            room = await require_means(server, plan.stack, destination)
        except CannotCombine as error:
            raise RestoreFailed(f"backup {info.backup_id} is an incremental one: {error}") from error
        on_progress(f"it stands on {', '.join(each.backup_id for each in plan.stack[:-1])}: that needs {room}")
    made = await asyncio.to_thread(_make_roots, destination)

    def tell(size_bytes: int) -> None:
        total = f" of {info.size_bytes >> 20}" if info.size_bytes else ""
        on_progress(f"{size_bytes >> 20}{total} MiB restored")

    try:
        if len(plan.stack) > 1:
            extracted = await extract_chain(
                server,
                store,
                layout,
                plan.stack,
                destination,
                parallel=settings.parallel,
                patience=settings.patience,
                on_progress=on_progress,
            )
        else:
            names = BackupNames(layout, info.backup_id)
            extracted = await extract_backup(
                store,
                names,
                info,
                plan.backup.manifest,
                destination,
                parallel=settings.parallel,
                patience=settings.patience,
                on_progress=tell,
            )
        await asyncio.to_thread(_finish_files, server, destination, extracted, info, target)
    except BaseException:
        # Nothing was there before: nothing is left now.
        await asyncio.shield(asyncio.to_thread(empty, made))
        raise


def _make_roots(destination: Destination) -> list[Path]:
    roots = [destination.data_directory, *destination.tablespaces.values()]
    for root in roots:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.chmod(0o700)
        if destination.run_as is not None:
            os.chown(root, destination.run_as.uid, destination.run_as.gid)
    started = destination.data_directory / UNFINISHED
    started.touch()
    # Named before they are marked, so that none is left behind of which nobody knows.
    named = "".join(f"{place}\n" for place in destination.tablespaces.values())
    write_atomically(started, named.encode(errors="surrogateescape"))
    for place in destination.tablespaces.values():
        (place / UNFINISHED).touch()
    return roots


def _finish_files(
    server: LocalServer, destination: Destination, extracted: Extracted, info: BackupInfo, target: Target
) -> None:
    data = destination.data_directory
    for name in ("pg_wal", "pg_tblspc"):
        _make_directory(data / name, destination)
    link_tablespaces(destination)
    make_durable(extracted)
    remove_files_of_source(data)
    create_standby_signal(server, data)
    marker = _Marker(info.backup_id, info.system_identifier, target)
    write_atomically(data / MARKER, to_json(marker), run_as=server.run_as)
    if extracted.control is None:
        raise ContentDamaged("the backup holds no pg_control")
    write_control(destination, extracted.control)
    _unmark(destination.tablespaces.values())
    (data / UNFINISHED).unlink()


def _unmark(places: Iterable[Path]) -> None:
    for place in places:
        (place / UNFINISHED).unlink(missing_ok=True)


def _make_directory(path: Path, destination: Destination) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    if destination.run_as is not None:
        os.chown(path, destination.run_as.uid, destination.run_as.gid)


async def _replay(
    server: LocalServer,
    store: ObjectStore,
    layout: Layout,
    target: Target,
    settings: RestoreSettings,
    plan: Plan,
    on_progress: Callable[[str], None],
) -> Restored:
    info = plan.info
    async with work_directory(server) as work:
        archive = RecoveryArchive(
            store,
            layout,
            data_directory=server.data_directory,
            work_directory=work,
            system_identifier=info.system_identifier,
            size=info.segment_size,
            chain=plan.chain,
            run_as=server.run_as,
            settings=settings.fetch,
        )
        await archive.start()
        try:
            replay = Replay(
                server,
                archive,
                target,
                plan.chain,
                settings.replay,
                work_directory=work,
                last_known=last_known(plan),
                on_progress=on_progress,
            )
            try:
                reached = await replay.run()
            except RecoveryStopped as error:
                kept = await asyncio.to_thread(_keep_log, server, replay.log_file)
                raise RestoreFailed(str(error).replace(str(replay.log_file), str(kept))) from error
        finally:
            await archive.close()
        await asyncio.to_thread(forget_recovery, server.data_directory)
    return Restored(info, reached)


def last_known(plan: Plan) -> Lsn | None:
    """Where the last whole segment of the archive begins: replay that ends before it has not seen all."""
    last = plan.window.reach.last
    if last is None or plan.window.chain != plan.chain:
        return None
    return plan.info.segment_size.start_lsn(last)


def _keep_log(server: LocalServer, log_file: Path) -> Path:
    kept = server.data_directory / LOG_FILE
    with kept.open("ab") as file:
        file.write(log_file.read_bytes() if log_file.exists() else b"")
    return kept


def forget_recovery(data_directory: Path) -> None:
    (data_directory / LOG_FILE).unlink(missing_ok=True)
    _unmark([data_directory, *(data_directory / "pg_tblspc").iterdir()])
    (data_directory / MARKER).unlink(missing_ok=True)


@asynccontextmanager
async def work_directory(server: LocalServer) -> AsyncIterator[Path]:
    """Of this one recovery; short enough for a socket's path, closed to everybody but Postgres's user and this one."""
    work = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="im-recovery-"))
    try:
        if server.run_as is not None:
            os.chown(work, server.run_as.uid, server.run_as.gid)
        yield work
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, work, ignore_errors=True))
