"""The clients' side of a drill, as a process of its own, so that it can stand in a network namespace.

    python -m instance_manager.drill.client prepare|run|rows --member NAME=HOST:PORT ... --password-file FILE

`prepare` makes the table on the primary, `run` writes and reads until SIGTERM, `rows` prints what one member holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import msgspec

from instance_manager.drill.history import HistoryWriter
from instance_manager.drill.sampler import Sampler
from instance_manager.drill.sql import MAKE_TABLE, TABLE, MemberAddress, connect, is_primary
from instance_manager.drill.write_probe import WriteProbe

FLUSH_INTERVAL_S = 0.1
PREPARE_DEADLINE_S = 30.0
_SQL_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Arguments:
    mode: str
    members: tuple[MemberAddress, ...]
    output: Path | None
    clients: int
    interval_s: float


def main() -> int:
    arguments = _parse()
    try:
        asyncio.run(_run(arguments))
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        print(f"{arguments.mode}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(arguments: Arguments) -> None:
    if arguments.mode == "prepare":
        await prepare(arguments.members)
    elif arguments.mode == "rows":
        rows = await rows_of(arguments.members[0])
        sys.stdout.buffer.write(msgspec.json.encode([(*row, count) for row, count in rows.items()]))
    else:
        assert arguments.output is not None  # noqa: S101
        await run(arguments.members, arguments.output, arguments.clients, arguments.interval_s)


async def prepare(members: tuple[MemberAddress, ...]) -> None:
    """Make the table anew, on whichever member is the primary. TimeoutError: none was found."""
    async with asyncio.timeout(PREPARE_DEADLINE_S):
        while True:
            for member in members:
                with contextlib.suppress(OSError, asyncpg.PostgresError, TimeoutError):
                    connection = await connect(member, timeout_s=2.0)
                    try:
                        if await is_primary(connection):
                            await connection.execute(MAKE_TABLE, timeout=10)
                            return
                    finally:
                        connection.terminate()
            await asyncio.sleep(0.2)


async def rows_of(member: MemberAddress) -> Counter[tuple[int, int]]:
    """How often each row is on the member."""
    connection = await connect(member, timeout_s=5.0)
    try:
        found = await connection.fetch(f"SELECT client, number FROM {TABLE}", timeout=_SQL_DEADLINE_S)  # noqa: S608
    finally:
        connection.terminate()
    return Counter((row["client"], row["number"]) for row in found)


async def run(members: tuple[MemberAddress, ...], output: Path, clients: int, interval_s: float) -> None:
    """Write and read until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with output.open("ab") as file:
        history = HistoryWriter(file)
        probe = WriteProbe(members, history, clients=clients, interval_s=interval_s)
        sampler = Sampler(members, history, clients=clients)

        async def flush() -> None:
            while not stop.is_set():
                history.flush()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), FLUSH_INTERVAL_S)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(probe.run(stop))
            tasks.create_task(sampler.run(stop))
            tasks.create_task(flush())
        history.flush()


def _parse() -> Arguments:
    parser = argparse.ArgumentParser(prog="python -m instance_manager.drill.client", description=__doc__)
    parser.add_argument("mode", choices=("prepare", "run", "rows"))
    parser.add_argument("--member", action="append", required=True, metavar="NAME=HOST:PORT")
    parser.add_argument("--password-file", type=Path, required=True)
    parser.add_argument("--user", default="app")
    parser.add_argument("--database", default="app")
    parser.add_argument("--output", type=Path, help="the history, for `run`")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--interval-s", type=float, default=0.01, help="pause of a client after an acknowledgement")
    found = parser.parse_args()
    if found.mode == "run" and found.output is None:
        parser.error("run needs --output")
    members = []
    for text in found.member:
        name, _, address = text.partition("=")
        host, _, port = address.rpartition(":")
        if not (name and host and port.isdigit()):
            parser.error(f"--member {text}: not NAME=HOST:PORT")
        members.append(MemberAddress(name, host, int(port), found.user, found.database, found.password_file))
    return Arguments(found.mode, tuple(members), found.output, found.clients, found.interval_s)


if __name__ == "__main__":
    sys.exit(main())
