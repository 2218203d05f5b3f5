"""Failovers that were not planned: what clients keep, what the log tells, and the verb for what no quorum can mend."""

from __future__ import annotations

import signal

import pytest
from cluster_tools import (
    Writer,
    ask,
    is_writable,
    log_end,
    messages,
    psql,
    record,
    volume,
    wait_other_primary,
)

from instance_manager.core.types import member_name_of
from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)

SUPERVISOR_BYTES_MAX = 16 * 1024 * 1024
AGENT_BYTES_MAX = 56 * 1024 * 1024


def test_every_acknowledged_row_survives_the_sudden_end_of_the_primary(lasting_cluster: LocalCluster) -> None:
    old = lasting_cluster.wait_primary()
    before = record(lasting_cluster)
    offsets = {name: log_end(lasting_cluster, name) for name in lasting_cluster.names}
    with Writer(lasting_cluster, "over_a_failover") as writer:
        writer.wait_for_more(20)
        lasting_cluster.kill(old)
        new = wait_other_primary(lasting_cluster, old)
        writer.wait_for_more(20)
        lasting_cluster.start(old)
        lasting_cluster.wait_redundant(75)
        writer.wait_for_more(20)
    assert writer.missing() == set()
    now = record(lasting_cluster)
    assert now.chain is not None
    assert before.chain is not None
    assert len(now.chain.switches) == len(before.chain.switches) + 1
    assert [name for name in lasting_cluster.names if is_writable(lasting_cluster, name)] == [new]
    _assert_a_story(messages(lasting_cluster, new, offset=offsets[new]), old)


def _assert_a_story(lines: list[str], old: str) -> None:
    """The log of the winner, read from above."""
    chapters = [
        f"suspicion: {old} ",
        "role candidate, was standby: ",
        "stand: epoch ",
        "role promoting, was candidate: the Lease is taken",
        "promoted: timeline ",
        "role primary, was promoting: clients are let in",
        "open: clients enter",
    ]
    found = -1
    for chapter in chapters:
        later = [index for index, line in enumerate(lines) if index > found and line.startswith(chapter)]
        assert later, f"{chapter!r} does not follow in\n" + "\n".join(lines)
        found = later[0]


def test_the_log_tells_by_whose_promises_the_lease_was_taken(lasting_cluster: LocalCluster) -> None:
    old = lasting_cluster.wait_primary()
    offsets = {name: log_end(lasting_cluster, name) for name in lasting_cluster.names}
    postmaster = lasting_cluster.processes(old).postmaster
    assert postmaster is not None
    processes.send([postmaster], signal.SIGKILL)
    new = wait_other_primary(lasting_cluster, old)
    chain = record(lasting_cluster).chain
    assert chain is not None
    epoch = chain.switches[-1].epoch
    lines = messages(lasting_cluster, new, offset=offsets[new])
    assert any(line.startswith(f"take the Lease: epoch {epoch}, ") and "promises of " in line for line in lines)


def test_memory_stays_within_its_limits_after_failovers(lasting_cluster: LocalCluster) -> None:
    told = {}
    for name in lasting_cluster.names:
        found = lasting_cluster.processes(name)
        assert found.supervisor is not None
        assert found.agent is not None
        told[name] = (processes.resident_bytes(found.supervisor.pid), processes.resident_bytes(found.agent.pid))
    print("resident MiB:", {name: tuple(round(size / 2**20, 1) for size in sizes) for name, sizes in told.items()})
    for name, (supervisor, agent) in told.items():
        assert supervisor < SUPERVISOR_BYTES_MAX, f"{name}: {supervisor}"
        assert agent < AGENT_BYTES_MAX, f"{name}: {agent}"


def test_r15_failover_with_loss_takes_the_best_that_is_left_and_sets_the_returning_primary_aside(
    lasting_cluster: LocalCluster,
) -> None:
    """q is 1 of 2 voters, so one voter alone elects nobody: it may hold less than the other one did."""
    old = lasting_cluster.wait_primary()
    told = psql(
        lasting_cluster.connection_string(), "DROP TABLE IF EXISTS kept_by_r15; CREATE TABLE kept_by_r15 AS SELECT 1"
    )
    assert told.code == 0, str(told)
    before = record(lasting_cluster)
    lost_voter, left_voter = sorted(before.voters)
    lost, left = member_name_of(lost_voter), member_name_of(left_voter)
    verb = ("failover", "--allow-data-loss")
    old_member = volume(lasting_cluster, old).member_id
    # Together: the primary must not have the time to go on with the other voter alone.
    processes.send(
        [process for name in (lost, old) for process in lasting_cluster.processes(name).everything], signal.SIGKILL
    )
    lasting_cluster.kill(old)
    lasting_cluster.kill(lost)
    assert record(lasting_cluster).voters == before.voters

    lasting_cluster.wait(
        lambda: (
            (status := lasting_cluster.status(left))
            and any("a failover needs promises of 2 voters, 1 could answer" in risk for risk in status.at_risk)
        ),
        20,
        "status says why nobody is elected",
    )
    # It is refused as long as the voter that is left does not suspect the primary itself.
    preview = lasting_cluster.wait(
        lambda: (
            told
            if "refused: " not in (told := ask(lasting_cluster, left, *verb, stdin="something else\n")).out
            else None
        ),
        20,
        "the verb is not refused any more",
    )
    assert preview is not None
    assert preview.code == 2, str(preview)
    for name, member in ((old, old_member), (lost, lost_voter)):
        assert f"{name} ({member}): LOST; what only it holds is given up" in preview.out
    assert f"{left}: reachable, timeline " in preview.out
    assert f"new primary: {left}" in preview.out
    assert "that is not the cluster's name; nothing was done" in preview.err
    assert record(lasting_cluster).epoch == before.epoch

    carried_out = ask(lasting_cluster, left, *verb, stdin=f"{before.cluster_name}\n")
    assert carried_out.code == 0, str(carried_out)
    assert f"{left} took the Lease at epoch {before.epoch + 1}; given up: " in carried_out.out
    assert wait_other_primary(lasting_cluster, old) == left
    assert record(lasting_cluster).excluded >= {old_member, lost_voter}
    lasting_cluster.wait(lambda: is_writable(lasting_cluster, left), 20, f"{left} takes writes alone")

    offsets = {name: log_end(lasting_cluster, name) for name in (old, lost)}
    lasting_cluster.start(old)
    lasting_cluster.start(lost)
    assert lasting_cluster.wait_redundant(75) == left
    for name, member in ((old, old_member), (lost, lost_voter)):
        since = messages(lasting_cluster, name, offset=offsets[name])
        assert any(line.startswith("rejoin: set aside and clone: ") for line in since)
        assert not any(line.startswith("rejoin: rewind") for line in since)
        assert volume(lasting_cluster, name).member_id != member
    assert psql(lasting_cluster.connection_string(), "SELECT count(*) FROM kept_by_r15").out == "1"
