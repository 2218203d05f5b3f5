"""A cluster with an archive: what is in it after failovers and after the loss of everything, and what it costs the rest."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from archive_recovery import base_backup, recovered
from cluster_harness import eventually, running_cluster
from cluster_tools import (
    Writer,
    done,
    http_get,
    log_end,
    make_whole,
    messages,
    record,
    story,
    superuser_sql,
    wait_other_primary,
)

from instance_manager.archive.codecs import codec_of_suffix
from instance_manager.core.archive_state import ArchiveState
from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import ArchivePlan
from instance_manager.demo.processes import now_s
from instance_manager.supervisor.fence import Process

pytestmark = pytest.mark.timeout(240)
WALS = "archive/demo/wals"


@pytest.fixture(scope="module")
def archiving_cluster() -> Iterator[LocalCluster]:
    # A slot whose standby is away is given up soon, so that a test need not write for long.
    with running_cluster(
        archive=ArchivePlan(), parameters=(("max_slot_wal_keep_size", "16MB"), ("wal_keep_size", "0"))
    ) as made:
        yield made


@pytest.fixture
def cluster(archiving_cluster: LocalCluster, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    failed_before = request.session.testsfailed
    make_whole(archiving_cluster)
    yield archiving_cluster
    if request.session.testsfailed > failed_before:
        print(story(archiving_cluster))


def archive_state(cluster: LocalCluster) -> ArchiveState | None:
    status = cluster.primary_status()
    return None if status is None else status.archive


def trouble(cluster: LocalCluster) -> str | None:
    state = archive_state(cluster)
    return None if state is None else state.trouble


def says(cluster: LocalCluster, name: str, offset: int, start: str) -> bool:
    """Whether a line of its log since `offset` begins so."""
    return any(line.startswith(start) for line in messages(cluster, name, offset=offset))


def wait_renewals(cluster: LocalCluster, count: int) -> None:
    wanted = record(cluster).renewals + count
    eventually(cluster, lambda: record(cluster).renewals >= wanted, within_s=30, what=f"{count} renewals")


def archived(cluster: LocalCluster) -> dict[str, float]:
    """The names of WAL in the archive, and when each was stored."""
    wals = cluster.layout.directory / WALS
    return {path.name.removesuffix(".zst"): path.stat().st_mtime for path in wals.rglob("*.zst")}


def finish_segments(cluster: LocalCluster, name: str, count: int) -> list[str]:
    """So many segments of its log, finished; their names."""
    found = []
    for _ in range(count):
        statement = "SELECT pg_walfile_name(lsn) FROM (SELECT pg_logical_emit_message(true, 'test', 'x') AS lsn) m"
        found.append(superuser_sql(cluster, name, statement))
        superuser_sql(cluster, name, "SELECT pg_switch_wal()")
    return found


def all_archived(cluster: LocalCluster, names: list[str], *, within_s: float = 40.0) -> None:
    eventually(cluster, lambda: set(names) <= archived(cluster).keys(), within_s=within_s, what=f"{names} are archived")


def archiver(cluster: LocalCluster, name: str) -> Process:
    found = cluster.processes(name).archiver
    assert found is not None
    return found


@contextlib.contextmanager
def without_store(cluster: LocalCluster) -> Iterator[None]:
    place = cluster.layout.archive
    place.rename(place.with_name("archive-is-away"))
    try:
        yield
    finally:
        place.with_name("archive-is-away").rename(place)


class Renewals:
    """The longest time between two renewals of the Lease, as anybody sees them in the store, while the block lasts."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.longest_s = 0.0

    def __enter__(self) -> Renewals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        last, last_s = record(self._cluster).renewals, now_s()
        while not self._stop.wait(0.05):
            renewals = record(self._cluster).renewals
            if renewals != last:
                self.longest_s = max(self.longest_s, now_s() - last_s)
                last, last_s = renewals, now_s()


