"""Where what lies in the archive: barman-cloud's layout, and a folder of our own that its tools never list.

<server>/wals/<16 hex digits>/<segment>.zst     also .partial and backup labels
<server>/wals/<timeline>.history.zst
<server>/base/<id>/...
<server>/instance-manager/lineage.json           whose archive this is
<server>/instance-manager/pieces/<segment>/<from>-<to>.zst
<server>/instance-manager/partials/<partial>.<16 hex digits of its content>.zst
<server>/instance-manager/probe/...
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from instance_manager.archive.codecs import SUFFIXES, Codec
from instance_manager.archive.wal_names import wal_kind

_PIECE = re.compile(r"([0-9A-F]{8})-([0-9A-F]{8})")


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """A part of an unfinished segment: its bytes from `start` to before `end`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of the objects of one server's archive."""

    server: str
    codec: Codec

    @property
    def wals(self) -> str:
        return f"{self.server}/wals/"

    @property
    def base(self) -> str:
        return f"{self.server}/base/"

    @property
    def lineage(self) -> str:
        return f"{self.server}/instance-manager/lineage.json"

    @property
    def probe(self) -> str:
        return f"{self.server}/instance-manager/probe"

    @property
    def all_pieces(self) -> str:
        return f"{self.server}/instance-manager/pieces/"

    @property
    def other_partials(self) -> str:
        return f"{self.server}/instance-manager/partials/"

    def wal(self, name: str) -> str:
        """The object of a WAL file, compressed by the archive's codec. ValueError: not the name of one."""
        return self.wal_stem(name) + self.codec.suffix

    def wal_stem(self, name: str) -> str:
        """What the object's name begins with, whatever its codec."""
        if wal_kind(name) == "history":
            return f"{self.wals}{name}"
        return f"{self.wals}{name[:16]}/{name}"

    def other_partial(self, name: str, content_sha256: str) -> str:
        """Where a `.partial` goes whose name is taken by another: nobody asks for it by name."""
        if wal_kind(name) != "partial":
            raise ValueError(f"not a partial segment: {name}")
        return f"{self.other_partials}{name}.{content_sha256[:16]}{self.codec.suffix}"

    def pieces(self, segment_name: str) -> str:
        """The folder of the pieces of a segment."""
        if wal_kind(segment_name) != "segment":
            raise ValueError(f"not a segment: {segment_name}")
        return f"{self.all_pieces}{segment_name}/"

    def piece(self, segment_name: str, piece: Piece) -> str:
        return f"{self.pieces(segment_name)}{piece.start:08X}-{piece.end:08X}{self.codec.suffix}"

    def wal_of(self, object_name: str) -> str | None:
        """The WAL file that an object below `wals` holds; None: it is something else."""
        name = without_suffix(object_name.rpartition("/")[2])
        try:
            is_there = self.wal_stem(name) == without_suffix(object_name)
        except ValueError:
            return None
        return name if is_there else None

    def segment_of_leftover(self, object_name: str) -> str | None:
        """The segment of which a piece or a `.partial` beside the WAL holds a part; None: it is something else."""
        folder, kept = object_name.removeprefix(self.all_pieces), object_name.removeprefix(self.other_partials)
        if folder != object_name and self.piece_of(object_name) is not None:
            name = folder.partition("/")[0]
        elif kept != object_name:
            name = kept.partition(".partial.")[0]
        else:
            return None
        try:
            return name if wal_kind(name) == "segment" else None
        except ValueError:
            return None

    def piece_of(self, object_name: str) -> Piece | None:
        """The piece that an object in a folder of `pieces` holds; None: it is something else."""
        match = _PIECE.fullmatch(without_suffix(object_name.rpartition("/")[2]))
        if match is None:
            return None
        piece = Piece(int(match[1], 16), int(match[2], 16))
        return piece if piece.start < piece.end else None


def without_suffix(name: str) -> str:
    """The name of what was compressed."""
    for suffix in SUFFIXES.values():
        if suffix and name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def joined_pieces(pieces: list[Piece]) -> list[Piece]:
    """Pieces that together cover a segment from its start as far as possible without a gap, in order, each once."""
    covering: list[Piece] = []
    end = 0
    while found := [piece for piece in pieces if piece.start <= end < piece.end]:
        best = max(found, key=lambda piece: piece.end)
        covering.append(best)
        end = best.end
    return covering
