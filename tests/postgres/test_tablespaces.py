"""What a copy that never came into place leaves in tablespaces, and who must have ended before it is removed."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from instance_manager.postgres import directory
from instance_manager.postgres.directory import (
    DirectoryRefused,
    places_kept_by_others,
    remove_leftovers,
    set_aside,
    working_in,
)
from instance_manager.postgres.server import LocalServer
from instance_manager.postgres.tablespaces import UNFINISHED

FILES = "PG_15_202209061"


@pytest.fixture
def server(tmp_path: Path) -> LocalServer:
    return LocalServer(
        data_directory=tmp_path / "data",
        socket_directory=tmp_path,
        state_directory=tmp_path / "state",
        listen_address="",
        port=1,
        bin_directory=Path("/nowhere"),
        run_as=None,
    )


@pytest.fixture
def half(server: LocalServer) -> Path:
    """What a kill has left of a copy."""
    made = server.data_directory.with_name("data.clone-0123abcd")
    (made / "pg_tblspc").mkdir(parents=True)
    (made / "PG_VERSION").write_text("15\n")
    return made


def tablespace(place: Path, *directories: Path) -> Path:
    """With a file of Postgres's; `directories` have a link to it."""
    (place / FILES).mkdir(parents=True)
    (place / FILES / "1").write_bytes(b"rows")
    for each in directories:
        (each / "pg_tblspc").mkdir(parents=True, exist_ok=True)
        (each / "pg_tblspc" / "16400").symlink_to(place)
    return place


def test_a_half_copy_is_removed_with_its_tablespaces_but_for_what_is_somebody_elses(
    server: LocalServer, half: Path, tmp_path: Path
) -> None:
    space = tablespace(tmp_path / "space", half)
    (space / "lost+found").mkdir()
    assert remove_leftovers(server) == (half,)
    assert not half.exists()
    assert [path.name for path in space.iterdir()] == ["lost+found"]


def test_one_that_was_killed_before_it_had_its_links_is_removed_where_it_has_left_its_marks(
    server: LocalServer, half: Path, tmp_path: Path
) -> None:
    ours, another = tablespace(tmp_path / "ours"), tablespace(tmp_path / "another")
    (half / UNFINISHED).write_text(f"{ours}\n{another}\n{tmp_path / 'missing'}\n")
    (ours / UNFINISHED).touch()
    remove_leftovers(server)
    assert list(ours.iterdir()) == []
    assert (another / FILES / "1").exists()


@pytest.mark.parametrize("owner", ["data", "data.set-aside-3"])
def test_the_tablespace_of_the_directory_in_place_or_of_one_that_was_set_aside_is_never_touched(
    server: LocalServer, half: Path, tmp_path: Path, owner: str
) -> None:
    space = tablespace(tmp_path / "space", half, server.data_directory.with_name(owner))
    (half / UNFINISHED).write_text(f"{space}\n")
    (space / UNFINISHED).touch()
    remove_leftovers(server)
    assert not half.exists()
    assert (space / FILES / "1").exists()


def test_a_half_copy_is_not_removed_while_a_process_works_in_it_that_has_outlived_its_agent(
    server: LocalServer, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = tablespace(tmp_path / "space", half)
    reads, writes = os.pipe()
    with working_in(half) as lock:
        left = subprocess.Popen(["cat"], stdin=reads, pass_fds=[lock])
    os.close(reads)
    try:
        monkeypatch.setattr(directory, "LEFT_DEADLINE_S", 0.1)
        with pytest.raises(DirectoryRefused, match="somebody still works in"):
            remove_leftovers(server)
        assert (space / FILES / "1").exists()
    finally:
        os.close(writes)
        left.wait(10)
    monkeypatch.setattr(directory, "LEFT_DEADLINE_S", 10.0)
    remove_leftovers(server)
    assert not (space / FILES).exists()


def initialised(server: LocalServer, *places: Path) -> None:
    (server.data_directory / "global").mkdir(parents=True)
    (server.data_directory / "PG_VERSION").write_text("15\n")
    (server.data_directory / "global" / "pg_control").touch()
    for place in places:
        tablespace(place, server.data_directory)


def test_a_directory_that_is_set_aside_takes_its_tablespaces_along_and_goes_with_them(
    server: LocalServer, tmp_path: Path
) -> None:
    space = tmp_path / "space"
    initialised(server, space)
    first = set_aside(server)
    taken = tmp_path / "space.set-aside-1"
    assert (first / "pg_tblspc" / "16400").resolve() == taken
    assert (taken / FILES / "1").read_bytes() == b"rows"
    assert list(space.iterdir()) == []
    assert places_kept_by_others(server) == {}
    space.rmdir()
    initialised(server, space)
    second = set_aside(server)
    assert not first.exists()
    assert not taken.exists()
    assert (second / "pg_tblspc" / "16400" / FILES / "1").exists()


def test_a_tablespace_that_cannot_be_moved_stays_and_is_told(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = tmp_path / "space"
    initialised(server, space)
    rename = Path.rename

    def is_a_mount(path: Path, target: Path) -> Path:
        if path == space:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", is_a_mount)
    aside = set_aside(server)
    assert places_kept_by_others(server) == {aside: [space]}
    assert (aside / "pg_tblspc" / "16400" / FILES / "1").exists()


def test_nobody_works_in_a_directory_that_was_removed_meanwhile(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = directory._is_locked

    def another_is_faster(descriptor: int) -> bool:
        if half.stat().st_ino == os.fstat(descriptor).st_ino:
            half.rename(half.with_name("gone"))
            half.mkdir()
        return lock(descriptor)

    monkeypatch.setattr(directory, "_is_locked", another_is_faster)
    with pytest.raises(DirectoryRefused, match="was removed meanwhile"), working_in(half):
        pass
