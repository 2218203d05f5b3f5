"""Real recoveries whose Postgres reads pg_wal alone: nothing but what was placed there is ever believed, whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from archive_harness import until
from archiving_server import REPOSITORY, SEGMENT_BYTES, all_archived, archiving, insert, prepared
from backup_harness import store_of, take
from fetch_steps import hold_back
from harness import BIN_DIRECTORY, Cluster, run_as
from recovery_harness import ROWS, Restoration, archived, segments_in

from instance_manager.archive.recovery import restore as restoring
from instance_manager.archive.recovery.hidden_server import HiddenServer
from instance_manager.archive.recovery.replay import Replay
from instance_manager.archive.wal_names import SegmentSize
from instance_manager.core.types import Lsn, parse_lsn
from instance_manager.ports import ObjectStore
from instance_manager.postgres.configuration import parse_settings

pytestmark = pytest.mark.timeout(300)
SIZE = SegmentSize(SEGMENT_BYTES)
SEED = 20261129


class Held:
    """One segment does not come into pg_wal before it is let go, so that Postgres waits for it alone."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = name
        self.start = SIZE.start_lsn(SIZE.parse(name))
        self.go = hold_back(name, monkeypatch)
        self.replay: Replay | None = None
        until_there = Replay._until_there

        async def replaying(replay: Replay) -> Any:
            self.replay = replay
            return await until_there(replay)

        monkeypatch.setattr(Replay, "_until_there", replaying)

    async def waits(self, restoration: Restoration) -> None:
        """Postgres has replayed what is before it, but for a record that goes on in it, and is to read alone."""
        await until(lambda: self.replayed(restoration) > self.start - 64 * 1024 and self.reads_alone, deadline_s=60)

    @property
    def reads_alone(self) -> bool:
        return self.replay is not None and self.replay._archive.reads_alone

    def replayed(self, restoration: Restoration) -> Lsn:
        """As it was told last."""
        told = [text.removeprefix("replayed to ").partition(",")[0] for text in restoration.said]
        return max((parse_lsn(text) for text in told if "/" in text and " " not in text), default=Lsn(0))

    def children(self) -> dict[str, int]:
        """The processes of the Postgres that replays, by what they are."""
        assert self.replay is not None
        process = self.replay._server._process
        assert process is not None
        pid = process.pid
        found = {}
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            # Who has ended meanwhile is none any more.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                title = Path(f"/proc/{child}/cmdline").read_text().strip("\0 ")
                found[title.removeprefix("postgres: ")] = int(child)
        return found


