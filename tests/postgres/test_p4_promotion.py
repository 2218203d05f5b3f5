"""P4: a promotion takes exactly the claimed timeline, from the recorded fork."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from harness import Cluster, PostgresProcess, conninfo, run_as, wait_until

from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, TimelineSwitch
from instance_manager.postgres import promotion
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.promotion import (
    PromotedWrong,
    PromotionFailed,
    checkpoint,
    clear_claim,
    fill_gap,
    install_restore_command,
    promote,
    write_claim,
)
from instance_manager.postgres.voting import follow, position, stop_following

A = MemberId("a_0000000a")
B = MemberId("b_0000000b")
FIRST = TimelineChain(Timeline(1))


async def ready(cluster: Cluster, *names: str) -> list[PostgresProcess]:
    servers = await cluster.primary_with_standbys(*names)
    for standby in servers[1:]:
        standby.set_dynamic(restore_command=install_restore_command(standby.server))
        await standby.reload()
    return servers


async def claimed(standby: PostgresProcess, chain: TimelineChain, timeline: int) -> TimelineChain:
    """Vote, and claim `timeline` from the end of this log."""
    await stop_following(standby.running, DynamicSettings(standby.running.settings_file), deadline_s=5)
    end = await position(standby.server, chain, deadline_s=5)
    epoch = Epoch(len(chain.switches) + 2)
    return chain.forked(TimelineSwitch(Timeline(timeline), end.timeline, end.lsn, epoch))


async def timeline_of(server: PostgresProcess) -> int:
    return int((await server.fetchval("SELECT pg_walfile_name(pg_current_wal_insert_lsn())"))[:8], 16)


async def test_p4_two_siblings_promoted_without_a_claim_take_the_same_timeline(cluster: Cluster) -> None:
    _, a, b = await cluster.primary_with_standbys(A, B)
    for standby in (a, b):
        await standby.execute("SELECT pg_promote()")
    assert await timeline_of(a) == await timeline_of(b) == 2


async def test_p4_a_promotion_takes_exactly_the_claimed_timeline(cluster: Cluster) -> None:
    _, a = await ready(cluster, A)
    chain = await claimed(a, FIRST, 9)
    promoted = await promote(a.server, chain, a.relay, deadline_s=10)
    print(f"promote, 1 to 9: {promoted.took_s * 1000:.0f} ms")
    assert await timeline_of(a) == 9
    assert not (a.state / "claim").exists()
    histories = {path.name: path.stat().st_size for path in (a.data / "pg_wal").glob("*.history")}
    assert sorted(histories) == [f"0000000{number}.history" for number in range(2, 10)]
    assert [name for name, size in histories.items() if size > 0] == ["00000009.history"]
    await checkpoint(a.server, deadline_s=10)
    assert await a.fetchval("SELECT timeline_id FROM pg_control_checkpoint()") == 9


async def test_p4_a_standby_cannot_follow_across_a_skipped_number_without_its_history(cluster: Cluster) -> None:
    primary, a, b = await ready(cluster, A, B)
    await claimed(b, FIRST, 3)
    chain = await claimed(a, FIRST, 3)
    primary.kill()
    await promote(a.server, chain, a.relay, deadline_s=10)
    (a.data / "pg_wal" / "00000002.history").unlink()
    await follow(b.running, DynamicSettings(b.running.settings_file), conninfo(a, B), None, deadline_s=5)

    async def refused() -> bool:
        return "could not receive timeline history file" in b.log_text()

    await wait_until(refused, what="the fact behind fill_gap")
    fill_gap(a.server, Timeline(1), Timeline(3))
    await cluster.wait_streaming(a, B)
    # It starts again across the gap, although pg_control knows the first timeline only.
    assert await b.fetchval("SELECT timeline_id FROM pg_control_checkpoint()") == 1
    await b.stop(signal.SIGQUIT)
    clear_claim(b.server)
    await b.start()
    await cluster.wait_streaming(a, B)


async def test_p4_the_history_keeps_all_ancestors_and_a_sibling_follows_across(cluster: Cluster) -> None:
    primary, a, b = await ready(cluster, A, B)
    await claimed(b, FIRST, 3)
    chain = await claimed(a, FIRST, 3)
    promoted = await promote(a.server, chain, a.relay, deadline_s=10)
    print(f"promote, 1 to 3: {promoted.took_s * 1000:.0f} ms")
    primary.kill()
    await follow(b.running, DynamicSettings(b.running.settings_file), conninfo(a, B), None, deadline_s=5)
    await cluster.wait_streaming(a, B)
    await a.execute("CREATE TABLE t AS SELECT generate_series(1, 100) AS id")
    await cluster.wait_streaming(a, B)
    chain = await claimed(b, chain, 7)
    await promote(b.server, chain, b.relay, deadline_s=10)
    assert await timeline_of(b) == 7
    history = (b.data / "pg_wal" / "00000007.history").read_text()
    assert [line.split()[0] for line in history.splitlines() if line.strip()] == ["1", "3"]
    assert await b.fetchval("SELECT count(*) FROM t") == 100


async def test_p4_a_promotion_that_did_not_take_the_claim_is_an_error(cluster: Cluster) -> None:
    _, a = await ready(cluster, A)
    chain = await claimed(a, FIRST, 9)
    (a.state / "restore_command.sh").write_text("exit 1\n")
    with pytest.raises(PromotedWrong) as failure:
        await promote(a.server, chain, a.relay, deadline_s=10)
    assert (failure.value.claimed, failure.value.timeline) == (9, 2)


async def test_p4_a_promotion_from_another_point_than_the_recorded_is_an_error(cluster: Cluster) -> None:
    _, a = await ready(cluster, A)
    chain = await claimed(a, FIRST, 9)
    switch = chain.switches[-1]
    wrong = FIRST.forked(TimelineSwitch(switch.timeline, switch.parent, Lsn(switch.switch_lsn + 8), switch.epoch))
    with pytest.raises(PromotedWrong, match="its history is"):
        await promote(a.server, wrong, a.relay, deadline_s=10)


async def test_p4_without_the_script_or_the_signal_nothing_is_promoted(cluster: Cluster) -> None:
    _, a = await cluster.primary_with_standbys(A)
    chain = FIRST.forked(TimelineSwitch(Timeline(9), Timeline(1), Lsn(8), Epoch(2)))
    with pytest.raises(PromotionFailed, match="restore_command") as failure:
        await promote(a.server, chain, a.relay, deadline_s=5)
    assert not failure.value.triggered
    a.set_dynamic(restore_command=install_restore_command(a.server))
    await a.reload()
    chain = await claimed(a, FIRST, 9)

    async def forgets() -> None:
        pass

    with pytest.raises(PromotionFailed) as failure:
        await promote(a.server, chain, forgets, deadline_s=0.5)
    assert failure.value.triggered
    assert await a.fetchval("SELECT pg_is_in_recovery()")
    assert not (a.data / "promote").exists()
    assert not (a.state / "claim").exists()


async def test_p4_a_signal_file_that_hung_on_the_disk_is_taken_back_when_it_lands(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A postmaster that finds it at any later signal of a backend would promote to a timeline that nobody claims."""
    _, a = await ready(cluster, A)
    chain = await claimed(a, FIRST, 9)
    hangs, goes_on, landed = threading.Event(), threading.Event(), threading.Event()

    def slow(path: Path, content: bytes, **options: Any) -> None:
        hangs.set()
        assert goes_on.wait(60)
        write_atomically(path, content, **options)
        landed.set()

    monkeypatch.setattr(promotion, "write_atomically", slow)
    promoting = asyncio.create_task(promote(a.server, chain, a.relay, deadline_s=10))

    async def hung() -> bool:
        return hangs.is_set()

    await wait_until(hung, deadline_s=10, what="the signal file's write hangs")
    promoting.cancel()
    asyncio.get_running_loop().call_later(0.2, goes_on.set)
    with pytest.raises(asyncio.CancelledError):
        await promoting
    assert await asyncio.to_thread(landed.wait, 10)
    assert not (a.data / "promote").exists()
    assert not (a.state / "claim").exists()
    assert await a.fetchval("SELECT pg_is_in_recovery()")


