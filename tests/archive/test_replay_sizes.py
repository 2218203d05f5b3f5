"""What a Postgres that only replays may use of a machine, as /proc and /sys tell of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from instance_manager.archive.recovery import sizes
from instance_manager.archive.recovery.sizes import memory_bytes, replay_sizes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def machine(root: Path, *, groups: str, limits: dict[str, str] | None = None, strict: bool = False) -> Path:
    """Of 64 GiB, 16 of them available, and 4 that may still be promised."""
    told = {
        "proc/meminfo": f"MemTotal: {64 * MIB} kB\nMemAvailable: {16 * MIB} kB\nHugePages_Total: 0\n"
        f"CommitLimit: {40 * MIB} kB\nCommitted_AS: {36 * MIB} kB\n",
        "proc/sys/vm/overcommit_memory": "2\n" if strict else "0\n",
        "proc/self/cgroup": groups,
    }
    for name, text in {**told, **(limits or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "expected_bytes"),
    [
        pytest.param("0::/\n", {}, 16 * GIB, id="no limit"),
        pytest.param("0::/\n", {"sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}, 2 * GIB, id="a container's own view"),
        pytest.param("0::/\n", {"sys/fs/cgroup/memory.max": "max\n"}, 16 * GIB, id="told that there is none"),
        pytest.param(
            "0::/pods/one/main\n",
            {
                "sys/fs/cgroup/pods/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/pods/one/memory.max": f"{3 * GIB}\n",
                "sys/fs/cgroup/pods/one/main/memory.max": "max\n",
            },
            3 * GIB,
            id="the lowest above it",
        ),
        pytest.param(
            "4:cpu,cpuacct:/a\n3:memory:/b\n0::/\n",
            {
                "sys/fs/cgroup/memory/b/memory.limit_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            GIB,
            id="the first version",
        ),
        pytest.param(
            "3:memory:/docker/1234\n",
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{5 * GIB}\n"},
            5 * GIB,
            id="the host's name for a container's group",
        ),
    ],
)
def test_the_memory_is_what_is_available_and_at_most_the_limit_of_any_group(
    tmp_path: Path, groups: str, limits: dict[str, str], expected_bytes: int
) -> None:
    assert memory_bytes(machine(tmp_path, groups=groups, limits=limits)) == expected_bytes


def test_where_no_more_memory_is_promised_than_there_is_it_is_what_may_still_be_promised(tmp_path: Path) -> None:
    assert memory_bytes(machine(tmp_path, groups="0::/\n", strict=True)) == 4 * GIB


def test_this_machine_can_be_asked() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory_bytes() <= total


def directory(root: Path, *, database_bytes: int, tablespace_bytes: int = 0) -> Path:
    """One as Postgres's, of sparse files."""
    tablespace = root / "space"
    for folder in (root / "base/1", root / "pg_tblspc", root / "pg_wal", tablespace / "PG_15/1"):
        folder.mkdir(parents=True)
    (root / "pg_tblspc/16384").symlink_to(tablespace)
    for path, size_bytes in ((root / "base/1/2", database_bytes), (tablespace / "PG_15/1/3", tablespace_bytes)):
        path.touch()
        os.truncate(path, size_bytes)
    return root


@pytest.mark.parametrize(
    ("memory", "database_bytes", "tablespace_bytes", "expected"),
    [
        pytest.param(16 * GIB, 30 * MIB, 0, "512MB", id="little to hold"),
        pytest.param(16 * GIB, GIB, GIB // 2, "3072MB", id="twice what the directory holds"),
        pytest.param(16 * GIB, 100 * GIB, 0, "4096MB", id="a quarter of the memory"),
        pytest.param(256 * MIB, 100 * GIB, 0, "128MB", id="Postgres's default at least"),
        pytest.param(1024 * GIB, 100 * GIB, 900 * GIB, "16384MB", id="no more than is of use"),
    ],
)
def test_the_buffers_are_for_what_the_directory_holds_within_a_quarter_of_the_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: int,
    database_bytes: int,
    tablespace_bytes: int,
    expected: str,
) -> None:
    monkeypatch.setattr(sizes, "memory_bytes", lambda: memory)
    data = directory(tmp_path, database_bytes=database_bytes, tablespace_bytes=tablespace_bytes)
    assert replay_sizes(data)["shared_buffers"] == expected


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), KeyError("MemAvailable"), ValueError("kB")]
)
def test_a_kernel_that_does_not_tell_of_its_memory_keeps_nobody_from_recovering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def untold() -> int:
        raise error

    monkeypatch.setattr(sizes, "memory_bytes", untold)
    assert replay_sizes(directory(tmp_path, database_bytes=GIB))["shared_buffers"] == "128MB"


@pytest.mark.parametrize(
    ("free_bytes", "expected"),
    [
        pytest.param(2 * GIB, "1024MB", id="Postgres's default at least"),
        pytest.param(20 * GIB, "5120MB", id="a quarter of what is free"),
        pytest.param(1024 * GIB, "16384MB", id="a replay that breaks off has to do it again"),
    ],
)
def test_the_log_between_restart_points_is_at_most_a_quarter_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, expected: str
) -> None:
    data = directory(tmp_path, database_bytes=MIB)
    monkeypatch.setattr(
        os, "statvfs", lambda _: os.statvfs_result((4 * KIB, 4 * KIB, 0, 0, free_bytes // (4 * KIB), 0, 0, 0, 0, 255))
    )
    assert replay_sizes(data)["max_wal_size"] == expected
