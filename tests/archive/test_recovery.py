"""Recovery from the archive alone, to every kind of target, and only to that: otherwise nothing opens, and the reason is told."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from archive_harness import until
from archiving_server import ArchivingServer, all_archived, archiving, insert, prepared
from backup_harness import LAYOUT, objects, store_of, take
from fault_proxy import FaultProxy
from harness import Cluster, PostgresProcess, run_as, wait_until
from recovery_harness import Restoration

from instance_manager.agent.recovering import RecoveryFailed, recover
from instance_manager.archive.backup.names import BackupNames
from instance_manager.archive.content import MemoryContent
from instance_manager.archive.recovery import restore as restoring
from instance_manager.archive.recovery.origin import ORIGIN_FILE, Origin, parse_origin
from instance_manager.archive.recovery.replay import ReplaySettings
from instance_manager.archive.recovery.restore import RestoreFailed
from instance_manager.archive.wal_names import wal_kind
from instance_manager.core.archive_state import GAP

pytestmark = pytest.mark.timeout(240)


async def fork(server: PostgresProcess, made: ArchivingServer, system: int, epoch: int) -> None:
    """The next timeline, as after a failover: the same server leaves the one that it was on."""
    await server.stop()
    server.make_standby()
    await server.start()
    await server.execute("SELECT pg_promote()")
    await wait_until(lambda: server.fetchval("SELECT NOT pg_is_in_recovery()"), deadline_s=30)
    made.order("primary", system, epoch=epoch)


async def test_a_moment_before_a_mistaken_delete_and_nothing_behind_it(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        await insert(server, 0, 1000)
        taken = await take(made, store)
        await insert(server, 1000, 1000)
        before = await server.fetchval("SELECT clock_timestamp()::text")
        await asyncio.sleep(0.05)  # two commits of one microsecond could not be told apart
        await server.execute("DELETE FROM t")
        await insert(server, 5000, 10)
        await all_archived(server)
        server.kill()
    kept = await objects(store, "orders/wals/")
    restoration = Restoration(cluster.add("r"), store)
    restored = await restoration.run(time=before)
    assert restored.info == taken.info
    assert restored.reached.timeline == 2
    assert await restoration.numbers() == set(range(2000))
    assert await objects(store, "orders/wals/") == kept, "the source's archive is only read"


async def test_two_failovers_are_followed_and_a_position_at_a_boundary_is_reached(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        system = await prepared(cluster, made)
        await take(made, store)
        await insert(server, 0, 1000)
        # From now on the log asks more of whoever replays it than the backup tells.
        server.configure(max_connections=60)
        await fork(server, made, system, 2)
        await insert(server, 1000, 1000)
        await all_archived(server)
        boundary = await server.fetchval("SELECT pg_current_wal_lsn()::text")
        await fork(server, made, system, 3)
        await insert(server, 2000, 1000)
        await all_archived(server)
        server.kill()
    assert boundary.endswith("00000"), "the segment behind it begins here, and no record does"
    latest = Restoration(cluster.add("a"), store)
    assert (await latest.run()).reached.timeline == 4
    assert "settings of the source have risen" in "".join(latest.said)
    assert await latest.numbers() == set(range(3000))
    for name, timeline in (("b", None), ("c", "2")):
        restoration = Restoration(cluster.add(name), store)
        await restoration.run(lsn=boundary, timeline=timeline)
        assert await restoration.numbers() == set(range(2000))
    old = Restoration(cluster.add("d"), store)
    with pytest.raises(RestoreFailed, match="no timeline 9 in the archive; there are: 1, 2, 3"):
        await old.run(timeline="9")


async def test_a_store_that_fails_stops_the_replay_which_goes_on_when_it_is_back(
    cluster: Cluster, s3_section: dict[str, Any], proxy: FaultProxy
) -> None:
    server, store = cluster.add("p"), store_of(s3_section)
    with archiving(server, s3_section) as made:
        await prepared(cluster, made)
        await take(made, store)
        for number in range(3):
            await insert(server, number * 3000, 3000)
        name = await all_archived(server)
        server.kill()
    restoration = Restoration(cluster.add("r"), store)
    proxy.fail("403 AccessDenied", path=name)
    running = asyncio.create_task(restoration.run())
    await until(
        lambda: running.done() or any(text.startswith("waiting for the archive") for text in restoration.said),
        deadline_s=60,
    )
    assert not running.done(), await running
    assert not any("opening" in text for text in restoration.said)
    proxy.heal()
    await running
    assert await restoration.numbers() == set(range(9000))


async def test_what_is_beyond_the_end_of_the_archive_does_not_open_but_resumes_when_that_is_accepted(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        await take(made, store)
        await insert(server, 0, 1000)
        await server.fetchval("SELECT pg_create_restore_point('known')")
        await insert(server, 1000, 1000)
        await all_archived(server)
        server.kill()
    restoration = Restoration(cluster.add("r"), store)
    target: dict[str, Any] = {"time": "2999-01-01 00:00:00+00"}
    with pytest.raises(RestoreFailed, match=r"the archive ends at .* which is before the target"):
        await restoration.run(**target)
    data = restoration.server.data_directory
    assert (data / "standby.signal").exists(), "started by hand it opens no more than by us"
    with pytest.raises(RestoreFailed, match="begun for another target"):
        await restoration.run(name="known")
    accepting = {"replay": ReplaySettings(accept_end=True)}
    await restoration.run(changes=accepting, **target)
    assert "going on with the restore" in "".join(restoration.said)
    assert await restoration.numbers() == set(range(2000))
    named = Restoration(cluster.add("n"), store)
    await named.run(name="known")
    assert await named.numbers() == set(range(1000))


async def test_a_gap_in_the_log_opens_nothing(cluster: Cluster, directory_section: dict[str, Any]) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        taken = await take(made, store)
        for number in range(3):
            await insert(server, number * 3000, 3000)
        await all_archived(server)
        server.kill()
    wal = [name for name in await objects(store, "orders/wals/") if name.endswith(".zst") and ".backup" not in name]
    assert taken.info.end_segment.number < len(wal) + 7
    await store.delete(wal[-2], deadline_s=5)
    restoration = Restoration(cluster.add("r"), store)
    quick = {"replay": ReplaySettings(outage_patience_s=1)}
    with pytest.raises(RestoreFailed, match="the archive has a gap"):
        await restoration.run(changes=quick)
    said = [GAP in line for line in restoration.said]
    assert said.index(True) < next(n for n, line in enumerate(restoration.said) if "MiB restored" in line), "at once"
    assert (restoration.server.data_directory / "standby.signal").exists()


async def test_a_restore_that_was_killed_with_its_tablespaces_is_begun_anew_and_says_so(
    cluster: Cluster, directory_section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    space, moved = cluster.root / "space", cluster.root / "moved"
    space.mkdir(mode=0o700)
    if (user := run_as()) is not None:
        os.chown(space, user.uid, user.gid)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        await server.execute(f"CREATE TABLESPACE space LOCATION '{space}'")
        await server.execute("CREATE TABLE elsewhere TABLESPACE space AS SELECT n FROM generate_series(1, 500) n")
        await take(made, store)
        await all_archived(server)
        server.kill()
    restoration = Restoration(cluster.add("r"), store)
    changes = {"tablespaces": {"space": moved}}

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as during:
        # As a kill right before the end of the files: nothing is cleared up.
        during.setattr(restoring, "_finish_files", killed)
        during.setattr(restoring, "empty", lambda roots: None)
        with pytest.raises(Killed):
            await restoration.run(changes=changes)
    assert any(moved.iterdir())
    await restoration.run(changes=changes)
    assert f"a restore that was killed had left its files in {moved}: they are removed" in restoration.said
    assert [path.name for path in moved.iterdir()] == [path.name for path in space.iterdir()], "no mark is left"
    restored = await restoration.start()
    assert await restored.fetchval("SELECT count(*) FROM elsewhere") == 500
    restored.kill()


async def test_a_damaged_backup_leaves_the_place_as_it_was(cluster: Cluster, directory_section: dict[str, Any]) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        taken = await take(made, store, split_bytes=4 << 20)
        server.kill()
    name = BackupNames(LAYOUT, taken.info.backup_id).tar("data_0001", ".lz4")
    path = Path(directory_section["directory"]) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    await store.delete(name, deadline_s=5)
    await store.create(name, MemoryContent.of(bytes(content)), deadline_s=5)
    restoration = Restoration(cluster.add("r"), store)
    with pytest.raises(RestoreFailed, match=r"not the file that was backed up|not lz4|other content"):
        await restoration.run()
    assert list(restoration.server.data_directory.iterdir()) == []
    (restoration.server.data_directory / "precious").write_text("")
    with pytest.raises(RestoreFailed, match="nothing is ever overwritten"):
        await restoration.run()


async def test_a_backup_that_cannot_become_consistent_is_told_and_not_waited_for_for_ever(
    cluster: Cluster, directory_section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is consistent Postgres takes no connection: nobody saw that it had come to the end."""
    monkeypatch.setattr("instance_manager.archive.recovery.replay.ENDS_WITHOUT_AN_ANSWER", 10)
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        info = (await take(made, store)).info
        server.kill()
    for name in await objects(store, "orders/wals/"):
        wal = LAYOUT.wal_of(name) or ""
        if wal_kind(wal) == "segment" and wal >= info.segment_size.name(info.end_segment):
            await store.delete(name, deadline_s=5)
    restoration = Restoration(cluster.add("r"), store)
    with pytest.raises(RestoreFailed, match="the archive ends before the backup is consistent"):
        await restoration.run()


