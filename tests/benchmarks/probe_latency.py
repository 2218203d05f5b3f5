"""How soon `/livez` and `/readyz` of a real primary answer at 200 requests a second, beside a bare handler in the same minute.

    .venv/bin/python tests/benchmarks/probe_latency.py [--seconds 15] [--json FILE]

For each situation (pgbench loads the machine; the store is away; Postgres is frozen, or stopped; the disk hangs) requests are sent at fixed times, whether or not
earlier ones were answered, and each is timed from when it was due. The floor is a bare aiohttp handler in a process of its own, asked
in turn with the probes: what of a figure is the machine's and not ours. Where the floor itself is beyond the limit the machine is too busy to tell, and
what is held is that the probes are no more than a quarter slower than it (and 5 ms).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).parent.parent / "cluster"))

from cluster_harness import FAST
from cluster_tools import done, stopped

from instance_manager.demo import plan
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.ports import choose_base_port
from instance_manager.drill.disk import Volumes, why_unavailable

REQUESTS_PER_S = 200
ANSWER_WITHIN_S = 10.0
LIMIT_LOADED_S = 0.020
LIMIT_BROKEN_S = 1.0
REDUNDANT_WITHIN_S = 240.0
"""Also on a machine that is busy with other work: three clones, and a rejoin after each situation."""

FLOOR = """
import asyncio, sys
from aiohttp import web
async def handle(request): return web.json_response({"ok": True})
async def main():
    application = web.Application(); application.router.add_get("/floor", handle)
    runner = web.AppRunner(application, access_log=None); await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
