"""What the kernel tells of who opens the files of a directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from instance_manager.archive.recovery.openings import EventsLost, Openings


@pytest.fixture
def openings(tmp_path: Path) -> Iterator[Openings]:
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "below").mkdir()
    made = Openings(tmp_path)
    yield made
    made.close()


def test_who_opens_shows_and_who_only_looks_or_renames_does_not(openings: Openings, tmp_path: Path) -> None:
    (tmp_path / "first").stat()
    list(tmp_path.iterdir())
    (tmp_path / "below" / "third").write_bytes(b"x")
    (tmp_path / "below" / "third").replace(tmp_path / "third")
    (tmp_path / "second").unlink()
    assert openings.new() == set()
    (tmp_path / "first").read_bytes()
    (tmp_path / "third").read_bytes()
    assert openings.new() == {"first", "third"}
    assert openings.new() == set()


def test_more_than_the_kernel_keeps_is_told_and_what_comes_after_shows(openings: Openings, tmp_path: Path) -> None:
    kept = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for _ in range(kept // 2 + 1):
        # By turns: the same twice would be one event.
        (tmp_path / "first").open().close()
        (tmp_path / "second").open().close()
    with pytest.raises(EventsLost):
        openings.new()
    (tmp_path / "second").read_bytes()
    assert openings.new() == {"second"}


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Openings(tmp_path / "missing")
