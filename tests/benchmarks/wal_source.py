"""WAL to archive: a server's directory from before, and the same after pgbench has filled N segments of 16 MiB.

Made once and kept. Every program gets the same files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import BIN_DIRECTORY, PostgresProcess, run_as

SEGMENT_BYTES = 16 << 20
SCALE = 20
SETTINGS = {
    "archive_mode": "on",
    # The value by which Postgres waits, and marks what is finished as ready.
    "archive_command": "",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "full_page_writes": "on",
    "fsync": "off",
    "listen_addresses": "127.0.0.1",
    "log_line_prefix": "%m [%p] %b ",
    "logging_collector": "off",
    "max_wal_senders": "2",
    "max_wal_size": "1GB",
    "shared_buffers": "512MB",
    "synchronous_commit": "off",
    "wal_keep_size": "100GB",
}
REPLAY_SETTINGS = {name: SETTINGS[name] for name in ("checkpoint_timeout", "log_line_prefix", "wal_keep_size")}
"""What must be the same in every replay that is compared, besides memory and restart points (`sizes.replay_sizes`)."""


@dataclass(frozen=True, slots=True)
class WalSource:
    """`before` is a stopped server's directory; `server` is the same one, with all segments in its pg_wal."""

    before: Path
    server: PostgresProcess
    segments: tuple[str, ...]

    @property
    def status(self) -> Path:
        return self.server.data / "pg_wal" / "archive_status"

    def mark(self, count: int) -> tuple[str, ...]:
        """The first `count` segments are ready to be archived, and nothing else is."""
        wanted = self.segments[:count]
        for path in self.status.iterdir():
            if path.suffix == ".ready":
                path.replace(path.with_suffix(".done"))
        for name in wanted:
            (self.status / f"{name}.done").replace(self.status / f"{name}.ready")
        return wanted

    def is_archived(self, names: tuple[str, ...]) -> bool:
        return (self.status / f"{names[-1]}.done").exists() and not any(
            (self.status / f"{name}.ready").exists() for name in names
        )


def server_at(root: Path, name: str) -> PostgresProcess:
    """A server whose directories are there, not started."""
    server = PostgresProcess(root, name)
    for directory in (server.root, server.state, server.socket):
        directory.mkdir(mode=0o755, exist_ok=True)
    server.own(server.state, server.socket)
    return server


async def wal_source(root: Path, count: int, *, full_pages: bool = True) -> WalSource:
    """Take what an earlier run has left in `root`, if it is enough, or make it.

    `full_pages`: nearly each change is logged with its whole page; else only the first touch of each page is, so that the log is of
    changes, which are much more work to replay for each byte.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o755)  # noqa: ASYNC240 - nothing else runs
    described = root / "segments.json"
    if not described.exists() or len(json.loads(described.read_text())) < count:
        described.unlink(missing_ok=True)
        await _make(root, count, full_pages=full_pages)
    return WalSource(root / "before", server_at(root, "source"), tuple(json.loads(described.read_text())))


async def _make(root: Path, count: int, *, full_pages: bool) -> None:
    """Goes on where an interrupted run, or one for fewer segments, has ended."""
    server = server_at(root, "source")
    before = root / "before"
    if not before.exists():
        shutil.rmtree(server.data, ignore_errors=True)
        await make_before(server, SCALE)
        copy = before.with_name("before.new")
        await asyncio.to_thread(subprocess.run, ["cp", "-a", str(server.data), str(copy)], check=True)
        copy.replace(before)
    if not full_pages:
        server.configure(max_wal_size="1TB")
    await server.start(deadline_s=120)
    while len(found := _finished(server)) < count:
        pgbench(server, "-n", "-M", "prepared", "-c", "4", "-T", "2")
        if full_pages:
            # The next touch of each page is logged with the whole page, as on a server with more data and more time.
            await server.execute("CHECKPOINT")
    await server.stop(deadline_s=120)
    (root / "segments.json").write_text(json.dumps(found))


async def make_before(server: PostgresProcess, scale: int) -> None:
    """With pgbench's tables, stopped."""
    _run(
        ["initdb", "--no-sync", "--data-checksums", "--auth=trust", "--username=postgres", "-D", str(server.data)],
        server,
    )
    with (server.data / "postgresql.conf").open("a") as file:
        file.write("".join(f"{name} = '{value}'\n" for name, value in SETTINGS.items()))
        file.write("include_if_exists 'test.conf'\n")
    await server.start()
    pgbench(server, "-i", "-s", str(scale), "-q")
    await server.stop(deadline_s=60)
    for path in (server.data / "pg_wal/archive_status").iterdir():
        path.unlink()


def _finished(server: PostgresProcess) -> list[str]:
    """Since `before`: all that the server has marked as ready, or an earlier run as done."""
    status = server.data / "pg_wal/archive_status"
    return sorted({path.stem for path in status.iterdir()})


def pgbench(server: PostgresProcess, *options: str) -> None:
    _run(["pgbench", "-h", str(server.socket), "-p", str(server.port), "-U", "postgres", *options, "postgres"], server)


def _run(argv: list[str], server: PostgresProcess) -> None:
    owner = run_as()
    server.own(server.root)
    done = subprocess.run(
        [str(BIN_DIRECTORY / argv[0]), *argv[1:]],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        user=None if owner is None else owner.uid,
        group=None if owner is None else owner.gid,
        extra_groups=None if owner is None else [],
    )
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]}: {done.stderr[-2000:]}")


@contextlib.contextmanager
def emptied(directory: Path) -> Iterator[Path]:
    """A directory that is empty at the start, and gone at the end."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
