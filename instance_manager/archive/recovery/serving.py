"""restore_command of a recovery: the same client and the same fetcher as an archiver's, in the process that recovers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from instance_manager.archive import commands
from instance_manager.archive.archiver import SPOOL
from instance_manager.archive.codecs import CodecName
from instance_manager.archive.counters import ArchiverStatus
from instance_manager.archive.fetch import Fetched, Fetcher, FetchSettings, NotFetched
from instance_manager.archive.gate import ArchiveGate
from instance_manager.archive.layout import Layout
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.archive.server import ArchiverSocket
from instance_manager.archive.wal_names import SegmentSize, timeline_of, wal_kind
from instance_manager.core.types import Epoch, Lsn, Timeline, TimelineChain, TimelineSwitch
from instance_manager.ports import ObjectStore
from instance_manager.postgres.server import RunAs
from instance_manager.threads import monotonic_s


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
        self._fetcher = Fetcher(
            wal,
            wal / SPOOL,
            store,
            layout,
            orders,
            self.status.fetch,
            settings,
            gate=ArchiveGate(store, layout, codec, self.status),
        )
        self._server: ArchiverSocket | None = None
        self.ends_seen = 0
        """How often Postgres was told that a segment is not there, or got one of which only the beginning is."""

    def cut_at(self, lsn: Lsn) -> None:
        """From now on the history ends there, whatever comes into the archive meanwhile."""
        nobody = Timeline(self._chain.current + 1)
        cut = self._chain.forked(TimelineSwitch(nobody, self._chain.current, lsn, Epoch(0)))
        self._orders.take(replace(self._told, chain=cut))

    async def start(self) -> None:
        """OSError."""
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

    def restore_command(self) -> str:
        """Its value; copies the client. OSError; NoInterpreter."""
        client = commands.install_client(self._work_directory, self._run_as)
        return commands.restore_command(commands.interpreter(self._run_as), client, self._socket, "recovery")

    async def _fetch(self, words: list[str]) -> str:
        if len(words) != 3:
            return "failed fetch takes a mode, a name and a path"
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
        return "done" if answer is Fetched.PRESENT else "absent"
