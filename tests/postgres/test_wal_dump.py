"""The end of the log that `wal_dump` finds is the one at which Postgres itself goes on."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from pathlib import Path

import pytest
from own_fixtures import own_template, servers
from own_server import OwnServer, Servers

from instance_manager.core.types import Lsn, Timeline, WalEnd, format_lsn, parse_lsn
from instance_manager.postgres.control_data import ControlData, read_control_data
from instance_manager.postgres.directory import create_standby_signal
from instance_manager.postgres.histories import History, read_history
from instance_manager.postgres.server import DeadlinePassed, run_program
from instance_manager.postgres.sql import session
from instance_manager.postgres.wal_dump import (
    BLOCK_BYTES,
    PositionUnknown,
    end_of_stopped_directory,
    end_of_wal,
    record_end,
    segment_file_name,
)

__all__ = ["own_template", "servers"]

SEGMENT_BYTES = 16 * 1024 * 1024
ONE = Timeline(1)
TWO = Timeline(2)


async def stopped_end(one: OwnServer, newest: Timeline = ONE, history: History = ()) -> WalEnd:
    return await end_of_stopped_directory(
        one.server, await read_control_data(one.server), newest=newest, history=history
    )


async def end_from(one: OwnServer, start: Lsn, *, timeline: Timeline = ONE, **others: object) -> WalEnd:
    control = await read_control_data(one.server)
    options: dict[str, object] = {
        "newest": timeline,
        "history": (),
        "system_identifier": control.system_identifier,
        "wal_segment_bytes": control.wal_segment_bytes,
        **others,
    }
    return await end_of_wal(one.server, start=WalEnd(timeline, start), **options)  # type: ignore[arg-type]


async def where_postgres_goes_on(one: OwnServer) -> Lsn:
    """Start the stopped directory as a standby of nobody: it replays all that is valid."""
    one.configure()
    create_standby_signal(one.server)
    await one.start()
    await one.wait_for("select pg_is_in_recovery()")
    last = Lsn(0)
    same = 0
    while same < 6:
        now = await one.lsn("pg_last_wal_replay_lsn")
        same = same + 1 if now == last else 0
        last = now
        await asyncio.sleep(0.05)
    return last


async def write_rows(one: OwnServer, count: int) -> None:
    async with session(one.server) as opened:
        await opened.execute("create table if not exists public.t(n bigint, filler text)")
        await opened.execute(
            "insert into public.t select n, repeat(md5(n::text), 1 + n::int % 40) from generate_series(1, $1::int) n",
            count,
            deadline_s=20,
        )


async def test_the_end_of_a_paused_standby_is_where_its_promotion_forks(servers: Servers) -> None:
    primary = await servers.primary()
    standby = await servers.standby(primary)
    await standby.fetchval("select pg_wal_replay_pause()")
    await standby.wait_for("select pg_get_wal_replay_pause_state() = 'paused'")
    await write_rows(primary, 20000)
    flushed = await primary.lsn("pg_current_wal_flush_lsn")
    await standby.wait_for(f"select pg_last_wal_receive_lsn() >= '{format_lsn(flushed)}'::pg_lsn")
    primary.kill()
    await standby.wait_for("select not exists(select from pg_stat_wal_receiver)")
    replayed = await standby.lsn("pg_last_wal_replay_lsn")
    end = await end_from(standby, replayed)
    assert replayed < flushed <= end.lsn
    # After a restart without a primary, receive says nothing, and replay may be anywhere (P3): the files still tell.
    await standby.fetchval("select pg_promote()")
    await standby.wait_for("select not pg_is_in_recovery()")
    history = read_history(standby.data / "pg_wal", TWO)
    assert history == ((ONE, end.lsn),)
    assert end == WalEnd(ONE, end.lsn)


async def test_the_end_after_a_crash_in_mid_load_is_where_recovery_ends(servers: Servers) -> None:
    primary = await servers.primary(max_wal_size="2GB", checkpoint_timeout="30min")
    begun = await primary.lsn("pg_current_wal_flush_lsn")
    load = asyncio.create_task(write_rows(primary, 2_000_000))
    await primary.wait_for(f"select pg_current_wal_flush_lsn() > '{format_lsn(begun)}'::pg_lsn + {6 << 20}")
    primary.kill()
    with pytest.raises(Exception, match=r"SQL|connection|no end"):
        await load
    control = await read_control_data(primary.server)
    assert not control.shut_down_cleanly
    end = await stopped_end(primary)
    assert end.lsn - control.redo_lsn > 4 * 1024 * 1024
    assert await where_postgres_goes_on(primary) == end.lsn
    assert not list(primary.root.glob("data.wal-view-*"))


async def test_the_end_of_a_clean_shutdown_is_after_its_checkpoint_record(servers: Servers) -> None:
    primary = await servers.primary()
    await write_rows(primary, 100)
    await primary.stop()
    control = await read_control_data(primary.server)
    assert control.shut_down_cleanly
    end = await stopped_end(primary)
    assert control.checkpoint_lsn < end.lsn <= control.checkpoint_lsn + 200
    assert await end_from(primary, end.lsn) == end


async def test_a_log_that_ends_with_a_segment_ends_at_the_boundary(servers: Servers) -> None:
    primary = await servers.primary()
    standby = await servers.standby(primary)
    await write_rows(primary, 100)
    switched = await primary.lsn("pg_switch_wal")
    boundary = -(-switched // SEGMENT_BYTES) * SEGMENT_BYTES
    await standby.wait_for(f"select pg_last_wal_replay_lsn() >= '{format_lsn(boundary)}'::pg_lsn")
    primary.kill()
    await standby.wait_for("select not exists(select from pg_stat_wal_receiver)")
    await standby.stop()
    at_rest = await stopped_end(standby)
    # The primary may have logged a snapshot of running transactions after the switch: then that is the end.
    assert at_rest.lsn >= boundary
    for number in range(boundary // SEGMENT_BYTES, boundary // SEGMENT_BYTES + 2):
        (standby.data / "pg_wal" / segment_file_name(ONE, number, SEGMENT_BYTES)).unlink(missing_ok=True)
    assert (await end_from(standby, (await read_control_data(standby.server)).redo_lsn)).lsn == boundary
    assert (await end_from(standby, Lsn(boundary))).lsn == boundary


async def test_the_end_is_followed_along_the_claimed_timelines_only(servers: Servers) -> None:
    first = await servers.primary()
    second = await servers.standby(first)
    await write_rows(first, 1000)
    await second.wait_for(
        f"select pg_last_wal_replay_lsn() >= '{format_lsn(await first.lsn('pg_current_wal_flush_lsn'))}'::pg_lsn"
    )
    third = await servers.standby(first, "c")
    third_start = await third.lsn("pg_last_wal_replay_lsn")
    await third.fetchval("select pg_wal_replay_pause()")
    # The first goes on alone after the second was cut off, and so diverges.
    second.configure()
    await second.stop()
    await second.start()
    await second.fetchval("select pg_promote()")
    await second.wait_for("select not pg_is_in_recovery()")
    await write_rows(first, 10)
    await write_rows(second, 3000)
    history = read_history(second.data / "pg_wal", TWO)
    assert history is not None
    switch_lsn = history[0][1]
    second_end = await second.lsn("pg_current_wal_flush_lsn")
    await second.stop()
    first.kill()
    await third.stop()

    on_two = await stopped_end(second, TWO, history)
    assert on_two.timeline == TWO
    assert on_two.lsn > second_end
    from_before = await end_from(second, third_start, newest=TWO, history=history)
    assert from_before == on_two
    assert (await end_from(second, switch_lsn, newest=TWO, history=history)) == on_two
    diverged = await stopped_end(first, TWO, history)
    assert diverged.timeline == ONE
    assert diverged.lsn > switch_lsn
    # An unclaimed timeline is not looked at.
    assert (await end_from(second, third_start)).timeline == ONE

    # A log that is on the second timeline in name, but ends before the fork, holds nothing of it.
    segment = switch_lsn // SEGMENT_BYTES
    copied = second.data / "pg_wal" / segment_file_name(TWO, segment, SEGMENT_BYTES)
    with copied.open("r+b") as file:
        file.seek(switch_lsn % SEGMENT_BYTES)
        file.write(b"\0" * (SEGMENT_BYTES - switch_lsn % SEGMENT_BYTES))
    assert await end_from(second, third_start, newest=TWO, history=history) == WalEnd(ONE, switch_lsn)


async def test_users_text_in_the_last_record_does_not_move_the_end(servers: Servers) -> None:
    primary = await servers.primary()
    start = await primary.lsn("pg_current_wal_flush_lsn")
    fake = "x\nrmgr: XLOG        len (rec/tot):     24/    24, tx:          0, lsn: F/01000028, prev 0/01000000, desc: SWITCH \n"
    async with session(primary.server) as opened:
        await opened.fetchval("select pg_logical_emit_message(true, $1, 'x')::text", fake)
        await opened.fetchval("select pg_create_restore_point($1)::text", fake[:60])
        await opened.fetchval("select pg_logical_emit_message(true, $1, 'x')::text", fake)
    flushed = await primary.lsn("pg_current_wal_flush_lsn")
    primary.kill()
    end = await end_from(primary, start)
    assert flushed <= end.lsn < flushed + BLOCK_BYTES


async def all_records(one: OwnServer, start: Lsn) -> list[tuple[Lsn, int]]:
    """Start and length of every record that pg_waldump lists on timeline 1."""
    output = await run_program(
        one.server,
        [
            "/bin/sh",
            "-c",
            f"{one.server.program('pg_waldump')} -p {one.data}/pg_wal -t 1 -s {format_lsn(start)} 2>/dev/null || true",
        ],
        deadline_s=20,
        limit_bytes=200_000_000,
    )
    found = re.findall(r"^rmgr: \S+\s+len \(rec/tot\):\s*\d+/\s*(\d+), .*? lsn: (\S+), prev", output, re.MULTILINE)
    return [(parse_lsn(lsn), int(total)) for total, lsn in found]


async def test_wherever_the_log_is_torn_the_end_is_the_last_whole_record(servers: Servers) -> None:
    primary = await servers.primary(wal_level="logical")
    start = await primary.lsn("pg_current_wal_flush_lsn")
    await write_rows(primary, 30000)
    async with session(primary.server) as opened:
        # One record over several pages, one over a whole segment.
        await opened.fetchval("select pg_logical_emit_message(true, 'big', repeat('x', 50000))::text")
        await opened.fetchval(
            "select pg_logical_emit_message(true, 'huge', repeat('y', 20000000))::text", deadline_s=20
        )
    await write_rows(primary, 1000)
    await primary.stop()
    control = await read_control_data(primary.server)
    records = await all_records(primary, start)
    assert len(records) > 10000
    ends = [record_end(lsn, total, segment_bytes=SEGMENT_BYTES) for lsn, total in records]
    for end, (following, _) in zip(ends, records[1:], strict=False):
        header = 40 if end % SEGMENT_BYTES == 0 else 24 if end % BLOCK_BYTES == 0 else 0
        assert following == end + header
    whole_end = await end_from(primary, start)
    page_ends = [Lsn(end) for end in ends if end % BLOCK_BYTES == 0]
    assert page_ends
    for end in page_ends[:5]:
        assert await end_from(primary, end) == whole_end
    wal = primary.data / "pg_wal"
    saved = primary.root / "saved"
    shutil.copytree(wal, saved)
    long_ones = [index for index, (_, total) in enumerate(records) if total > 40000]
    at_page_end = [index for index, end in enumerate(ends) if end % BLOCK_BYTES == 0][:3]
    picked = [0, 1, *range(7, len(records), len(records) // 8), *long_ones, *at_page_end, len(records) - 1]
    for index in picked:
        lsn, total = records[index]
        for torn_at in {lsn, lsn + 4, lsn + 23, lsn + total // 2, lsn + total - 1}:
            await asyncio.to_thread(_tear, saved, wal, torn_at, control)
            # Nearer than `start`, so that each of the many cases is quick.
            before = ends[index - 200] if index > 200 else start
            found = await end_from(primary, Lsn(before))
            expected = ends[index - 1] if index else start
            whole = torn_at > lsn + 24 and found.lsn == ends[index]
            assert found.lsn == expected or (whole and _tail_is_zeros(saved, lsn, ends[index], torn_at)), (
                f"record {index} at {format_lsn(lsn)} of {total} torn at {format_lsn(torn_at)}: {found}"
            )


def _tear(saved: Path, wal: Path, torn_at: int, control: ControlData) -> None:
    """What lies after `torn_at` was never written: zeros in its segment, and no later segments."""
    size = control.wal_segment_bytes
    torn = torn_at // size
    for file in sorted(saved.iterdir()):
        if not re.fullmatch(r"[0-9A-F]{24}", file.name):
            continue
        number = int(file.name[16:], 16)
        target = wal / file.name
        if number < torn:
            if not target.exists() or target.stat().st_mtime_ns != file.stat().st_mtime_ns:
                shutil.copy2(file, target)
        elif number == torn:
            content = file.read_bytes()[: torn_at % size]
            target.write_bytes(content + b"\0" * (size - len(content)))
        else:
            target.unlink(missing_ok=True)
        if target.exists():
            os.chown(target, wal.stat().st_uid, wal.stat().st_gid)


def _tail_is_zeros(saved: Path, start: int, end: int, torn_at: int) -> bool:
    """Were the bytes that were torn off zeros anyway?"""
    file = saved / segment_file_name(ONE, torn_at // SEGMENT_BYTES, SEGMENT_BYTES)
    content = file.read_bytes()[torn_at % SEGMENT_BYTES : end % SEGMENT_BYTES or SEGMENT_BYTES]
    return end > torn_at > start and not content.strip(b"\0")


async def test_what_cannot_be_told_is_no_position(servers: Servers) -> None:
    primary = await servers.primary()
    begin = await primary.lsn("pg_current_wal_flush_lsn")
    await write_rows(primary, 200)
    await primary.stop()
    control = await read_control_data(primary.server)
    records = await all_records(primary, begin)
    with pytest.raises(PositionUnknown, match="belongs to system"):
        await end_from(primary, control.redo_lsn, system_identifier=control.system_identifier + 1)
    with pytest.raises(PositionUnknown, match="no record begins"):
        # The middle of a record that is followed by others.
        await end_from(primary, Lsn(records[50][0] + 16))
    with pytest.raises(PositionUnknown, match="not where a record can end"):
        await end_from(primary, Lsn(control.redo_lsn + 3))
    with pytest.raises(PositionUnknown, match="does not hold the segment"):
        await end_from(primary, Lsn(control.redo_lsn + 10 * SEGMENT_BYTES))
    with pytest.raises(DeadlinePassed):
        await end_from(primary, control.redo_lsn, deadline_s=0.0001)
    wal = primary.data / "pg_wal" / segment_file_name(ONE, control.redo_lsn // SEGMENT_BYTES, SEGMENT_BYTES)
    with wal.open("r+b") as file:
        file.truncate(control.redo_lsn % SEGMENT_BYTES // BLOCK_BYTES * BLOCK_BYTES)
    with pytest.raises(PositionUnknown):
        await stopped_end(primary)
    wal.unlink()
    with pytest.raises(PositionUnknown, match="does not hold the segment"):
        await stopped_end(primary)
    assert not list(primary.root.glob("data.wal-view-*"))
