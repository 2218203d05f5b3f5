"""R3: a Lease that is gone, older or unreadable is mended by its last holder only, and moves no role and no row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from cluster_tools import Writer, done, log_end, messages, record

from instance_manager.coordination.local import RECORD_FILE
from instance_manager.core.record import ClusterRecord
from instance_manager.demo.cluster import LocalCluster, NotInTime

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def writer(lasting_cluster: LocalCluster) -> Iterator[Writer]:
    """Writes the whole time; in the end every acknowledged row must be there."""
    with Writer(lasting_cluster, "over_a_damaged_lease") as made:
        made.wait_for_more()
        yield made
        made.wait_for_more(20)
    assert made.missing() == set()


def _mended(cluster: LocalCluster, before: ClusterRecord) -> ClusterRecord | None:
    try:
        now = record(cluster)
    except Exception:  # not yet a record
        return None
    return now if now.epoch > before.epoch and now.opened else None


def _risks(cluster: LocalCluster, name: str) -> tuple[str, ...]:
    status = cluster.status(name)
    return status.at_risk if status is not None else ()


def _assert_mended(cluster: LocalCluster, before: ClusterRecord, offsets: dict[str, int]) -> None:
    assert before.holder is not None
    now = cluster.wait(partial(_mended, cluster, before), 60, "the holder writes the Lease anew")
    assert now is not None
    assert now.holder is not None
    assert now.holder.member_id == before.holder.member_id, "the last holder, nobody else"
    assert now.chain == before.chain, "no failover"
    assert cluster.wait_redundant(60) == before.holder.name
    for name in cluster.names:
        if name != before.holder.name:
            since = messages(cluster, name, offset=offsets[name])
            assert not any(line.startswith(("take the Lease", "create the Lease", "stand: ")) for line in since)


@pytest.mark.parametrize("damage", ["deleted", "an older one"])
def test_r3_a_lease_that_is_lost_is_written_anew_by_its_holder_behind_a_later_epoch(
    lasting_cluster: LocalCluster, writer: Writer, damage: str
) -> None:
    path = lasting_cluster.layout.store / RECORD_FILE
    if damage == "an older one":
        older = path.read_bytes()
        old = lasting_cluster.wait_primary()
        done(lasting_cluster, old, "switchover")
        lasting_cluster.wait_redundant(60)
        writer.wait_for_more()
    before = record(lasting_cluster)
    offsets = {name: log_end(lasting_cluster, name) for name in lasting_cluster.names}
    if damage == "deleted":
        path.unlink()
    else:
        replaced = path.with_name("older")
        replaced.write_bytes(older)
        replaced.replace(path)
    _assert_mended(lasting_cluster, before, offsets)


def test_r3_an_unreadable_lease_is_taken_by_nobody_and_written_anew_by_its_holder(
    lasting_cluster: LocalCluster, writer: Writer
) -> None:
    standby = lasting_cluster.standbys()[0]
    path = lasting_cluster.layout.store / RECORD_FILE
    before = record(lasting_cluster)
    content = path.read_bytes()
    offsets = {name: log_end(lasting_cluster, name) for name in lasting_cluster.names}
    damaged = path.with_name("damaged")
    damaged.write_bytes(b"{ this is no record")
    damaged.replace(path)
    lasting_cluster.wait(
        lambda: (
            _mended(lasting_cluster, before)
            or any("no failover until it is repaired" in risk for risk in _risks(lasting_cluster, standby))
        ),
        10,
        "a standby says that the Lease is damaged, if it is not mended before",
    )
    try:
        lasting_cluster.wait(partial(_mended, lasting_cluster, before), 20, "the holder writes the Lease anew")
        _assert_mended(lasting_cluster, before, offsets)
    except NotInTime:
        damaged.write_bytes(content)
        damaged.replace(path)
        raise