asyncio.run(main())
"""


@contextlib.contextmanager
def floor() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", FLOOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/floor"
    finally:
        process.communicate(timeout=20)


@contextlib.contextmanager
def pgbench(cluster: LocalCluster, seconds: float) -> Iterator[None]:
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))
    program = str(binaries[-1]) if binaries else "pgbench"
    target = cluster.connection_string()
    subprocess.run([program, "-i", "-q", "-s", "2", target], check=True, capture_output=True, timeout=120)
    load = subprocess.Popen(
        [program, "-c", "8", "-j", "2", "-T", str(int(seconds + 30)), target],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        load.terminate()
        load.wait(20)


async def measure(urls: dict[str, str], seconds: float) -> dict[str, list[float]]:
    """Seconds from when each request was due; a missing answer counts as the longest."""
    took: dict[str, list[float]] = {name: [] for name in urls}
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)) as session:

        async def ask(name: str, due_s: float) -> None:
            try:
                async with session.get(urls[name]) as response:
                    await response.read()
            except (aiohttp.ClientError, TimeoutError):
                took[name].append(ANSWER_WITHIN_S)
                return
            took[name].append(loop.time() - due_s)

        began_s, names, asked = loop.time(), list(urls), []
        for number in range(int(seconds * REQUESTS_PER_S)):
            due_s = began_s + number / REQUESTS_PER_S
            await asyncio.sleep(max(0, due_s - loop.time()))
            asked.append(asyncio.create_task(ask(names[number % len(names)], due_s)))
        await asyncio.gather(*asked)
    return took


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@contextlib.contextmanager
def cluster_on_volumes() -> Iterator[tuple[LocalCluster, Volumes]]:
    """Each instance on a file system of its own that can be frozen."""
    made = plan.loopback_plan(instances=3, base_port=choose_base_port(6, None, spread=True), parameters=FAST)
    with contextlib.ExitStack() as stack:
        cluster = LocalCluster.create(made)
        stack.callback(cluster.close)
        volumes = Volumes(cluster.layout.directory / "volumes")
        stack.callback(volumes.close)
        volumes.open([(name, cluster.layout.instance(name)) for name in cluster.names])
        stack.callback(cluster.stop_all)
        cluster.start_all()
        cluster.wait_redundant(REDUNDANT_WITHIN_S)
        yield cluster, volumes


@contextlib.contextmanager
def store_away(cluster: LocalCluster) -> Iterator[None]:
    for name in cluster.names:
        plan.disconnect_store(cluster.layout, name)
    try:
        yield
    finally:
        for name in cluster.names:
            plan.connect_store(cluster.layout, name)


@contextlib.contextmanager
def postgres_frozen(cluster: LocalCluster, name: str) -> Iterator[None]:
    found = cluster.processes(name)
    manager = {process.pid for process in (found.supervisor, found.agent) if process is not None}
    with stopped(*(process for process in found.everything if process.pid not in manager)):
        yield


@contextlib.contextmanager
def postgres_stopped(cluster: LocalCluster, name: str) -> Iterator[None]:
    done(cluster, name, "fence", name)
    try:
        yield
    finally:
        done(cluster, name, "unfence", name)


@contextlib.contextmanager
def disk_hung(volumes: Volumes, name: str) -> Iterator[None]:
    volumes.freeze(name)
    try:
        yield
    finally:
        volumes.thaw(name)


def situations(seconds: float) -> Iterator[tuple[str, float, dict[str, list[float]]]]:
    if (missing := why_unavailable()) is not None:
        raise SystemExit(f"the hung disk cannot be made here: {missing}")
    with floor() as floor_url, cluster_on_volumes() as (cluster, volumes):

        def asked(situation: contextlib.AbstractContextManager[None], name: str) -> dict[str, list[float]]:
            member = cluster.plan.member(name)
            base = f"http://{member.host}:{member.http_port}"
            urls = {"floor": floor_url, "/livez": f"{base}/livez", "/readyz": f"{base}/readyz"}
            with situation:
                return asyncio.run(measure(urls, seconds))

        yield "idle", LIMIT_LOADED_S, asked(contextlib.nullcontext(), cluster.wait_redundant(REDUNDANT_WITHIN_S))
        primary = cluster.wait_redundant(REDUNDANT_WITHIN_S)
        yield "pgbench", LIMIT_LOADED_S, asked(pgbench(cluster, seconds), primary)
        primary = cluster.wait_redundant(REDUNDANT_WITHIN_S)
        yield "store away", LIMIT_BROKEN_S, asked(store_away(cluster), primary)
        primary = cluster.wait_redundant(REDUNDANT_WITHIN_S)
        yield "Postgres frozen", LIMIT_BROKEN_S, asked(postgres_frozen(cluster, primary), primary)
        primary = cluster.wait_redundant(REDUNDANT_WITHIN_S)
        yield "Postgres stopped", LIMIT_BROKEN_S, asked(postgres_stopped(cluster, primary), primary)
        primary = cluster.wait_redundant(REDUNDANT_WITHIN_S)
        yield "disk hung", LIMIT_BROKEN_S, asked(disk_hung(volumes, primary), primary)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, within = [], True
    print(f"{'situation':18}{'route':10}{'requests':>9}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}")
    for situation, limit_s, took in situations(arguments.seconds):
        floor_s = percentile(took["floor"], 0.99)
        allowed_s = limit_s if floor_s < limit_s else floor_s * 1.25 + 0.005
        if floor_s >= limit_s:
            print(
                f"{situation}: the bare handler needs more than {1000 * limit_s:.0f} ms: too busy (load {os.getloadavg()[0]:.0f})"
            )
        for name, values in took.items():
            row = {
                "situation": situation,
                "load": round(os.getloadavg()[0], 1),
                "route": name,
                "requests": len(values),
                "p50_ms": round(percentile(values, 0.5) * 1000, 2),
                "p99_ms": round(percentile(values, 0.99) * 1000, 2),
                "max_ms": round(max(values) * 1000, 2),
            }
            rows.append(row)
            print("{situation:18}{route:10}{requests:9}{p50_ms:9}{p99_ms:9}{max_ms:9}".format(**row), flush=True)
            within = within and (name == "floor" or percentile(values, 0.99) < allowed_s)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"at": time.strftime("%Y-%m-%d"), "rows": rows}, indent=1))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
