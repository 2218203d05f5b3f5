"""What a recovery makes of the end of the archive, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from archive_harness import Desk, chain_of
from backup_harness import LAYOUT
from test_retention import info_at, put, put_backup
from wal_builders import SIZE, SYSTEM

from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.recovery.extract import Destination
from instance_manager.archive.recovery.replay import Replay, ReplaySettings, TargetNotReached, _Seen
from instance_manager.archive.recovery.restore import (
    MARKER,
    RestoreFailed,
    _alone_in,
    _find_marker,
    _make_roots,
    _Marker,
    _remove_unfinished,
    last_known,
    make_plan,
)
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.archive.recovery.target import Target, make_target
from instance_manager.archive.wal_names import Segment
from instance_manager.codec import to_json
from instance_manager.core.types import Lsn, Timeline
from instance_manager.postgres.server import LocalServer
from instance_manager.postgres.tablespaces import empty

END = Lsn(7 * SIZE.size_bytes + 5000)


def served(desk: Desk, root: Path) -> RecoveryArchive:
    return RecoveryArchive(
        desk.store,
        desk.layout,
        data_directory=desk.wal.parent,
        work_directory=root,
        system_identifier=str(SYSTEM),
        size=SIZE,
        chain=chain_of(),
        run_as=None,
        settings=FetchSettings(),
    )


def at_the_end(
    desk: Desk, root: Path, target: Target, *, lsn: Lsn = END, last_known: Lsn | None = None, **how: Any
) -> str:
    server = LocalServer(root, root, root, "127.0.0.1", 5432, root, None)
    replay = Replay(
        server,
        served(desk, root),
        target,
        chain_of(),
        ReplaySettings(**how),
        work_directory=root,
        last_known=last_known,
    )
    return replay._at_the_end(_Seen(lsn=lsn))


async def test_all_that_there_is_ends_where_the_archive_does_but_not_before(local_desk: Desk, tmp_path: Path) -> None:
    last = SIZE.start_lsn(SIZE.containing(chain_of().first, END))
    assert "the archive ends at 0/701388" in at_the_end(local_desk, tmp_path, make_target(), last_known=last)
    with pytest.raises(TargetNotReached, match="a record there cannot be read"):
        at_the_end(local_desk, tmp_path, make_target(), lsn=last, last_known=last)


async def test_a_position_at_the_end_is_reached_and_one_behind_it_is_not(local_desk: Desk, tmp_path: Path) -> None:
    assert "replayed to 0/701388" in at_the_end(local_desk, tmp_path, make_target(lsn="0/701388"))
    boundary = Lsn(8 * SIZE.size_bytes)
    for lsn in ("0/800000", "0/800028"):
        assert "replayed to" in at_the_end(local_desk, tmp_path, make_target(lsn=lsn), lsn=boundary)
    for target in (make_target(lsn="0/800029"), make_target(name="x"), make_target(time="2999-01-01 00:00:00+00")):
        with pytest.raises(TargetNotReached, match="before the target"):
            at_the_end(local_desk, tmp_path, target, lsn=boundary)
        assert "the archive ends at" in at_the_end(local_desk, tmp_path, target, lsn=boundary, accept_end=True)


async def test_what_comes_into_the_archive_after_its_end_was_accepted_is_not_replayed(
    local_desk: Desk, tmp_path: Path
) -> None:
    names = [f"0000000100000000{number:08X}" for number in (6, 7, 8)]
    for name in names:
        local_desk.ready(name)
        await local_desk.push(name)
    archive = served(local_desk, tmp_path)
    archive.cut_at(END)
    try:
        place = local_desk.wal / "RECOVERYXLOG"
        assert await archive._fetch(["recovery", names[0], str(place)]) == "done"
        assert place.read_bytes() == (local_desk.wal / names[0]).read_bytes()
        assert archive.ends_seen == 0
        assert await archive._fetch(["recovery", names[1], str(place)]) == "done"
        whole = (local_desk.wal / names[1]).read_bytes()
        assert place.read_bytes() == whole[:5000] + bytes(len(whole) - 5000)
        assert await archive._fetch(["recovery", names[2], str(place)]) == "absent"
        assert await archive._fetch(["recovery", "00000002.history", str(place)]) == "absent"
        assert archive.ends_seen == 2
    finally:
        await archive.close()


def test_a_directory_that_was_killed_as_it_opened_is_not_started_again(tmp_path: Path) -> None:
    """Postgres has removed standby.signal: it would open by itself, perhaps on the timeline that it came from."""
    (tmp_path / "global").mkdir()
    (tmp_path / "global" / "pg_control").write_bytes(b"x")
    (tmp_path / "standby.signal").write_bytes(b"")
    (tmp_path / MARKER).write_bytes(to_json(_Marker("20251101T000000", str(SYSTEM), make_target())))
    assert _find_marker(tmp_path) is not None
    (tmp_path / "standby.signal").unlink()
    with pytest.raises(RestoreFailed, match=r"killed as it opened.*Remove it"):
        _find_marker(tmp_path)


def test_files_of_a_restore_that_was_killed_are_removed_and_nobody_elses(tmp_path: Path) -> None:
    """A pod that is killed while its files are restored begins anew, for ever refused it would be no cluster."""
    data = tmp_path / "data"
    roots = _make_roots(Destination(data, {}, None))
    (data / "base").mkdir()
    (data / "base" / "1").write_bytes(b"half")
    _remove_unfinished(data)
    assert list(data.iterdir()) == []
    assert _find_marker(data) is None
    _make_roots(Destination(data, {}, None))
    (data / "global").mkdir()
    (data / "global" / "pg_control").write_bytes(b"whole")
    _remove_unfinished(data)
    assert (data / "global" / "pg_control").exists()
    empty(roots)
    (data / "somebody").write_bytes(b"else's")
    _remove_unfinished(data)
    with pytest.raises(RestoreFailed, match="is not empty"):
        _find_marker(data)


def test_tablespaces_of_a_restore_that_was_killed_are_emptied_where_they_still_bear_its_mark(tmp_path: Path) -> None:
    """The next try was refused for ever, because they were not empty."""
    data, first, second = tmp_path / "data", tmp_path / "first", tmp_path / "second"
    destination = Destination(data, {1: first, 2: second}, None)
    _make_roots(destination)
    for place in (first, second):
        (place / "PG_15_202209061").mkdir()
        (place / "PG_15_202209061" / "1").write_bytes(b"half")
    # Somebody has emptied the second since, and has put his own there.
    empty([second])
    (second / "somebody").write_bytes(b"else's")
    assert _remove_unfinished(data) == [first, data]
    assert (list(data.iterdir()), list(first.iterdir())) == ([], [])
    assert (second / "somebody").exists()


def test_a_kill_between_two_marks_leaves_nothing_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, space = tmp_path / "data", tmp_path / "space"
    touched: list[Path] = []
    touch = Path.touch

    def killed_at_the_second(path: Path, **words: Any) -> None:
        touched.append(path)
        if len(touched) == 2:
            raise KeyboardInterrupt
        touch(path, **words)

    monkeypatch.setattr(Path, "touch", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        _make_roots(Destination(data, {1: space}, None))
    assert _remove_unfinished(data) == [data]
    assert (list(data.iterdir()), list(space.iterdir())) == ([], [])


def test_two_restores_never_work_in_one_directory(tmp_path: Path) -> None:
    """The agent that began one has died; the next one begins while the first is still ending."""
    with (
        _alone_in(tmp_path / "data"),
        pytest.raises(RestoreFailed, match="another restore is at work"),
        _alone_in(tmp_path / "data"),
    ):
        pass
    with _alone_in(tmp_path / "data"):
        pass


async def test_all_of_an_old_timeline_is_held_against_what_the_archive_has_of_it(local_desk: Desk) -> None:
    """Not only of the newest history: `latest` of any must not open before its last segment."""
    store = local_desk.store
    await put_backup(store, info_at(2))
    for timeline, numbers in ((1, range(20, 26)), (2, range(23, 31))):
        for number in numbers:
            await put(store, LAYOUT.wal(SIZE.name(Segment(Timeline(timeline), number))))
    history = b"1\t0/1710000\tno recovery target specified\n"
    await put(store, LAYOUT.wal("00000002.history"), b"".join(LAYOUT.codec.compressed([history], len(history))))
    newest = await make_plan(store, LAYOUT, make_target())
    assert last_known(newest) == 30 * SIZE.size_bytes
    old = await make_plan(store, LAYOUT, make_target(timeline="1"))
    assert last_known(old) == 25 * SIZE.size_bytes
