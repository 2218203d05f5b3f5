"""`/metrics` of this instance: its own state from memory, and the statistics of its Postgres."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from instance_manager import __version__
from instance_manager.agent.archiver_status import ArchiverAnswer
from instance_manager.agent.context import Context
from instance_manager.agent.health import DiskHealth
from instance_manager.config import Configuration
from instance_manager.core.archive_state import ArchiveState
from instance_manager.core.roles import Role
from instance_manager.metrics import process
from instance_manager.metrics.archive import TimeUntilFull, archive_blocks, state_blocks
from instance_manager.metrics.custom import load_all
from instance_manager.metrics.exposition import Block, Counter, Family, gauge, gauges, render
from instance_manager.metrics.postgres import Options
from instance_manager.postgres_log.relay import RelayCounts
from instance_manager.status import CertificateStatus

ROLES = tuple(role.value for role in Role)
ARCHIVE_BUDGET_S = 0.3
P = "instance_manager_"


class PostgresStatistics(Protocol):
    """What is asked of Postgres for a scrape."""

    async def collect(self, *, running: bool) -> list[Block]:
        """Soon, whatever Postgres does."""
        ...


def statistics_options(configuration: Configuration) -> Options:
    """QueriesUnusable: a file of custom queries."""
    me, section = configuration.me, configuration.metrics
    return Options(
        server_label=f"{me.host}:{me.postgres_port}",
        tables=section.tables,
        refresh_s=section.refresh_s,
        custom=load_all(section.queries),
    )


def certificate_blocks(certificates: Iterable[CertificateStatus]) -> list[Block]:
    """One series for each use; nothing without TLS."""
    told = tuple(certificates)
    return [
        gauges(
            f"{P}certificate_days_left",
            "Until the certificate that is used ends, in days.",
            "use",
            {each.use: each.days_left for each in told},
        ),
        gauges(
            f"{P}certificate_files_usable",
            "0: what is in the certificate's directory is not used, and an older one is.",
            "use",
            {each.use: each.problem is None for each in told},
        ),
    ]


def log_blocks(counts: RelayCounts) -> list[Block]:
    """Of Postgres's log on its way to standard output."""
    lines = Counter(f"{P}postgres_log_records_total", "Records of Postgres's log that were told on standard output.")
    lines.add(by=counts.lines)
    dropped = Counter(
        f"{P}postgres_log_records_dropped_total", "Records that nobody read in time, or that were too long."
    )
    dropped.add(by=counts.dropped)
    return [
        lines.block(),
        dropped.block(),
        gauge(f"{P}postgres_log_waiting_bytes", "What waits in the files of Postgres's log.", counts.waiting_bytes),
    ]