async def test_p4_a_paused_standby_and_one_in_conflict_are_promoted(cluster: Cluster) -> None:
    primary, a = await ready(cluster, A)
    a.configure(max_standby_streaming_delay="-1")
    await a.reload()
    await primary.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS id")
    await cluster.wait_streaming(primary, A)
    async with a.session() as reader:
        await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await reader.fetch("SELECT 1")
        await a.execute("SELECT pg_wal_replay_pause()")
        await primary.execute("DELETE FROM t")
        await primary.execute("VACUUM t")
        await cluster.wait_streaming(primary, A)
        chain = await claimed(a, FIRST, 2)
        promoted = await promote(a.server, chain, a.relay, deadline_s=10)
    print(f"promote, paused and in conflict: {promoted.took_s * 1000:.0f} ms")
    assert await timeline_of(a) == 2


async def test_p4_a_claim_alone_tells_a_standby_of_no_timeline(cluster: Cluster) -> None:
    """It looks for newer timelines all the time while nobody streams to it; what it finds it would believe."""
    _, a = await ready(cluster, A)
    await claimed(a, FIRST, 9)
    # As `promote` leaves it just before it tells the postmaster.
    a.write("promote", "")
    write_claim(a.server, Timeline(9))
    before = a.log_text()
    await a.execute("SELECT pg_sleep(2.5)")
    assert "not a child" not in a.log_text()[len(before) :]
    assert list((a.data / "pg_wal").glob("*.history")) == []
    (a.data / "promote").unlink()
    await a.stop()
    clear_claim(a.server)
    await a.start()
    assert await a.fetchval("SELECT pg_is_in_recovery()")


