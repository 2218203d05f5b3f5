"""Segments placed in pg_wal ahead of replay: the real shell line and client ask as Postgres does, without a Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from archive_harness import Desk, chain_of, until
from fetch_steps import FORK, ON_2, SEGMENT, A, B, C, D, fill, put
from wal_builders import SIZE, SYSTEM, segment_content

from instance_manager.archive.content import sha256_of
from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.recovery import placing
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.spool import Spool
from instance_manager.archive.stores.patience import Patience
from instance_manager.core.types import Lsn, TimelineChain
from instance_manager.postgres.files import fsync_directory, fsync_file

QUICK = Patience(total_s=5.0, attempt_s=5.0, attempts_max=2, first_pause_s=0.01)
ROW = tuple(f"0000000100000000000000{number:02X}" for number in range(5, 15))


class Asking(RecoveryArchive):
    """Counts what comes to it, and asks itself through the shell, as the startup process does."""

    wal: Path
    work: Path
    came: list[str]

    async def ask(self, name: str) -> int:
        """restore_command's exit code; what it restored is in place then."""
        command = self.restore_command().replace("%f", name).replace("%p", str(self.wal / "RECOVERYXLOG"))
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", command)
        code = await process.wait()
        if code == 0:
            (self.wal / "RECOVERYXLOG").replace(self.wal / name)
        return code

    async def read(self, name: str) -> bytes | None:
        """What Postgres would read: restored, or found in pg_wal; None: neither. AssertionError: it would stop."""
        code = await self.ask(name)
        assert code in (0, 1), code
        path = self.wal / name
        return path.read_bytes() if path.exists() else None

    def is_placed(self, name: str) -> bool:
        marker = self.work / "placed" / name
        return marker.exists() and marker.stat().st_size > 0

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
    made.wal, made.work, made.came = desk.wal, work, []
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
        assert await recovery.read(ROW[0]) == segment_content(ROW[0])
        for number, name in enumerate(ROW[1:], 1):
            await recovery.placed(*ROW[number : number + 4])
            assert recovery.placed_now() <= set(ROW[number : number + 4]), "never more than was allowed"
            assert await recovery.ask(name) == 1
            assert (local_desk.wal / name).read_bytes() == segment_content(name)
        assert recovery.came == [ROW[0]]
        assert recovery.status.fetch.restored == len(ROW)
        beyond = SIZE.next_name(ROW[-1])
        assert await recovery.read(beyond) is None
        assert (recovery.came, recovery.ends_seen) == ([ROW[0], beyond], 1)
    assert done_marks(local_desk) == set(ROW[1:]), "as Postgres marks what it restores itself"
    assert {path.name for path in local_desk.wal.iterdir() if len(path.name) == 24} == set(ROW)


