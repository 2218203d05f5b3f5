"""Segments placed in pg_wal ahead of replay, and who reads them alone: the real shell line and client, without a Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from archive_harness import Desk, chain_of, until
from fetch_steps import FORK, ON_2, SEGMENT, A, B, C, D, fill, hold_back, put
from wal_builders import SIZE, SYSTEM, segment_content

from instance_manager.archive import spool
from instance_manager.archive.archiver import SPOOL
from instance_manager.archive.content import sha256_of
from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.recovery import openings, placing, serving
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.stores.patience import Patience
from instance_manager.core.types import Lsn, TimelineChain
from instance_manager.postgres.files import fsync_directory, fsync_file

QUICK = Patience(total_s=5.0, attempt_s=5.0, attempts_max=2, first_pause_s=0.01)
ROW = tuple(f"0000000100000000000000{number:02X}" for number in range(5, 15))


class Asking(RecoveryArchive):
    """Counts what comes to it, and reads as the startup process does: it asks through the shell, or opens what lies in pg_wal."""

    wal: Path
    came: list[str]
    changes: list[bool]

    async def ask(self, name: str) -> int:
        """restore_command's exit code; what it restored is in place then."""
        command = self.restore_command().replace("%f", name).replace("%p", str(self.wal / "RECOVERYXLOG"))
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", command)
        code = await process.wait()
        if code == 0:
            (self.wal / "RECOVERYXLOG").replace(self.wal / name)
        return code

    async def asked(self, name: str) -> bytes | None:
        """What a Postgres that asks would read: restored, or found in pg_wal; None: neither. AssertionError: it would stop."""
        code = await self.ask(name)
        assert code in (0, 1), code
        path = self.wal / name
        return path.read_bytes() if path.exists() else None

    async def read(self, name: str) -> bytes | None:
        """As `asked`, but alone where it is to, for as long as it is to."""
        path = self.wal / name
        await until(lambda: path.exists() or not self._has_to_wait())
        if not self.reads_alone:
            return await self.asked(name)
        content = path.read_bytes()
        await until(lambda: not self.is_placed(name))
        return content

    def _has_to_wait(self) -> bool:
        self.look()
        return self.reads_alone

    def is_placed(self, name: str) -> bool:
        return self._place is not None and self._place.holds(name)

    async def placed(self, *names: str) -> None:
        await until(lambda: all(self.is_placed(name) for name in names))

    def placed_now(self) -> set[str]:
        return {name for name in ROW if self.is_placed(name)}

    async def _fetch(self, words: list[str]) -> str:
        self.came.append(words[1])
        return await super()._fetch(words)


@contextlib.asynccontextmanager
async def asking(desk: Desk, *, chain: TimelineChain | None = None, ahead: int = 4) -> AsyncIterator[Asking]:
    """One recovery over the desk's pg_wal."""
    work = Path(tempfile.mkdtemp(prefix="im-placing-"))
    made = Asking(
        desk.store,
        desk.layout,
        data_directory=desk.wal.parent,
        work_directory=work,
        system_identifier=str(SYSTEM),
        size=SIZE,
        chain=chain or chain_of(),
        run_as=None,
        settings=FetchSettings(recovery=QUICK, parallel=2, prefetch_bytes=ahead * SEGMENT),
    )
    made.wal, made.came, made.changes = desk.wal, [], []
    made.on_change = lambda: made.changes.append(made.reads_alone)
    await made.start()
    await made.before_postgres_starts()
    try:
        yield made
    finally:
        await made.close()
        shutil.rmtree(work)


def done_marks(desk: Desk) -> set[str]:
    return {path.stem for path in (desk.wal / "archive_status").iterdir() if path.suffix == ".done"}


def forget_marks(desk: Desk) -> None:
    for path in (desk.wal / "archive_status").iterdir():
        path.unlink()


async def filled(desk: Desk, *names: str) -> None:
    await fill(desk, *names)
    forget_marks(desk)