def test_p4_clearing_the_claim_removes_empty_histories_above_the_newest_real_one(cluster: Cluster) -> None:
    server = cluster.add("x")
    wal = server.data / "pg_wal"
    (wal / "00000002.history").write_text("")
    (wal / "00000003.history").write_text("1\t0/3000000\tno recovery target specified\n")
    (wal / "00000004.history").write_text("")
    (wal / "archive_status" / "00000004.history.done").write_text("")
    write_claim(server.server, Timeline(5))
    clear_claim(server.server)
    assert sorted(path.name for path in wal.glob("*.history")) == ["00000002.history", "00000003.history"]
    assert not (wal / "archive_status" / "00000004.history.done").exists()


@pytest.mark.parametrize(
    ("name", "claim", "promote_file", "present"),
    [
        ("00000003.history", "9", False, True),
        ("00000008.history", "9", False, True),
        ("00000009.history", "9", False, False),
        ("0000000A.history", "9", False, False),
        ("0000000F.history", "16", False, True),
        ("00000002.history", "9", False, False),  # there already, in pg_wal
        ("00000003.history", None, False, False),
        ("00000003.history", "9", True, False),
        ("00000003.history", "", False, False),
        ("00000003.history", "9; exit 0", False, False),
        ("000000010000000000000003", "9", False, False),
        ("000000010000000000000003.partial", "9", False, False),
    ],
)
def test_p4_p9_the_restore_script_answers(
    cluster: Cluster, name: str, claim: str | None, promote_file: bool, present: bool
) -> None:
    server = cluster.add("x")
    command = install_restore_command(server.server)
    (server.data / "pg_wal" / "00000002.history").write_text("1\t0/3000000\tx\n")
    if claim is not None:
        (server.state / "claim").write_text(f"{claim}\n")
    if promote_file:
        (server.data / "promote").write_text("")
    path = "pg_wal/RECOVERYHISTORY"
    owner = run_as()
    done = subprocess.run(
        ["/bin/sh", "-c", command.replace("%f", name).replace("%p", path)],
        cwd=server.data,
        check=False,
        capture_output=True,
        text=True,
        user=None if owner is None else owner.uid,
        group=None if owner is None else owner.gid,
    )
    assert done.stderr == ""
    assert done.returncode == (0 if present else 1)
    restored = server.data / path
    assert restored.exists() == present
    assert not present or restored.stat().st_size == 0
