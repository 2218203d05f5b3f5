"""Who flushes a restored file: Postgres itself, before it reads it. So the archiver need not, and its disk only begins."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from archiving_server import all_archived, archiving, cold_copy, insert, prepared
from fetch_steps import SEGMENT, A, fetch, fill, restored
from harness import BIN_DIRECTORY, Cluster
from recovering_server import recovery_of

from instance_manager.archive import spool

STRACE = shutil.which("strace")


@pytest.mark.timeout(240)
@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
async def test_postgres_flushes_each_segment_that_it_is_handed_before_it_takes_its_place(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server = cluster.add("p")
    with archiving(server, directory_section) as made:
        copy = await cold_copy(cluster, server)
        system = await prepared(cluster, made)
        await insert(server, 0, 10_000)
        await all_archived(server)
        server.kill()
    async with recovery_of(cluster, copy, directory_section, system) as recovery:
        trace = recovery.server.state / "trace"
        recovery.server.bin_directory = traced(recovery.server.state, trace)
        recovery.server.configure(fsync="on")
        await recovery.start()
        assert await recovery.rows() == set(range(10_000))
    flushed, taken = False, 0
    for line in trace.read_text().splitlines():
        if re.search(r"fsync\(\d+<[^>]*/pg_wal/RECOVERYXLOG>", line):
            flushed = True
        elif re.search(r'rename\("pg_wal/RECOVERYXLOG", "pg_wal/[0-9A-F]{24}"\) += 0', line):
            assert flushed, line
            flushed, taken = False, taken + 1
    assert taken >= 3


def traced(directory: Path, trace: Path) -> Path:
    """A folder whose `postgres` runs under strace, with the process number that its starter knows."""
    folder = directory / "traced"
    folder.mkdir()
    program = folder / "postgres"
    calls = "trace=fsync,rename"
    program.write_text(f'#!/bin/sh\nexec {STRACE} -D -f -y -e {calls} -o {trace} {BIN_DIRECTORY}/postgres "$@"\n')
    for path in (folder, program):
        path.chmod(0o755)
    return folder


async def test_the_archiver_waits_for_no_disk_and_only_begins_to_write(
    local_desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin_writing = spool.begin_writing

    def noted(file_descriptor: int) -> bool:
        begun.append(os.fstat(file_descriptor).st_size)
        done = begin_writing(file_descriptor)
        assert done
        return done

    def never(file_descriptor: int) -> None:
        raise AssertionError("it was waited for the disk")

    await fill(local_desk, A)
    monkeypatch.setattr(spool, "begin_writing", noted)
    monkeypatch.setattr(os, "fsync", never)
    await fetch(local_desk, A)
    assert begun == [SEGMENT]
    assert len(restored(local_desk)) == SEGMENT
