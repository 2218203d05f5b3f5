"""The theorem that elections rest on, over the nasty model: what a voter has proven to hold, and nothing else, was or will
be acknowledged by it. With the real rules no seed breaks it; without the one or the other some do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict

import pytest
from postgres_stage import Stage, StagedInstance, all_of, chain_of, staged
from simulated_volume import HARSH
from simulated_wal import entries_before

from instance_manager.core.quorum import ALONE
from instance_manager.core.types import WalEnd
from instance_manager.postgres import voting
from instance_manager.postgres.server import LocalPostgresError

SEEDS = 60
LOAD_PAUSE_S = 0.02

Stop = Callable[[StagedInstance], Awaitable[object]]
Apply = Callable[[StagedInstance, StagedInstance], Awaitable[object]]


async def by_the_rule(voter: StagedInstance) -> object:
    return await voting.stop_following(voter.port.running, voter.settings, deadline_s=5)


async def by_emptying_the_conninfo(voter: StagedInstance) -> None:
    """What seems to do: a new connection shows that nobody is followed."""
    await voter.settings.change({"primary_conninfo": ""}, deadline_s=5)


async def by_ending_the_walreceiver(voter: StagedInstance) -> None:
    """Seen gone, after the conninfo was emptied; but nothing keeps another from starting."""
    await voter.settings.change({"primary_conninfo": ""}, deadline_s=5)
    receiver = voter.running.walreceiver
    if receiver is not None:
        receiver.terminate()
    while voter.running.walreceiver is receiver is not None:
        await voter.port.answers_new_connection(deadline_s=1)


async def applied_by_the_rule(primary: StagedInstance, voter: StagedInstance) -> object:
    return await primary.synchronous.apply(all_of(voter), deadline_s=20)


async def applied_as_shown(primary: StagedInstance, voter: StagedInstance) -> None:
    """The value is shown by a new connection, and the walsender is `quorum`."""
    from instance_manager.agent.server_files import render_set

    await primary.settings.change({"synchronous_standby_names": render_set(all_of(voter))}, deadline_s=20)


def lost(seed: int, stop: Stop, apply: Apply = applied_by_the_rule) -> int:
    """How many acknowledged commits are past what the voter proved to hold."""
    options = {**asdict(HARSH), "startup_busy": 0.05}
    with staged("a", "b", seed=seed, **options) as stage:
        a, b = stage.instances
        stage.primary(a)
        stage.standby(b, a)
        _load(stage, a)
        stage.run(stage.world.random.uniform(0, 2))
        try:
            stage.do(a, apply(a, b))
        except LocalPostgresError:
            return 0
        since = len(stage.acknowledged)
        stage.run(stage.world.random.uniform(0, 0.5))
        proven = _vote(stage, b, stop)
        if proven is None:
            return 0
        stage.run(8)
        held = set(b.entries()[: entries_before(proven.lsn)])
        return sum(entry not in held for entry in stage.acknowledged[since:])


def _load(stage: Stage, primary: StagedInstance) -> None:
    def commit(number: int) -> None:
        stage.commit(primary, number)
        stage.world.call_later(LOAD_PAUSE_S, commit, number + 1)

    commit(0)


def _vote(stage: Stage, voter: StagedInstance, stop: Stop) -> WalEnd | None:
    """None: not proven, so nothing is promised."""
    try:
        stage.do(voter, stop(voter))
        return stage.do(voter, voter.port.position(chain_of(), deadline_s=1))
    except LocalPostgresError:
        return None


def test_what_a_voter_has_proven_is_all_that_it_ever_acknowledges() -> None:
    assert [seed for seed in range(SEEDS) if lost(seed, by_the_rule)] == []


@pytest.mark.parametrize("stop", [by_emptying_the_conninfo, by_ending_the_walreceiver])
def test_without_the_rule_some_seed_loses_an_acknowledged_commit(stop: Stop) -> None:
    assert any(lost(seed, stop) for seed in range(10 * SEEDS))


def test_without_waiting_for_the_checkpointer_some_seed_loses_an_acknowledged_commit() -> None:
    """Those that were acknowledged by nobody else, after the list was shown."""
    assert any(lost(seed, by_the_rule, applied_as_shown) for seed in range(SEEDS))


def test_going_on_alone_and_coming_back_is_covered_by_the_rule() -> None:
    async def there_and_back(primary: StagedInstance, voter: StagedInstance) -> object:
        await primary.synchronous.apply(all_of(voter), deadline_s=20)
        await primary.synchronous.apply(ALONE, deadline_s=20)
        return await primary.synchronous.apply(all_of(voter), deadline_s=20)

    assert [seed for seed in range(SEEDS // 3) if lost(seed, by_the_rule, there_and_back)] == []
