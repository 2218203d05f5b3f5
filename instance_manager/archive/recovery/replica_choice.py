"""Is there a backup in an archive from which a standby is better made than by a copy of the primary? Little is read to tell.

| archive | what of it | up to where |
|---|---|---|
| the cluster's own | a backup within the accepted history, and the log behind it | its end |
| that from which the cluster was recovered | a backup of the history before, and the log behind it | where this cluster left that history, and never past it |

The first has less to replay where both would do. The second needs what this cluster wrote first too: the segment of the fork, from the
primary or from the cluster's own archive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from instance_manager.archive.backup.catalogue import Listed, chain_of, is_part_of, list_backups, window_of
from instance_manager.archive.codecs import Codec
from instance_manager.archive.layout import Layout
from instance_manager.archive.lineage import ForeignArchive, Lineage, read_lineage
from instance_manager.archive.recovery.origin import Origin
from instance_manager.archive.recovery.replica_places import places_for, younger_places
from instance_manager.archive.recovery.replica_request import ReplicaRequest
from instance_manager.archive.recovery.restore import LIST_DEADLINE_S, Plan, RestoreFailed
from instance_manager.archive.tail import chain_from_history, chain_of_archive, histories_in
from instance_manager.archive.where import make_store
from instance_manager.config import Configuration
from instance_manager.config_sections import ArchiveSection, RecoverySection
from instance_manager.core.types import Lsn, Timeline, TimelineChain, format_lsn
from instance_manager.ports import ObjectStore, ObjectStoreError
from instance_manager.postgres.histories import HistoryInvalid, parse_history

SMALL_BYTES = 1 << 30
"""A cluster below this is copied from its primary before an archive has been looked through."""
LOG_PER_SIZE = 0.5
"""Of the cluster's size so much log is replayed at most: each byte of it costs more time than one that is copied, but none of the primary's."""
GAP_PAUSE_S = 10.0
"""Segments are archived in parallel: one that is missing beside later ones may be there in a moment."""


class NotFromArchive(Exception):
    """The primary is the better source, or the only one; says why. Nothing was begun."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One of the two."""

    store: ObjectStore
    layout: Layout
    lineage: Lineage | None


@dataclass(frozen=True, slots=True)
class Fork:
    """Where the cluster left the history of its source."""

    lsn: Lsn
    timeline: Timeline
    """The cluster's first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A backup that will do."""

    archive: Archive
    parallel: int
    plan: Plan
    fork: Fork | None = None
    """None: the archive is the cluster's own."""
    own: Archive | None = None
    """For what comes behind the fork; None: there is none, or it is not this cluster's."""
    tablespaces: dict[str, Path]
    """Where each of the backup's is to be, by name."""
    younger: dict[str, Path]
    """Where the log may make others."""
    log_bytes: int
    size_bytes: int | None
    """Of the cluster; None: barman-cloud did not tell."""

    def __str__(self) -> str:
        whose = "the source's archive" if self.fork is not None else "this cluster's archive"
        size = "unknown size" if self.size_bytes is None else f"{self.size_bytes >> 20} MiB"
        return f"backup {self.plan.info.backup_id} of {whose} ({size}, and {self.log_bytes >> 20} MiB of log to replay)"


def require_cheaper(choice: Choice) -> None:
    """NotFromArchive: by its size, or by the log that would have to be replayed."""
    size_bytes = choice.size_bytes
    if size_bytes is None:
        raise NotFromArchive(f"{choice}: whether that is cheaper than a copy cannot be told")
    if size_bytes < SMALL_BYTES:
        raise NotFromArchive(f"{choice}: below {SMALL_BYTES >> 20} MiB a copy of the primary is cheaper")
    if choice.log_bytes > size_bytes * LOG_PER_SIZE:
        raise NotFromArchive(f"{choice}: for so much log a copy of the primary is cheaper")


