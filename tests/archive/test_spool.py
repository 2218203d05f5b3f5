"""The files that are restored, before they are handed over."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetch_steps import SEGMENT, A
from wal_builders import segment_content

from instance_manager.archive import spool
from instance_manager.archive.spool import Spool


@pytest.mark.parametrize("can_allocate", [True, False])
def test_a_file_whose_size_is_known_has_its_place_before_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_allocate: bool
) -> None:
    if not can_allocate:
        monkeypatch.setattr(spool, "allocate", lambda *_: False)
    sizes: list[int] = []

    def seen() -> Iterator[bytes]:
        (file,) = tmp_path.iterdir()
        sizes.append(file.stat().st_size)
        yield segment_content(A)

    file = Spool(tmp_path).write(A, seen(), size_bytes=SEGMENT)
    assert sizes == [SEGMENT if can_allocate else 0]
    assert file.read_bytes() == segment_content(A)


def test_threads_that_bring_segments_ahead_give_way_to_postgres_and_are_never_put_before_it(tmp_path: Path) -> None:
    seen: list[int] = []

    def noted() -> Iterator[bytes]:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        yield b"x"

    def write(niceness: int) -> None:
        Spool(tmp_path, niceness=niceness).write(A, noted())

    own = os.getpriority(os.PRIO_PROCESS, 0)
    for niceness in (0, own + 5, own - 1):
        thread = threading.Thread(target=write, args=(niceness,))
        thread.start()
        thread.join()
    assert seen == [own, own + 5, own]
