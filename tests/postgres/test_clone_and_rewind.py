"""A clone appears whole or not at all; a directory whose rewind did not end is never started."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from harness import frozen, processes_of, title_of, wait_until
from own_fixtures import own_template, servers
from own_server import OwnServer, Servers

from instance_manager.core.types import Timeline
from instance_manager.postgres.clone import (
    CloneDeadlines,
    CloneProgress,
    CloneRefused,
    SourceServer,
    clone,
    parse_progress,
)
from instance_manager.postgres.configuration import REPLICATION_CONF, ReplicationSettings
from instance_manager.postgres.control_data import ClusterState, read_control_data
from instance_manager.postgres.directory import (
    DirectoryRefused,
    DirectoryState,
    inspect_directory,
    remove_leftovers,
    require_startable,
    set_aside,
)
from instance_manager.postgres.rewind import RewindFailed, RewindOutcome, SourceNotReady, rewind, rewind_marker
from instance_manager.postgres.server import DeadlinePassed, LocalServer, ProgramFailed
from instance_manager.postgres.sql import session

__all__ = ["own_template", "servers"]

TWO = Timeline(2)


async def test_a_clone_reports_progress_and_starts_as_a_standby_with_our_files_only(servers: Servers) -> None:
    primary = await servers.primary()
    copy = servers.new("b")
    seen: list[CloneProgress] = []
    system = (await read_control_data(primary.server)).system_identifier
    await clone(copy.server, primary.source(), system_identifier=system, on_progress=seen.append)
    assert seen
    assert seen[-1].done_bytes > 10_000_000
    assert seen[-1].total_bytes >= seen[0].total_bytes > 0
    report = inspect_directory(copy.server)
    assert report.state is DirectoryState.INITIALISED
    assert report.has_standby_signal
    assert report.leftovers == ()
    assert not (copy.data / REPLICATION_CONF).exists()
    with pytest.raises(DirectoryRefused, match="not ours yet"):
        require_startable(copy.server)
    assert copy.data.stat().st_mode & 0o777 == 0o700
    copy.follow(primary)
    await copy.start()
    assert await copy.fetchval("select pg_is_in_recovery()")
    with pytest.raises(DirectoryRefused, match="taken"):
        await clone(copy.server, primary.source(), system_identifier=system)


async def test_an_interrupted_clone_leaves_nothing_that_could_be_started(servers: Servers) -> None:
    primary = await servers.primary()
    copy = servers.new("b")
    begun = asyncio.Event()
    running = asyncio.create_task(
        clone(copy.server, primary.source(), system_identifier=None, on_progress=lambda _: begun.set())
    )
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert inspect_directory(copy.server).state is DirectoryState.MISSING
    assert inspect_directory(copy.server).leftovers == ()
    await primary.wait_for("select not exists(select from pg_stat_replication)")
    # A killed agent could not clean up.
    half = copy.data.with_name("data.clone-0123abcd")
    half.mkdir()
    (half / "PG_VERSION").write_text("15")
    stranger = copy.data.with_name("data.clone-mine")
    stranger.mkdir()
    assert remove_leftovers(copy.server) == (half,)
    assert not half.exists()
    assert stranger.exists()


def clone_alone(server: LocalServer, source: SourceServer) -> None:
    asyncio.run(clone(server, source, system_identifier=None))


async def test_a_killed_agent_leaves_nobody_who_still_writes_into_tablespaces(servers: Servers) -> None:
    """They have no other place: the next copy would be in the same."""
    primary = await servers.primary()
    copy = servers.new("b")
    agent = multiprocessing.get_context("spawn").Process(target=clone_alone, args=(copy.server, primary.source()))

    async def begun() -> list[int]:
        return programs(str(copy.data))

    # The source has a checkpoint to make first, and does not.
    (checkpointer,) = (pid for pid in processes_of(primary.data) if "checkpointer" in title_of(pid))
    try:
        with frozen(checkpointer):
            agent.start()
            await wait_until(begun, deadline_s=20, what="pg_basebackup")
            (half,) = inspect_directory(copy.server).leftovers
            agent.kill()
            agent.join()
            # It waits for the last of them.
            assert remove_leftovers(copy.server) == (half,)
            assert programs(str(copy.data)) == []
    finally:
        agent.kill()


def programs(data_directory: str) -> list[int]:
    """Every pg_basebackup into a place beside it that still lives."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if argv[0].endswith("/pg_basebackup") and any(f"--pgdata={data_directory}.clone-" in word for word in argv):
                found.append(int(entry.name))
    return found


