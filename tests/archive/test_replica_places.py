"""The tablespaces of a standby from an archive: where its primary has them, or nowhere."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from archiving_server import all_archived, archiving, insert, prepared
from backup_harness import store_of, take
from harness import Cluster, PostgresProcess, owned_directory, wait_until
from replica_harness import CONFIGURATION, TWO, Making, fork_of, numbers, recovered_primary
from test_retention import info_at

from instance_manager.agent.recovering import NotMade, make_replica
from instance_manager.archive.backup.info import Tablespace
from instance_manager.archive.recovery.replica_places import make_places, places_for, younger_places
from instance_manager.archive.recovery.replica_request import ReplicaRequest
from instance_manager.archive.recovery.restore import RestoreFailed
from instance_manager.core.types import TimelineChain
from instance_manager.postgres.server import LocalServer

pytestmark = pytest.mark.timeout(240)


async def test_the_backups_go_where_the_primary_has_them_and_younger_ones_come_with_the_log(
    cluster: Cluster, directory_section: dict[str, Any]
) -> None:
    source = cluster.add("p")
    space, young = owned_directory(cluster.root / "space"), owned_directory(cluster.root / "young")
    with archiving(source, directory_section) as made:
        await prepared(cluster, made)
        await source.execute(f"CREATE TABLESPACE space LOCATION '{space}'")
        await source.execute("CREATE TABLE old TABLESPACE space AS SELECT n FROM generate_series(1, 500) n")
        await take(made, store_of(directory_section))
        await source.execute(f"CREATE TABLESPACE young LOCATION '{young}'")
        await source.execute("CREATE TABLE new TABLESPACE young AS SELECT n FROM generate_series(1, 50) n")
        await insert(source, 0, 1000)
        moment = await source.fetchval("SELECT clock_timestamp()::text")
        await source.execute("SELECT pg_sleep(0.05)")  # two commits of one microsecond could not be told apart
        await insert(source, 1000, 1000)
        await all_archived(source)
        source.kill()
    primary = await recovered_primary(
        cluster, directory_section, time=moment, changes={"tablespaces": {"space": cluster.root / "primary"}}
    )
    oids = {row["spcname"]: row["oid"] for row in await primary.fetch("SELECT spcname, oid FROM pg_tablespace")}
    await out_of_the_way(primary, oids["young"], young)
    bootstrap = {
        "recovery": {"archive": {**directory_section, "server_name": "orders"}},
        "replicas_from": "archive",
    }
    making = Making(cluster, "s", primary, {"bootstrap": bootstrap})
    of_standby = cluster.root / "of standby"
    placed = ((oids["space"], str(of_standby)), (oids["young"], str(young)))

    owned_directory(of_standby)
    (of_standby / "precious").touch()
    request, file = await making.request(tablespaces=placed), making.process.root / CONFIGURATION
    with pytest.raises(NotMade, match=f"space cannot be in {of_standby}: it is not empty") as refused:
        await make_replica(making.server, file, request, lambda _: None)
    assert not refused.value.is_choice
    (of_standby / "precious").unlink()

    assert await making.run(tablespaces=placed) == fork_of(primary)
    assert TimelineChain(TWO).contains(await making.end(TimelineChain(TWO)))
    links = {link.name: link.readlink() for link in (making.server.data_directory / "pg_tblspc").iterdir()}
    assert links == {str(oids["space"]): of_standby, str(oids["young"]): young}
    standby = await making.follow(cluster)
    await primary.execute("INSERT INTO old VALUES (501)")
    await primary.execute("INSERT INTO new VALUES (51)")
    await wait_until(lambda: has(standby, 501, 51), deadline_s=20, what="every row on the standby")
    assert await numbers(standby) == set(range(1000))


async def out_of_the_way(primary: PostgresProcess, oid: int, place: Path) -> None:
    """The log says where it is made, and two servers of one machine cannot have it there."""
    await primary.stop()
    await asyncio.to_thread(move_tablespace, primary.data / "pg_tblspc" / str(oid), place)
    await primary.start()


def move_tablespace(link: Path, place: Path) -> None:
    away = place.rename(place.with_name("young of primary"))
    link.unlink()
    link.symlink_to(away)


async def has(standby: PostgresProcess, old: int, new: int) -> bool:
    rows = await standby.fetch("SELECT (SELECT count(*) FROM old) AS old, (SELECT count(*) FROM new) AS new")
    return (rows[0]["old"], rows[0]["new"]) == (old, new)


def request_of(*tablespaces: tuple[int, str]) -> ReplicaRequest:
    return ReplicaRequest(
        system_identifier="1",
        cluster_uid="",
        major=15,
        chain=TimelineChain(TWO),
        primary_conninfo="",
        tablespaces=tablespaces,
    )


def test_one_that_the_primary_has_dropped_goes_where_a_restore_would_put_it() -> None:
    spaces = (Tablespace("kept", 1, "/a/1"), Tablespace("moved", 2, "/a/2"), Tablespace("dropped", 3, "/a/3"))
    info = replace(info_at(3), tablespaces=spaces)
    request = request_of((1, "/b/1"), (4, "/b/4"))
    assert places_for(info, request, {"kept": Path("/c/1"), "moved": Path("/c/2")}) == {
        "kept": Path("/b/1"),
        "moved": Path("/c/2"),
        "dropped": Path("/a/3"),
    }
    assert younger_places(info, request) == {"with oid 4": Path("/b/4")}


@pytest.fixture
def server(tmp_path: Path) -> LocalServer:
    return LocalServer(
        data_directory=tmp_path / "instance" / "data",
        socket_directory=tmp_path,
        state_directory=tmp_path,
        listen_address="",
        port=1,
        bin_directory=tmp_path,
        run_as=None,
    )


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("relative", "that is no full path"),
        ("{root}/x/../y", "that is no full path"),
        ("{root}/instance/data/space", "the data directory is in"),
        ("{root}/instance", "the data directory is in"),
        ("{root}/other/below", "the tablespace other is in"),
        ("{root}/file", "File exists"),
        ("{root}/file/below", "Not a directory"),
        ("{root}/link", "File exists"),
        ("{root}/full", "it is not empty"),
        ("/proc/space", "No such file or directory"),
    ],
)
def test_a_place_that_cannot_be_used_is_told_before_anything_is_read(
    server: LocalServer, tmp_path: Path, place: str, why: str
) -> None:
    server.data_directory.parent.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "lost+found").mkdir()
    (tmp_path / "empty").mkdir()
    good = {"other": tmp_path / "other", "empty": tmp_path / "empty", "deep": tmp_path / "deep" / "below"}
    make_places(good, server)
    with pytest.raises(RestoreFailed, match=f"the tablespace odd cannot be in .*: {why}"):
        make_places({**good, "odd": Path(place.format(root=tmp_path))}, server)


def test_where_a_directory_that_was_set_aside_has_its_tablespaces_still_nothing_is_made(
    server: LocalServer, tmp_path: Path
) -> None:
    """The log may make one anew that the primary has dropped, where the other one has its files."""
    aside = server.data_directory.with_name("data.set-aside-1")
    (aside / "pg_tblspc").mkdir(parents=True)
    (aside / "pg_tblspc" / "16400").symlink_to(tmp_path / "space")
    (tmp_path / "space.set-aside-1").mkdir()
    make_places({}, server)
    (tmp_path / "space" / "PG_15_202209061").mkdir(parents=True)
    with pytest.raises(
        RestoreFailed, match=f"{aside} was set aside, and its tablespaces are still in {tmp_path / 'space'}"
    ):
        make_places({}, server)
