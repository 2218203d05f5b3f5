"""What a file costs while very many wait: the archiver's process, asked over its socket for one after another, as Postgres asks.

    python backlog_benchmark.py [--files 1000 50000] [--only 3000]

Segments of 1 MiB that are holes behind a right first page, so that compression costs next to nothing, and what grows with
the backlog would show. `.ready` becomes `.done` at each answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("postgres", "archive")]

from archiving_server import ArchivingServer, ask  # noqa: E402
from harness import PostgresProcess  # noqa: E402
from measure import peak_resident_mib  # noqa: E402
from wal_builders import SIZE, SYSTEM, first_page  # noqa: E402

FIRST = "000000010000000000000001"
MEASURED = 1000
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def make_backlog(wal: Path, count: int) -> list[str]:
    (wal / "archive_status").mkdir(parents=True)
    names, name = [], FIRST
    for _ in range(count):
        with (wal / name).open("wb") as file:
            file.write(first_page(name))
            file.truncate(SIZE.size_bytes)
        (wal / "archive_status" / f"{name}.ready").touch()
        names.append(name)
        name = SIZE.next_name(name)
    return names


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


async def work_off(root: Path, files: int, only: int) -> None:
    server = PostgresProcess(root, "p")
    for directory in (server.root, server.state, server.socket, root / "archive"):
        directory.mkdir(parents=True)
    names = make_backlog(server.data / "pg_wal", files)
    status = server.data / "pg_wal/archive_status"
    made = ArchivingServer(server, {"directory": str(root / "archive"), "stream_interval_s": 0})
    await made.start_archiver()
    try:
        assert made.process is not None
        pid = made.process.pid
        made.order("primary", SYSTEM)
        cpu_before_s, begin_s = cpu_s(pid), time.monotonic()
        for number, name in enumerate(names[:only], 1):
            answer = ask(made.socket, f"push\t{name}".encode())
            assert answer == "done", answer
            (status / f"{name}.ready").replace(status / f"{name}.done")
            if number % MEASURED == 0 and (number <= 3 * MEASURED or number % (10 * MEASURED) == 0):
                # The last thousand each time.
                print(
                    f"{files - number + MEASURED:6} waited: {(cpu_s(pid) - cpu_before_s) / MEASURED * 1000:.2f} ms of CPU, "
                    f"{(time.monotonic() - begin_s) / MEASURED * 1000:.2f} ms a file, peak {peak_resident_mib(pid):.0f} MiB",
                    flush=True,
                )
            if number % MEASURED == 0:
                cpu_before_s, begin_s = cpu_s(pid), time.monotonic()
                made.order("primary", SYSTEM)
        assert made.status()["push"]["archived"] >= min(files, only)
    finally:
        made.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 50_000])
    parser.add_argument("--only", type=int, default=1 << 30, help="stop after so many, although more wait")
    parser.add_argument("--directory", type=Path, help="where the backlog is made; default: the system's temporary one")
    arguments = parser.parse_args()
    for files in arguments.files:
        with tempfile.TemporaryDirectory(prefix="im-backlog-", dir=arguments.directory) as root:
            Path(root).chmod(0o755)
            print(f"a backlog of {files} files")
            asyncio.run(work_off(Path(root), files, arguments.only))


if __name__ == "__main__":
    main()
