"""Incremental backups of a real server, which must be Postgres 17 or later: `tests/majors.sh 17 18` runs this file.

What is restored is compared with what a sum over every row said when it was backed up.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from archiving_server import REPOSITORY, ArchivingServer, all_archived, archiving, prepared, run
from backup_harness import LAYOUT, SETTINGS, objects, store_of, take
from fault_proxy import FaultProxy
from harness import BIN_DIRECTORY, Cluster, PostgresProcess, major_version, run_as, wait_until
from recovery_harness import QUICK, Restoration
from test_backup import command
from test_backup_with_barman import give_to_postgres, open_directory, options

from instance_manager.archive.backup.catalogue import chain_of, find_backup, list_backups
from instance_manager.archive.backup.copying import BackupFailed
from instance_manager.archive.backup.increment import parse_header
from instance_manager.archive.backup.manifest import read_members
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.backup.removal import BackupKept, delete_backup
from instance_manager.archive.backup.requests import Request, Requests, Schedule
from instance_manager.archive.backup.take import OnBackup, Taken
from instance_manager.archive.backup.tender import BackupTender, TenderSettings
from instance_manager.archive.backup.verify import verify_chain
from instance_manager.archive.codecs import Codec
from instance_manager.archive.orders import OrderBook, Orders
from instance_manager.archive.recovery.combine import STAGE, ManifestWriter, combined
from instance_manager.archive.recovery.extract import Destination
from instance_manager.archive.recovery.restore import RestoreFailed
from instance_manager.core.types import Epoch
from instance_manager.ports import ObjectStore
from instance_manager.threads import monotonic_s

pytestmark = pytest.mark.timeout(240)

MAJOR = major_version()
assert MAJOR >= 17, f"these tests are about Postgres 17 and later, and {BIN_DIRECTORY} is {MAJOR}"
SUMMARIES = {"summarize_wal": "on"}
LARGE_PAGES = 400
NONE = Codec("none")


async def incremental(made: ArchivingServer, store: ObjectStore, parent: Taken | None = None, **changes: Any) -> Taken:
    on = OnBackup(None if parent is None else parent.info.backup_id)
    return await take(made, store, on=on, **changes)


async def sums(server: PostgresProcess, *tables: str) -> dict[str, Any]:
    """Of each table how many rows, and a sum that every one of them changes."""
    found = {}
    for table in tables:
        query = f"SELECT count(*) AS rows, sum(hashtext({table}::text)::bigint) AS sum FROM {table}"  # noqa: S608
        found[table] = dict((await server.fetch(query))[0])
    return found


async def in_database(server: PostgresProcess, database: str, query: str) -> Any:
    connection = await server.connect(database=database)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def large_table(server: PostgresProcess) -> None:
    """With a row a page, and a few rows that nobody touches."""
    await server.execute("CREATE TABLE large (n int PRIMARY KEY, filler text)")
    await server.execute("ALTER TABLE large ALTER filler SET STORAGE PLAIN")
    await server.execute(
        f"INSERT INTO large SELECT n, repeat(md5(n::text), 150) FROM generate_series(1, {LARGE_PAGES}) n"  # noqa: S608
    )


async def put_together(server: PostgresProcess, store: ObjectStore, backup_id: str, directory: Path) -> Destination:
    """The chain put together, as pg_combinebackup left it."""
    listed = await list_backups(store, LAYOUT, deadline_s=10)
    chain = chain_of(listed, find_backup(listed, backup_id))
    info = chain[-1].info
    assert info is not None
    spaces = {each.oid: open_directory(directory / str(each.oid)) for each in info.tablespaces}
    result, _ = await combined(
        server.server,
        store,
        LAYOUT,
        chain,
        Destination(open_directory(directory / "data"), spaces, run_as()),
        parallel=2,
        patience=QUICK,
    )
    return result


async def test_a_chain_under_load_is_restored_to_the_last_row_and_verified_by_postgres_itself(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    space, elsewhere = open_directory(cluster.root / "space"), open_directory(cluster.root / "elsewhere")
    tables = ("t", "large", "grown", "cut", "spaced", "regrown")
    with archiving(server, directory_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        await large_table(server)
        await server.execute(f"CREATE TABLESPACE space LOCATION '{space}'")
        await server.execute(
            "CREATE TABLE spaced TABLESPACE space AS SELECT n, repeat('x', 500) FROM generate_series(1, 2000) n"
        )
        for name in ("grown", "cut", "dropped", "rewritten", "regrown"):
            await server.execute(
                f"CREATE TABLE {name} AS SELECT n, repeat('x', 500) AS x FROM generate_series(1, 2000) n"  # noqa: S608
            )
        await server.execute("CREATE UNLOGGED TABLE unlogged AS SELECT n FROM generate_series(1, 100) n")
        await server.execute("CREATE DATABASE gone")
        await server.execute("VACUUM")
        full = await take(made, store)

        loading = asyncio.create_task(load(server))
        await server.execute("UPDATE large SET filler = repeat('y', 4000) WHERE n % 40 = 0")
        await server.execute("INSERT INTO grown SELECT n, repeat('z', 500) FROM generate_series(1, 4000) n")
        await server.execute("DELETE FROM cut WHERE n > 100")
        await server.execute("VACUUM cut")
        # What was cut off and grows again must not bring back what the full backup has there.
        await server.execute("DELETE FROM regrown WHERE n > 100")
        await server.execute("VACUUM regrown")
        await server.execute("INSERT INTO regrown SELECT n, repeat('q', 500) FROM generate_series(1, 300) n")
        await server.execute("DROP TABLE dropped")
        await server.execute("DROP DATABASE gone")
        await server.execute("CREATE DATABASE made")
        await in_database(server, "made", "CREATE TABLE inside AS SELECT 17 AS n")
        await server.execute("CREATE DATABASE copied STRATEGY file_copy")
        await server.execute("UPDATE spaced SET n = n + 1 WHERE n % 100 = 0")
        first = await incremental(made, store)
        await server.execute("UPDATE large SET filler = repeat('w', 4000) WHERE n % 50 = 0")
        await server.execute("TRUNCATE rewritten")
        await server.execute("INSERT INTO rewritten VALUES (1, 'new')")
        await server.execute("VACUUM FULL spaced")
        await server.execute("CREATE TABLE late AS SELECT n FROM generate_series(1, 500) n")
        await in_database(server, "made", "INSERT INTO inside VALUES (18) RETURNING n")
        second = await incremental(made, store)
        await server.execute("INSERT INTO late VALUES (501)")
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        expected = await sums(server, *tables, "late", "rewritten")
        await all_archived(server)
        server.kill()
    assert first.info.parent_id == full.info.backup_id
    assert second.info.parent_id == first.info.backup_id
    assert second.manifest.whole_bytes is not None
    assert second.info.size_bytes is not None
    assert second.info.size_bytes < second.manifest.whole_bytes / 2
    listed = await list_backups(store, LAYOUT, deadline_s=10)
    assert [each.state for each in listed] == ["done"] * 3
    verdict = await verify_chain(store, LAYOUT, listed)
    assert verdict.is_good, verdict
    assert not [name for name in await objects(store, "orders/base/") if full.info.backup_id not in name]

    look = cluster.add("look")
    result = await put_together(look, store, second.info.backup_id, open_directory(cluster.root / "put-together"))
    assert not list(result.data_directory.rglob("INCREMENTAL.*"))
    for program in (["pg_verifybackup", "-n"], ["pg_checksums", "--check", "-D"]):
        done = await run([BIN_DIRECTORY / program[0], *program[1:], result.data_directory], as_postgres=True)
        assert done.returncode == 0 or "not shut down cleanly" in done.stderr or "must be shut down" in done.stderr, (
            done.stderr
        )

    restoration = Restoration(cluster.add("r"), store)
    restored = await restoration.run(changes={"tablespaces": {"space": elsewhere}})
    assert restored.info == second.info
    assert "standing on" in " ".join(restoration.said) or "stands on" in " ".join(restoration.said)
    restored_server = await restoration.start()
    assert await sums(restored_server, *tables, "late", "rewritten") == expected
    assert await restored_server.fetchval(
        "SELECT array_agg(datname ORDER BY datname) FROM pg_database WHERE NOT datistemplate"
    ) == ["copied", "made", "postgres"]
    assert await in_database(restored_server, "made", "SELECT sum(n) FROM inside") == 35
    assert await restored_server.fetchval("SELECT count(*) FROM unlogged") == 0
    assert not [name for root in (restored_server.data, elsewhere) for name in root.glob(".instance-manager*")]
    connection = [f"--host={restored_server.socket}", f"--port={restored_server.port}", "--username=postgres"]
    done = await run(
        [BIN_DIRECTORY / "pg_amcheck", *connection, "--all", "--install-missing", "--heapallindexed"], as_postgres=True
    )
    assert done.returncode == 0, (done.stdout, done.stderr)


async def load(server: PostgresProcess) -> None:
    """Rows of `t`, one transaction after the other, until cancelled."""
    number = 0
    while True:
        await server.fetchval("INSERT INTO t VALUES ($1::int, repeat(md5($1::text), 20)) RETURNING n", number)
        number += 1


async def test_a_moment_between_two_of_a_chain_is_recovered(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        await large_table(server)
        await take(made, store)
        await server.execute("UPDATE large SET filler = 'first' WHERE n = 7")
        first = await incremental(made, store)
        await server.execute("UPDATE large SET filler = 'second' WHERE n = 7")
        before = await server.fetchval("SELECT clock_timestamp()::text")
        await asyncio.sleep(0.05)  # two commits of one microsecond could not be told apart
        await server.execute("DELETE FROM large")
        await incremental(made, store)
        await all_archived(server)
        server.kill()
    restoration = Restoration(cluster.add("r"), store)
    assert (await restoration.run(time=before)).info == first.info
    restored = await restoration.start()
    assert await restored.fetchval("SELECT filler FROM large WHERE n = 7") == "second"
    assert await restored.fetchval("SELECT count(*) FROM large") == LARGE_PAGES


async def test_a_standby_takes_one_and_after_a_failover_it_knows_what_has_changed_since(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    primary, standby = cluster.add("p"), cluster.add("s")
    store = store_of(directory_section)
    with archiving(primary, directory_section) as first, archiving(standby, directory_section) as second:
        system = await prepared(cluster, first, **SUMMARIES)
        await large_table(primary)
        full = await take(first, store)
        await all_archived(primary)
        cluster.follow(standby, primary)
        standby.configure(**second.archive_settings(), **SUMMARIES)
        await second.start_archiver()
        second.order("standby", system, is_streaming=True)
        await standby.start()
        await primary.execute("UPDATE large SET filler = 'in the standby' WHERE n = 6")
        await primary.execute("CHECKPOINT")
        await cluster.wait_streaming(primary, "s")
        end = await primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")
        replayed = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
        await wait_until(lambda: standby.fetchval(replayed, end), deadline_s=30)
        done = await asyncio.to_thread(command, first, "backup", "--wait", "--incremental", "--timeout", "90")
        assert done.returncode == 0, done.stderr
        by_standby = (await list_backups(store, LAYOUT, deadline_s=10))[-1]
        assert by_standby.manifest is not None
        assert (by_standby.manifest.was_standby, by_standby.parent_id) == (True, full.info.backup_id)
        deleted = await asyncio.to_thread(command, first, "backup", "delete", full.info.backup_id, "--yes")
        assert deleted.returncode == 1
        assert f"is needed by {by_standby.backup_id}" in deleted.stderr
        shown = json.loads((await asyncio.to_thread(command, first, "backups", "--json")).stdout)["backups"]
        assert [each["parent"] for each in shown] == [None, full.info.backup_id]

        await primary.execute("UPDATE large SET filler = 'old primary' WHERE n = 7")
        end = await primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")
        await wait_until(lambda: standby.fetchval(replayed, end), deadline_s=30)
        primary.kill()
        await standby.execute("SELECT pg_promote()")
        standby.set_dynamic(primary_conninfo="", synchronous_standby_names="")
        await standby.reload()
        second.order("primary", system, epoch=2)
        await standby.execute("UPDATE large SET filler = 'new primary' WHERE n = 8")
        taken = await incremental(second, store)
        await standby.execute("UPDATE large SET filler = 'later' WHERE n = 9")
        await all_archived(standby)
        standby.kill()
    assert (taken.info.timeline, taken.info.parent_id) == (2, by_standby.backup_id)
    restoration = Restoration(cluster.add("r"), store)
    assert (await restoration.run()).info == taken.info
    restored = await restoration.start()
    rows = await restored.fetch("SELECT filler FROM large WHERE n IN (6, 7, 8, 9) ORDER BY n")
    assert [row["filler"] for row in rows] == ["in the standby", "old primary", "new primary", "later"]
    assert await restored.fetchval("SELECT count(*) FROM large") == LARGE_PAGES


async def test_a_standby_without_summaries_leaves_it_to_the_primary(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    primary, standby = cluster.add("p"), cluster.add("s")
    store = store_of(directory_section)
    with archiving(primary, directory_section) as first, archiving(standby, directory_section) as second:
        system = await prepared(cluster, first, **SUMMARIES)
        full = await take(first, store)
        cluster.follow(standby, primary)
        await second.start_archiver()
        second.order("standby", system, is_streaming=True)
        await standby.start()
        await cluster.wait_streaming(primary, "s")
        done = await asyncio.to_thread(command, first, "backup", "--wait", "--incremental", "--timeout", "90")
        assert done.returncode == 0, done.stderr
        listed = (await list_backups(store, LAYOUT, deadline_s=10))[-1]
        assert listed.manifest is not None
        assert (listed.manifest.was_standby, listed.parent_id) == (False, full.info.backup_id)
        primary.kill()
        standby.kill()


async def test_without_summaries_or_with_a_gap_it_is_refused_and_nothing_is_left(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        with pytest.raises(BackupFailed, match=r"set archive\.backup\.incremental to true"):
            await incremental(made, store)
        server.configure(**SUMMARIES)
        await server.reload()
        with pytest.raises(BackupFailed, match="there is no backup that it could stand on"):
            await incremental(made, store)
        full = await take(made, store)
        await server.execute("CREATE TABLE more AS SELECT n FROM generate_series(1, 1000) n")
        first = await incremental(made, store)
        # A later one, so that what is removed now lies before others.
        await server.execute("CHECKPOINT")
        await wait_until(lambda: summarized_past(server, first), deadline_s=30)
        for path in summaries_of(server):
            if int(path.name[8:24], 16) <= full.info.begin_lsn:
                path.unlink()
        kept = await objects(store)
        with pytest.raises(BackupFailed, match=r"has no summary .* and has later ones"):
            await incremental(made, store, full)
        assert [name for name in await objects(store) if "/wals/" not in name and "/pieces/" not in name] == [
            name for name in kept if "/wals/" not in name and "/pieces/" not in name
        ]
        server.kill()


async def summarized_past(server: PostgresProcess, taken: Taken) -> bool:
    """Is there a summary that begins behind the begin of a backup?"""
    paths = await asyncio.to_thread(summaries_of, server)
    return any(int(path.name[8:24], 16) >= taken.info.begin_lsn for path in paths)


def summaries_of(server: PostgresProcess) -> list[Path]:
    """Named by timeline, begin and end."""
    return [path for path in (server.data / "pg_wal" / "summaries").iterdir() if path.name != "temp.summary"]


async def test_what_others_stand_on_is_not_deleted_and_a_lost_parent_is_told(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        full = await take(made, store)
        first = await incremental(made, store)
        server.kill()
    names = BackupNames(LAYOUT, full.info.backup_id)
    with pytest.raises(BackupKept, match=f"is needed by {first.info.backup_id}"):
        await delete_backup(store, names, deadline_s=10)
    assert [each.state for each in await list_backups(store, LAYOUT, deadline_s=10)] == ["done", "done"]
    # As barman's tools would, which know nothing of it.
    await asyncio.to_thread(shutil.rmtree, Path(directory_section["directory"]) / names.folder)
    await asyncio.to_thread(shutil.rmtree, Path(directory_section["directory"]) / names.own_folder)
    (listed,) = await list_backups(store, LAYOUT, deadline_s=10)
    assert (listed.state, listed.problem) == ("orphaned", f"it stands on backup {full.info.backup_id}, which is gone")
    with pytest.raises(RestoreFailed, match="none of the backups"):
        await Restoration(cluster.add("r"), store).run()


async def test_a_restore_without_the_program_or_with_a_damaged_parent_leaves_the_place_as_it_was(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        await large_table(server)
        full = await take(made, store)
        taken = await incremental(made, store)
        server.kill()
    restoration = Restoration(cluster.add("r"), store)
    programs = open_directory(cluster.root / "programs")
    for name in ("postgres", "pg_controldata"):
        (programs / name).symlink_to(BIN_DIRECTORY / name)
    whole = restoration.server
    restoration.server = replace(whole, bin_directory=programs)
    with pytest.raises(RestoreFailed, match="pg_combinebackup is not there.*--backup " + full.info.backup_id):
        await restoration.run()
    restoration.server = whole
    tar = Path(directory_section["directory"]) / BackupNames(LAYOUT, full.info.backup_id).tar("data", ".lz4")
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(bytes(content))
    with pytest.raises(RestoreFailed):
        await restoration.run()
    assert list(whole.data_directory.iterdir()) == []
    listed = await list_backups(store, LAYOUT, deadline_s=10)
    verdict = await verify_chain(store, LAYOUT, chain_of(listed, find_backup(listed, taken.info.backup_id)))
    assert not verdict.is_good


async def test_a_restore_that_was_killed_while_it_read_the_chain_is_begun_anew(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        await large_table(server)
        await take(made, store)
        taken = await incremental(made, store)
        server.kill()
    restoration = Restoration(cluster.add("r"), store)
    place = restoration.server.data_directory
    argv = [sys.executable, "-m", "instance_manager", "restore", str(place), "--bin-directory", str(BIN_DIRECTORY)]
    where = ["--directory", directory_section["directory"], "--server", "orders", "--parallel", "1"]
    process = await asyncio.create_subprocess_exec(*argv, *where, cwd=REPOSITORY)
    chain = place / STAGE / taken.info.backup_id / "PG_VERSION"
    await wait_until(lambda: asyncio.to_thread(chain.exists), deadline_s=60, what="the incremental one is being read")
    process.kill()
    await process.wait()
    assert not (place / "global").exists()
    await restoration.run()
    assert any(text.startswith("a restore that was killed had left its files") for text in restoration.said)
    restored = await restoration.start()
    assert await restored.fetchval("SELECT count(*) FROM large") == LARGE_PAGES


async def test_unchanged_files_go_as_their_header_alone(cluster: Cluster, directory_section: dict[str, Any]) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        await large_table(server)
        path = await server.fetchval("SELECT pg_relation_filepath('large')")
        await server.execute("VACUUM FREEZE large")
        await take(made, store)
        await server.execute("UPDATE large SET filler = 'x' WHERE n = 1")
        taken = await incremental(made, store, codec=NONE)
        server.kill()
    folder, _, name = path.rpartition("/")
    tars = Path(directory_section["directory"]) / BackupNames(LAYOUT, taken.info.backup_id).folder
    out = open_directory(cluster.root / "out")
    done = await run(["tar", "-xf", tars / "data.tar", "-C", out])
    assert done.returncode == 0, done.stderr
    blocks, length, begin = parse_header((out / folder / f"INCREMENTAL.{name}").read_bytes())
    assert length >= LARGE_PAGES // 2
    assert 0 < len(blocks) <= 5, "the row's old page and its new one"
    assert (out / folder / f"INCREMENTAL.{name}").stat().st_size == begin + 8192 * len(blocks)
    # Other forks go whole: early minor releases clear the visibility map's bits without a word in the summaries.
    assert (out / folder / f"{name}_vm").exists()
    unchanged = out / folder / "INCREMENTAL.2619"
    assert not unchanged.exists() or parse_header(unchanged.read_bytes())[1] > 0


class InTurn:
    """The part of an archiver that takes backups, of a primary, by a calendar of the test's own."""

    def __init__(self, made: ArchivingServer, store: ObjectStore, system: int, full_every: int) -> None:
        orders = OrderBook(monotonic_s)
        orders.take(
            Orders(
                role="primary",
                epoch=Epoch(1),
                cluster_uid="0123456789abcdef",
                permit_until_s=time.clock_gettime(time.CLOCK_BOOTTIME) + 600,
                system_identifier=str(system),
                wal_segment_bytes=made.segment_bytes,
            )
        )
        settings = TenderSettings(
            instance="orders-1",
            take=SETTINGS,
            schedule=Schedule((datetime.time(3),)),
            full_every=full_every,
            primary_waits_s=0,
        )
        self.day = 1
        self.server = made.server
        self.tender = BackupTender(
            settings, made.server.server, store, LAYOUT, orders, self.switch_wal, now=lambda: self.now
        )

    @property
    def now(self) -> datetime.datetime:
        return datetime.datetime(2025, 11, self.day, 4, tzinfo=datetime.UTC)

    async def switch_wal(self) -> None:
        await self.server.execute("SELECT pg_switch_wal()")

    async def round(self) -> None:
        await self.tender.look()
        await self.tender.idle()