def test_status_tells_how_far_the_archive_is(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()
    with Writer(cluster, "told") as writer:
        writer.wait_for_more(20)

        def caught_up() -> ArchiveState | None:
            state = archive_state(cluster)
            known = state is not None and state.position is not None and state.lag_s is not None
            return state if known and state is not None and state.level == "calm" and (state.lag_s or 0) < 5 else None

        first = eventually(cluster, caught_up, within_s=30, what="the archive keeps up")
        assert first is not None
        writer.wait_for_more(20)
        assert first.position is not None
        position = first.position
        eventually(
            cluster,
            lambda: (state := caught_up()) is not None and state.position is not None and state.position > position,
            within_s=30,
            what="the position advances while rows are written",
        )
    assert "archive: calm, complete to 0/" in done(cluster, primary, "status")
    for name in cluster.names:
        told = json.loads(http_get(cluster, name, "/status").body)
        assert told["archive"]["level"] == "calm", f"{name} tells of the primary's archive"
        assert told["archive"]["trouble"] is None


def test_every_instance_tells_what_can_be_recovered(cluster: LocalCluster) -> None:
    """Its schedule has a moment that lies behind, so the first backup is taken at once."""
    primary = cluster.wait_primary()

    def told(name: str) -> dict[str, Any]:
        archive = json.loads(http_get(cluster, name, "/status").body)["archive"]
        return (archive or {}).get("backups") or {}

    def is_told(name: str) -> bool:
        return bool(told(name).get("good") and told(name)["recoverable_from"])

    for name in cluster.names:
        eventually(cluster, partial(is_told, name), within_s=90, what=f"{name} tells of a good backup")
        assert told(name)["first_gap"] == ""
        assert not [risk for risk in json.loads(http_get(cluster, name, "/status").body)["at_risk"] if "backup" in risk]
    assert "backups: 1 good, the newest " in done(cluster, primary, "status")
    metrics = http_get(cluster, primary, "/metrics").body
    for family in (
        "contiguous_lsn_bytes",
        "lag_seconds",
        "lag_bytes",
        "ready_bytes",
        "stream_lag_seconds",
        "newest_backup_timestamp_seconds",
        "recoverable_from_timestamp_seconds",
        "gap_behind_newest_backup",
        'upload_seconds_total{phase="store"}',
    ):
        assert f"\ninstance_manager_archive_{family} " in metrics, family
    assert "\ninstance_manager_archive_good_backups 1\n" in metrics
    # The second one: the first has nothing to compare with, to tell when the volume is full.
    shown = http_get(cluster, primary, "/metrics").body
    dashboard = (Path(__file__).parents[2] / "deploy/monitoring/dashboard.json").read_text()
    asked = set(re.findall(r"instance_manager_archive_[a-z_]+", dashboard))
    assert len(asked) > 10
    assert {name for name in asked if f"\n{name} " not in shown and f"\n{name}{{" not in shown} == set()


def test_a_new_primary_archives_what_the_old_one_had_not_and_its_history_comes_first(cluster: LocalCluster) -> None:
    old = cluster.wait_primary()
    with Writer(cluster, "over_a_failover") as writer:
        writer.wait_for_more(5)
        # Segments from before the standbys were cloned are on no other volume.
        all_archived(cluster, finish_segments(cluster, old, 1))
        processes.send([archiver(cluster, old)], signal.SIGSTOP)
        never_archived = finish_segments(cluster, old, 3)
        writer.wait_for_more(5)
        cluster.kill(old)
        new = wait_other_primary(cluster, old)
        writer.wait_for_more(5)
        all_archived(cluster, never_archived)
        timeline = int(superuser_sql(cluster, new, "SELECT timeline_id FROM pg_control_checkpoint()"))
        after = finish_segments(cluster, new, 1)
        all_archived(cluster, [f"{timeline:08X}.history", *after])
        stored = archived(cluster)
        of_timeline = [name for name in stored if name.startswith(f"{timeline:08X}") and len(name) == 24]
        assert of_timeline, stored
        assert min(stored[name] for name in of_timeline) >= stored[f"{timeline:08X}.history"]
        state = archive_state(cluster)
        assert state is not None
        assert (state.gaps, state.conflicts) == (0, 0)
        cluster.start(old)
        cluster.wait_redundant(75)
    assert writer.missing() == set()


def test_what_a_new_primary_does_not_hold_any_more_its_standby_brings(cluster: LocalCluster) -> None:
    """The old primary is lost before it archived them, and the new one has removed them: only the third has them."""
    old = cluster.wait_primary()
    # The demo's first backup lets the log before it expire: what nobody needs any more is no gap.
    base = cluster.layout.archive / "demo/base"
    eventually(cluster, lambda: list(base.glob("*/backup.info")), within_s=90, what="the scheduled backup is whole")
    with Writer(cluster, "only_the_third") as writer:
        writer.wait_for_more(5)
        all_archived(cluster, finish_segments(cluster, old, 1))
        with without_store(cluster):
            never_archived = finish_segments(cluster, old, 3)
            writer.wait_for_more(5)
            begun = {name: log_end(cluster, name) for name in cluster.names}
            cluster.kill(old)
            new = wait_other_primary(cluster, old)
            writer.wait_for_more(5)
            [third] = set(cluster.names) - {old, new}
            held = {name: (cluster.layout.data(third) / "pg_wal" / name).read_bytes() for name in never_archived}
            for name in never_archived:
                (cluster.layout.data(new) / "pg_wal" / name).unlink()
        all_archived(cluster, never_archived, within_s=60)
        for name, content in held.items():
            stored = next((cluster.layout.directory / WALS).rglob(f"{name}.zst"))
            assert (
                b"".join(codec_of_suffix(stored.name).decompressed([stored.read_bytes()], limit_bytes=1 << 30))
                == content
            )
        eventually(
            cluster,
            lambda: says(cluster, new, begun[new], "archive gap filled"),
            within_s=60,
            what="the end of the gap is told",
        )
        assert says(cluster, new, begun[new], "archive gap: the archive lacks 3 files")
        cluster.start(old)
        cluster.wait_redundant(75)
    assert writer.missing() == set()


def test_neither_a_dead_nor_a_stopped_archiver_nor_a_store_that_is_gone_slows_the_lease_down(
    cluster: LocalCluster,
) -> None:
    primary = cluster.wait_primary()
    epoch = record(cluster).epoch
    begun = log_end(cluster, primary)
    longest: dict[str, float] = {}
    with Writer(cluster, "beside_faults") as writer:
        for fault in ("none", "killed", "stopped", "store gone"):
            with contextlib.ExitStack() as during:
                renewals = during.enter_context(Renewals(cluster))
                victim = archiver(cluster, primary)
                if fault == "killed":
                    processes.send([victim], signal.SIGKILL)
                elif fault == "stopped":
                    processes.send([victim], signal.SIGSTOP)
                    during.callback(processes.send, [victim], signal.SIGCONT)
                elif fault == "store gone":
                    during.enter_context(without_store(cluster))
                finish_segments(cluster, primary, 1)
                wait_renewals(cluster, 3)
                if fault == "store gone":
                    eventually(cluster, lambda: trouble(cluster), within_s=60, what="the trouble is told")
                    eventually(
                        cluster,
                        lambda: says(cluster, primary, begun, "archive trouble"),
                        within_s=30,
                        what="as an event",
                    )
                writer.wait_for_more(10)
            longest[fault] = round(renewals.longest_s, 2)
        finished = finish_segments(cluster, primary, 1)
        # Postgres was in its pause of a minute, and the agent wakes it.
        all_archived(cluster, finished, within_s=50)
        eventually(
            cluster,
            lambda: says(cluster, primary, begun, "archive works"),
            within_s=30,
            what="the end of the trouble is told too",
        )
    print("longest time between two renewals:", longest)
    assert record(cluster).epoch == epoch
    assert cluster.wait_primary() == primary
    assert writer.missing() == set()
    for fault, seconds in longest.items():
        assert seconds < longest["none"] + 1.0, (fault, longest)


def test_a_switchover_waits_for_no_archive(cluster: LocalCluster) -> None:
    """Postgres waits for its archive_command when it shuts down; the agent ends that, whatever the archiver does."""
    old = cluster.wait_primary()
    begun = log_end(cluster, old)
    with Writer(cluster, "over_a_switchover") as writer:
        processes.send([archiver(cluster, old)], signal.SIGSTOP)
        finished = finish_segments(cluster, old, 2)
        writer.wait_for_more(5)
        done(cluster, old, "switchover")
        new = wait_other_primary(cluster, old)
        writer.wait_for_more(5)
        processes.send([archiver(cluster, old)], signal.SIGCONT)
        told = messages(cluster, old, offset=begun)
        assert any("role stopped, was stopping: Postgres has ended (exit, exit code 0)" in line for line in told), told
        assert any(line.startswith("release: ") for line in told), told
        all_archived(cluster, finished)
        assert new == cluster.wait_primary()
        # The old one still has what it had not archived. Nothing there waits for it, and no alert says so.
        assert list((cluster.layout.data(old) / "pg_wal/archive_status").glob("*.ready"))
        eventually(cluster, lambda: tells_that_nothing_waits(cluster, old), within_s=15, what=f"nothing waits on {old}")
    assert writer.missing() == set()


def tells_that_nothing_waits(cluster: LocalCluster, name: str) -> bool:
    lines = http_get(cluster, name, "/metrics").body.splitlines()
    return {"instance_manager_archive_ready_files 0", "instance_manager_archive_oldest_ready_age_seconds 0.0"} <= {
        *lines
    }


def test_a_standby_whose_wal_is_gone_from_its_primary_gets_it_from_the_archive(cluster: LocalCluster) -> None:
    primary = cluster.wait_primary()
    standby = next(name for name in cluster.names if name != primary)
    cluster.kill(standby)
    with Writer(cluster, "while_it_was_away") as writer:
        names = []
        for _ in range(4):
            names += finish_segments(cluster, primary, 2)
            writer.wait_for_more(3)
            superuser_sql(cluster, primary, "CHECKPOINT")
        all_archived(cluster, names)
        kept = superuser_sql(cluster, primary, "SELECT name FROM pg_ls_waldir()").split()
        assert names[0] not in kept, "the primary has removed it"
        begun = log_end(cluster, standby)
        cluster.start(standby)
        line = f'restored log file \\"{names[0]}\\" from archive'.encode()
        # Before its silence is noticed the primary may still count the old one as redundant.
        eventually(
            cluster,
            lambda: line in cluster.layout.log(standby).read_bytes()[begun:],
            within_s=60,
            what=f"{names[0]} comes from the archive",
        )
        cluster.wait_redundant(75)
    assert not any(line.startswith(("rewind", "set aside")) for line in messages(cluster, standby, offset=begun))
    assert writer.missing() == set()


def test_the_loss_of_every_volume_costs_the_streaming_interval(cluster: LocalCluster, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    base_backup(cluster, cluster.wait_primary(), backup)
    with Writer(cluster, "before_the_end") as writer:
        writer.wait_for_more(20)
        cluster.wait(lambda: (s := archive_state(cluster)) is not None and (s.lag_s or 99) < 3, 30, "it keeps up")
        old = cluster.wait_primary()
        done(cluster, old, "switchover")
        wait_other_primary(cluster, old)
        seen: list[tuple[float, int]] = []
        ends_s = now_s() + 4
        while now_s() < ends_s:
            seen.append((now_s(), len(writer.acknowledged)))
            threading.Event().wait(0.02)
        primary = cluster.wait_primary()
        for name in sorted(cluster.names, key=lambda name: name != primary):
            cluster.kill(name)
        killed_s = now_s()
        acknowledged = list(writer.acknowledged)
    known = record(cluster)
    for name in cluster.names:
        shutil.rmtree(cluster.layout.instance(name))
    # Short: a socket lies in it.
    root = Path("/tmp") / f"recovered-{cluster.layout.directory.name[-8:]}"
    root.mkdir()
    try:
        with recovered(cluster, known, root, backup) as server:
            rows = server.rows("before_the_end")
    finally:
        shutil.rmtree(root)
    missing = [number for number in acknowledged if number not in rows]
    # What is there is a prefix of what was acknowledged: nothing is missing in the middle.
    assert missing == acknowledged[len(acknowledged) - len(missing) :]
    first_missing = len(acknowledged) - len(missing)
    lost_s = killed_s - next((at_s for at_s, count in seen if count > first_missing), killed_s)
    print(f"{len(missing)} of {len(acknowledged)} rows were lost, of the last {lost_s:.2f} s")
    assert lost_s < 1.0 + 3.0, "archive.stream_interval_s and an upload, on a busy machine"
