"""pg_rewind and pg_basebackup over the network, and what else is done to a stopped directory.

Both take their time; when they are cut off they leave a half-rewound directory, or a leftover beside it.

Left out: tablespaces, WAL that the source no longer has, and single-user recovery before a rewind, except for what
it writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from simulated_running import ASKS_AGAIN_S, Access
from simulated_server import PostgresServer
from simulated_streaming import CHANNEL
from simulated_volume import DataDirectory
from simulated_wal import Line, line_of

from instance_manager.core.types import Timeline
from instance_manager.postgres.clone import CloneRefused
from instance_manager.postgres.control_data import ClusterState
from instance_manager.postgres.directory import DirectoryRefused
from instance_manager.postgres.rewind import RewindFailed, RewindOutcome, SourceNotReady
from instance_manager.postgres.server import ProgramFailed

STEPS = 5
SOURCE_DEADLINE_S = 10.0
NO_PROGRESS_S = 60.0


class Source:
    """A running member to copy from, as far as the network lets it be reached."""

    def __init__(self, access: Access, host: str) -> None:
        self._access = access
        self._host = host

    def reachable(self) -> PostgresServer | None:
        """None: silence. ConnectionRefusedError: nobody takes the connection."""
        cluster = self._access.volume.cluster
        own = self._access.instance.host.name
        if cluster.network.is_blocked(own, self._host, CHANNEL) or cluster.network.is_blocked(self._host, own, CHANNEL):
            return None
        server = cluster.servers.get(self._host)
        if server is None or not server.ready or server.stopping or not server.postmaster.alive:
            raise ConnectionRefusedError(self._host)
        return None if server.postmaster.paused or server.process.held else server

    async def connected(self, deadline_s: float) -> PostgresServer | None:
        for _ in range(int(deadline_s / ASKS_AGAIN_S)):
            server = self.reachable()
            if server is not None:
                return server
            await asyncio.sleep(ASKS_AGAIN_S)
        return None

    async def copy(self, on_step: Callable[[int], None]) -> PostgresServer:
        """The time that copying takes. ConnectionError: it broke."""
        cluster = self._access.volume.cluster
        server = self.reachable()
        step_s = cluster.draw(cluster.behaviour.copy_s) / STEPS
        for step in range(STEPS):
            await asyncio.sleep(step_s)
            now = await self.connected(NO_PROGRESS_S)
            if now is None or (server is not None and now is not server):
                raise ConnectionError("the connection broke")
            server = now
            await self._access.write_file()
            on_step(step)
        if cluster.chance(cluster.behaviour.copy_fails, "a clone or a rewind failed on its way"):
            raise ConnectionError("the connection broke")
        assert server is not None
        return server


async def clone(
    access: Access, host: str, port: int, system_identifier: int, on_progress: Callable[[str], None]
) -> None:
    """`postgres.clone.clone`. The copy has the WAL up to the backup's end, and has to replay to there."""
    volume = access.volume
    await access.write_file()
    volume.leftovers = 0
    if volume.data is not None or volume.foreign:
        raise DirectoryRefused("the place is taken")
    source = Source(access, host)
    # A process that is killed leaves it behind.
    volume.leftovers += 1
    try:
        server = await source.copy(
            lambda step: on_progress(f"cloning from {host}:{port}: {100 * (step + 1) // STEPS} % of 1 MiB")
        )
    except ConnectionError as error:
        volume.leftovers -= 1
        raise ProgramFailed(["pg_basebackup"], 1, str(error)) from error
    if server.data.system_identifier != system_identifier:
        volume.leftovers -= 1
        raise CloneRefused(f"{host}:{port} is of system {server.data.system_identifier}, not {system_identifier}")
    end = server.sendable_end() if not server.in_recovery else server.startup.advance()
    copy = server.data.copy_of(end)
    copy.minimum_recovery = (copy.log.entries[-1].timeline, copy.log.end)
    copy.state = ClusterState.IN_ARCHIVE_RECOVERY
    volume.data = copy
    volume.leftovers -= 1
    volume.rewind_attempts = 0


async def ready_source(
    access: Access, host: str, port: int, system_identifier: int, timeline: Timeline
) -> PostgresServer:
    """`postgres.rewind.require_ready`."""
    try:
        server = await Source(access, host).connected(SOURCE_DEADLINE_S)
    except ConnectionRefusedError as error:
        raise SourceNotReady(f"{host}:{port}: connection refused") from error
    if server is None:
        raise SourceNotReady(f"{host}:{port}: no answer within {SOURCE_DEADLINE_S:g} s")
    if server.data.system_identifier != system_identifier:
        raise DirectoryRefused(f"{host}:{port} is of another system")
    if server.in_recovery or server.data.timeline != timeline:
        raise SourceNotReady(f"{host}:{port} has not checkpointed on {timeline}")
    return server


async def rewind(access: Access, host: str, port: int, timeline: Timeline) -> RewindOutcome:
    """`postgres.rewind.rewind`. Afterwards recovery must reach where the source was at the end, and WAL may lack."""
    volume = access.volume
    await access.read_file()
    data = volume.data
    if data is None or volume.foreign:
        raise DirectoryRefused("there is no data directory")
    source = Source(access, host)
    server = await ready_source(access, host, port, data.system_identifier, timeline)
    await access.write_file()
    volume.rewind_attempts += 1
    attempts = volume.rewind_attempts
    # WAL is copied like any file, as it is while copying; the minimum is where the source is at the end.
    copied = server.sendable_end()
    if not _is_needed(data, server.data, timeline, attempts):
        data.standby_signal = True
        volume.rewind_attempts = 0
        return RewindOutcome.NOT_NEEDED
    volume.cluster.on_destroying(volume, "rewinding")
    data.standby_signal = False
    volume.torn = True
    try:
        after = await source.copy(lambda _: None)
    except ConnectionError as error:
        raise RewindFailed(str(error), attempts) from error
    if after is not server or after.in_recovery:
        raise RewindFailed("the source changed", attempts)
    rewound = server.data.copy_of(copied)
    rewound.minimum_recovery = (server.timeline, server.data.log.end)
    rewound.state = ClusterState.IN_ARCHIVE_RECOVERY
    volume.data = rewound
    volume.torn = False
    volume.rewind_attempts = 0
    return RewindOutcome.REWOUND


def _is_needed(target: DataDirectory, source: DataDirectory, timeline: Timeline, attempts: int) -> bool:
    """By pg_control and the histories only: pg_rewind compares no records, and on one timeline it needs nothing (P4, P11)."""
    minimum = target.minimum_recovery
    own = max(target.timeline, minimum[0] if minimum is not None else Timeline(0))
    if own == timeline:
        return False
    fork = _fork(line_of(target.histories, own), line_of(source.histories, timeline))
    if fork is None:
        raise RewindFailed("could not find common ancestor of the source and target cluster's timelines", attempts)
    # A primary that was not shut down is, by single-user mode, which writes a checkpoint behind whatever there is.
    crashed = target.state not in (ClusterState.SHUT_DOWN, ClusterState.SHUT_DOWN_IN_RECOVERY)
    return crashed or target.log.end > fork


def _fork(one: Line, other: Line) -> int | None:
    """findCommonAncestorTimeline: where two lines of timelines part; None: they have nothing in common."""
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    if common == 0:
        return None
    ends = [line[common][1] for line in (one, other) if common < len(line)]
    return min(ends)
