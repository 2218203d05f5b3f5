"""restore_command of a recovery: the same client and the same fetcher as an archiver's, in the process that recovers.

Whole segments ahead of need lie in pg_wal before Postgres needs them (`placing`). While they follow one another, and more
are coming, Postgres is to *read alone*: its restore_command is empty, and it waits where the next one is not there yet. For all else
it asks: histories, the first segments after a start, what is cut at a fork, what could not be brought or read, the end of the archive.
To read alone is never wrong, since in pg_wal there is nothing else; but only who asks learns that there is no more, or why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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

log = logging.getLogger("instance_manager.archive.recovery")

NICENESS = 5
"""Where processors are few what comes ahead gives way to the one process that replays, which is what is waited for."""
RETURNS_TO_BELIEVE = 5
"""So often Postgres must have come back to a segment that it has. It does so once by itself, from the backup's checkpoint to its begin."""
STUCK_S = 2.0
"""So long Postgres may leave a segment that is in place, before it is told to ask. Where replay is that slow a question costs nothing."""


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


class _Row:
    """How far the segments that Postgres has got follow one another."""

    def __init__(self, size: SegmentSize) -> None:
        self._size = size
        self._last = ""
        self._is_followed = False
        """The one before the last was the one before it."""
        self._stuck_at = ""
        self._since_s = 0.0

    def got(self, name: str) -> None:
        self._is_followed = name == self._behind_last
        self._last, self._since_s = name, monotonic_s()

    def ends(self) -> None:
        """It has got something else, or nothing."""
        self._last, self._is_followed = "", False

    def is_stuck(self) -> None:
        """The row begins again behind the last one."""
        self._stuck_at = self._last
        self.ends()

    @property
    def next(self) -> str:
        """What it will want to read; empty: that is not certain."""
        return self._behind_last if self._is_followed and self._last > self._stuck_at else ""

    @property
    def waiting_s(self) -> float:
        return monotonic_s() - self._since_s

    @property
    def _behind_last(self) -> str:
        return self._size.next_name(self._last) if self._last else ""


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
        holds_all: bool = True,
    ) -> None:
        """`holds_all`: there is nothing in pg_wal that is not in this archive. Then it is emptied before each start, and may be read
        without asking; else what is there stays, and Postgres asks for each segment."""
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
        self._place = InPgWal(wal, size, run_as) if holds_all else None
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
        self._size = size
        self._row = _Row(size)
        self.reads_alone = False
        """Postgres is to have an empty restore_command."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when `reads_alone` has changed."""

    def cut_at(self, lsn: Lsn) -> None:
        """From now on the history ends there, whatever comes into the archive meanwhile."""
        nobody = Timeline(self._chain.current + 1)
        cut = self._chain.forked(TimelineSwitch(nobody, self._chain.current, lsn, Epoch(0)))
        self._orders.take(replace(self._told, chain=cut))

    async def start(self) -> None:
        """OSError."""
        if self._place is not None:
            self._place.start(self._taken)
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
        if self._place is not None:
            self._place.close()

    async def before_postgres_starts(self) -> None:
        """What was placed for the last one counts no more, and pg_wal has no segment of this archive's. It is to ask. OSError."""
        await self._fetcher.look_ahead(True)
        if self._place is not None:
            await self._place.renew()
        self._asked, self._row = _Asked(), _Row(self._size)
        self._choose()

    async def before_it_opens(self) -> None:
        """Nothing is placed any more, and what Postgres has not taken is removed: it is not of what comes now. What it has had is
        durable from now on. It is to ask. OSError."""
        await self._fetcher.look_ahead(False)
        if self._place is not None:
            await self._place.make_durable()
        self._choose()

    def restore_command(self) -> str:
        """By which Postgres asks; copies the client. OSError; NoInterpreter."""
        client = commands.install_client(self._work_directory, self._run_as)
        return commands.restore_command(commands.interpreter(self._run_as), client, self._socket, "recovery")

    def look(self) -> None:
        """To be called every second or so: whether Postgres does not get on alone."""
        is_late = self.reads_alone and self._row.waiting_s > STUCK_S
        if is_late and self._place is not None and self._place.holds(self._row.next):
            log.info("%s lies in pg_wal, and Postgres has not taken it for %g s: it is to ask", self._row.next, STUCK_S)
            self._row.is_stuck()
        self._choose()

    @property
    def unreadable(self) -> str | None:
        """The segment for which Postgres comes back again and again, although it has it whole: a record in it, or one that goes on in
        the next, cannot be read."""
        asked = self._asked
        return asked.last if asked.ends == 0 and asked.returns >= RETURNS_TO_BELIEVE else None

    def _take_note(self) -> None:
        for name in self._fetcher.go_on():
            self._asked.note(name)
            self._row.got(name)
        if self._place is not None and self._place.lost_track():
            log.info("the kernel has lost track of what Postgres has opened in pg_wal: it is to ask")
            self._row.ends()

    def _choose(self) -> None:
        wanted = self._row.next
        is_shown = self._place is not None and self._place.is_watched
        reads_alone = bool(wanted) and is_shown and self._fetcher.is_coming(wanted)
        if reads_alone != self.reads_alone:
            self.reads_alone = reads_alone
            log.debug("Postgres %s", f"is to read {wanted} alone" if reads_alone else "is to ask")
            self.on_change()

    def _taken(self) -> None:
        self._take_note()
        self._choose()

    async def _fetch(self, words: list[str]) -> str:
        if len(words) != 3:
            return "failed fetch takes a mode, a name and a path"
        self._take_note()  # what it has taken by itself is from before this question
        try:
            return await self._answer(words[1], Path(words[2]))
        finally:
            self._choose()

    async def _answer(self, name: str, destination: Path) -> str:
        kind = wal_kind(name)
        if kind == "segment":
            self._asked.note(name)
        if kind == "history" and timeline_of(name) > self._chain.current:
            return "absent"
        joined, cut = self.status.fetch.joined_tails, self.status.fetch.cut_at_fork
        try:
            answer = await self._fetcher.fetch("recovery", name, destination)
        except NotFetched as error:
            self._row.ends()
            return f"failed {error}"
        is_cut_here = self.status.fetch.cut_at_fork > cut and name.startswith(f"{self._chain.current:08X}")
        is_absent = answer is Fetched.ABSENT and kind == "segment"
        if is_cut_here or is_absent or self.status.fetch.joined_tails > joined:
            self.ends_seen += 1
            self._asked.ends += 1
            self._row.ends()
        elif kind == "segment":
            self._row.got(name)
        return "done" if answer is Fetched.PRESENT else "absent"