async def choose(configuration: Configuration, request: ReplicaRequest, stack: AsyncExitStack) -> Choice:
    """NotFromArchive, with what is in the way of each archive; RestoreFailed: one of them could not be looked at. The stores are closed
    with `stack`."""
    section, recovery = configuration.archive, configuration.bootstrap.recovery
    reasons: list[str] = []
    is_away = False
    own: Archive | None = None
    if section is not None:
        try:
            own = await _own(section, configuration.cluster.name, request, stack)
            return await _from_own(own, section.parallel, request)
        except (NotFromArchive, ObjectStoreError, ForeignArchive) as error:
            reasons.append(f"this cluster's archive: {error}")
            is_away = isinstance(error, ObjectStoreError)
    if recovery is not None:
        try:
            source = await _open(recovery.archive, recovery.archive.server_name or "", stack)
            return await _from_source(source, own, recovery, request)
        except (NotFromArchive, ObjectStoreError, ForeignArchive) as error:
            reasons.append(f"the source's archive: {error}")
            is_away = is_away or isinstance(error, ObjectStoreError)
    if is_away:
        raise RestoreFailed("; ".join(reasons))
    raise NotFromArchive("; ".join(reasons) or "there is no archive")


async def _open(section: ArchiveSection, server_name: str, stack: AsyncExitStack) -> Archive:
    store = make_store(section)
    stack.push_async_callback(store.close)
    lineage = await read_lineage(store, Layout(server_name, Codec(section.codec)), deadline_s=LIST_DEADLINE_S)
    codec = section.codec if lineage is None else lineage.codec
    return Archive(store, Layout(server_name, Codec(codec)), lineage)


async def _own(section: ArchiveSection, cluster: str, request: ReplicaRequest, stack: AsyncExitStack) -> Archive:
    archive = await _open(section, section.server_name or cluster, stack)
    lineage = archive.lineage
    if lineage is None:
        raise NotFromArchive("nothing was archived yet")
    if (lineage.system_identifier, lineage.cluster_uid) != (request.system_identifier, request.cluster_uid):
        # A source and its copy go on with the same timeline numbers and positions: no check of a segment would tell.
        raise NotFromArchive(f"{archive.layout.server} is of the cluster with uid {lineage.cluster_uid}")
    chain = request.chain
    if chain.switches and chain.current not in await histories_in(
        archive.store, archive.layout, deadline_s=LIST_DEADLINE_S
    ):
        raise NotFromArchive(f"the history of timeline {chain.current} is not archived yet")
    return archive


async def _from_own(own: Archive, parallel: int, request: ReplicaRequest) -> Choice:
    plan = await _plan(own, request, request.chain, lambda _: True)
    return Choice(
        archive=own,
        parallel=parallel,
        plan=plan,
        tablespaces=places_for(plan.info, request, {}),
        younger=younger_places(plan.info, request),
        log_bytes=max(0, (request.position or plan.info.begin_lsn) - plan.info.begin_lsn),
        size_bytes=_size_bytes(plan.backup),
    )


async def _from_source(
    source: Archive, own: Archive | None, recovery: RecoverySection, request: ReplicaRequest
) -> Choice:
    chain, fork = _before(request)
    _require_origin(source, request)
    if chain != await chain_of_archive(source.store, source.layout, timeline=chain.current, deadline_s=LIST_DEADLINE_S):
        raise NotFromArchive(f"its history of timeline {chain.current} is not the one that this cluster came along")
    plan = await _plan(source, request, chain, lambda end_lsn: end_lsn <= fork.lsn)
    size = plan.info.segment_size
    if not request.keeps_fork:
        name = size.name(size.containing(fork.timeline, fork.lsn))
        found = own and await own.store.info(own.layout.wal(name), deadline_s=LIST_DEADLINE_S)
        if not found:
            raise NotFromArchive(f"{name}, with which this cluster begins, the primary does not keep any more")
    behind = max(0, (request.position or fork.lsn) - fork.lsn)
    return Choice(
        archive=source,
        parallel=recovery.archive.parallel,
        plan=plan,
        fork=fork,
        own=own,
        tablespaces=places_for(plan.info, request, recovery.tablespaces),
        younger=younger_places(plan.info, request),
        log_bytes=fork.lsn - plan.info.begin_lsn + behind,
        size_bytes=_size_bytes(plan.backup),
    )