class InstanceMetrics:
    """`exposition` is one scrape. `archiver` asks the archiver for its status; None: no archive is configured.

    `archive`: what this agent knows of it anyway.
    """

    def __init__(
        self,
        context: Context,
        postgres: PostgresStatistics,
        disk: DiskHealth,
        *,
        archiver: Callable[[], Awaitable[ArchiverAnswer]] | None = None,
        archive: Callable[[], ArchiveState | None] = lambda: None,
        postgres_log: RelayCounts | None = None,
    ) -> None:
        self._c = context
        self._postgres = postgres
        self._disk = disk
        self._archiver = archiver
        self._archive_state = archive
        self._archiver_pid: int | None = None
        self._until_full = TimeUntilFull()
        self._postgres_log = postgres_log if postgres_log is not None else RelayCounts()

    async def exposition(self) -> bytes:
        """Both parts are asked at once, each with its own limit, so that the answer is there within a second."""
        archive, postgres = await asyncio.gather(
            self._archive(), self._postgres.collect(running=self._c.database.running)
        )
        return render([*self._blocks(), *archive, *postgres])

    def _permit_left_s(self) -> float:
        permit = self._c.link.permit
        return permit.soft_s - self._c.clock.now_s() if permit is not None and self._c.holds_lease else 0.0

    async def _archive(self) -> list[Block]:
        if self._archiver is None:
            return []
        try:
            async with asyncio.timeout(ARCHIVE_BUDGET_S):
                answer = await self._archiver()
        except (OSError, TimeoutError, EOFError):
            self._archiver_pid = None
            return archive_blocks(None)
        self._archiver_pid = answer.pid
        c = self._c
        state, taken, now_s = self._archive_state(), c.archiver.taken, c.clock.now_s()
        size_bytes = taken.wal_segment_bytes if taken is not None and taken.role == "primary" else None
        waiting_bytes = state.waiting * size_bytes if state is not None and size_bytes is not None else None
        return [
            *archive_blocks(answer.status, now_s),
            *state_blocks(state, size_bytes),
            self._until_full.block(now_s, waiting_bytes, self._disk.free_bytes),
        ]

    def _blocks(self) -> list[Block]:
        c = self._c
        return [
            gauge(f"{P}build_info", "1, with the version in a label.", 1, version=__version__),
            *self._lease(),
            *self._cluster(),
            *self._replication(),
            *self._local(),
            *certificate_blocks(c.certificates()),
            *log_blocks(self._postgres_log),
            *c.measures.blocks(),
            *process.own_process(),
        ]

    def _lease(self) -> list[Block]:
        c = self._c
        view = c.keeper.view()
        record = view.record
        permit_left_s = self._permit_left_s()
        held = c.holds_lease
        return [
            gauge(f"{P}lease_held", "1: this instance holds the Lease.", held),
            gauge(
                f"{P}lease_age_seconds",
                "Since this instance last saw the Lease change, in seconds.",
                view.read_age_s + view.unchanged_for_s if view.read else None,
            ),
            gauge(
                f"{P}lease_read_age_seconds",
                "Since the last answer to a read or write of the Lease.",
                view.read_age_s if view.read else None,
            ),
            gauge(
                f"{P}lease_readable",
                "1: the coordination store answers, and the Lease is sound.",
                c.keeper.last_error is None and view.damage is None and view.read,
            ),
            gauge(
                f"{P}lease_duration_seconds",
                "How long a candidate waits by time, as recorded.",
                record.lease_duration_s if record is not None else None,
            ),
            gauge(
                f"{P}seconds_to_fence",
                "Of a holder: until it stops Postgres unless it renews the Lease; 0 of others.",
                permit_left_s if held else 0,
            ),
            gauge(f"{P}epoch", "Epoch of the Lease.", record.epoch if record is not None else None),
            gauge(
                f"{P}promised_epoch", "Highest epoch that this instance has promised.", c.volume.state.promised_epoch
            ),
            gauge(f"{P}paused", "1: no failover until it is resumed.", record is not None and record.paused),
            gauge(
                f"{P}fenced",
                "1: a user keeps Postgres stopped here.",
                record is not None and c.configuration.name in record.fenced,
            ),
        ]

    def _cluster(self) -> list[Block]:
        c = self._c
        record = c.keeper.record
        views = c.peers.views()
        k, members = c.synchronous.k, c.synchronous.members
        primary = c.role is Role.PRIMARY
        needed = record.promises_needed if record is not None else None
        return [
            gauges(
                f"{P}role",
                "1 for the role of this instance, 0 for every other.",
                "role",
                {role: role == c.role.value for role in ROLES},
            ),
            gauge(
                f"{P}accepts_writes",
                "1: clients are let in, and may write.",
                primary and c.gate_open and self._permit_left_s() > 0,
            ),
            gauge(f"{P}peers", "Other instances of the cluster.", len(views)),
            gauges(
                f"{P}peer_reachable",
                "1: the peer's agent answers this one.",
                "peer",
                {name: view.answers for name, view in views.items()},
            ),
            gauge(
                f"{P}voters",
                "Instances that the Lease names as voters.",
                len(record.voters) if record is not None else None,
            ),
            gauge(
                f"{P}quorum",
                "q: voters that hold every acknowledged commit. 0: the primary goes on alone.",
                record.quorum if record is not None else None,
            ),
            gauge(
                f"{P}election_promises_needed",
                "Promises that an election needs; none where nobody can be elected.",
                needed,
            ),
            gauge(f"{P}synchronous_standbys_wanted", "Standbys that a commit shall be on.", c.wanted_k()),
            gauge(
                f"{P}synchronous_standbys_actual",
                "On the primary: standbys that a commit waits for now.",
                k if primary else None,
            ),
            gauge(
                f"{P}synchronous_candidates",
                "On the primary: standbys of which these may be any.",
                len(members) if primary else None,
            ),
        ]

    def _replication(self) -> list[Block]:
        c = self._c
        view = c.database.view()
        record = c.keeper.record
        end = view.end
        primary = c.role is Role.PRIMARY
        return [
            gauge(f"{P}postgres_running", "1: the postmaster runs.", view.running),
            gauge(f"{P}postgres_answers", "1: Postgres answers the agent.", view.answers),
            gauge(f"{P}timeline", "Timeline of the local log.", end.timeline if end is not None else None),
            gauge(
                f"{P}lsn_bytes",
                "End of the local log: flushed on a primary, received on a standby.",
                end.lsn if end is not None else None,
            ),
            gauge(
                f"{P}receiving",
                "Of a standby: 1 while it receives the log.",
                view.receiving if view.mode == "standby" else None,
            ),
            gauge(
                f"{P}replication_lag_bytes",
                "Of a standby: behind the last position that the primary told.",
                None if primary else c.database.seen.lag_bytes(record.position if record is not None else None),
            ),
            gauge(
                f"{P}replay_lag_bytes",
                "Of a standby: received and not yet replayed.",
                c.database.seen.replay_lag_bytes(),
            ),
            gauge(
                f"{P}not_receiving_seconds",
                "How long a standby that is told to follow has received nothing.",
                c.database.not_receiving_for_s(),
            ),
        ]

    def _local(self) -> list[Block]:
        c = self._c
        disk = self._disk
        restarts = Counter(f"{P}agent_restarts_total", "Times that the supervisor started an agent, but the first.")
        restarts.add(by=c.link.agent_restarts)
        reaped = Counter(f"{P}reaped_children_total", "Processes that the supervisor has reaped.")
        reaped.add(by=c.link.reaped)
        flush = Block(
            Family(f"{P}volume_fsync_seconds", "gauge", "How long the last probe's write and fsync took.", ("volume",))
        )
        if (took_s := getattr(disk, "flush_s", None)) is not None:
            flush.add(took_s, "instance")
        pids = {"agent": os.getpid(), "supervisor": os.getppid()}
        if self._archiver_pid is not None:
            pids["archiver"] = self._archiver_pid
        return [
            restarts.block(),
            reaped.block(),
            process.memory_of(pids),
            gauge(
                f"{P}volume_free_bytes",
                "What Postgres may still write on the volume.",
                disk.free_bytes,
                volume="instance",
            ),
            gauge(f"{P}volume_size_bytes", "Size of the volume.", getattr(disk, "size_bytes", None), volume="instance"),
            flush,
            gauge(
                f"{P}volume_probe_age_seconds",
                "Since the start of the last write and fsync that came back.",
                c.clock.now_s() - disk.last_good_s,
                volume="instance",
            ),
            gauge(f"{P}healthy", "1: there is fresh proof that disk and Postgres work.", c.health.unhealthy() is None),
        ]
