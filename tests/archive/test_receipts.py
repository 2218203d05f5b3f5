"""Receipts: what archive_command acknowledges without a client, and everything for which a client must ask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from archive_harness import Desk, chain_of, desk_at, until
from test_commands import ask, shell
from wal_builders import make_ready, segment_content

from instance_manager.archive import commands, push
from instance_manager.archive.receipts import RECEIPTS, Receipts
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.codec import to_json
from instance_manager.postgres.archive_commands import ALLOWS

A, B, C = (f"00000001000000000000000{number}" for number in (5, 6, 7))


class Line:
    """`archive_command` over a pg_wal, with a client that only fails."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wal = root / "pg_wal"
        (self.wal / "archive_status").mkdir(parents=True)
        self.allows = root / "archive-allows"
        self.allows.write_text("push\n")
        self.receipts = root / "receipts"
        self.socket = root / "a.sock"
        self.client = commands.install_client(root, None)
        commands.quick(self.client).write_text("exit 11;\n")
        self.taken: list[str] = []

    async def push(self, name: str = A) -> int:
        """0, or 1 where a client was asked."""
        command = commands.archive_command(commands.PERL, self.client, self.socket, self.allows, self.receipts)
        code, told = await shell(command, name, f"pg_wal/{name}", cwd=self.root)
        assert told == ""
        return code

    def modified_ns(self, name: str = A) -> int:
        return (self.wal / name).stat().st_mtime_ns


@pytest.fixture
def line() -> Iterator[Line]:
    with tempfile.TemporaryDirectory(prefix="im ar'$ %") as directory:
        made = Line(Path(directory))
        make_ready(made.wal, A, segment_content(A))
        yield made


@pytest.fixture
async def receipts(line: Line) -> AsyncIterator[Receipts]:
    made = Receipts(line.receipts, None)
    made.start(line.taken.append)
    yield made
    made.close()


async def test_a_receipt_is_acknowledged_once_and_told_of(line: Line, receipts: Receipts) -> None:
    await receipts.give(A, line.modified_ns())
    assert await line.push() == 0
    assert await line.push() == 1, "a client is asked"
    await until(lambda: line.taken == [A])
    assert receipts.count == 0
    await receipts.give(B, line.modified_ns())
    assert sorted(path.name for path in line.receipts.iterdir()) == [B, "taken"]


async def test_a_receipt_is_good_for_once_also_while_its_writer_stands_still(line: Line, receipts: Receipts) -> None:
    await receipts.give(A, line.modified_ns())
    assert receipts._bell is not None
    asyncio.get_running_loop().remove_reader(receipts._bell)
    assert await line.push() == 0
    assert await line.push() == 1


async def test_without_a_receipt_a_client_is_asked(line: Line, receipts: Receipts) -> None:
    await receipts.give(B, line.modified_ns())
    assert await line.push() == 1
    assert receipts.count == 1


@pytest.mark.parametrize("word", ["fetch\n", "", "pushed\n", None])
async def test_the_agents_word_stops_receipts_too(line: Line, receipts: Receipts, word: str | None) -> None:
    await receipts.give(A, line.modified_ns())
    if word is None:
        line.allows.unlink()
    else:
        line.allows.write_text(word)
    assert await line.push() == 1
    assert receipts.count == 1


@pytest.mark.parametrize("difference_ns", [-1, 1, -1_000_000_000, 1_000_000_000])
async def test_of_another_file_of_the_name_nothing_is_acknowledged(
    line: Line, receipts: Receipts, difference_ns: int
) -> None:
    await receipts.give(A, line.modified_ns())
    os.utime(line.wal / A, ns=(line.modified_ns() + difference_ns,) * 2)
    assert await line.push() == 1


async def test_of_a_file_that_is_not_there_nothing_is_acknowledged(line: Line, receipts: Receipts) -> None:
    await receipts.give(A, line.modified_ns())
    (line.wal / A).unlink()
    assert await line.push() == 1


