"""The keys of an archive in S3 show up nowhere: not while it works, and not while the store refuses and repeats them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_harness import eventually, running_cluster
from cluster_tools import http_get, log_end, messages, superuser_sql

from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import ArchivePlan

sys.path.append(str(Path(__file__).parent.parent / "archive"))
from fault_proxy import FaultProxy
from s3_server import REGION, make_bucket, s3_server

pytestmark = pytest.mark.timeout(240)

PLANTED = "planted0123456789abcdefghijklmnopqrstuvwxyz"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultProxy]:
    with s3_server() as url, FaultProxy(url).running() as made:
        made.bucket = make_bucket(url)  # type: ignore[attr-defined]
        yield made


@pytest.fixture(scope="module")
def cluster(proxy: FaultProxy) -> Iterator[LocalCluster]:
    before = {name: os.environ.get(name) for name in SECRETS}
    os.environ |= {name: f"{PLANTED}-{name}" for name in SECRETS} | {"AWS_REGION": REGION}
    try:
        plan = ArchivePlan(endpoint=proxy.url, bucket=proxy.bucket)  # type: ignore[attr-defined]
        with running_cluster(instances=2, archive=plan) as made:
            yield made
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class CommandLines:
    """Of every process of the machine, as often as they can be read while the block lasts: archive_command lives for milliseconds."""

    def __init__(self) -> None:
        self.found: set[bytes] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.found.add(path.read_bytes())
                except OSError:
                    continue

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)


def command(cluster: LocalCluster, *arguments: str) -> str:
    config = cluster.layout.config(cluster.names[0])
    done = subprocess.run(
        [sys.executable, "-m", "instance_manager", *arguments, "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def places(cluster: LocalCluster) -> dict[str, str]:
    found = {}
    for name in cluster.names:
        found[f"log of {name}"] = cluster.layout.log(name).read_text(errors="replace")
        for path in ("/status", "/metrics", "/readyz", "/cluster", "/patroni"):
            found[f"{path} of {name}"] = http_get(cluster, name, path, timeout_s=15).body
        for file in sorted(cluster.layout.instance(name).rglob("state/*")):
            if file.is_file():
                found[str(file)] = file.read_text(errors="replace")
        family = cluster.processes(name)
        managers = {each.pid for each in (family.supervisor, family.agent, family.archiver) if each is not None}
        for process in family.everything:
            files = ("cmdline",) if process.pid in managers else ("cmdline", "environ")
            for each in files:
                content = Path(f"/proc/{process.pid}/{each}").read_bytes()
                found[f"{each} of {process.pid}"] = content.decode(errors="replace")
    return found


def test_keys_and_tokens_of_the_archive_show_up_nowhere(cluster: LocalCluster, proxy: FaultProxy) -> None:
    primary = cluster.wait_primary()
    told: dict[str, str] = {}
    with CommandLines() as lines:
        superuser_sql(cluster, primary, "SELECT pg_switch_wal()")
        eventually(
            cluster,
            lambda: int(superuser_sql(cluster, primary, "SELECT archived_count FROM pg_stat_archiver")) > 0,
            within_s=60,
            what="a segment is archived",
        )
        told["backups"] = command(cluster, "backups")
        begun = log_end(cluster, primary)
        proxy.fail("403 AccessDenied-Echo")
        superuser_sql(cluster, primary, "SELECT pg_logical_emit_message(true, 'test', 'x')")
        superuser_sql(cluster, primary, "SELECT pg_switch_wal()")
        eventually(
            cluster,
            lambda: any(line.startswith("archive trouble") for line in messages(cluster, primary, offset=begun)),
            within_s=60,
            what="the trouble is told",
        )
        told["backups, refused"] = command(cluster, "backups")
        told["archive check, refused"] = command(cluster, "archive", "check")
        told |= places(cluster)
        proxy.heal()
    told["command lines"] = b"\n".join(lines.found).decode(errors="replace")
    assert "archive.sock" in told["command lines"], "archive_command was seen"
    assert "AccessDenied-Echo" in told[f"log of {primary}"]
    assert "AccessDenied-Echo" in told[f"/status of {primary}"]
    assert "AccessDenied-Echo" in told["backups, refused"]
    assert sum(place.startswith("environ") for place in told) >= 8
    # The settings of every session, and what they run.
    told["settings"] = superuser_sql(cluster, primary, "SELECT string_agg(setting, ' ') FROM pg_settings")
    assert [place for place, text in told.items() if PLANTED in text] == []
