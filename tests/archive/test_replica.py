"""A standby's directory from an archive: within the cluster's history, never past the fork, and never opened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from archiving_server import all_archived, archiving, insert, prepared, system_identifier
from backup_harness import LAYOUT, store_of, take
from harness import Cluster, PostgresProcess, processes_of, wait_until
from replica_harness import (
    CONFIGURATION,
    JOIN_PATIENCE_S,
    KEPT,
    TWO,
    Making,
    configuration_of,
    fork_of,
    in_time,
    numbers,
    recovered_primary,
    two_histories,
)
from test_recovery import fork as fork_to

from instance_manager.agent.recovering import NotMade
from instance_manager.agent.recovering import make_replica as make_by_a_process
from instance_manager.archive.backup.catalogue import list_backups
from instance_manager.archive.recovery.origin import Origin
from instance_manager.archive.recovery.replica_choice import NotFromArchive, require_cheaper
from instance_manager.archive.recovery.replica_request import ReplicaRequest
from instance_manager.archive.recovery.restore import RestoreFailed
from instance_manager.core.types import Epoch, Lsn, Timeline, TimelineChain, TimelineSwitch, format_lsn
from instance_manager.postgres.control_data import ClusterState, read_control_data
from instance_manager.postgres.directory import DirectoryState, inspect_directory
from instance_manager.postgres.server import LocalServer

pytestmark = pytest.mark.timeout(240)
CHAIN = TimelineChain(TWO)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instance_manager.archive.recovery.joining.AGAIN_PATIENCE_S", JOIN_PATIENCE_S)


def of_source(section: dict[str, Any]) -> dict[str, Any]:
    return {"bootstrap": {"recovery": {"archive": {**section, "server_name": "orders"}}}}


async def test_from_the_sources_archive_it_gets_nothing_past_the_fork_and_follows_the_new_timeline(
    cluster: Cluster, section: dict[str, Any]
) -> None:
    source = cluster.add("p")
    with archiving(source, section) as made:
        await prepared(cluster, made)
        moment = await two_histories(made, section)
        primary = await recovered_primary(cluster, section, time=moment)
        # The source writes on, and archives it.
        await insert(source, 200_000, 3000)
        await all_archived(source)
    await insert(primary, 2000, 500)
    making = Making(cluster, "s", primary, of_source(section))
    fork = fork_of(primary)
    assert await making.run() == fork
    control = await read_control_data(making.server)
    assert control.state is ClusterState.SHUT_DOWN_IN_RECOVERY
    assert CHAIN.contains(await making.end(CHAIN))
    assert_nothing_past(making.server.data_directory, fork)
    standby = await making.follow(cluster)
    await insert(primary, 2500, 10)
    wanted = KEPT | set(range(2000, 2510))
    await wait_until(lambda: has(standby, wanted), deadline_s=20, what="every row on the standby")
    # It is a whole standby: it opens, with every row.
    primary.kill()
    standby.set_dynamic(synchronous_standby_names="")
    await standby.reload()
    await standby.execute("SELECT pg_promote()")
    await insert(standby, 3000, 1)
    assert await numbers(standby) == wanted | {3000}


async def has(server: PostgresProcess, wanted: set[int]) -> bool:
    return await numbers(server) == wanted


def assert_nothing_past(data: Path, fork: int) -> None:
    """Of the source's timeline: no segment behind the fork's, and of that one zeros behind the fork."""
    segment_bytes = 1 << 20
    last = fork // segment_bytes
    for path in (data / "pg_wal").glob("00000001????????????????"):
        number = int(path.name[8:16], 16) * (1 << 32) // segment_bytes + int(path.name[16:], 16)
        assert number <= last, path.name
        if number == last:
            assert not any(path.read_bytes()[fork % segment_bytes :]), "what the source wrote behind the fork"


async def test_which_archive_will_do_and_why_another_will_not(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    source = cluster.add("p")
    with archiving(source, directory_section) as made:
        await prepared(cluster, made)
        moment = await two_histories(made, directory_section)
        await take(made, store_of(directory_section))
        source.kill()
    primary = await recovered_primary(cluster, directory_section, time=moment)
    making = Making(cluster, "s", primary, of_source(directory_section))
    choice = await making.choose()
    assert choice.plan.info.backup_id == min(await backup_ids(directory_section)), "the other is from behind the fork"
    assert choice.log_bytes > fork_of(primary) - choice.plan.info.begin_lsn > 0
    for changes, why in (
        ({"origin": None}, "does not tell which archive it was recovered from"),
        ({"origin": Origin("orders", "another")}, "recovered from orders, of the cluster with uid another"),
        ({"history": ""}, "was not recovered from an archive"),
        ({"history": "1\t0/100\tno recovery target specified\n"}, "of its 2 backups none is sound"),
        ({"keeps_fork": False}, "the primary does not keep any more"),
        ({"system_identifier": "7"}, "of its 2 backups none is sound"),
        ({"major": 9}, "of its 2 backups none is sound"),
    ):
        with pytest.raises(NotFromArchive, match=why):
            await making.choose(**changes)
    # Its own archive, where another cluster's is meant by mistake.
    own = Making(cluster, "o", primary, {"archive": {**directory_section, "server_name": "orders"}})
    with pytest.raises(NotFromArchive, match="orders is of the cluster with uid 0123456789abcdef"):
        await own.choose(cluster_uid="new")
    nothing = Making(cluster, "e", primary, {"archive": {**directory_section, "server_name": "nothing"}})
    with pytest.raises(NotFromArchive, match="nothing was archived yet"):
        await nothing.choose()
    away = Making(cluster, "w", primary, {"archive": {"directory": "/nowhere/archive"}})
    with pytest.raises(RestoreFailed, match=r"this cluster's archive: .*/nowhere/archive"):
        await away.choose()
    info, store = choice.plan.info, store_of(directory_section)
    next_one = info.segment_size.next_name(info.segment_size.name(info.end_segment))
    assert info.segment_size.end_lsn(info.segment_size.parse(next_one)) <= fork_of(primary)
    await store.delete(LAYOUT.wal(next_one), deadline_s=5)
    with pytest.raises(NotFromArchive, match=f"has a gap at {next_one}"):
        await making.choose()
    await store.delete(LAYOUT.wal(info.segment_size.name(info.end_segment)), deadline_s=5)
    with pytest.raises(NotFromArchive, match="consistent some is gone"):
        await making.choose()


async def backup_ids(section: dict[str, Any]) -> list[str]:
    return [each.backup_id for each in await list_backups(store_of(section), LAYOUT, deadline_s=10)]


async def test_what_is_cheaper_is_told_by_size_and_by_the_log_behind_the_backup(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    source = cluster.add("p")
    with archiving(source, directory_section) as made:
        await prepared(cluster, made)
        moment = await two_histories(made, directory_section)
        source.kill()
    primary = await recovered_primary(cluster, directory_section, time=moment)
    choice = await Making(cluster, "s", primary, of_source(directory_section)).choose()
    assert choice.size_bytes is not None
    with pytest.raises(NotFromArchive, match="below 1024 MiB a copy of the primary is cheaper"):
        require_cheaper(choice)
    gib = 1 << 30
    require_cheaper(replace(choice, size_bytes=100 * gib, log_bytes=50 * gib))
    with pytest.raises(NotFromArchive, match="for so much log a copy"):
        require_cheaper(replace(choice, size_bytes=100 * gib, log_bytes=50 * gib + 1))
    with pytest.raises(NotFromArchive, match="cannot be told"):
        require_cheaper(replace(choice, size_bytes=None))


async def test_from_the_clusters_own_archive_it_comes_along_a_failover_and_not_along_what_was_left(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(directory_section)
    with archiving(server, directory_section) as made:
        system = await prepared(cluster, made)
        await insert(server, 0, 1000)
        await take(made, store)
        await insert(server, 1000, 1000)
        await all_archived(server)
        await fork_to(server, made, system, 2)
        left_at = fork_of(server)
        await insert(server, 5000, 1000)
        await all_archived(server)
        making = Making(cluster, "s", server, {"archive": directory_section})
        chain = TimelineChain(Timeline(1), (TimelineSwitch(TWO, Timeline(1), left_at, Epoch(2)),))
        reached = await making.run(chain=chain, history="", origin=None, keeps_fork=False)
        assert chain.contains(await making.end(chain))
        assert reached > left_at
        # The archive of a busy primary grows as fast as it is replayed.
        near = Making(cluster, "n", server, {"archive": directory_section})
        await near.run(chain=chain, history="", origin=None, position=left_at)
        assert any("which is enough" in text for text in near.said)
        assert chain.contains(await near.end(chain))
        unknown = TimelineChain(
            Timeline(1), (TimelineSwitch(Timeline(3), Timeline(1), Lsn(left_at - 100_000), Epoch(3)),)
        )
        with pytest.raises(NotFromArchive, match="the history of timeline 3 is not archived yet"):
            await making.choose(chain=unknown, history="", origin=None)
        standby = await making.follow(cluster)
        await insert(server, 6000, 10)
        wanted = {*range(2000), *range(5000, 6010)}
        await wait_until(lambda: has(standby, wanted), deadline_s=20, what="every row on the standby")


async def test_what_the_primary_does_not_keep_any_more_comes_from_the_clusters_own_archive(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    source = cluster.add("p")
    with archiving(source, directory_section) as made:
        await prepared(cluster, made)
        moment = await two_histories(made, directory_section)
        source.kill()
    primary = await recovered_primary(cluster, directory_section, time=moment)
    own = {**directory_section, "server_name": "new"}
    with archiving(primary, own) as made:
        primary.configure(**made.archive_settings())
        await primary.stop()
        await made.start_archiver()
        await primary.start()
        made.order("primary", await system_identifier(primary))
        await insert(primary, 2000, 3000)
        await all_archived(primary)
        making = Making(cluster, "s", primary, {"archive": own, **of_source(directory_section)})
        nobody = "host=127.0.0.1 port=1 user=nobody"
        assert await making.run(keeps_fork=False, primary_conninfo=nobody) == fork_of(primary)
        assert CHAIN.contains(await making.end(CHAIN))
        standby = await making.follow(cluster)
        wanted = KEPT | set(range(2000, 5000))
        await wait_until(lambda: has(standby, wanted), deadline_s=20, what="every row on the standby")


async def test_a_failure_on_the_way_is_told_and_the_primary_that_is_gone_is_not_waited_for_for_ever(
    cluster: Cluster, directory_section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instance_manager.archive.recovery.joining.PATIENCE_S", 3.0)
    source = cluster.add("p")
    with archiving(source, directory_section) as made:
        await prepared(cluster, made)
        moment = await two_histories(made, directory_section)
        source.kill()
    primary = await recovered_primary(cluster, directory_section, time=moment)
    gone = Making(cluster, "g", primary, of_source(directory_section))
    with pytest.raises(
        RestoreFailed, match=r"nothing came of this cluster's log behind .* for 3 s: .*[Cc]onnection refused"
    ):
        await gone.run(primary_conninfo="host=127.0.0.1 port=1 user=nobody")
    assert not (gone.server.data_directory / "postmaster.pid").exists()
    making = Making(cluster, "s", primary, of_source(directory_section))
    (tar,) = (Path(directory_section["directory"]) / "orders/base").glob("*/data_0001.tar.lz4")
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 0x55
    tar.chmod(0o600)
    tar.write_bytes(content)
    with pytest.raises(RestoreFailed, match="not lz4"):
        await making.run()
    assert list(making.server.data_directory.iterdir()) == []


async def by_a_process(
    server: LocalServer, file: Path, request: ReplicaRequest, on_progress: Callable[[str], None] = lambda _: None
) -> str:
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        on_progress(text)

    return await in_time(make_by_a_process(server, file, request, tell), said)


async def test_an_agent_has_it_made_by_a_process_of_its_own_and_nothing_is_left_of_one_that_was_interrupted(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    source = cluster.add("p")
    with archiving(source, directory_section) as made:
        await prepared(cluster, made)
        moment = await two_histories(made, directory_section)
        source.kill()
    primary = await recovered_primary(cluster, directory_section, time=moment)
    sections = of_source(directory_section)
    cheaper = Making(cluster, "a", primary, sections)
    # Postgres's own, not the copy of the template.
    server = replace(cheaper.process.server, data_directory=cheaper.process.root / "new")
    request, file = await cheaper.request(), cheaper.process.root / CONFIGURATION
    with pytest.raises(NotMade, match="a copy of the primary is cheaper") as refused:
        await by_a_process(server, file, request)
    assert refused.value.is_choice

    sections["bootstrap"]["replicas_from"] = "archive"
    configuration_of(cheaper.process, sections)
    replays = asyncio.Event()
    making = asyncio.create_task(
        by_a_process(server, file, request, lambda text: replays.set() if text.startswith("replayed") else None)
    )
    waiting = asyncio.create_task(replays.wait())
    await asyncio.wait({making, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert not making.done(), await making
    (staging,) = cheaper.process.root.glob("new.clone-*")
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert processes_of(staging) == []
    assert list(cheaper.process.root.glob("new*")) == []

    fork = fork_of(primary)
    elsewhere = replace(request, history=request.history.replace(format_lsn(fork), format_lsn(fork + 8)))
    with pytest.raises(
        NotMade, match=f"replay ended at {format_lsn(fork)}, and not at {format_lsn(fork + 8)}"
    ) as failed:
        await by_a_process(server, file, elsewhere, lambda _: None)
    assert not failed.value.is_choice
    assert list(cheaper.process.root.glob("new*")) == []

    told = await by_a_process(server, file, request)
    assert "of the source's archive" in told
    report = inspect_directory(server)
    assert (report.state, report.has_standby_signal, report.leftovers) == (DirectoryState.INITIALISED, True, ())