async def test_the_receipts_of_a_process_that_was_killed_are_void(line: Line) -> None:
    """Nothing has removed them."""
    program = f"""
import asyncio
from pathlib import Path
from instance_manager.archive.receipts import Receipts
async def main():
    receipts = Receipts(Path({str(line.receipts)!r}), None)
    receipts.start(lambda name: None)
    await receipts.give({A!r}, {line.modified_ns()})
    print("given", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"given\n"
        # Its number is still taken, by what the kernel keeps of it until it is waited for.
        process.send_signal(signal.SIGSTOP)
        valid = (line.receipts / A).read_bytes()
        assert valid.split()[0] == str(process.pid).encode()
    finally:
        process.kill()
        process.wait()
    assert (line.receipts / A).exists()
    assert await line.push() == 1


async def test_a_process_that_has_its_number_by_now_is_another_one(line: Line, receipts: Receipts) -> None:
    await receipts.give(A, line.modified_ns())
    receipt = line.receipts / A
    number, began = receipt.read_bytes().split()
    receipt.write_bytes(b"%s %d\n" % (number, int(began) - 1))
    os.utime(receipt, ns=(line.modified_ns(),) * 2)
    assert await line.push() == 1
    receipt.write_bytes(b"%s %s\n" % (number, began))
    os.utime(receipt, ns=(line.modified_ns(),) * 2)
    assert await line.push() == 0, "and nothing else was wrong with it"


async def test_what_is_withdrawn_is_not_acknowledged(line: Line, receipts: Receipts) -> None:
    await receipts.give(A, line.modified_ns())
    receipts.withdraw_all()
    assert await line.push() == 1


async def test_what_is_withdrawn_while_the_disk_is_slow_is_not_there_afterwards(
    line: Line, receipts: Receipts, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun, go_on = receipts._write, threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> None:
        begun.set()
        go_on.wait(10)
        write(*arguments)

    monkeypatch.setattr(receipts, "_write", slowly)
    giving = asyncio.create_task(receipts.give(A, line.modified_ns()))
    await asyncio.to_thread(begun.wait, 10)
    receipts.withdraw_all()
    go_on.set()
    await giving
    assert not (line.receipts / A).exists()
    assert await line.push() == 1


async def test_a_disk_that_does_not_take_a_receipt_in_time_costs_the_receipt_only(
    line: Line, receipts: Receipts, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, go_on = receipts._write, threading.Event()

    def slowly(*arguments: Any) -> None:
        go_on.wait(10)
        write(*arguments)

    monkeypatch.setattr("instance_manager.archive.receipts.DEADLINE_S", 0.05)
    monkeypatch.setattr(receipts, "_write", slowly)
    await receipts.give(A, line.modified_ns())
    assert receipts.count == 0
    go_on.set()
    await until(lambda: receipts._threads._in_flight == 0)
    assert not (line.receipts / A).exists()


async def test_an_end_and_a_start_remove_what_is_there(line: Line, receipts: Receipts) -> None:
    await receipts.give(A, line.modified_ns())
    receipts.close()
    assert not line.receipts.exists()
    line.receipts.symlink_to(line.wal)
    receipts.start(lambda name: None)
    assert not line.receipts.is_symlink()
    assert (line.wal / A).exists(), "a link is removed, and not what it shows"


async def test_without_what_the_shell_looks_at_nothing_is_acknowledged(line: Line, receipts: Receipts) -> None:
    await receipts.give(A, line.modified_ns())
    line.client.with_name("archive_receipt.sh").unlink()
    command = commands.archive_command(commands.PERL, line.client, line.socket, line.allows, line.receipts)
    code, _ = await shell(command, A, f"pg_wal/{A}", cwd=line.root)
    assert 1 <= code <= 125


def test_the_longest_command_is_not_cut_off_by_postgres() -> None:
    """A socket's path has 107 bytes at most, which limits the others. The longest name is a backup label's."""
    directory = Path("/" + "d" * (107 - len("//archive.sock")))
    state = directory / "state"
    interpreter = Path("/" + "p" * 100)
    command = commands.archive_command(
        interpreter, state / commands.CLIENT, directory / "archive.sock", state / ALLOWS, state / RECEIPTS
    )
    name = "000000010000000000000005.00000028.backup"
    expanded = command.replace("%f", name).replace("%p", f"pg_wal/{name}")
    assert len(expanded) <= commands.COMMAND_MAX_BYTES


class Running:
    """An archiver that runs, asked as by a client and by receipts."""

    def __init__(self, desk: Desk, line: Line) -> None:
        self.desk, self.line = desk, line

    async def push(self, name: str) -> str:
        """By the socket, as a client."""
        return await ask(self.desk.settings.socket, f"push\t{name}")

    async def take(self, name: str) -> int:
        return await self.line.push(name)

    async def order(self, **changes: object) -> None:
        orders = self.desk.primary(**changes)  # type: ignore[arg-type]
        assert (await ask(self.desk.settings.socket, f"orders\t{to_json(orders).decode()}")).startswith("done")

    def given(self) -> list[str]:
        """Those that are not used."""
        found = []
        for path in self.line.receipts.glob("0*"):
            with contextlib.suppress(FileNotFoundError):
                found += [path.name] if path.stat().st_size > 0 else []
        return sorted(found)


@pytest.fixture
async def running(line: Line, directory_store: DirectoryStore) -> AsyncIterator[Running]:
    async with desk_at(line.root, directory_store, socket=line.socket, receipts=line.receipts) as desk:
        task = asyncio.create_task(desk.archiver.run())
        await until(line.socket.exists)
        yield Running(desk, line)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_was_sent_ahead_needs_no_client_and_what_lies_behind_it_follows(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "HELD_BACK_S", 30.0)
    names = [f"0000000100000000000000{number:02X}" for number in range(0x05, 0x25)]
    running.desk.ready(*names)
    assert await running.push(names[0]) == "done\n"
    assert running.desk.archiver._receipts.count >= running.desk.archiver.pusher._window // 2, "its answer waited"
    clients = 1
    for name in names[1:]:
        if await running.take(name) != 0:
            clients += 1
            assert await running.push(name) == "done\n"
    assert clients <= len(names) / 2
    assert running.desk.push_counters.archived == len(names)
    for name in names:
        assert await running.desk.wal_in_store(name) == segment_content(name)
    await until(lambda: running.given() == [])
    assert running.desk.push_counters.last_archived == names[-1]


async def test_each_receipt_that_is_used_sends_one_more_file_ahead(running: Running) -> None:
    names = [f"0000000100000000000000{number:02X}" for number in range(0x05, 0x25)]
    running.desk.ready(*names)
    window = running.desk.archiver.pusher._window
    assert await running.push(names[0]) == "done\n"
    await until(lambda: running.given() == names[1:window])
    assert await running.take(names[1]) == 0
    await until(lambda: running.given() == names[2 : window + 1])


async def test_a_receipt_that_postgres_has_passed_by_is_withdrawn(running: Running) -> None:
    running.desk.ready(B, C)
    assert await running.push(A) == "done\n"
    await until(lambda: running.given() == [B, C])
    assert await running.push(C) == "done\n"
    assert running.given() == []


async def test_another_epoch_withdraws_receipts_and_the_same_one_renewed_does_not(running: Running) -> None:
    running.desk.ready(B)
    assert await running.push(A) == "done\n"
    await until(lambda: running.given() == [B])
    await running.order(until_s=1090.0)
    assert running.given() == [B]
    await running.order(epoch=2)
    assert running.given() == []
    assert await running.take(B) == 1


@pytest.mark.parametrize("change", ["history", "standby", "permit"])
async def test_a_fork_a_demotion_and_the_permits_end_withdraw_receipts(running: Running, change: str) -> None:
    running.desk.ready(B)
    assert await running.push(A) == "done\n"
    await until(lambda: running.given() == [B])
    if change == "history":
        await running.order(chain=chain_of((2, 1, 6 << 24)))
    elif change == "standby":
        standby = to_json(running.desk.standby()).decode()
        assert (await ask(running.desk.settings.socket, f"orders\t{standby}")).startswith("done")
    else:
        running.desk.now_s = 2000.0
        await until(lambda: running.given() == [], deadline_s=3)
    assert running.given() == []
    assert await running.take(B) == 1


async def test_a_file_that_failed_has_no_receipt(running: Running) -> None:
    make_ready(running.desk.wal, B, segment_content(C))
    running.desk.ready(C)
    assert await running.push(A) == "done\n"
    await until(lambda: running.given() == [C])
    assert await running.take(B) == 1
    assert (await running.push(B)).startswith(f"failed {B} is not what its name says")


async def test_an_answer_is_not_held_back_for_long_by_what_hangs_behind_it(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, hanging = running.desk.store.create, asyncio.Event()

    async def hangs_for_b(name: str, *rest: object, **others: object) -> None:
        if B in name:
            hanging.set()
            await asyncio.Event().wait()
        await create(name, *rest, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(running.desk.store, "create", hangs_for_b)
    running.desk.ready(B)
    async with asyncio.timeout(3):
        assert await running.push(A) == "done\n"
    assert hanging.is_set()
    assert running.given() == []


async def test_what_becomes_durable_after_the_orders_have_changed_has_no_receipt(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, sent, changed = running.desk.store.create, asyncio.Event(), asyncio.Event()

    async def later(name: str, *rest: object, **others: object) -> None:
        if B in name:
            sent.set()
            await changed.wait()
        await create(name, *rest, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(running.desk.store, "create", later)
    running.desk.ready(B)
    assert await running.push(A) == "done\n"
    await sent.wait()
    await running.order(epoch=2)
    changed.set()
    await until(lambda: running.desk.push_counters.archived == 2)
    assert running.given() == []


async def test_a_file_that_was_asked_for_while_it_was_sent_ahead_is_answered_and_has_no_receipt(
    running: Running,
) -> None:
    running.desk.ready(B)
    assert await running.push(A) == "done\n"
    await until(lambda: running.given() == [B])
    assert await running.push(B) == "done\n"
    assert running.given() == []
    assert running.desk.push_counters.archived == 2
