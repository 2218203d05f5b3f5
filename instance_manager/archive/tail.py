"""The end of an archive: is a segment that is not there the end of the log, or a gap? And what of its last one is there?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instance_manager.archive.accepted import served_part
from instance_manager.archive.codecs import codec_of_suffix
from instance_manager.archive.content import sha256_of
from instance_manager.archive.layout import Layout, Piece, joined_pieces
from instance_manager.archive.restore_file import Expected, restore_wal, verified, zeros
from instance_manager.archive.spool import Spool
from instance_manager.archive.wal_names import Segment, SegmentSize, wal_kind
from instance_manager.core.archive_state import GAP
from instance_manager.core.types import Epoch, Timeline, TimelineChain, TimelineSwitch
from instance_manager.ports import ContentDamaged, ObjectInfo, ObjectStore
from instance_manager.postgres.histories import History, HistoryInvalid, parse_history


class GapInArchive(Exception):
    """A segment is missing although later ones are there: recovery must stop, for it would open without them."""


@dataclass(frozen=True, slots=True)
class ArchiveEnd:
    """Questions about the end of one server's archive."""

    store: ObjectStore
    layout: Layout
    size: SegmentSize
    system_identifier: int
    chain: TimelineChain

    async def require_no_later(self, segment: Segment, *, deadline_s: float) -> None:
        """GapInArchive: of this timeline or of one that the accepted history went on to, later WAL is there."""
        for timeline in (segment.timeline, *self._after(segment.timeline)):
            prefix = f"{self.layout.wals}{timeline:08X}"
            after = self.layout.wal_stem(self.size.name(segment)) if timeline == segment.timeline else ""
            async for entry in self.store.entries(prefix, after=after, deadline_s=deadline_s):
                name = self.layout.wal_of(entry.name)
                if name is None or wal_kind(name) != "segment":
                    continue
                found = self.size.parse(name)
                if found.number > segment.number and served_part(found, self.size, self.chain) is not None:
                    raise GapInArchive(
                        f"{self.size.name(segment)} is not in the archive, but {name} is: {GAP}. Put the "
                        "segment back (a standby or an old primary may still have it in pg_wal), or recover to a target before it"
                    )

    async def restore_tail(self, segment: Segment, keep_bytes: int, spool: Spool, *, deadline_s: float) -> Path | None:
        """What was archived of a segment that was never finished, the rest zeros; None: nothing was."""
        name = self.size.name(segment)
        pieces = joined_pieces(await self._pieces(name, deadline_s))
        covered = pieces[-1].end if pieces else 0
        if covered < keep_bytes and (covered == 0 or keep_bytes < self.size.size_bytes):
            partial = Expected(f"{name}.partial", self.size, self.system_identifier, keep_bytes)
            found = await restore_wal(self.store, self.layout, partial, spool, deadline_s=deadline_s)
            if found is not None:
                return found
        if not pieces:
            return None
        expected = Expected(name, self.size, self.system_identifier, min(covered, keep_bytes))
        info = ObjectInfo(self.layout.pieces(name), covered, {})
        loop = asyncio.get_running_loop()

        def joined() -> Iterator[bytes]:
            end = 0
            for piece in pieces:
                # One after another, so that only one is in memory: this runs in a thread, the store's calls in the loop.
                content = asyncio.run_coroutine_threadsafe(self._read_piece(name, piece, deadline_s), loop).result()
                yield content[end - piece.start :]
                end = piece.end
            yield from zeros(self.size.size_bytes - end)

        return await asyncio.to_thread(spool.write, name, verified(joined(), info, expected))

    def _after(self, timeline: Timeline) -> list[Timeline]:
        return [switch.timeline for switch in self.chain.switches if switch.timeline > timeline]

    async def _pieces(self, segment_name: str, deadline_s: float) -> list[Piece]:
        found = []
        async for entry in self.store.entries(self.layout.pieces(segment_name), deadline_s=deadline_s):
            piece = self.layout.piece_of(entry.name)
            if piece is not None and piece.end <= self.size.size_bytes:
                found.append(piece)
        return found

    async def _read_piece(self, segment_name: str, piece: Piece, deadline_s: float) -> bytes:
        name = self.layout.piece(segment_name, piece)
        length = piece.end - piece.start

        def receive(info: ObjectInfo, chunks: Iterator[bytes]) -> bytes:
            content = b"".join(codec_of_suffix(name).decompressed(chunks, limit_bytes=length))
            if info.metadata.get("sha256", "") not in ("", sha256_of([content])):
                raise ContentDamaged(f"{name} holds other content than was streamed")
            return content

        content = await self.store.receive(name, receive, deadline_s=deadline_s)
        if content is None or len(content) != length:
            raise ContentDamaged(f"{name} holds {None if content is None else len(content)} bytes, not {length}")
        return content


async def histories_in(store: ObjectStore, layout: Layout, *, deadline_s: float) -> dict[Timeline, str]:
    """Timelines whose history is in the archive, with the names of the objects."""
    found = {}
    async for entry in store.entries(layout.wals, shallow=True, deadline_s=deadline_s):
        name = layout.wal_of(entry.name)
        if name is not None and wal_kind(name) == "history":
            found[Timeline(int(name[:8], 16))] = entry.name
    return found


async def chain_of_archive(
    store: ObjectStore, layout: Layout, *, timeline: Timeline | None = None, deadline_s: float
) -> TimelineChain:
    """The history of `timeline`, or of the newest in the archive, by its history file. ContentDamaged: it cannot be."""
    histories = await histories_in(store, layout, deadline_s=deadline_s)
    newest = timeline if timeline is not None else max(histories, default=Timeline(1))
    if newest not in histories:
        return TimelineChain(newest)
    name = histories[newest]

    def receive(info: ObjectInfo, chunks: Iterator[bytes]) -> bytes:
        content = codec_of_suffix(name).decompressed(chunks, limit_bytes=1 << 20)
        expected = Expected(f"{newest:08X}.history", SegmentSize(1 << 20), 0, 0)
        return b"".join(verified(content, info, expected))

    content = await store.receive(name, receive, deadline_s=deadline_s)
    if content is None:
        raise ContentDamaged(f"{name} was listed and is gone")
    try:
        parents = parse_history(newest, content.decode(errors="replace"))
    except HistoryInvalid as error:
        raise ContentDamaged(f"{name}: {error}") from error
    return chain_from_history(newest, parents)


def chain_from_history(timeline: Timeline, parents: History) -> TimelineChain:
    """The chain that a history file tells; its epochs are not known (0)."""
    if not parents:
        return TimelineChain(timeline)
    following = [parent for parent, _ in parents[1:]] + [timeline]
    switches = tuple(
        TimelineSwitch(each, parent, left_at, Epoch(0))
        for each, (parent, left_at) in zip(following, parents, strict=True)
    )
    return TimelineChain(parents[0][0], switches)
