"""Keys as barman-cloud has them, and the covering of a segment by pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance_manager.archive.codecs import Codec
from instance_manager.archive.layout import Layout, Piece, joined_pieces

LAYOUT = Layout("orders", Codec("zstd"))
SEGMENT = "000000010000000A000000FE"


def test_keys_are_barman_clouds() -> None:
    assert LAYOUT.wal(SEGMENT) == f"orders/wals/000000010000000A/{SEGMENT}.zst"
    assert LAYOUT.wal(f"{SEGMENT}.partial") == f"orders/wals/000000010000000A/{SEGMENT}.partial.zst"
    assert LAYOUT.wal(f"{SEGMENT}.00000028.backup") == f"orders/wals/000000010000000A/{SEGMENT}.00000028.backup.zst"
    assert LAYOUT.wal("0000000B.history") == "orders/wals/0000000B.history.zst"
    assert Layout("s", Codec("none")).wal(SEGMENT) == f"s/wals/000000010000000A/{SEGMENT}"
    assert Layout("s", Codec("gzip")).wal(SEGMENT).endswith(".gz")


def test_the_way_back_from_a_key() -> None:
    for name in (SEGMENT, f"{SEGMENT}.partial", "0000000B.history", f"{SEGMENT}.00000028.backup"):
        assert LAYOUT.wal_of(LAYOUT.wal(name)) == name
        assert LAYOUT.wal_of(Layout("orders", Codec("bzip2")).wal(name)) == name
    assert LAYOUT.wal_of(f"orders/wals/0000000100000000/{SEGMENT}.zst") is None
    assert LAYOUT.wal_of("orders/wals/000000010000000A/readme.txt") is None


def test_what_is_ours_alone_is_where_barmans_tools_do_not_list() -> None:
    ours = [
        LAYOUT.lineage,
        LAYOUT.probe,
        LAYOUT.piece(SEGMENT, Piece(0, 10)),
        LAYOUT.other_partial(f"{SEGMENT}.partial", "ab" * 32),
    ]
    assert all(name.startswith("orders/instance-manager/") for name in ours)
    assert LAYOUT.piece_of(LAYOUT.piece(SEGMENT, Piece(0x10, 0x20))) == Piece(0x10, 0x20)
    assert LAYOUT.piece_of("orders/x/00000020-00000010.zst") is None


def test_no_path_is_built_of_what_is_no_name() -> None:
    for name in ("../x", "x", "0000000B.history/../../y"):
        with pytest.raises(ValueError, match="not the name"):
            LAYOUT.wal(name)
    with pytest.raises(ValueError, match="not a segment"):
        LAYOUT.pieces("0000000B.history")


def test_pieces_are_joined_up_to_the_first_gap() -> None:
    a, b, c, d = Piece(0, 10), Piece(10, 20), Piece(0, 20), Piece(30, 40)
    assert joined_pieces([d, b, a]) == [a, b]
    assert joined_pieces([a, b, c, d]) == [c]
    assert joined_pieces([b, d]) == []
    assert joined_pieces([a, Piece(5, 25), d]) == [a, Piece(5, 25)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda t: Piece(t[0], t[0] + t[1])), max_size=20))
def test_joined_pieces_cover_all_that_can_be_covered(pieces: list[Piece]) -> None:
    joined = joined_pieces(pieces)
    end = 0
    for piece in joined:
        assert piece.start <= end < piece.end
        end = piece.end
    reach = 0
    while any(piece.start <= reach < piece.end for piece in pieces):
        reach += 1
    assert end == reach
