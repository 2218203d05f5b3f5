"""`instance-manager archive check`: does WAL get there and back? `archive verify`: is the log there, and right?

Exit codes: 0 all is well; 1 it is not, or that is not known; 2 wrong use.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from functools import partial

import asyncpg

from instance_manager.archive.backup.catalogue import list_backups
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.backup.verify import Verdict, verify_segments
from instance_manager.archive.backup.wal_range import gaps_in, segments_of
from instance_manager.archive.codecs import codec_of_suffix
from instance_manager.archive.content import sha256_of
from instance_manager.archive.layout import without_suffix
from instance_manager.archive.tail import histories_in
from instance_manager.archive.wal_names import Segment, SegmentSize
from instance_manager.archive.where import WRONG_USE, Where, add_where, carry_out
from instance_manager.config import Configuration
from instance_manager.core.types import Timeline
from instance_manager.ports import ObjectStore
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres.sql import session
from instance_manager.threads import monotonic_s

DEADLINE_S = 60.0
POLL_S = 0.3
_SWITCH = """
    SELECT pg_is_in_recovery() AS is_standby, (SELECT bytes_per_wal_segment FROM pg_control_init()) AS segment_bytes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="archive_command", required=True)
    check = commands.add_parser(
        "check", help="finish a segment on the primary, and see it come into the archive and back, byte for byte"
    )
    check.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    add_where(check)
    verify = commands.add_parser(
        "verify", help="is the log in the archive without a gap, and is each segment what it should be?"
    )
    verify.add_argument("--from", dest="first", metavar="SEGMENT", help="by default from the oldest backup on")
    verify.add_argument("--to", dest="last", metavar="SEGMENT", help="by default to the newest segment")
    verify.add_argument("--parallel", type=int, default=4, metavar="N")
    add_where(verify)


def run(namespace: argparse.Namespace) -> int:
    """Its exit code."""
    works = {"check": _check, "verify": _verify}
    return carry_out(namespace, partial(works[namespace.archive_command], namespace))


def _complain(text: str, code: int = 1) -> int:
    print(f"instance-manager: {text}", file=sys.stderr)
    return code


async def _check(namespace: argparse.Namespace, where: Where) -> int:
    configuration = where.configuration
    if configuration is None:
        return _complain("check needs the primary itself: give its --config FILE", WRONG_USE)
    server = server_of(configuration)
    begin_s = monotonic_s()
    try:
        name, size = await _finished_segment(server)
    except (LocalPostgresError, asyncpg.PostgresError) as error:
        return _complain(f"Postgres of {configuration.instance.name}: {error}")
    if name is None:
        return _complain(
            f"{configuration.instance.name} is a standby: give the configuration of the primary", WRONG_USE
        )
    print(f"finished segment {name}", flush=True)
    local = await asyncio.to_thread((server.data_directory / "pg_wal" / name).read_bytes)
    while monotonic_s() - begin_s < namespace.timeout:
        found = await _content(where, name, size)
        if found is not None:
            if sha256_of([found]) != sha256_of([local]):
                return _complain(f"{name} came back with other content than pg_wal holds")
            print(f"it is in the archive and came back the same, {monotonic_s() - begin_s:.1f} s later")
            return 0
        await asyncio.sleep(POLL_S)
    return _complain(
        f"{name} did not come into the archive within {namespace.timeout:g} s: see `instance-manager status`"
    )


def server_of(configuration: Configuration) -> LocalServer:
    """For SQL only."""
    from pathlib import Path

    return LocalServer(
        data_directory=configuration.data_directory,
        socket_directory=configuration.socket_directory,
        state_directory=configuration.state_directory,
        listen_address=configuration.listen_host,
        port=configuration.me.postgres_port,
        bin_directory=configuration.postgres.bin_directory or Path("/"),
        run_as=None,
    )


async def _finished_segment(server: LocalServer) -> tuple[str | None, SegmentSize]:
    async with session(server) as sql:
        row = await sql.fetchrow(_SWITCH)
        if row is None or row["is_standby"]:
            return None, SegmentSize(1 << 20)
        # Something to archive, also where nothing was written since the last switch.
        await sql.execute("SELECT pg_logical_emit_message(false, 'instance-manager', 'archive check')")
        name = await sql.fetchval("SELECT pg_walfile_name(pg_switch_wal() - 1)")
        return str(name), SegmentSize(row["segment_bytes"])


async def _content(where: Where, name: str, size: SegmentSize) -> bytes | None:
    stem = where.layout.wal_stem(name)
    async for entry in where.store.entries(stem, deadline_s=DEADLINE_S):
        if without_suffix(entry.name) == stem:
            codec = codec_of_suffix(entry.name)
            return await where.store.receive(
                entry.name,
                lambda _, chunks: b"".join(codec.decompressed(chunks, limit_bytes=size.size_bytes)),  # noqa: B023
                deadline_s=DEADLINE_S,
            )
    return None


async def _verify(namespace: argparse.Namespace, where: Where) -> int:
    listed = await list_backups(where.store, where.layout, deadline_s=DEADLINE_S)
    infos = [each.info for each in listed if each.is_restorable and each.info is not None]
    if not infos:
        return _complain("there is no backup, from which the log would be of use: `instance-manager backup` takes one")
    size = infos[0].segment_size
    try:
        first = (
            min(info.begin_segment.number for info in infos)
            if namespace.first is None
            else size.parse(namespace.first).number
        )
        last = None if namespace.last is None else size.parse(namespace.last).number
    except ValueError as error:
        return _complain(str(error), WRONG_USE)
    verdict = Verdict()
    timelines = {Timeline(1), *(await histories_in(where.store, where.layout, deadline_s=DEADLINE_S))}
    for timeline in sorted({info.timeline for info in infos} | timelines):
        await _verify_timeline(where.store, where, infos[0], timeline, first, last, namespace.parallel, verdict)
    for text in (*verdict.unread, *verdict.problems):
        _complain(text)
    print(f"{verdict.segments} segments of WAL are there and right" + ("" if verdict.is_good else ", but not all"))
    return 0 if verdict.is_good else 1


async def _verify_timeline(
    store: ObjectStore,
    where: Where,
    info: BackupInfo,
    timeline: Timeline,
    first: int,
    last: int | None,
    parallel: int,
    verdict: Verdict,
) -> None:
    """Between the first and the last segment that are there, each one; whether the ends are where they should be `backups` tells."""
    size = info.segment_size
    found = await segments_of(store, where.layout, size, timeline, first=first, deadline_s=DEADLINE_S)
    found = [number for number in found if last is None or number <= last]
    if not found:
        return
    for begin, end in gaps_in(found):
        names = size.name(Segment(timeline, begin)), size.name(Segment(timeline, end))
        verdict.add(f"timeline {timeline} has a gap: {end - begin + 1} segments are missing, {names[0]} to {names[1]}")
    rows = _rows(found)
    for begin, end in rows:
        await verify_segments(
            store,
            where.layout,
            info,
            Segment(timeline, begin),
            end,
            verdict,
            parallel=parallel,
            tell=lambda text: print(text, flush=True),
        )


def _rows(found: list[int]) -> list[tuple[int, int]]:
    """The numbers as (first, last) of each row without a gap."""
    begins = [found[0], *(end + 1 for _, end in gaps_in(found))]
    ends = [*(begin - 1 for begin, _ in gaps_in(found)), found[-1]]
    return list(zip(begins, ends, strict=True))