async def test_a_clone_that_cannot_be_made_or_is_of_another_system_leaves_nothing(servers: Servers) -> None:
    primary = await servers.primary()
    copy = servers.new("b")
    with pytest.raises(CloneRefused):
        await clone(copy.server, primary.source(), system_identifier=1)
    with pytest.raises(ProgramFailed):
        await clone(copy.server, primary.source(user="nobody"), system_identifier=None)
    assert primary.process is not None
    frozen = asyncio.create_task(
        clone(copy.server, primary.source(), system_identifier=None, deadlines=CloneDeadlines(start_s=0.05))
    )
    with pytest.raises(DeadlinePassed, match="its start"):
        await frozen
    assert inspect_directory(copy.server).state is DirectoryState.MISSING
    assert inspect_directory(copy.server).leftovers == ()


async def diverged(servers: Servers) -> tuple[OwnServer, OwnServer]:
    """A stopped former primary with rows that its promoted standby does not have."""
    old = await servers.primary()
    new = await servers.standby(old)
    async with session(old.server) as opened:
        await opened.execute("create table public.t(n int); insert into public.t values (1)")
        await opened.execute("checkpoint")
    await new.wait_for("select to_regclass('public.t') is not null")
    new.configure(replication=ReplicationSettings(synchronous_standby_names=""))
    await new.fetchval("select pg_reload_conf()")
    await new.wait_for("select not exists(select from pg_stat_wal_receiver)")
    async with session(old.server) as opened:
        await opened.execute("insert into public.t select 2 from generate_series(1, 1000)")
    await new.fetchval("select pg_promote()")
    async with session(new.server) as opened:
        await opened.execute("insert into public.t values (3)")
    old.kill()
    return old, new


async def test_a_diverged_former_primary_is_rewound_and_follows(servers: Servers) -> None:
    old, new = await diverged(servers)
    assert (await read_control_data(old.server)).state is ClusterState.IN_PRODUCTION
    async with session(new.server) as opened:
        await opened.execute("checkpoint")
    lines: list[str] = []
    outcome = await rewind(old.server, new.source(), timeline=TWO, on_line=lines.append)
    assert outcome is RewindOutcome.REWOUND
    assert lines
    assert rewind_marker(old.server) is None
    assert inspect_directory(old.server).has_standby_signal
    with pytest.raises(DirectoryRefused, match="not ours yet"):
        require_startable(old.server)
    old.follow(new)
    await old.start()
    await old.wait_for("select count(*) = 2 from public.t")
    await old.wait_for("select exists(select from pg_stat_wal_receiver where status = 'streaming')")
    await old.stop()
    again = await rewind(old.server, new.source(), timeline=TWO)
    assert again is RewindOutcome.NOT_NEEDED
    await old.start()


async def test_a_source_that_has_not_checkpointed_or_is_not_there_costs_no_attempt(servers: Servers) -> None:
    old, new = await diverged(servers)
    with pytest.raises(SourceNotReady):
        await rewind(old.server, new.source(), timeline=Timeline(3))
    with pytest.raises(SourceNotReady):
        await rewind(old.server, replace(new.source(), port=1), timeline=TWO)
    assert rewind_marker(old.server) is None
    require_startable(old.server)


async def test_a_failed_rewind_leaves_the_marker_and_the_directory_refuses(servers: Servers) -> None:
    old, new = await diverged(servers)
    async with session(new.server) as opened:
        await opened.execute("checkpoint")
    for segment in (old.data / "pg_wal").glob("0000000100000000*"):
        segment.unlink()
    for attempt in (1, 2):
        with pytest.raises(RewindFailed) as failed:
            await rewind(old.server, new.source(), timeline=TWO)
        assert failed.value.attempts == attempt
        assert failed.value.output
    marker = rewind_marker(old.server)
    assert marker is not None
    assert marker.attempts == 2
    with pytest.raises(DirectoryRefused, match="half rewound"):
        require_startable(old.server)
    system = (await read_control_data(new.server)).system_identifier
    aside = set_aside(old.server)
    assert aside.name == "data.set-aside-1"
    await clone(old.server, new.source(), system_identifier=system)
    assert rewind_marker(old.server) is None
    old.follow(new)
    require_startable(old.server)
    assert set_aside(old.server).name == "data.set-aside-2"
    assert not aside.exists()


def test_only_progress_lines_are_progress() -> None:
    assert parse_progress("  1024/23456 kB (4%), 0/1 tablespace (/x)") == CloneProgress(1024 * 1024, 23456 * 1024)
    assert parse_progress("waiting for checkpoint") is None
