"""A standby's data directory from an archive: the files of a backup, replay without opening, shut down.

It ends within the cluster's accepted history, like a copy of the primary, and is judged like any directory before it follows. The
archive is only read. Whatever goes wrong, the caller removes the directory and copies the primary.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from instance_manager.archive.commands import NoInterpreter
from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.recovery.joining import Joining
from instance_manager.archive.recovery.replay import RecoveryStopped, Replay, ReplaySettings
from instance_manager.archive.recovery.replica_choice import Archive, Choice, Fork
from instance_manager.archive.recovery.replica_request import ReplicaRequest
from instance_manager.archive.recovery.restore import (
    RestoreFailed,
    RestoreSettings,
    forget_recovery,
    last_known,
    restore_files,
    work_directory,
)
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.recovery.target import Target
from instance_manager.archive.stores.patience import Patience
from instance_manager.core.types import Lsn, TimelineChain, format_lsn
from instance_manager.ports import ObjectStoreError
from instance_manager.postgres.histories import history_file_name, timelines_with_history
from instance_manager.postgres.server import LocalPostgresError, LocalServer

# The primary is there to copy from: a store that fails is not waited for as where it is all that there is.
FILES = Patience(total_s=6 * 3600.0, attempt_s=6 * 3600.0, attempts_max=4)
SEGMENTS = Patience(total_s=30.0, attempt_s=20.0, attempts_max=6)
OUTAGE_PATIENCE_S = 60.0
LOG_LINES_TOLD = 20


async def make_replica(
    server: LocalServer,
    choice: Choice,
    request: ReplicaRequest,
    *,
    on_progress: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str], None] = lambda _: None,
    settings: RestoreSettings | None = None,
) -> Lsn:
    """Into `server.data_directory`, which must be empty, and the places of its tablespaces (`make_places`); how far it was replayed.

    RestoreFailed, and `on_failure` gets the last lines of Postgres's log. Cancelled, it stops Postgres first.
    """
    how = settings or RestoreSettings(
        parallel=choice.parallel,
        patience=FILES,
        fetch=FetchSettings(recovery=SEGMENTS, parallel=choice.parallel),
        replay=ReplaySettings(outage_patience_s=OUTAGE_PATIENCE_S),
    )
    on_progress(f"restoring {choice}")
    try:
        plan, archive = choice.plan, choice.archive
        how = replace(how, tablespaces=choice.tablespaces)
        await restore_files(server, archive.store, archive.layout, Target(), how, plan, on_progress)
        reached = await _replay(server, choice, request, how, on_progress, on_failure)
        if choice.fork is not None:
            if reached != choice.fork.lsn:
                raise RestoreFailed(
                    f"replay ended at {format_lsn(reached)}, and not at {format_lsn(choice.fork.lsn)}, where this cluster left its source"
                )
            await _join(server, choice, choice.fork, request, how, on_progress, on_failure)
        await asyncio.to_thread(_finish, server, request.chain)
    except (ObjectStoreError, LocalPostgresError, OSError, RecoveryStopped, NoInterpreter) as error:
        raise RestoreFailed(str(error)) from error
    return reached


async def _replay(
    server: LocalServer,
    choice: Choice,
    request: ReplicaRequest,
    how: RestoreSettings,
    on_progress: Callable[[str], None],
    on_failure: Callable[[str], None],
) -> Lsn:
    plan = choice.plan
    async with (
        work_directory(server) as work,
        _serving(server, work, choice, choice.archive, plan.chain, how) as archive,
    ):
        if choice.fork is not None:
            archive.cut_at(choice.fork.lsn)
        replay = Replay(
            server,
            archive,
            Target(),
            plan.chain,
            how.replay,
            work_directory=work,
            last_known=last_known(plan) if choice.fork is None else None,
            # What the primary writes meanwhile it streams.
            enough=request.position if choice.fork is None else None,
            on_progress=on_progress,
        )
        try:
            return await replay.run_without_opening()
        except RecoveryStopped as error:
            _tell_log(replay.log_file, on_failure)
            raise RestoreFailed(str(error).removesuffix(f"; see {replay.log_file}")) from error


async def _join(
    server: LocalServer,
    choice: Choice,
    fork: Fork,
    request: ReplicaRequest,
    how: RestoreSettings,
    on_progress: Callable[[str], None],
    on_failure: Callable[[str], None],
) -> None:
    async with AsyncExitStack() as stack:
        work = await stack.enter_async_context(work_directory(server))
        own = None
        if choice.own is not None:
            # The source's last segment is only here.
            own = await stack.enter_async_context(
                _serving(server, work, choice, choice.own, request.chain, how, holds_all=False)
            )
        joining = Joining(
            server,
            fork,
            primary_conninfo=request.primary_conninfo,
            own=own,
            work_directory=work,
            on_progress=on_progress,
        )
        try:
            await joining.run()
        except RecoveryStopped:
            _tell_log(joining.log_file, on_failure)
            raise


@asynccontextmanager
async def _serving(
    server: LocalServer,
    work: Path,
    choice: Choice,
    archive: Archive,
    chain: TimelineChain,
    how: RestoreSettings,
    *,
    holds_all: bool = True,
) -> AsyncIterator[RecoveryArchive]:
    info = choice.plan.info
    made = RecoveryArchive(
        archive.store,
        archive.layout,
        data_directory=server.data_directory,
        work_directory=work,
        system_identifier=info.system_identifier,
        size=info.segment_size,
        chain=chain,
        run_as=server.run_as,
        settings=how.fetch,
        holds_all=holds_all,
    )
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def _tell_log(log_file: Path, on_failure: Callable[[str], None]) -> None:
    """The directory does not outlive this."""
    lines = log_file.read_text(errors="replace").splitlines() if log_file.exists() else []
    for line in lines[-LOG_LINES_TOLD:]:
        on_failure(line)


def _finish(server: LocalServer, chain: TimelineChain) -> None:
    forget_recovery(server.data_directory)
    wal = server.data_directory / "pg_wal"
    for timeline in timelines_with_history(wal):
        # What was before the cluster is in its own first history too; beside it, it would be a dead end (P4).
        if not chain.knows(timeline):
            (wal / history_file_name(timeline)).unlink()
