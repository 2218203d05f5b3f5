"""Archiving and replay, ours beside pgBackRest and barman-cloud: the same WAL, store and codec, runs interleaved.

python archive_benchmark.py --segments 100 --rounds 3 [--store s3|minio|directory] [--delay-ms 30] [--peers ...] [--no-replay]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("postgres", "archive")]

from certificates import make_certificate  # noqa: E402
from measure import CpuMeter, adopt_orphans  # noqa: E402
from minio_server import minio_server  # noqa: E402
from peers import BUCKET, REPLAYED_MAX, BarmanCloud, Busy, Moved, Nothing, Ours, Peer, PgBackRest, Placed, Store  # noqa: E402
from runs import archive, replay, stand_in  # noqa: E402
from s3_server import admin  # noqa: E402
from wal_source import WalSource, emptied, wal_source  # noqa: E402

DEFAULT_ROOT = Path("/tmp/instance-manager-benchmark")
Results = dict[str, dict[str, list[float]]]


def peer_of(name: str, store: Store, parallel: int, work: Path) -> Peer:
    if name == "nothing":
        return Nothing()
    if name == "busy":
        return Busy()
    if name == "mv":
        return Moved(work)
    kinds = {"ours": Ours, "placed": Placed, "pgbackrest": PgBackRest, "barman": BarmanCloud}
    made: Peer = kinds[name](store, parallel, work)
    return made


async def one_run(source: WalSource, name: str, arguments: argparse.Namespace, root: Path, results: Results) -> None:
    with emptied(root / "work") as work, emptied(root / "store") as directory:
        source.server.own(work, directory)
        certificate, key = make_certificate(root)
        meter = CpuMeter()
        if arguments.store == "directory":
            store = Store(certificate, directory=directory)
            await measured(source, peer_of(name, store, arguments.parallel, work), arguments, root, meter, results)
            return
        if arguments.store == "minio":
            with minio_server(directory) as minio:
                assert minio.process is not None
                admin(minio.url, minio.certificate).create_bucket(Bucket=BUCKET)
                store = Store(minio.certificate, port=minio.port)
                meter.left_out = frozenset({minio.process.pid})
                await measured(source, peer_of(name, store, arguments.parallel, work), arguments, root, meter, results)
            return
        with stand_in(directory, certificate, key, arguments.delay_ms) as process:
            assert process.stdout is not None
            store = Store(certificate, port=int(process.stdout.readline()))
            meter.left_out = frozenset({process.pid})
            await measured(source, peer_of(name, store, arguments.parallel, work), arguments, root, meter, results)


async def measured(
    source: WalSource, peer: Peer, arguments: argparse.Namespace, root: Path, meter: CpuMeter, results: Results
) -> None:
    count = arguments.segments
    found: dict[str, float] = {}
    try:
        done = await archive(source, count, peer, meter)
        found["segments/s"] = count / done.seconds
        found["CPU ms/segment"] = done.cpu_s / count * 1000
        found["failed"] = done.failed
        if done.peak_mib is not None:
            found["peak MiB"] = done.peak_mib
        if not arguments.no_replay:
            from_pg_wal = type(peer) in (Nothing, Busy)
            count = min(count, REPLAYED_MAX)
            if isinstance(peer, Placed):
                peer.placed_before = min(peer.placed_before, count - 1)
            replayed = await replay(source, count, peer, meter, root, from_pg_wal=from_pg_wal)
            found["replay s"], found["replay CPU s"] = replayed.seconds, replayed.cpu_s
    finally:
        peer.close()
        meter.reap()
    for key, value in found.items():
        results[peer.name][key].append(value)
    print(peer.name, {key: round(value, 2) for key, value in found.items()}, flush=True)


async def benchmark(arguments: argparse.Namespace) -> Results:
    results: Results = defaultdict(lambda: defaultdict(list))
    full_pages = arguments.wal == "pages"
    wal = arguments.root / ("wal" if full_pages else "wal-of-changes")
    source = await wal_source(wal, arguments.segments, full_pages=full_pages)
    for _ in range(arguments.rounds):
        for name in arguments.peers:
            await one_run(source, name, arguments, arguments.root, results)
    return results


def table(results: Results) -> str:
    """Median, and the range in brackets."""
    keys = list(dict.fromkeys(key for found in results.values() for key in found))
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, found in results.items():
        cells = [
            f"{statistics.median(found[key]):.1f} ({min(found[key]):.1f} to {max(found[key]):.1f})"
            if found[key]
            else ""
            for key in keys
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", choices=["s3", "minio", "directory"], default="s3")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="for each request of the stand-in")
    parser.add_argument(
        "--wal", choices=["pages", "changes"], default="pages", help="mostly full pages, or few of them"
    )
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--peers", nargs="+", default=["nothing", "mv", "ours", "pgbackrest", "barman"])
    parser.add_argument("--no-replay", action="store_true")
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    adopt_orphans()
    results = asyncio.run(benchmark(arguments))
    print(table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
