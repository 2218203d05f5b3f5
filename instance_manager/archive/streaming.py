"""The unfinished segment, in pieces: losing every volume at once costs `interval_s` and an upload, not a segment.

What has been flushed is asked of Postgres by SQL (`pg_current_wal_flush_lsn`, and the timeline by the name of the segment it is
in) and read from pg_wal: bytes before the flush position are on disk and never change. A walsender would say the same with
a protocol of its own, a slot, and a place among the standbys that count for synchronous replication.

Pieces are kept few by merging as a binary counter does: the n-th replaces as many before it as n has zeros at its end,
so that after n of them log n are left, and each byte was sent log n times. A piece is removed only when one that covers it
is durable; all of them when the whole segment is.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from instance_manager.archive.content import MemoryContent, sha256_of
from instance_manager.archive.counters import StreamCounters
from instance_manager.archive.layout import Layout, Piece, joined_pieces
from instance_manager.archive.orders import Orders
from instance_manager.archive.upload import NotArchived, Prepared, Uploader, reused_chunks
from instance_manager.archive.wal_names import Segment, wal_kind
from instance_manager.core.types import Lsn, Timeline
from instance_manager.ports import ObjectInfo, ObjectStore, ObjectStoreError
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.threads import Threads, TooManyCalls, monotonic_s

log = logging.getLogger("instance_manager.archive.streaming")

READ_DEADLINE_S = 10.0
LARGEST_PIECE_BYTES = 16 << 20
FLUSHED_QUERY = """
SELECT pg_current_wal_flush_lsn()::text AS lsn, substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8) AS timeline
WHERE NOT pg_is_in_recovery()
"""


@dataclass(frozen=True, slots=True)
class Flushed:
    """How far the log of this primary is on its disk."""

    timeline: Timeline
    lsn: Lsn


FlushedPosition = Callable[[], Awaitable[Flushed | None]]
"""Port: asks Postgres; None: it is no primary. LocalPostgresError."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A piece and how many merges have made it."""

    piece: Piece
    rank: int


def next_piece(pieces: list[Ranked], end: int) -> tuple[Ranked, list[Ranked]]:
    """The piece to make towards covering everything before `end`, and those that it replaces."""
    start = pieces[-1].piece.end if pieces else 0
    end = min(end, start + LARGEST_PIECE_BYTES)
    rank = 0
    replaced: list[Ranked] = []
    for last in reversed(pieces):
        if last.rank != rank or end - last.piece.start > LARGEST_PIECE_BYTES:
            break
        start, rank = last.piece.start, rank + 1
        replaced.append(last)
    return Ranked(Piece(start, end), rank), replaced


