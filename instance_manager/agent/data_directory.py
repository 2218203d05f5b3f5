"""The data directory itself, looked at and worked on while no server runs in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from instance_manager.agent.postgres_port import LocalPostgres
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Timeline, TimelineChain, WalEnd
from instance_manager.postgres.control_data import ControlData
from instance_manager.postgres.directory import DirectoryState
from instance_manager.postgres.wal_dump import PositionUnknown, WalMissing

log = logging.getLogger("instance_manager.agent.data_directory")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedFacts:
    """What is known of a directory on which no server runs."""

    exists: bool
    half_rewound: bool
    foreign: str | None
    system_identifier: str | None
    end: WalEnd | None
    needs: WalEnd | None = None
    """What recovery must reach and the log on this disk does not."""
    recovers_along: Timeline | None = None
    """The timeline of a read-write start: pg_control's. It lags behind the log while the end of a promotion is written."""
    histories: tuple[Timeline, ...] = ()
    """The timelines whose histories are there."""


class DataDirectory:
    """What it is was seen when this agent began, and is seen again at each verb."""

    def __init__(self, postgres: LocalPostgres) -> None:
        self._postgres = postgres
        self._report = postgres.inspect_at_start()

    @property
    def has_data(self) -> bool:
        return self._report.state in (
            DirectoryState.INITIALISED,
            DirectoryState.HALF_REWOUND,
            DirectoryState.FOREIGN,
        )

    @property
    def is_startable(self) -> bool:
        return self._report.state is DirectoryState.INITIALISED

    @property
    def is_half_rewound(self) -> bool:
        return self._report.state is DirectoryState.HALF_REWOUND

    async def wal_segment_bytes(self) -> int:
        """Of the data directory; the same for all of the cluster."""
        return (await self._postgres.control_data()).wal_segment_bytes

    async def initialise(self, on_progress: Callable[[str], None]) -> ControlData:
        await self._refresh_report()
        if self._report.state is not DirectoryState.INITIALISED:
            await self._postgres.initialise(on_progress)
        await self._refresh_report()
        return await self._postgres.control_data()

    async def stopped_facts(self, chain: TimelineChain | None) -> StoppedFacts:
        await self._refresh_report()
        report = self._report
        exists = report.state in (DirectoryState.INITIALISED, DirectoryState.HALF_REWOUND)
        foreign = report.reason if report.state is DirectoryState.FOREIGN else None
        if foreign is None and exists and report.major != self._postgres.major:
            foreign = f"it is of Postgres {report.major}, the programs are {self._postgres.major}"
        facts = StoppedFacts(
            exists=exists,
            half_rewound=report.state is DirectoryState.HALF_REWOUND,
            foreign=foreign,
            system_identifier=None,
            end=None,
        )
        if not exists or foreign is not None:
            return facts
        control = await self._postgres.control_data()
        facts = replace(
            facts,
            system_identifier=str(control.system_identifier),
            recovers_along=max(control.timeline, control.minimum_recovery_end_timeline),
            histories=await self._postgres.histories(),
        )
        if chain is None or facts.half_rewound:
            return facts
        try:
            end = await self._postgres.end_of_stopped(control, chain)
        except WalMissing as error:
            return replace(facts, needs=error.needed)
        except PositionUnknown as error:
            log.warning("the end of the stopped directory's log cannot be told: %s", error)
            return facts
        return replace(facts, end=end)

    async def shutdown_end(self, chain: TimelineChain | None) -> WalEnd | None:
        """Behind the shutdown checkpoint of a clean end on the claimed timeline (P12); None otherwise."""
        if chain is None:
            return None
        control = await self._postgres.control_data()
        end = await self._postgres.shutdown_end(control, chain)
        if isinstance(end, str):
            log.warning("no handover on this log: %s", end)
            return None
        return end

    async def require_source(self, host: str, port: int, system_identifier: str, timeline: Timeline) -> None:
        """Whoever is copied from is there to be copied from. LocalPostgresError: why not."""
        await self._postgres.require_source(host, port, int(system_identifier), timeline)

    async def clone(self, host: str, port: int, system_identifier: str, on_progress: Callable[[str], None]) -> None:
        await self._postgres.clone(host, port, int(system_identifier), on_progress)
        await self._refresh_report()

    async def make_from_archive(
        self, host: str, port: int, record: ClusterRecord, on_progress: Callable[[str], None]
    ) -> str:
        """What it was made from; see `LocalPostgres`."""
        told = await self._postgres.make_from_archive(host, port, record, on_progress)
        await self._refresh_report()
        return told

    async def rewind(self, host: str, port: int, timeline: Timeline) -> None:
        try:
            log.info("pg_rewind from %s:%s: %s", host, port, await self._postgres.rewind(host, port, timeline))
        finally:
            await self._refresh_report()

    async def set_aside(self) -> None:
        log.warning("the data directory was set aside as %s", await self._postgres.set_aside())
        await self._refresh_report()

    async def _refresh_report(self) -> None:
        self._report = await self._postgres.inspect()