async def test_what_is_still_on_its_way_is_waited_for_and_read_in_place(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(local_desk, A, B)
    held = asyncio.Event()
    make_durable = placing.InPgWal.make_durable

    async def slow(place: placing.InPgWal, file: Path) -> None:
        await held.wait()
        await make_durable(place, file)

    monkeypatch.setattr(placing.InPgWal, "make_durable", slow)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        question = asyncio.create_task(recovery.ask(B))
        await until(lambda: recovery.came == [A, B])
        assert not question.done()
        held.set()
        # It is not the archiver's file any more when the answer comes, so it stays in the spool.
        assert await question in (0, 1)
        assert (local_desk.wal / B).read_bytes() == segment_content(B)
        assert recovery.ends_seen == 0


async def test_a_marker_comes_last_and_its_segment_is_flushed_before(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(local_desk, A, B)
    steps: list[str] = []

    async with asking(local_desk, ahead=1) as recovery:
        marker = recovery.work / "placed" / B

        def file_flushed(path: Path) -> None:
            fsync_file(path)
            assert path.read_bytes() == segment_content(B)
            assert not (local_desk.wal / B).exists()
            assert not marker.exists()
            steps.append("file")

        def directory_flushed(path: Path) -> None:
            assert path == local_desk.wal
            assert (path / B).exists()
            assert done_marks(local_desk) == {B}
            fsync_directory(path)
            assert not marker.exists()
            steps.append("directory")

        monkeypatch.setattr(placing, "fsync_file", file_flushed)
        monkeypatch.setattr(placing, "fsync_directory", directory_flushed)
        await recovery.read(A)
        await recovery.placed(B)
    assert steps == ["file", "directory"]


async def test_a_marker_is_good_for_one_answer_and_what_could_not_be_read_comes_anew(local_desk: Desk) -> None:
    await filled(local_desk, A, B, C)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await recovery.placed(B)
        (local_desk.wal / B).write_bytes(bytes(SEGMENT))
        assert await recovery.read(B) == bytes(SEGMENT)
        assert await recovery.read(B) == segment_content(B)
        assert recovery.came == [A, B]


@pytest.mark.parametrize("is_marked", [False, True])
async def test_a_crash_before_or_after_the_marker_leaves_nothing_that_is_believed(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch, is_marked: bool
) -> None:
    """Of a machine: the names are there, and what is in them is not."""
    await filled(local_desk, A, B, C)
    with monkeypatch.context() as during:
        # A kill clears nothing up.
        during.setattr(placing.InPgWal, "_remove", lambda *_: None)
        if not is_marked:
            during.setattr(placing.InPgWal, "_mark", killed)
        async with asking(local_desk) as crashed:
            await crashed.read(A)
            under_way = crashed._fetcher._prefetch._under_way
            await until(lambda: all(under_way[name].done() for name in (B, C)))
            assert crashed.placed_now() == ({B, C} if is_marked else set())
    for name in (B, C):
        assert (local_desk.wal / name).exists()
        (local_desk.wal / name).write_bytes(bytes(SEGMENT))
    async with asking(local_desk, ahead=0) as recovery:
        for name in (A, B, C):
            assert await recovery.read(name) == segment_content(name)
        assert recovery.came == [A, B, C]


def killed(*_: object) -> None:
    raise OSError("killed")


async def test_markers_do_not_outlive_their_postgres(local_desk: Desk) -> None:
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await recovery.placed(B, C, D)
        assert await recovery.ask(B) == 1
        await recovery.before_postgres_starts()
        assert recovery.placed_now() == set()
        assert (local_desk.wal / B).exists(), "it had that one"
        assert not (local_desk.wal / C).exists()
        assert done_marks(local_desk) == {B}
        for name in (A, B, C):
            assert await recovery.read(name) == segment_content(name)
        assert recovery.came[:2] == [A, A]


async def test_an_old_file_under_a_new_name_is_never_taken_for_the_segment(local_desk: Desk) -> None:
    """As recycling leaves them: the right name and the right size, with another segment in it."""
    await filled(local_desk, A, B, C)
    for name in (B, C, D):
        (local_desk.wal / name).write_bytes(segment_content(A))
    async with asking(local_desk) as recovery:
        for name in (A, B, C):
            assert await recovery.read(name) == segment_content(name)
        # The archive ends here; what Postgres finds under the name has another address in its pages, and it stops.
        assert await recovery.ask(D) == 1
        assert (recovery.came[-1], recovery.ends_seen) == (D, 1)


async def test_a_damaged_segment_is_nobodys_until_it_is_asked_for_and_then_stops_recovery(local_desk: Desk) -> None:
    await filled(local_desk, A, B)
    await put(local_desk, C, segment_content(C, seed=2), sha256=sha256_of([segment_content(C)]))
    await put(local_desk, D, segment_content(D))
    (local_desk.wal / C).write_bytes(segment_content(A))
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await recovery.placed(B, D)
        assert await recovery.ask(B) == 1
        assert await recovery.ask(C) == 126
        assert (local_desk.wal / C).read_bytes() == segment_content(A), "what was there is not touched"


async def test_nothing_behind_a_fork_is_placed(local_desk: Desk) -> None:
    chain = chain_of((2, 1, FORK))
    await filled(local_desk, A, B, C, D)
    await put(local_desk, ON_2, segment_content(ON_2))
    async with asking(local_desk, chain=chain) as recovery:
        await recovery.read(A)
        await recovery.placed(B)
        assert await recovery.ask(B) == 1
        assert await recovery.read(ON_2) == segment_content(ON_2)
        assert await recovery.read(C) == segment_content(C)[: FORK - 7 * SEGMENT] + bytes(8 * SEGMENT - FORK)
        assert recovery.came == [A, ON_2, C]
        assert not (local_desk.wal / D).exists()


async def test_what_was_given_is_not_replaced_and_another_order_of_questions_begins_anew(local_desk: Desk) -> None:
    """From the checkpoint of a backup Postgres goes back to where its log begins, and comes by once more."""
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        await recovery.read(ROW[2])
        await recovery.placed(*ROW[3:7])
        given = (local_desk.wal / ROW[2]).stat().st_ino
        await recovery.read(ROW[0])
        await recovery.placed(ROW[1], ROW[3], ROW[4])
        assert recovery.placed_now() == {ROW[1], ROW[3], ROW[4]}
        assert not (local_desk.wal / ROW[6]).exists()
        assert (local_desk.wal / ROW[2]).stat().st_ino == given
        for name in ROW:
            assert await recovery.read(name) == segment_content(name)
        assert ROW[2] in recovery.came[2:], "this one by the long way"
        assert recovery.unreadable is None


async def test_before_it_opens_what_was_not_asked_for_is_removed_and_nothing_more_comes(local_desk: Desk) -> None:
    await filled(local_desk, *ROW)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await recovery.placed(B, C, D)
        assert await recovery.ask(B) == 1
        await recovery.before_it_opens()
        assert {path.name for path in local_desk.wal.iterdir() if len(path.name) == 24} == {A, B}
        assert done_marks(local_desk) == {B}
        # The promotion reads the last record's segment once more.
        assert await recovery.read(B) == segment_content(B)
        assert recovery._fetcher._prefetch._under_way == {}


async def test_where_the_history_is_cut_the_whole_segment_is_not_read_again(local_desk: Desk) -> None:
    await filled(local_desk, A, B, C)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
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
        await recovery.read(ROW[0])
        await recovery.placed(*ROW[1:4])
        assert recovery.placed_now() == set(ROW[1:4]), "half of what is free"
        free = SEGMENT
        await recovery.before_postgres_starts()
        for name in ROW[:4]:
            assert await recovery.read(name) == segment_content(name)
        assert recovery.came[1:] == list(ROW[:4])


@pytest.mark.parametrize("step", ["make_durable", "_take_place", "_mark"])
async def test_what_finds_no_room_is_not_placed_and_leaves_nothing(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    await filled(local_desk, A, B)
    met: list[str] = []

    def full(*_: object) -> int:
        met.append(step)
        raise OSError(errno.ENOSPC, "No space left on device")

    async def full_later(*_: object) -> int:
        return full()

    monkeypatch.setattr(placing.InPgWal, step, full_later if step == "make_durable" else full)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await until(lambda: met and recovery._fetcher._prefetch._under_way[B].done())
        assert not (local_desk.wal / B).exists()
        assert not recovery.is_placed(B)
        assert await recovery.ask(B) == 0
        assert (local_desk.wal / B).read_bytes() == segment_content(B)


async def test_a_placed_segment_whose_name_another_file_has_taken_gets_no_marker(
    local_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(local_desk, A, B)

    def overtaken(path: Path) -> None:
        fsync_directory(path)
        (path / "other").write_bytes(bytes(SEGMENT))
        (path / "other").replace(path / B)

    monkeypatch.setattr(placing, "fsync_directory", overtaken)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await until(lambda: recovery._fetcher._prefetch._under_way[B].done())
        assert not recovery.is_placed(B)
        assert await recovery.read(B) == segment_content(B)
        assert recovery.came == [A, B]


def test_threads_that_bring_segments_ahead_give_way_to_postgres_and_are_never_put_before_it(tmp_path: Path) -> None:
    seen: list[int] = []

    def noted() -> Iterator[bytes]:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        yield b"x"

    def write(niceness: int) -> None:
        Spool(tmp_path, niceness=niceness).write(A, noted())

    own = os.getpriority(os.PRIO_PROCESS, 0)
    for niceness in (0, own + 5, own - 1):
        thread = threading.Thread(target=write, args=(niceness,))
        thread.start()
        thread.join()
    assert seen == [own, own + 5, own]


async def test_who_comes_back_again_and_again_to_what_he_has_cannot_read_it(local_desk: Desk) -> None:
    """A record that cannot be read, in a segment that is right: Postgres asks for it for ever."""
    await filled(local_desk, A, B, C)
    async with asking(local_desk) as recovery:
        await recovery.read(A)
        await recovery.placed(B)
        for _ in range(6):
            assert recovery.unreadable is None
            await recovery.read(B)
        assert recovery.unreadable == B
        await recovery.read(C)
        assert recovery.unreadable is None
        for _ in range(9):
            # The end of the archive: a record that began in C would go on in D.
            assert await recovery.read(D) is None
            await recovery.read(C)
        assert recovery.unreadable is None
