"""What a data directory's place holds, and files that are whole after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from instance_manager.core.types import Lsn, Timeline, TimelineChain, TimelineSwitch
from instance_manager.postgres.binaries import BinariesNotFound, find_bin_directory, parse_server_version
from instance_manager.postgres.control_data import ClusterState, ControlDataUnreadable, parse_control_data
from instance_manager.postgres.directory import (
    DirectoryRefused,
    DirectoryState,
    inspect_directory,
    require_startable,
    rewind_marker,
    set_aside,
    write_rewind_marker,
)
from instance_manager.postgres.files import make_directory, read_if_present, remove_if_present, write_atomically
from instance_manager.postgres.histories import (
    HistoryInvalid,
    history_of_chain,
    parse_history,
    read_history,
)
from instance_manager.postgres.server import LocalServer
from instance_manager.postgres.wal_dump import record_end, segment_file_name

SEGMENT_BYTES = 16 * 1024 * 1024


@pytest.fixture
def server(tmp_path: Path) -> LocalServer:
    (tmp_path / "state").mkdir()
    return LocalServer(
        data_directory=tmp_path / "data",
        socket_directory=tmp_path,
        state_directory=tmp_path / "state",
        listen_address="",
        port=1,
        bin_directory=Path("/nowhere"),
        run_as=None,
    )


def test_each_state_of_the_place_is_told(server: LocalServer) -> None:
    data = server.data_directory
    assert inspect_directory(server).state is DirectoryState.MISSING
    data.mkdir()
    assert inspect_directory(server).state is DirectoryState.EMPTY
    (data / "file").write_text("x")
    assert inspect_directory(server).state is DirectoryState.FOREIGN
    with pytest.raises(DirectoryRefused):
        set_aside(server)
    (data / "PG_VERSION").write_text("15\n")
    assert inspect_directory(server).state is DirectoryState.FOREIGN
    (data / "global").mkdir()
    (data / "global" / "pg_control").write_bytes(b"x")
    report = inspect_directory(server)
    assert (report.state, report.major) == (DirectoryState.INITIALISED, 15)
    write_rewind_marker(server, "h:1")
    assert inspect_directory(server).state is DirectoryState.HALF_REWOUND
    with pytest.raises(DirectoryRefused, match="half rewound"):
        require_startable(server)


def test_a_marker_that_cannot_be_read_is_still_a_marker(server: LocalServer) -> None:
    (server.state_directory / "rewind-in-progress").write_bytes(b"\xff{")
    marker = rewind_marker(server)
    assert marker is not None
    assert write_rewind_marker(server, "h:1").attempts == 2


def test_a_data_directory_that_is_a_link_is_not_ours(server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    server.data_directory.symlink_to(tmp_path / "elsewhere")
    assert inspect_directory(server).state is DirectoryState.FOREIGN


def test_a_file_is_replaced_whole_and_links_are_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    path = tmp_path / "file"
    path.symlink_to(target)
    write_atomically(path, b"new", mode=0o640)
    assert (path.read_bytes(), target.read_bytes()) == (b"new", b"old")
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert read_if_present(path) == b"new"
    with pytest.raises(ValueError, match="longer"):
        read_if_present(path, limit_bytes=2)
    assert remove_if_present(path)
    assert not remove_if_present(path)
    assert read_if_present(path) is None
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "missing" / "x", b"")
    with pytest.raises(FileExistsError):
        make_directory(target)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["target"]


def test_histories_are_parsed_strictly() -> None:
    text = "1\t0/3000060\tno recovery target specified\n\n# comment\n2 1/0 \n"
    history = ((Timeline(1), Lsn(0x3000060)), (Timeline(2), Lsn(1 << 32)))
    assert parse_history(Timeline(5), text) == history
    assert parse_history(Timeline(5), "") == ()
    for bad in ("x\n", "1\n", "2\t0/1\n1\t0/2\n", "1\t0/2\n2\t0/1\n", "5\t0/1\n", "0\t0/1\n", "1\t0/123456789\n"):
        with pytest.raises(HistoryInvalid):
            parse_history(Timeline(5), bad)


def test_an_empty_history_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "00000002.history").write_text("1\t0/3000060\tx\n")
    (tmp_path / "00000009.history").write_text("")
    assert read_history(tmp_path, Timeline(2)) == ((Timeline(1), Lsn(0x3000060)),)
    assert read_history(tmp_path, Timeline(9)) is None


def test_the_history_of_a_chain_is_what_its_history_file_should_hold() -> None:
    chain = TimelineChain(Timeline(1)).forked(TimelineSwitch(Timeline(4), Timeline(1), Lsn(100), epoch=2))  # type: ignore[arg-type]
    assert history_of_chain(chain) == ((Timeline(1), Lsn(100)),)


def test_the_end_of_a_record_counts_page_headers_and_alignment() -> None:
    assert record_end(Lsn(0x1000028), 30, segment_bytes=SEGMENT_BYTES) == 0x1000048
    assert record_end(Lsn(0x1001FF0), 16, segment_bytes=SEGMENT_BYTES) == 0x1002000
    assert record_end(Lsn(0x1001FF0), 24, segment_bytes=SEGMENT_BYTES) == 0x1002000 + 24 + 8
    assert record_end(Lsn(0x1FFFFF0), 24, segment_bytes=SEGMENT_BYTES) == 0x2000000 + 40 + 8
    assert record_end(Lsn(0x1000028), 24, segment_bytes=SEGMENT_BYTES, is_switch=True) == 0x2000000
    assert segment_file_name(Timeline(10), 0x1FF, SEGMENT_BYTES) == "0000000A00000001000000FF"
    assert segment_file_name(Timeline(1), 5, 1 << 30) == "000000010000000100000001"


CONTROL = """pg_control version number:            1300
Catalog version number:               202209061
Database system identifier:           7300000000000000001
Database cluster state:               shut down in recovery
pg_control last modified:             Sat Nov 21 04:31:15 2026
Latest checkpoint location:           1/3000060
Latest checkpoint's REDO location:    1/3000028
Latest checkpoint's TimeLineID:       3
Latest checkpoint's PrevTimeLineID:   2
Minimum recovery ending location:     1/4000000
Min recovery ending loc's timeline:   3
Backup start location:                0/0
Backup end location:                  0/0
End-of-backup record required:        no
wal_level setting:                    replica
wal_log_hints setting:                on
max_connections setting:              100
max_worker_processes setting:         8
max_wal_senders setting:              10
max_prepared_xacts setting:           0
max_locks_per_xact setting:           64
WAL block size:                       8192
Bytes per WAL segment:                16777216
Data page checksum version:           0
"""


def test_control_data_is_read_or_refused() -> None:
    control = parse_control_data(CONTROL)
    assert control.state is ClusterState.SHUT_DOWN_IN_RECOVERY
    assert not control.shut_down_cleanly
    assert control.can_be_rewound
    assert not control.data_checksums
    assert (control.checkpoint_lsn, control.timeline) == ((1 << 32) + 0x3000060, 3)
    for bad in (
        CONTROL.replace("shut down in recovery", "unrecognized status code"),
        CONTROL.replace("wal_level setting", "something else"),
        CONTROL.replace("1/3000028", "nowhere"),
        "WARNING: Calculated CRC checksum does not match value stored in file.\n" + CONTROL,
        "",
    ):
        with pytest.raises(ControlDataUnreadable):
            parse_control_data(bad)


def test_missing_programs_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(BinariesNotFound, match="postgresql-16"):
        find_bin_directory(major=16, library=tmp_path, search_path=str(tmp_path))
    with pytest.raises(BinariesNotFound, match="has no postgres"):
        find_bin_directory(explicit=tmp_path)
    assert str(parse_server_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)")) == "15.18"
    assert parse_server_version("postgres (PostgreSQL) 19beta1").minor == -1
    with pytest.raises(ValueError, match="not a version"):
        parse_server_version("psql")
