"""restore_command of a recovery: the same client and the same fetcher as an archiver's, in the process that recovers.

Whole segments ahead of need lie in pg_wal before Postgres asks for them (`placing`); histories, the first segment after a
start, what is cut at a fork, and the end of the archive it gets from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from instance_manager.archive import commands
from instance_manager.archive.archiver import SPOOL
from instance_manager.archive.codecs import CodecName
from instance_manager.archive.counters import ArchiverStatus
from instance_manager.archive.fetch import Fetched, Fetcher, FetchSettings, NotFetched
from instance_manager.archive.gate import ArchiveGate
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.archive.recovery.placing import InPgWal
from instance_manager.archive.server import ArchiverSocket
from instance_manager.archive.wal_names import SegmentSize, timeline_of, wal_kind
from instance_manager.core.types import Epoch, Lsn, Timeline, TimelineChain, TimelineSwitch
from instance_manager.ports import ObjectStore
from instance_manager.postgres.server import RunAs
from instance_manager.threads import monotonic_s

NICENESS = 5
"""Where processors are few what comes ahead gives way to the one process that replays, which is what is waited for."""
RETURNS_TO_BELIEVE = 5
"""So often Postgres must have come back to a segment that it has. It does so once by itself, from the backup's checkpoint to its begin."""


@dataclass(slots=True)
class _Asked:
    """The order in which a Postgres has asked for segments since its start, those included that it found in place."""

    last: str = ""
    furthest: str = ""
    returns: int = 0
    """How often it went back, or asked for the same again, since it came to the furthest."""
    ends: int = 0
    """How often it was told since then that there is no more."""

    def note(self, name: str) -> None:
        if name > self.furthest:
            self.furthest, self.returns, self.ends = name, 0, 0
        else:
            self.returns += name <= self.last
        self.last = name


class RecoveryArchive:
    """Answers Postgres from one history of the archive. It can only read: nothing is ever written to the archive."""

    def __init__(
        self,
        store: ObjectStore,
        layout: Layout,
        *,
        data_directory: Path,
        work_directory: Path,
        system_identifier: str,
        size: SegmentSize,
        chain: TimelineChain,
        run_as: RunAs | None,
        settings: FetchSettings,
    ) -> None:
        self.segment_bytes = size.size_bytes
        self._socket = work_directory / "archive.sock"
        self._run_as = run_as
        self._work_directory = work_directory
        self.status = ArchiverStatus()
        orders = self._orders = OrderBook(monotonic_s)
        self._chain = chain
        self._told = Orders(
            role="standby",
            epoch=Epoch(0),
            cluster_uid="recovery",
            system_identifier=system_identifier,
            wal_segment_bytes=size.size_bytes,
            chain=chain,
        )
        orders.take(self._told)
        codec: CodecName = "none"  # only for what is written
        wal = data_directory / "pg_wal"
        self._place = InPgWal(wal, work_directory, size, run_as)
        self._fetcher = Fetcher(
            wal,
            wal / SPOOL,
            store,
            layout,
            orders,
            self.status.fetch,
            settings,
            gate=ArchiveGate(store, layout, codec, self.status),
            place=self._place,
            niceness=NICENESS,
        )
        self._server: ArchiverSocket | None = None
        self.ends_seen = 0
        """How often Postgres was told that a segment is not there, or got one of which only the beginning is."""
        self._asked = _Asked()

    def cut_at(self, lsn: Lsn) -> None:
        """From now on the history ends there, whatever comes into the archive meanwhile."""
        nobody = Timeline(self._chain.current + 1)
        cut = self._chain.forked(TimelineSwitch(nobody, self._chain.current, lsn, Epoch(0)))
        self._orders.take(replace(self._told, chain=cut))

    async def start(self) -> None:
        """OSError."""
        self._place.start(self._take_note)
        self._server = ArchiverSocket(
            self._socket,
            {"fetch": self._fetch},
            postgres_uid=None if self._run_as is None else self._run_as.uid,
            ended_with_client=frozenset({"fetch"}),
        )
        await self._server.start()

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()
        await self._fetcher.close()
        self._place.close()

    async def before_postgres_starts(self) -> None:
        """What was placed for the last one counts no more. OSError."""
        await self._fetcher.look_ahead(True)
        self._place.renew()
        self._asked = _Asked()

    async def before_it_opens(self) -> None:
        """Nothing is placed any more, and what Postgres has not asked for is removed: it is not of what comes now."""
        await self._fetcher.look_ahead(False)

    def restore_command(self) -> str:
        """Its value; copies the client. OSError; NoInterpreter."""
        client = commands.install_client(self._work_directory, self._run_as)
        asking = commands.restore_command(commands.interpreter(self._run_as), client, self._socket, "recovery")
        return commands.where_placed(self._place.markers, self._place.bell, asking)

    @property
    def unreadable(self) -> str | None:
        """The segment for which Postgres comes back again and again, although it has it whole: a record in it, or one that goes on in
        the next, cannot be read."""
        asked = self._asked
        return asked.last if asked.ends == 0 and asked.returns >= RETURNS_TO_BELIEVE else None

    def _take_note(self) -> None:
        for name in self._fetcher.go_on():
            self._asked.note(name)

    async def _fetch(self, words: list[str]) -> str:
        if len(words) != 3:
            return "failed fetch takes a mode, a name and a path"
        self._take_note()  # what the shell has answered is from before this question
        if wal_kind(words[1]) == "segment":
            self._asked.note(words[1])
        if wal_kind(words[1]) == "history" and timeline_of(words[1]) > self._chain.current:
            return "absent"
        joined, cut = self.status.fetch.joined_tails, self.status.fetch.cut_at_fork
        try:
            answer = await self._fetcher.fetch("recovery", words[1], Path(words[2]))
        except NotFetched as error:
            return f"failed {error}"
        is_cut_here = self.status.fetch.cut_at_fork > cut and words[1].startswith(f"{self._chain.current:08X}")
        if (
            is_cut_here
            or self.status.fetch.joined_tails > joined
            or (answer is Fetched.ABSENT and wal_kind(words[1]) == "segment")
        ):
            self.ends_seen += 1
            self._asked.ends += 1
        return "done" if answer is Fetched.PRESENT else "absent"