async def other_history(cluster: Cluster, section: dict[str, Any], store: ObjectStore) -> dict[str, bytes]:
    """An archive as `archived` makes it; and segments that went on with other rows from the same log, under the same names."""
    server = cluster.add("p")
    with archiving(server, section) as made:
        await prepared(cluster, made)
        await take(made, store)
        await server.stop()
        other = cluster.add("q", server.data)
        await server.start()
        for first in range(0, ROWS, ROWS // 4):
            await insert(server, first, ROWS // 4)
        await server.execute("SELECT pg_switch_wal()")
        await server.execute("CHECKPOINT")
        await server.stop()
    other.set_dynamic(synchronous_standby_names="")
    other.configure(archive_mode="off", wal_keep_size="1GB")
    await other.start()
    for first in range(ROWS, 2 * ROWS, ROWS // 4):
        await insert(other, first, ROWS // 4)
    await other.stop()
    wal = other.data / "pg_wal"
    return {path.name: path.read_bytes() for path in wal.iterdir() if len(path.name) == 24}


def put_into(wal: Path, segments: dict[str, bytes]) -> None:
    user = run_as()
    for name, content in segments.items():
        (wal / name).write_bytes(content)
        if user is not None:
            os.chown(wal / name, user.uid, user.gid)


async def test_segments_of_another_history_in_pg_wal_are_never_believed(
    cluster: Cluster, directory_section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and readable ones, as an older try or a copy may leave them; Postgres waits for one of those names."""
    store = store_of(directory_section)
    others = await other_history(cluster, directory_section, store)
    names = await segments_in(store)
    held = Held(names[-8], monkeypatch)
    assert set(names[3:-2]) <= set(others)
    restoration = Restoration(cluster.add("r"), store)
    finish = restoring._finish_files

    def finished(*words: Any) -> None:
        finish(*words)
        put_into(restoration.server.data_directory / "pg_wal", others)

    monkeypatch.setattr(restoring, "_finish_files", finished)
    running = asyncio.create_task(restoration.run())
    await held.waits(restoration)
    assert not (restoration.server.data_directory / "pg_wal" / held.name).exists()
    assert held.replayed(restoration) <= held.start
    held.go.set()
    await running
    assert await restoration.numbers() == set(range(ROWS))


async def test_somebody_who_opens_all_that_lies_in_pg_wal_leaves_nothing_there_that_is_behind_the_target(
    cluster: Cluster, directory_section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a copy by another program does: each file that he opens counts as taken, and is not removed by us."""
    store = store_of(directory_section)
    await archived(cluster, directory_section, store)
    restoration = Restoration(cluster.add("r"), store)
    wal = restoration.server.data_directory / "pg_wal"
    look, opened = HiddenServer.look, set[str]()

    async def looking(hidden: HiddenServer) -> asyncpg.Record | None:
        for path in wal.iterdir():
            if len(path.name) == 24:
                path.open().close()
                opened.add(path.name)
        return await look(hidden)

    monkeypatch.setattr(HiddenServer, "look", looking)
    restored = await restoration.run(name="half")
    last = SIZE.name(SIZE.containing(restored.info.timeline, restored.reached.lsn))
    assert max(opened) > last
    assert all(path.name <= last for path in wal.iterdir() if path.name.startswith("00000001") and len(path.name) == 24)
    assert await restoration.numbers() == set(range(ROWS // 2))


async def test_a_postgres_that_starts_its_processes_anew_while_it_reads_alone_goes_on(
    cluster: Cluster, directory_section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(directory_section)
    await archived(cluster, directory_section, store)
    held = Held((await segments_in(store))[-8], monkeypatch)
    restoration = Restoration(cluster.add("r"), store)
    running = asyncio.create_task(restoration.run())
    await held.waits(restoration)
    before = held.children()
    os.kill(before["checkpointer"], signal.SIGKILL)
    await until(lambda: held.children().get("checkpointer", before["checkpointer"]) != before["checkpointer"])
    held.go.set()
    await running
    assert await restoration.numbers() == set(range(ROWS))


async def test_what_the_source_has_set_by_alter_system_turns_neither_where_the_log_comes_from_nor_where_it_ends(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    run = cluster.root / "run"
    run.mkdir()
    server.own(run)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        await server.execute(f"ALTER SYSTEM SET restore_command = 'touch {run}/%f; exit 1'")
        await server.execute("ALTER SYSTEM SET wal_retrieve_retry_interval = '1h'")
        await server.execute("ALTER SYSTEM SET recovery_target_name = 'early'")
        await server.execute("ALTER SYSTEM SET recovery_target_action = 'promote'")
        await server.execute("ALTER SYSTEM SET work_mem = '5MB'")
        await take(made, store)
        await insert(server, 0, 10_000)
        await server.fetchval("SELECT pg_create_restore_point('early')")
        await insert(server, 10_000, 10_000)
        await server.execute("SELECT pg_switch_wal()")
        await server.stop()
    restoration = Restoration(cluster.add("r"), store)
    await restoration.run()
    assert list(run.iterdir()) == []
    settings = (restoration.server.data_directory / "postgresql.auto.conf").read_text().splitlines()
    assert "work_mem = '5MB'" in settings
    assert "# wal_retrieve_retry_interval = '1h'" in settings, "kept for whoever wants to know it"
    assert await restoration.numbers() == set(range(20_000))


async def test_nothing_that_the_source_has_set_by_alter_system_is_stronger_than_what_replay_needs(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    """A machine of another size, other users and libraries, and a log that would go elsewhere, or be silent about where replay stopped."""
    theirs = {
        **{"shared_buffers": "7TB", "huge_pages": "on", "max_wal_size": "2MB", "hot_standby": "off", "fsync": "off"},
        **{"logging_collector": "on", "log_destination": "csvlog", "log_error_verbosity": "verbose"},
        **{"log_min_messages": "panic", "ssl": "on", "hba_file": "/nowhere/hba", "external_pid_file": "/nowhere/pid"},
        **{"unix_socket_directories": "/nowhere", "unix_socket_group": "nobody-at-all", "port": "1"},
        **{"session_preload_libraries": "not_there", "local_preload_libraries": "$libdir/plugins/neither"},
    }
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        for name, value in theirs.items():
            await server.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        await take(made, store)
        await insert(server, 0, 10_000)
        await server.fetchval("SELECT pg_create_restore_point('here')")
        await insert(server, 10_000, 10_000)
        await server.execute("SELECT pg_switch_wal()")
        await server.execute("ALTER SYSTEM RESET ALL")
        await server.stop()
    restoration = Restoration(cluster.add("r"), store)
    restored = await restoration.run(name="here")
    assert "stopped at the target" in restored.reached.by
    auto_conf = restoration.server.data_directory / "postgresql.auto.conf"
    assert set(theirs) <= set(parse_settings(auto_conf.read_text())), "they are kept for its later life"
    auto_conf.write_text("")
    assert await restoration.numbers() == set(range(10_000))


async def test_who_has_read_alone_asks_for_the_unfinished_tail_and_gets_all_of_it(
    cluster: Cluster, directory_section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, {**directory_section, "stream_interval_s": 0.2}) as made:
        await prepared(cluster, made)
        await take(made, store)
        await insert(server, 0, 20_000)
        await all_archived(server)
        await insert(server, 20_000, 10)
        flushed = await server.fetchval("SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn")
        await until(lambda: made.status()["stream"]["durable_lsn"] >= flushed, deadline_s=20)
        server.kill()
    changes: list[bool] = []
    change = HiddenServer.change_way

    def changed(hidden: HiddenServer) -> None:
        changes.append(hidden._reads_alone())
        change(hidden)

    monkeypatch.setattr(HiddenServer, "change_way", changed)
    restoration = Restoration(cluster.add("r"), store)
    await restoration.run()
    assert changes == [False, True, False]
    assert await restoration.numbers() == set(range(20_010))


@pytest.mark.parametrize("seed", range(3))
async def test_a_recovery_that_is_killed_at_any_step_goes_on_over_torn_files(
    cluster: Cluster, directory_section: dict[str, Any], seed: int
) -> None:
    """With what a crash of the machine makes of files that were not flushed, in place of all that it had in pg_wal."""
    store = store_of(directory_section)
    await archived(cluster, directory_section, store)
    restoration = Restoration(cluster.add("r"), store)
    data = restoration.server.data_directory
    command = ["restore", str(data), "--server", "orders"]
    command += ["--directory", directory_section["directory"], "--bin-directory", str(BIN_DIRECTORY)]
    chance = random.Random(SEED + seed)
    # The first few are before it reads alone; there are two for each of some forty segments.
    for step in (chance.randint(1, 6), chance.randint(7, 70), chance.randint(7, 70)):
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, str(Path(__file__).with_name("killed_recovery.py")), str(step), *command),
            cwd=REPOSITORY,
            # Whatever it leaves goes with the cluster.
            env={**os.environ, "TMPDIR": str(cluster.root), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
        )
        assert await program.wait() == -signal.SIGKILL, f"killed at step {step}"
        # Its Postgres ends with it, but not at once.
        await until(lambda: not (data / "postmaster.pid").exists(), deadline_s=30)
        tear(data / "pg_wal")
    await restoration.run()
    assert "going on with the restore" in "".join(restoration.said)
    assert await restoration.numbers() == set(range(ROWS))


def tear(wal: Path) -> None:
    for path in wal.iterdir():
        if len(path.name) == 24:
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