async def test_of_a_schedule_every_so_manieth_is_full_and_one_that_cannot_be_incremental_too(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        system = await prepared(cluster, made, **SUMMARIES)
        await all_archived(server)  # from now on the archive is known to be this cluster's
        turns = InTurn(made, store, system, full_every=3)
        for turns.day in (1, 2, 3, 4):
            await turns.round()
            assert not turns.tender.status.last_error
        listed = await list_backups(store, LAYOUT, deadline_s=10)
        assert [each.parent_id is None for each in listed] == [True, False, False, True], "two stand on the first one"
        server.configure(summarize_wal="off")
        await server.reload()
        await wait_until(lambda: server.fetchval("SELECT current_setting('summarize_wal') = 'off'"), deadline_s=10)
        turns.day = 5
        await turns.round()
        assert "the server writes no summaries" in (turns.tender.status.last_error or "")
        assert len(await list_backups(store, LAYOUT, deadline_s=10)) == 4
        await turns.round()
        listed = await list_backups(store, LAYOUT, deadline_s=10)
        assert [each.parent_id is None for each in listed] == [True, False, False, True, True]
        # What somebody asks for is refused instead, each time.
        requests = Requests(store, LAYOUT)
        await requests.ask("by-hand", Request(None, "command", "now", incremental=True))
        for number in (1, 2, 3):
            await turns.round()
            ended = await requests.ended("by-hand", number)
            assert ended is not None
            assert "set archive.backup.incremental to true" in ended.error
        await turns.round()
        assert len((await requests.listing())["by-hand"].attempts) == 3
        assert len(await list_backups(store, LAYOUT, deadline_s=10)) == 5
        await turns.tender.close()
        server.kill()


async def test_barman_sees_no_incremental_backup_and_postgres_starts_from_none(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy, bucket: str, barman: Path
) -> None:
    server, store = cluster.add("p"), store_of(s3_section)
    with archiving(server, s3_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        full = await take(made, store)
        taken = await incremental(made, store, codec=NONE)
        server.kill()
    where = (f"s3://{bucket}/pre/fix", "orders")
    done = await run([barman / "barman-cloud-backup-list", *options(proxy), *where])
    assert done.returncode == 0, done.stderr
    assert full.info.backup_id in done.stdout
    assert taken.info.backup_id not in done.stdout
    target = open_directory(cluster.root / "by-barman")
    program = barman / "barman-cloud-restore"
    done = await run([program, *options(proxy), *where, taken.info.backup_id, str(target)])
    assert done.returncode != 0
    assert not list(target.iterdir())
    done = await run([program, *options(proxy), *where, full.info.backup_id, str(target)])
    assert done.returncode == 0, done.stderr
    # Whoever lays out its tars by hand all the same is told by Postgres.
    by_hand = open_directory(cluster.root / "by-hand")
    for name in await objects(store, BackupNames(LAYOUT, taken.info.backup_id).folder):
        if name.endswith(".tar"):
            await store.receive(name, lambda _, chunks: (by_hand / "tar").write_bytes(b"".join(chunks)), deadline_s=30)
            assert (await run(["tar", "-xf", by_hand / "tar", "-C", by_hand])).returncode == 0
    (by_hand / "tar").unlink()
    give_to_postgres(by_hand)
    await asyncio.to_thread((by_hand / "pg_wal").mkdir, exist_ok=True)
    alone = ("-c", "listen_addresses=", "-c", f"unix_socket_directories={by_hand}")
    done = await run([BIN_DIRECTORY / "postgres", "-D", by_hand, *alone], as_postgres=True)
    assert done.returncode != 0
    assert "this is an incremental backup, not a data directory" in done.stderr


async def test_the_servers_own_incremental_backup_holds_the_same_blocks(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made, **SUMMARIES)
        await large_table(server)
        full = await take(made, store)
        await server.execute("UPDATE large SET filler = 'x' WHERE n % 30 = 0")
        await server.execute("CREATE TABLE made AS SELECT n FROM generate_series(1, 1000) n")
        taken = await incremental(made, store, codec=NONE)
        manifest = cluster.root / "backup_manifest"
        manifest.write_bytes(await manifest_of(store, full))
        theirs = open_directory(cluster.root / "theirs")
        connection = ["-h", server.socket, "-p", str(server.port), "-U", "postgres"]
        how = ["-D", theirs, "-X", "none", "-c", "fast", "-i", manifest]
        done = await run([BIN_DIRECTORY / "pg_basebackup", *connection, *how], as_postgres=True)
        assert done.returncode == 0, done.stderr
        server.kill()
    ours = open_directory(cluster.root / "ours")
    for name in await objects(store, BackupNames(LAYOUT, taken.info.backup_id).folder):
        if name.endswith(".tar"):
            done = await run(["tar", "-xf", Path(directory_section["directory"]) / name, "-C", ours])
            assert done.returncode == 0, done.stderr
    expected = main_increments(theirs)
    assert main_increments(ours) == expected
    assert sum(len(blocks) for blocks, _ in expected.values()) > 10
    names = {path.relative_to(theirs) for path in theirs.glob("base/*/*") if "INCREMENTAL" not in path.name}
    assert all((ours / name).exists() for name in names), "what they have whole is whole here"


async def manifest_of(store: ObjectStore, taken: Taken) -> bytes:
    """As a restore writes it."""
    writer, names = ManifestWriter(taken.info), BackupNames(LAYOUT, taken.info.backup_id)
    parts = [writer.head()]
    for entry in taken.manifest.tars:
        members = await read_members(store, names, entry.name, deadline_s=10)
        assert members is not None
        parts.append(writer.files("", members.values()))
    return b"".join((*parts, writer.end()))


def main_increments(directory: Path) -> dict[str, tuple[list[int], int]]:
    """Of main forks: the blocks, and the length below which the others come from before."""
    found = {}
    for path in directory.rglob("INCREMENTAL.*"):
        if "_" not in path.name:
            found[str(path.relative_to(directory))] = parse_header(path.read_bytes())[:2]
    return found
