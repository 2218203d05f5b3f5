"""What the benchmarks stand on: the S3 stand-in keeps the rules that our store relies on, and no CPU time escapes the meter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("postgres", "archive")]

from certificates import make_certificate  # noqa: E402
from runs import replay_seconds, stand_in  # noqa: E402

from instance_manager.archive.content import MemoryContent, read_object  # noqa: E402
from instance_manager.archive.stores.probe import probe  # noqa: E402
from instance_manager.archive.stores.s3 import S3Settings, S3Store  # noqa: E402
from instance_manager.ports import ObjectExists  # noqa: E402


@pytest.fixture
async def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[S3Store]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    certificate, key = make_certificate(tmp_path)
    directory = tmp_path / "objects"
    directory.mkdir()
    with stand_in(directory, certificate, key, 0.0) as process:
        assert process.stdout is not None
        endpoint = f"https://127.0.0.1:{int(process.stdout.readline())}"
        made = S3Store(
            S3Settings(bucket="b", endpoint=endpoint, region="us-east-1", path_style=True, ca_file=certificate)
        )
        yield made
        await made.close()


async def test_the_stand_in_creates_once_and_gives_back_what_it_got(store: S3Store) -> None:
    await probe(store, "probe", deadline_s=10)
    await store.create("a/b/1", MemoryContent.of(b"first"), metadata={"sha256": "x"}, deadline_s=10)
    with pytest.raises(ObjectExists):
        await store.create("a/b/1", MemoryContent.of(b"second"), deadline_s=10)
    assert await read_object(store, "a/b/1", deadline_s=10) == b"first"
    info = await store.info("a/b/1", deadline_s=10)
    assert info is not None
    assert (info.metadata, info.vouched) == ({"sha256": "x"}, True)
    assert await store.info("a/b/2", deadline_s=10) is None
    await store.create("a/c", MemoryContent.of(b""), deadline_s=10)
    assert [each.name async for each in store.entries("a/", shallow=True, deadline_s=10)] == ["a/b/", "a/c"]
    assert [each.name async for each in store.entries("a/", deadline_s=10)] == ["a/b/1", "a/c"]


METERED = """
import subprocess, sys, time
from measure import CpuMeter, adopt_orphans
adopt_orphans()
meter = CpuMeter()
burn = "import os, time\\nif os.fork(): os._exit(0)\\nos.setsid()\\nwhile time.process_time() < 0.3: pass\\n"
subprocess.run([sys.executable, "-c", burn], check=True)
while meter.reap():
    time.sleep(0.01)
print(meter.reaped_s)
"""


def test_the_time_of_what_detaches_itself_is_counted() -> None:
    # In a process of its own: it becomes the parent of every orphan, and waits for all of them.
    done = subprocess.run(
        [sys.executable, "-c", METERED],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert 0.3 <= float(done.stdout) < 3.0


def test_the_replay_is_timed_by_postgres_log() -> None:
    log = (
        "2030-01-01 00:00:01.250 UTC [7] startup LOG:  redo starts at 0/11000028\n"
        '2030-01-01 00:00:03.750 UTC [7] startup LOG:  recovery stopping after WAL location (LSN) "0/12000000"\n'
    )
    assert replay_seconds(log) == 2.5