def _before(request: ReplicaRequest) -> tuple[TimelineChain, Fork]:
    """The source's history as far as this cluster came along it. NotFromArchive: it began with itself."""
    first = request.chain.first
    try:
        parents = parse_history(first, request.history)
    except HistoryInvalid as error:
        raise NotFromArchive(str(error)) from error
    if not parents:
        raise NotFromArchive("this cluster was not recovered from an archive")
    parent, lsn = parents[-1]
    return chain_from_history(parent, parents[:-1]), Fork(lsn, first)


def _require_origin(source: Archive, request: ReplicaRequest) -> None:
    uid = "" if source.lineage is None else source.lineage.cluster_uid
    if request.origin is None:
        raise NotFromArchive("the primary's directory does not tell which archive it was recovered from")
    if request.origin != Origin(source.layout.server, uid):
        raise NotFromArchive(
            f"this cluster was recovered from {request.origin.server_name}, of the cluster with uid {request.origin.cluster_uid}, "
            f"not from {source.layout.server} with uid {uid}"
        )


async def _plan(
    archive: Archive, request: ReplicaRequest, chain: TimelineChain, reaches: Callable[[Lsn], bool]
) -> Plan:
    """The newest sound backup of the history of which `reaches` takes the end. NotFromArchive; ObjectStoreError."""
    listed = await list_backups(archive.store, archive.layout, deadline_s=LIST_DEADLINE_S)
    fitting = [each for each in listed if _is_fit(each, request, chain, reaches)]
    if not fitting:
        raise NotFromArchive(f"of its {len(listed)} backups none is sound and of this cluster's history")
    chosen = max(fitting, key=lambda each: (each.info.end_lsn or 0, each.backup_id) if each.info else (0, ""))
    info = chosen.info
    assert info is not None  # noqa: S101 - _is_fit has looked
    window = await window_of(archive.store, archive.layout, info, chain=chain, deadline_s=LIST_DEADLINE_S)
    last = window.reach.last
    if last is None or last.number < info.end_segment.number:
        raise NotFromArchive(f"of the log that makes backup {info.backup_id} consistent some is gone")
    if window.reach.missing is not None:
        before = window.reach.missing
        await asyncio.sleep(GAP_PAUSE_S)
        window = await window_of(archive.store, archive.layout, info, chain=chain, deadline_s=LIST_DEADLINE_S)
        missing = window.reach.missing
        if missing == before and reaches(info.segment_size.end_lsn(before)):
            raise NotFromArchive(
                f"the log behind backup {info.backup_id} has a gap at {info.segment_size.name(before)} "
                f"({format_lsn(info.segment_size.start_lsn(before))})"
            )
    return Plan(chosen, info, chain, window, chain_of(listed, chosen))


def _is_fit(listed: Listed, request: ReplicaRequest, chain: TimelineChain, reaches: Callable[[Lsn], bool]) -> bool:
    info = listed.info
    return (
        listed.state == "done"
        and info is not None
        and info.end_lsn is not None
        and (info.system_identifier, info.major) == (request.system_identifier, request.major)
        and is_part_of(info, chain)
        and reaches(info.end_lsn)
    )


def _size_bytes(backup: Listed) -> int | None:
    """Of an incremental one, what it stands on included."""
    if backup.manifest is not None and backup.manifest.whole_bytes is not None:
        return backup.manifest.whole_bytes
    return backup.info.size_bytes if backup.info is not None else None