class Streamer:
    """Sends what was flushed since the last time. `step` is called again and again by one task."""

    def __init__(
        self,
        wal_directory: Path,
        store: ObjectStore,
        layout: Layout,
        uploader: Uploader,
        counters: StreamCounters,
        flushed: FlushedPosition,
        *,
        ensure_archive: Callable[[Orders], Awaitable[None]],
        ensure_history: Callable[[Timeline, Orders], Awaitable[None]],
    ) -> None:
        self._wal_directory = wal_directory
        self._store = store
        self._layout = layout
        self._uploader = uploader
        self._counters = counters
        self._flushed = flushed
        self._ensure_archive = ensure_archive
        self._ensure_history = ensure_history
        self._segment: Segment | None = None
        self._name = ""
        self._pieces: list[Ranked] = []
        self._durable: set[str] = set()
        self._threads = Threads("streaming")

    @property
    def current_name(self) -> str:
        """The segment that was streamed last; empty: none."""
        return self._name

    def segment_is_durable(self, name: str) -> None:
        """The whole segment is in the archive: its pieces go at the next step."""
        if wal_kind(name) == "segment":
            self._durable.add(name)

    async def step(self) -> bool:
        """Send the new part, if there is one; whether something was sent. Failures are counted, and tried again later."""
        try:
            sent = await self._step()
        except (ObjectStoreError, LocalPostgresError, NotArchived, OSError, TimeoutError, TooManyCalls) as error:
            self._counters.failures += 1
            self._counters.last_error = self._counters.trouble = str(error) or type(error).__name__
            # What reached the store is not known: it is listed again before the next piece.
            self._segment = None
            return False
        self._counters.trouble = ""
        return sent

    async def _step(self) -> bool:
        await self._remove_durable()
        try:
            orders = self._uploader.require_permit()
        except NotArchived:
            # No primary any more: the time since is nobody's lag when it is one again.
            self._segment = self._counters.covered_s = None
            return False
        asked_s = monotonic_s()
        flushed = await self._flushed()
        if flushed is None or (orders.chain is not None and flushed.timeline != orders.chain.current):
            return False
        segment = orders.size.containing(flushed.timeline, flushed.lsn)
        end = flushed.lsn - orders.size.start_lsn(segment)
        if segment != self._segment:
            await self._ensure_archive(orders)
            # Without its history recovery never finds the timeline, whatever is streamed of it.
            await self._ensure_history(segment.timeline, orders)
            self._pieces = await self._resumed(segment, end, orders)
            self._segment, self._name = segment, orders.size.name(segment)
        if end <= (self._pieces[-1].piece.end if self._pieces else 0):
            await self._tell(segment, end, asked_s, orders)
            return False
        made, replaced = next_piece(self._pieces, end)
        await self._send(segment, made.piece, orders)
        self._pieces = [*self._pieces[: len(self._pieces) - len(replaced)], made]
        await self._tell(segment, made.piece.end, asked_s if made.piece.end == end else None, orders)
        for each in replaced:
            await self._remove(self._layout.piece(orders.size.name(segment), each.piece))
        return True

    async def _tell(self, segment: Segment, end: int, covered_s: float | None, orders: Orders) -> None:
        """The position not past a finished segment that waits: what was written to it behind its last piece is not in the archive."""
        if covered_s is not None:
            self._counters.covered_s = covered_s
        if segment.number:
            before = orders.size.name(Segment(segment.timeline, segment.number - 1))
            waits = self._wal_directory / "archive_status" / f"{before}.ready"
            if await self._threads.call(waits.exists, deadline_s=READ_DEADLINE_S):
                return
        self._counters.durable_lsn = orders.size.start_lsn(segment) + end

    async def _resumed(self, segment: Segment, end: int, orders: Orders) -> list[Ranked]:
        """Pieces of a former archiver, as far as they are what this disk holds; others are removed and sent again.

        They differ when a crash lost what had been flushed: the log then went another way from there.
        """
        name = orders.size.name(segment)
        found = []
        async for entry in self._store.entries(self._layout.pieces(name), deadline_s=self._uploader.attempt_s):
            piece = self._layout.piece_of(entry.name)
            if piece is not None:
                info = await self._store.info(entry.name, deadline_s=self._uploader.attempt_s)
                if piece.end <= end and info is not None and await self._is_same(name, piece, info):
                    found.append(piece)
                else:
                    log.warning("%s is not what the log holds: it is removed, and sent again", entry.name)
                    await self._remove(entry.name)
        kept = joined_pieces(found)
        for piece in set(found) - set(kept):
            await self._remove(self._layout.piece(name, piece))
        # The highest rank first, so that the merging goes on as if it had never stopped.
        return [Ranked(piece, len(kept) - number) for number, piece in enumerate(kept, 1)]

    async def _is_same(self, name: str, piece: Piece, info: ObjectInfo) -> bool:
        digest = await self._threads.call(lambda: sha256_of(self._chunks(name, piece)), deadline_s=READ_DEADLINE_S)
        return info.metadata.get("sha256") == digest

    async def _send(self, segment: Segment, piece: Piece, orders: Orders) -> None:
        name = orders.size.name(segment)
        prepared = await self._threads.call(lambda: self._prepared(name, piece), deadline_s=READ_DEADLINE_S)
        await self._uploader.create(self._layout.piece(name, piece), prepared, orders.epoch)
        self._counters.pieces += 1
        self._counters.piece_bytes += prepared.file_bytes

    def _prepared(self, name: str, piece: Piece) -> Prepared:
        """Only its compressed form is ever whole in memory. NotArchived; OSError."""
        digest, wanted = hashlib.sha256(), piece.end - piece.start

        def checked() -> Iterator[memoryview]:
            length = 0
            for chunk in self._chunks(name, piece):
                digest.update(chunk)
                length += len(chunk)
                yield chunk
            if length != wanted:
                raise NotArchived(f"{name} holds only {piece.start + length} bytes of {piece.end} that were flushed")

        packed = tuple(self._layout.codec.compressed(checked(), wanted))
        return Prepared(MemoryContent(packed), digest.hexdigest(), wanted)

    def _chunks(self, name: str, piece: Piece) -> Iterator[memoryview]:
        return reused_chunks(self._wal_directory / name, piece.start, piece.end)

    async def _remove_durable(self) -> None:
        for name in sorted(self._durable):
            async for entry in self._store.entries(self._layout.pieces(name), deadline_s=self._uploader.attempt_s):
                await self._remove(entry.name)
            self._durable.discard(name)

    async def _remove(self, object_name: str) -> None:
        await self._store.delete(object_name, deadline_s=self._uploader.attempt_s)
        self._counters.removed += 1


async def sweep_pieces(store: ObjectStore, layout: Layout, current: str, *, deadline_s: float) -> int:
    """Remove the pieces of segments that are whole in the archive, left behind by crashes; how many."""
    removed = 0
    async for folder in store.entries(layout.all_pieces, shallow=True, deadline_s=deadline_s):
        name = folder.name.rstrip("/").rpartition("/")[2]
        if name == current or wal_kind(name) != "segment":
            continue
        if await store.info(layout.wal(name), deadline_s=deadline_s) is None:
            continue
        async for entry in store.entries(folder.name, deadline_s=deadline_s):
            await store.delete(entry.name, deadline_s=deadline_s)
            removed += 1
    return removed


class StreamingTask:
    """Steps for ever, `interval_s` after the last one began at the earliest."""

    def __init__(self, streamer: Streamer, interval_s: float, is_paused: Callable[[], bool]) -> None:
        self._streamer = streamer
        self._interval_s = interval_s
        self._is_paused = is_paused

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + self._interval_s
            if not self._is_paused():
                await self._streamer.step()
            await asyncio.sleep(max(0.0, due_s - loop.time()))