async def test_an_agent_has_the_first_directory_of_a_new_cluster_made_by_a_process_of_its_own(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        await prepared(cluster, made)
        taken = await take(made, store)
        await insert(server, 0, 1000)
        await server.fetchval("SELECT pg_create_restore_point('known')")
        await insert(server, 1000, 1000)
        await all_archived(server)
        server.kill()
        configuration = made.server.root / "instance.yaml"
        content = yaml.safe_load(configuration.read_text())
    new = cluster.add("r")
    shutil.rmtree(new.data)
    recovery = {"archive": {**directory_section, "server_name": "orders"}, "target": {"name": "knwon"}}
    content |= {"bootstrap": {"recovery": recovery}, "archive": {**directory_section, "server_name": "new"}}
    configuration.write_text(yaml.safe_dump(content))
    said: list[str] = []
    with pytest.raises(RecoveryFailed, match="before the target, name knwon"):
        await recover(new.server, configuration, said.append)
    assert not new.data.exists()
    # What was replayed towards another target cannot be taken back: the operator removes it.
    shutil.rmtree(new.data.with_name("data.recovery"))
    recovery["target"] = {"name": "known"}
    configuration.write_text(yaml.safe_dump(content))
    await recover(new.server, configuration, said.append)
    new.set_dynamic(synchronous_standby_names="")
    new.configure(archive_mode="off")
    await new.start()
    assert {row["n"] for row in await new.fetch("SELECT n FROM t")} == set(range(1000))
    assert any("MiB restored" in line for line in said)
    system = await new.fetchval("SELECT system_identifier::text FROM pg_control_system()")
    assert system == taken.info.system_identifier
    assert parse_origin((new.data / ORIGIN_FILE).read_bytes()) == Origin("orders", "0123456789abcdef")