async def test_what_lies_in_place_is_read_without_a_question_to_this_process(local_desk: Desk) -> None:
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        for number, name in enumerate(ROW):
            assert recovery.reads_alone == (number > 1), "it follows once two have followed one another"
            assert await recovery.read(name) == segment_content(name)
            assert recovery.placed_now() <= set(ROW[number + 1 : number + 5]), "never more than was allowed"
        assert recovery.came == [*ROW[:2]]
        beyond = SIZE.next_name(ROW[-1])
        assert await recovery.read(beyond) is None
        assert (recovery.came, recovery.ends_seen) == ([*ROW[:2], beyond], 1)
        assert recovery.status.fetch.restored == len(ROW)
        assert recovery.changes == [True, False]
    assert done_marks(local_desk) >= set(ROW[2:]), "as Postgres marks what it restores itself"
    assert {path.name for path in local_desk.wal.iterdir() if len(path.name) == 24} == set(ROW)


async def test_what_is_still_on_its_way_is_waited_for_without_a_question(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(local_desk, A, B, C)
    let_go = hold_back(C, monkeypatch)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await recovery.read(B)
        reading = asyncio.create_task(recovery.read(C))
        await until(lambda: any(path.name.startswith(C) for path in (local_desk.wal / SPOOL).iterdir()))
        recovery.look()
        assert recovery.reads_alone
        assert not (local_desk.wal / C).exists()
        let_go.set()
        assert await reading == segment_content(C)
        assert recovery.came == [A, B]


async def test_who_asks_for_what_is_on_its_way_waits_for_it(local_desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(local_desk, A, B)
    let_go = hold_back(B, monkeypatch)
    async with asking(local_desk) as recovery:
        await recovery.asked(A)
        question = asyncio.create_task(recovery.ask(B))
        await until(lambda: recovery.came == [A, B])
        assert not question.done()
        let_go.set()
        # It is not the archiver's file any more when the answer comes, so it stays in the spool.
        assert await question in (0, 1)
        assert (local_desk.wal / B).read_bytes() == segment_content(B)
        assert recovery.ends_seen == 0


async def test_nothing_waits_for_the_disk_before_it_opens_and_then_all_that_was_read_is_durable(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(local_desk, A, B, C, D)
    flushed: list[Path] = []

    for flush in (fsync_file, fsync_directory):

        def noted(path: Path, flush: Callable[[Path], None] = flush) -> None:
            flush(path)
            flushed.append(path)

        monkeypatch.setattr(placing, flush.__name__, noted)
    monkeypatch.setattr(spool, "begin_writing", lambda _: pytest.fail("the disk was made to begin"))
    async with asking(local_desk) as recovery:
        for name in (A, B, C):
            await recovery.read(name)
        await recovery.placed(D)
        assert done_marks(local_desk) == {B, C, D}
        assert flushed == []
        await recovery.before_it_opens()
        wal = local_desk.wal
        assert {path.name for path in flushed[:-2]} == {A, B, C}
        assert flushed[-2:] == [wal, wal / "archive_status"], "their names come behind them"


async def test_a_disk_that_fails_where_it_is_to_be_durable_keeps_it_from_opening(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    await filled(local_desk, A, B)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        monkeypatch.setattr(placing, "fsync_file", failing)
        with pytest.raises(OSError, match="Input/output error"):
            await recovery.before_it_opens()


async def test_what_could_not_be_read_comes_anew(local_desk: Desk) -> None:
    await filled(local_desk, A, B, C)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await recovery.read(B)
        await recovery.placed(C)
        os.truncate(local_desk.wal / C, 0)
        assert await recovery.read(C) == b""
        assert await recovery.asked(C) == segment_content(C)
        assert recovery.came == [A, B, C]


async def test_who_leaves_what_lies_there_is_to_ask_and_reads_alone_again_behind_it(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record before it cannot be read, or what it had was lost with a crash: neither would ever end."""
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        for name in ROW[:4]:
            await recovery.read(name)
        await recovery.placed(ROW[4])
        recovery.look()
        assert recovery.reads_alone, "it has had no time"
        monkeypatch.setattr(serving, "STUCK_S", 0.0)
        recovery.look()
        assert not recovery.reads_alone
        for name in ROW[2:4]:
            # Again, as after a restart.
            assert await recovery.asked(name) == segment_content(name)
            assert not recovery.reads_alone
        assert await recovery.asked(ROW[4]) == segment_content(ROW[4])
        assert recovery.reads_alone
        assert recovery.came == [*ROW[:2], *ROW[2:5]]


async def test_before_postgres_starts_pg_wal_has_no_segment_whatever_lay_there(local_desk: Desk) -> None:
    """From before a crash of the machine, recycled, or of an earlier start: what it finds it would believe."""
    await filled(local_desk, *ROW)
    (local_desk.wal / "00000001.history").write_text("")
    async with asking(local_desk) as recovery:
        for name in (A, B, C):
            await recovery.read(name)
        await recovery.placed(D)
        (local_desk.wal / ROW[6]).write_bytes(bytes(SEGMENT))
        (local_desk.wal / ROW[7]).write_bytes(segment_content(A))
        await recovery.before_postgres_starts()
        assert not recovery.reads_alone
        assert {path.name for path in local_desk.wal.iterdir()} == {"00000001.history", "archive_status", SPOOL}
        assert done_marks(local_desk) == set()
        for name in ROW:
            assert await recovery.read(name) == segment_content(name)


async def test_a_damaged_segment_is_nobodys_until_it_is_asked_for_and_then_stops_recovery(local_desk: Desk) -> None:
    await filled(local_desk, A, B)
    await put(local_desk, C, segment_content(C, seed=2), sha256=sha256_of([segment_content(C)]))
    await put(local_desk, D, segment_content(D))
    async with asking(local_desk) as recovery:
        await recovery.asked(A)
        await recovery.placed(B, D)
        assert await recovery.ask(B) == 1
        await until(lambda: recovery._fetcher._prefetch._under_way[C].done())
        recovery.look()
        assert not recovery.reads_alone, "what is behind it does not make up for it"
        assert await recovery.ask(C) == 126
        assert not recovery.reads_alone
        assert not (local_desk.wal / C).exists()


async def test_nothing_behind_a_fork_is_placed(local_desk: Desk) -> None:
    chain = chain_of((2, 1, FORK))
    await filled(local_desk, A, B, C, D)
    await put(local_desk, ON_2, segment_content(ON_2))
    async with asking(local_desk, chain=chain) as recovery:
        await recovery.asked(A)
        await recovery.placed(B)
        assert await recovery.asked(B) == segment_content(B)
        assert not recovery.reads_alone
        assert await recovery.read(ON_2) == segment_content(ON_2)
        assert await recovery.read(C) == segment_content(C)[: FORK - 7 * SEGMENT] + bytes(8 * SEGMENT - FORK)
        assert recovery.came == [A, B, ON_2, C]
        assert not (local_desk.wal / D).exists()


async def test_what_was_given_is_not_replaced_and_another_order_of_questions_begins_anew(local_desk: Desk) -> None:
    """From the checkpoint of a backup Postgres goes back to where its log begins, and comes by once more."""
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        await recovery.asked(ROW[3])
        await recovery.placed(*ROW[4:8])
        given = (local_desk.wal / ROW[3]).stat().st_ino
        await recovery.asked(ROW[0])
        await recovery.placed(ROW[1], ROW[2], ROW[4])
        assert recovery.placed_now() == {ROW[1], ROW[2], ROW[4]}
        assert not (local_desk.wal / ROW[7]).exists()
        await until(lambda: recovery._fetcher._prefetch._under_way[ROW[3]].done())
        assert (local_desk.wal / ROW[3]).stat().st_ino == given
        for name in ROW[1:]:
            assert await recovery.read(name) == segment_content(name)
        assert recovery.came[2:] == [ROW[1], ROW[3]], "this one by the long way"
        assert recovery.unreadable is None


async def test_before_it_opens_what_was_not_taken_is_removed_and_nothing_more_comes(local_desk: Desk) -> None:
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        for name in (A, B, C):
            await recovery.read(name)
        await recovery.placed(D)
        assert recovery.reads_alone
        await recovery.before_it_opens()
        assert not recovery.reads_alone
        assert {path.name for path in local_desk.wal.iterdir() if len(path.name) == 24} == {A, B, C}
        assert done_marks(local_desk) >= {C}
        # The promotion reads the last record's segment once more.
        assert await recovery.asked(C) == segment_content(C)
        assert recovery._fetcher._prefetch._under_way == {}
        assert not recovery.reads_alone


async def test_where_the_history_is_cut_the_whole_segment_is_not_read_again(local_desk: Desk) -> None:
    await filled(local_desk, A, B, C)
    async with asking(local_desk) as recovery:
        await recovery.asked(A)
        await recovery.placed(B, C)
        recovery.cut_at(Lsn(6 * SEGMENT + 5000))
        await recovery.before_postgres_starts()
        await recovery.read(A)
        assert await recovery.read(B) == segment_content(B)[:5000] + bytes(SEGMENT - 5000)
        assert await recovery.read(C) is None


async def test_a_volume_without_room_gets_nothing_ahead(local_desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(local_desk, *ROW)
    free = 6 * SEGMENT
    monkeypatch.setattr(
        os, "statvfs", lambda _: os.statvfs_result((SEGMENT, SEGMENT, 9, 9, free // SEGMENT, 0, 0, 0, 0, 255))
    )
    async with asking(local_desk, ahead=8) as recovery:
        await recovery.asked(ROW[0])
        await recovery.placed(*ROW[1:4])
        assert recovery.placed_now() == set(ROW[1:4]), "half of what is free"
        free = SEGMENT
        await recovery.before_postgres_starts()
        for name in ROW[:4]:
            assert await recovery.read(name) == segment_content(name)
        assert recovery.came[1:] == list(ROW[:4])


@pytest.mark.parametrize("step", ["_take_place", "_mark_done"])
async def test_what_finds_no_room_is_not_placed_and_leaves_nothing(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    await filled(local_desk, A, B, C)
    met: list[str] = []

    def full(*_: object) -> int:
        met.append(step)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(placing.InPgWal, step, full)
    async with asking(local_desk) as recovery:
        await recovery.asked(A)
        await until(lambda: met and recovery._fetcher._prefetch._under_way[B].done())
        assert not (local_desk.wal / B).exists()
        assert done_marks(local_desk) == set()
        for name in (B, C):
            assert await recovery.ask(name) == 0
            assert (local_desk.wal / name).read_bytes() == segment_content(name)
        recovery.look()
        assert not recovery.reads_alone


async def test_a_name_that_cannot_be_given_leaves_no_mark(local_desk: Desk) -> None:
    await filled(local_desk, A, B)
    async with asking(local_desk) as recovery:
        (local_desk.wal / B).mkdir()
        await recovery.asked(A)
        await until(lambda: recovery._fetcher._prefetch._under_way[B].done())
        assert not recovery.is_placed(B)
        assert done_marks(local_desk) == set()


async def test_where_the_kernel_does_not_watch_postgres_asks_for_each(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(_: Path) -> openings.Openings:
        raise OSError(errno.EMFILE, "Too many open files")

    await filled(local_desk, *ROW)
    monkeypatch.setattr(placing, "Openings", exhausted)
    async with asking(local_desk) as recovery:
        for name in ROW:
            assert await recovery.asked(name) == segment_content(name)
        assert (recovery.came, recovery.changes) == (list(ROW), [])


async def test_what_the_kernel_has_lost_is_asked_for_and_then_it_reads_alone_again(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        for name in ROW[:4]:
            await recovery.read(name)
        await recovery.placed(ROW[4], ROW[5])
        new = openings.Openings.new

        def lost(opened: openings.Openings) -> set[str]:
            new(opened)
            raise openings.EventsLost

        with monkeypatch.context() as overflowing:
            overflowing.setattr(openings.Openings, "new", lost)
            (local_desk.wal / ROW[4]).read_bytes()
            await until(lambda: not recovery.reads_alone)
        for name in ROW[5:]:
            assert await recovery.read(name) == segment_content(name)
        assert recovery.came == [*ROW[:2], *ROW[5:7]]


async def test_somebody_else_who_opens_all_that_lies_there_does_no_harm(local_desk: Desk) -> None:
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        for name in ROW[:3]:
            await recovery.read(name)
        await recovery.placed(*ROW[3:7])
        for name in ROW[3:7]:
            (local_desk.wal / name).read_bytes()
        await recovery.placed(*ROW[7:])
        assert recovery.reads_alone
        for name in ROW[3:]:
            assert await recovery.read(name) == segment_content(name)
        assert recovery.came == [*ROW[:2]]


async def test_who_comes_back_again_and_again_to_what_he_has_cannot_read_it(local_desk: Desk) -> None:
    """A record that cannot be read, in a segment that is right: Postgres asks for it for ever."""
    await filled(local_desk, A, B, C)
    async with asking(local_desk) as recovery:
        await recovery.asked(A)
        await recovery.placed(B)
        for _ in range(6):
            assert recovery.unreadable is None
            await recovery.asked(B)
        assert recovery.unreadable == B
        await recovery.asked(C)
        assert recovery.unreadable is None
        for _ in range(9):
            # The end of the archive: a record that began in C would go on in D.
            assert await recovery.asked(D) is None
            await recovery.asked(C)
        assert recovery.unreadable is None
