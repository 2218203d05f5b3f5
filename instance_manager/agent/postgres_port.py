"""Port: the local Postgres, its directory and the server on it, as `Database` uses them.

The real one is `installed_postgres`; the simulation has a model of Postgres's processes, logs and disks behind it. Each
call that waits has a deadline or belongs to an operation that is cancelled with its task. Errors: LocalPostgresError by
its subclasses, OSError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from instance_manager.config import Configuration
from instance_manager.core.quorum import SynchronousSet
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, WalEnd
from instance_manager.postgres.archive_commands import Allowed
from instance_manager.postgres.control_data import ControlData, HotStandbySettings
from instance_manager.postgres.directory import DirectoryReport
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.observation import PostgresObservation
from instance_manager.postgres.running import RunningServer


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """Whom to follow, under which promise."""

    holder: MemberId
    host: str
    port: int
    member_id: MemberId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class StartCommand:
    """What the supervisor executes."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


class LocalPostgres(Protocol):
    @property
    def major(self) -> int:
        """Of the installed programs."""
        ...

    @property
    def running(self) -> RunningServer: ...

    # The running server.

    async def observe(self, *, deadline_s: float) -> PostgresObservation:
        """Over a session that is kept. LocalPostgresError: no answer, or no good one."""
        ...

    def forget(self) -> None:
        """The kept session is of a server that ended, or is about to."""
        ...

    async def answers_new_connection(self, *, deadline_s: float) -> None: ...

    async def keep_slots(self, members: Collection[MemberId]) -> None:
        """Exactly these members' slots."""
        ...

    async def emit_message(self, *, deadline_s: float) -> None:
        """A record of our own that waits for nobody beyond its flush, for the walsenders to reply to."""
        ...

    async def create_roles(self) -> tuple[str, ...]: ...

    async def checkpoint(self, *, deadline_s: float) -> None: ...

    async def position(self, chain: TimelineChain, *, deadline_s: float) -> WalEnd:
        """See `postgres.voting.position`."""
        ...

    async def promote(
        self, chain: TimelineChain, relay: Callable[[], Awaitable[None]], *, deadline_s: float
    ) -> Timeline:
        """See `postgres.promotion.promote`: PromotionFailed, PromotedWrong."""
        ...

    async def histories(self) -> tuple[Timeline, ...]:
        """The timelines whose history files are in this directory, those that say nothing left out."""
        ...

    async def forget_dead_ends(self, chain: TimelineChain) -> None:
        """Of a stopped directory within the history; see `postgres.promotion.forget_dead_ends`."""
        ...

    async def fill_gaps(self, chain: TimelineChain) -> None:
        """Each number that the history skips has an empty history here; see `postgres.promotion.fill_gap`."""
        ...

    # The archive's commands; nothing to do where there is no archive.

    async def allow_archive(self, what: Allowed | None, *, deadline_s: float) -> None:
        """What archive_command and restore_command may do from now on. TimeoutError: the disk did not answer."""
        ...

    async def ask_to_archive_again(self, since: Lsn | None, *, deadline_s: float) -> None:
        """See `postgres.archive_commands.ask_again`. TimeoutError, OSError."""
        ...

    async def nothing_is_restored(self, postmaster_pid: int, *, deadline_s: float) -> None:
        """After `allow_archive(None)`: nothing comes from the archive any more, proven (P9). LocalPostgresError."""
        ...

    # Files.

    async def inspect(self) -> DirectoryReport: ...

    def inspect_at_start(self) -> DirectoryReport:
        """The same, blocking, before there is a loop."""
        ...

    async def control_data(self) -> ControlData: ...

    async def write_files(
        self, synchronous: SynchronousSet, access: Access, *, standby: bool, upstream: Upstream | None = None
    ) -> None:
        """All configuration, before a start; nobody is followed without `upstream`."""
        ...

    async def write_access(self, access: Access) -> None: ...

    async def written_access(self) -> Access | None:
        """The state of the gate by its file, whatever configuration its lines are of; None: the file is not there, or edited
        so that it cannot be told. What Postgres has loaded is another question."""
        ...

    async def set_standby_signal(self, standby: bool) -> None: ...

    async def prepare_start(self) -> StartCommand: ...

    def primary_settings(self, upstream: Upstream) -> str:
        """`primary_conninfo`."""
        ...

    async def replace_static(self, configuration: Configuration) -> tuple[str, ...]:
        """Take over a changed configuration; the names of parameters that need a restart. Nothing is reloaded yet."""
        ...

    def wanted_hot_standby(self) -> HotStandbySettings: ...

    # Stopped directories.

    async def initialise(self, on_progress: Callable[[str], None]) -> None: ...

    async def end_of_stopped(self, control: ControlData, chain: TimelineChain) -> WalEnd:
        """PositionUnknown; WalMissing: recovery needs more than there is."""
        ...

    async def shutdown_end(self, control: ControlData, chain: TimelineChain) -> WalEnd | str:
        """See `postgres.promotion.shutdown_end`; a reason where it is no clean end (P12)."""
        ...

    async def require_source(self, host: str, port: int, system_identifier: int, timeline: Timeline) -> None:
        """A primary of this system answers there, and has checkpointed on `timeline`. LocalPostgresError: why not."""
        ...

    async def clone(self, host: str, port: int, system_identifier: int, on_progress: Callable[[str], None]) -> None: ...

    async def make_from_archive(
        self, host: str, port: int, record: ClusterRecord, on_progress: Callable[[str], None]
    ) -> str:
        """In place of a clone of the primary there; what it was made from. NotMade (`recovering`): nothing was."""
        ...

    async def rewind(self, host: str, port: int, timeline: Timeline) -> str:
        """What came of it, for people."""
        ...

    async def set_aside(self) -> str:
        """Where the directory is now, for people."""
        ...


MakePostgres = Callable[[Callable[[], Awaitable[None]]], LocalPostgres]
"""Makes the port for a server that is reloaded by the given function."""

__all__ = ["DynamicSettings", "LocalPostgres", "MakePostgres", "StartCommand", "Upstream"]
