"""P4: a promotion that was cut off leaves its history behind, where it ran and where it was followed: a dead end.

Recovery takes the newest timeline for its own of which it finds a history that descends from where it is, whether or not
anybody wrote a record on it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from harness import Cluster, PostgresProcess, conninfo, frozen, wait_until
from test_p4_promotion import FIRST, A, B, claimed, ready, timeline_of

from instance_manager.core.types import MemberId, Timeline, TimelineChain, TimelineSwitch
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.histories import history_file_name, timelines_with_history
from instance_manager.postgres.promotion import (
    PromotedWrong,
    clear_claim,
    forget_dead_ends,
    install_restore_command,
    promote,
)
from instance_manager.postgres.voting import follow

C = MemberId("c_0000000c")
NOT_IN_HISTORY = "requested timeline 2 is not in this server's history"
NO_CHILD = "new timeline 3 is not a child of database system timeline 1"


async def follows(standby: PostgresProcess, upstream: PostgresProcess) -> None:
    settings = DynamicSettings(standby.running.settings_file)
    await follow(standby.running, settings, conninfo(upstream, standby.name), None, deadline_s=5)


def histories(server: PostgresProcess) -> tuple[Timeline, ...]:
    return timelines_with_history(server.data / "pg_wal")


def says(server: PostgresProcess, text: str, *, times: int) -> Callable[[], Awaitable[bool]]:
    async def said() -> bool:
        return server.log_text().count(text) >= times

    return said


async def receives_nothing_from(primary: PostgresProcess, standby: PostgresProcess) -> None:
    """It asks again and again, and is refused each time."""
    await wait_until(says(standby, NOT_IN_HISTORY, times=3), what="three times refused")
    assert await primary.fetchval("SELECT count(*) FROM pg_stat_replication") == 0


async def follows_with_all_rows(cluster: Cluster, primary: PostgresProcess, standby: PostgresProcess) -> None:
    await cluster.wait_streaming(primary, standby.name)
    await primary.execute("CREATE TABLE t AS SELECT generate_series(1, 100) AS id")
    await cluster.wait_streaming(primary, standby.name)
    assert await standby.fetchval("SELECT received_tli FROM pg_stat_wal_receiver") == 3
    await wait_until(lambda: standby.fetchval("SELECT to_regclass('t') IS NOT NULL"), what="the rows are replayed")
    assert await standby.fetchval("SELECT count(*) FROM t") == 100


async def after_a_dead_end(cluster: Cluster) -> tuple[PostgresProcess, PostgresProcess, TimelineChain]:
    """`b`, for whom timeline 2 is its own without a record of it, `c`, the primary on 3 from the same place, and its chain.

    `b` follows `a` while that is a standby yet. Its startup process stands still while `a` is really promoted, so that
    its walreceiver, which is told that timeline 1 ended, fetches the history of 2 and waits to be told where to go on. Then
    `a` is gone.
    """
    p, a, b, c = await ready(cluster, A, B, C)
    # All hold its shutdown checkpoint: they end at the same place.
    await p.stop()
    dead, accepted = await claimed(a, FIRST, 2), await claimed(c, FIRST, 3)
    assert dead.switches[0].switch_lsn == accepted.switches[0].switch_lsn
    await follows(b, a)
    await wait_until(
        lambda: b.fetchval("SELECT count(*) > 0 FROM pg_stat_wal_receiver WHERE status = 'streaming'"),
        what="b streams from a",
    )
    with frozen(b.child_pid("startup")):
        await promote(a.server, dead, a.relay, deadline_s=10)

        async def fetched() -> bool:
            return histories(b) == (2,)

        await wait_until(fetched, what="the walreceiver fetches the history")
        a.kill()
    await wait_until(says(b, "new target timeline is 2", times=1), what="recovery takes 2 for its own")
    await promote(c.server, accepted, c.relay, deadline_s=10)
    return b, c, accepted


async def test_p4_a_standby_that_fetched_the_history_of_a_dead_end_receives_from_another_only_after_a_restart(
    cluster: Cluster,
) -> None:
    b, c, chain = await after_a_dead_end(cluster)
    await follows(b, c)
    await receives_nothing_from(c, b)
    # The history that it should go along has been fetched: that is no help to a recovery that has chosen.
    await wait_until(says(b, NO_CHILD, times=1), what="recovery refuses timeline 3")
    assert histories(b) == (2, 3)
    await b.stop()
    forget_dead_ends(b.server, chain)
    clear_claim(b.server)
    await b.start()
    await follows_with_all_rows(cluster, c, b)
    assert histories(b) == (3,)


async def test_p4_a_restart_that_does_not_forget_the_dead_end_goes_there_again(cluster: Cluster) -> None:
    b, c, chain = await after_a_dead_end(cluster)
    b.set_dynamic(**{**(await b.running.settings_file.read()), "primary_conninfo": conninfo(c, B)})
    await b.stop()
    await b.start()
    await receives_nothing_from(c, b)
    await b.stop()
    # As before it met this primary: then an empty history of 2 would be the newest, and recovery would end on it.
    (b.data / "pg_wal" / history_file_name(Timeline(3))).unlink()
    forget_dead_ends(b.server, chain)
    clear_claim(b.server)
    assert list((b.data / "pg_wal").glob("*.history")) == []
    await b.start()
    await follows_with_all_rows(cluster, c, b)


async def cut_off_promotion(cluster: Cluster, claim: int) -> tuple[PostgresProcess, TimelineChain]:
    """A stopped standby whose promotion to `claim` ended after it had written its history and before its first record.

    No signal hits that moment: what Postgres has written by then is taken over from the promotion of a copy.
    """
    p, a = await ready(cluster, A)
    await p.stop()
    chain = await claimed(a, FIRST, claim)
    await a.stop()
    copy = restarted_copy(cluster, B, a)
    await copy.start()
    await promote(copy.server, chain, copy.relay, deadline_s=10)
    copy.kill()
    for path in sorted((copy.data / "pg_wal").glob("*.history")):
        a.write(f"pg_wal/{path.name}", path.read_text())
    assert histories(a) == (claim,)
    return a, chain


def restarted_copy(cluster: Cluster, name: str, source: PostgresProcess) -> PostgresProcess:
    copy = cluster.add(name, source=source.data)
    copy.set_dynamic(restore_command=install_restore_command(copy.server))
    return copy


@pytest.mark.parametrize("claim", [2, 9], ids=["the next number", "past a gap"])
async def test_p4_a_promotion_that_was_cut_off_is_never_repeated_under_its_number(cluster: Cluster, claim: int) -> None:
    a, chain = await cut_off_promotion(cluster, claim)
    clear_claim(a.server)
    await a.start()
    with pytest.raises(PromotedWrong) as failure:
        await promote(a.server, chain, a.relay, deadline_s=10)
    assert (failure.value.claimed, failure.value.timeline) == (claim, claim + 1)
    assert await timeline_of(a) == claim + 1


@pytest.mark.parametrize("claim", [2, 9], ids=["the next number", "past a gap"])
async def test_p4_a_promotion_that_was_cut_off_is_repeated_under_a_new_claim_once_the_old_is_forgotten(
    cluster: Cluster, claim: int
) -> None:
    a, cut_off = await cut_off_promotion(cluster, claim)
    (switch,) = cut_off.switches
    again = TimelineSwitch(Timeline(claim + 1), switch.parent, switch.switch_lsn, switch.epoch)
    chain = cut_off.forked(again)
    assert not chain.knows(switch.timeline)
    forget_dead_ends(a.server, chain)
    clear_claim(a.server)
    await a.start()
    await promote(a.server, chain, a.relay, deadline_s=10)
    assert await timeline_of(a) == claim + 1
    history = (a.data / "pg_wal" / history_file_name(Timeline(claim + 1))).read_text()
    assert [line.split()[0] for line in history.splitlines() if line.strip()] == ["1"]
