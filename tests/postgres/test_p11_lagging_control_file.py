"""P11, P4: pg_control learns of a promotion after the log does; an end in between leaves one that is older than the log.

CreateEndOfRecoveryRecord flushes the first record of the new timeline, and writes the control file after that. No signal
hits that moment, so it is made: after all of Postgres was killed, the control file of just before is put back.
"""

from __future__ import annotations

import pytest
from agent_database import database_of
from harness import Cluster, PostgresProcess
from test_p4_promotion import FIRST, A, claimed, ready, timeline_of

from instance_manager.core.lease import resumed
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import Epoch, TimelineChain
from instance_manager.postgres.control_data import ClusterState, read_control_data
from instance_manager.postgres.histories import timelines_with_history
from instance_manager.postgres.promotion import clear_claim, forget_dead_ends, promote

CONTROL_FILE = "global/pg_control"


async def killed_after_promotion(cluster: Cluster, *, control_file_of: str) -> tuple[PostgresProcess, TimelineChain]:
    """A former standby whose promotion to 2 is in the log, and whose control file is one of before it, or its own.

    Before it the standby had `stopped` and was started again, or was `running`; its own is what it had `afterwards`.
    """
    primary, a = await ready(cluster, A)
    await primary.execute("CREATE TABLE t AS SELECT generate_series(1, 100) AS id")
    await cluster.wait_streaming(primary, A)
    await primary.stop()
    chain = await claimed(a, FIRST, 2)
    control_file = a.data / CONTROL_FILE
    if control_file_of == "stopped":
        await a.stop()
        before = control_file.read_bytes()
        await a.start()
    else:
        before = control_file.read_bytes()
    await promote(a.server, chain, a.relay, deadline_s=10)
    a.kill()
    if control_file_of != "afterwards":
        assert control_file.read_bytes() != before
        control_file.write_bytes(before)
    return a, chain


async def start_read_write(a: PostgresProcess) -> None:
    assert not (a.data / "standby.signal").exists()
    await a.start()
    assert not await a.fetchval("SELECT pg_is_in_recovery()")


@pytest.mark.parametrize("control_file_of", ["stopped", "running"])
async def test_p11_with_a_control_file_of_before_a_read_write_start_goes_on_along_the_parent_without_a_word(
    cluster: Cluster, control_file_of: str
) -> None:
    a, _ = await killed_after_promotion(cluster, control_file_of=control_file_of)
    told = len(a.log_text())
    await start_read_write(a)
    assert await timeline_of(a) == 1
    assert await a.fetchval("SELECT timeline_id FROM pg_control_checkpoint()") == 1
    # The fact behind the rule: it says nothing of a timeline, although the history of 2 lies there.
    assert timelines_with_history(a.data / "pg_wal") == (2,)
    said = [line for line in a.log_text()[told:].splitlines() if " client backend " not in line]
    assert said[-1].endswith("database system is ready to accept connections")
    alarms = ("timeline", "WARNING", "ERROR", "FATAL", "PANIC")
    assert [line for line in said if any(word in line for word in alarms)] == []


async def test_p11_with_its_own_control_file_a_read_write_start_goes_on_along_the_claimed_timeline(
    cluster: Cluster,
) -> None:
    a, chain = await killed_after_promotion(cluster, control_file_of="afterwards")
    facts = await (await database_of(a)).directory.stopped_facts(chain)
    assert (facts.recovers_along, facts.histories) == (2, (2,))
    await start_read_write(a)
    assert await timeline_of(a) == 2


@pytest.mark.parametrize("control_file_of", ["stopped", "running"])
async def test_p11_the_facts_of_the_stopped_directory_tell_that_the_control_file_is_older_than_the_log(
    cluster: Cluster, control_file_of: str
) -> None:
    a, chain = await killed_after_promotion(cluster, control_file_of=control_file_of)
    facts = await (await database_of(a)).directory.stopped_facts(chain)
    control = await read_control_data(a.server)
    told_by = {"stopped": ClusterState.SHUT_DOWN_IN_RECOVERY, "running": ClusterState.IN_ARCHIVE_RECOVERY}
    assert control.state is told_by[control_file_of]
    assert facts.end is not None
    # The log is on the claimed timeline; Postgres would not go along it.
    assert (facts.end.timeline, facts.recovers_along, facts.histories) == (2, 1, (2,))
    assert facts.end.lsn > chain.switches[-1].switch_lsn


async def test_p11_p4_a_log_ahead_of_its_control_file_is_promoted_again_under_the_next_claim(cluster: Cluster) -> None:
    a, chain = await killed_after_promotion(cluster, control_file_of="running")
    facts = await (await database_of(a)).directory.stopped_facts(chain)
    assert facts.end is not None
    holder = Holder(member_id=A, incarnation="life")
    record = ClusterRecord(
        cluster_name="demo",
        cluster_uid="uid-1",
        mode="synchronous",
        lease_duration_s=10.0,
        epoch=Epoch(2),
        holder=holder,
        system_identifier=facts.system_identifier,
        chain=chain,
        highest_timeline=chain.current,
    )
    again = resumed(
        record,
        holder=holder,
        highest_epoch=Epoch(2),
        end=facts.end,
        claim_begun=chain.current in facts.histories,
        writable_along=facts.recovers_along == chain.current,
    ).chain
    assert again is not None
    assert (again.current, [switch.parent for switch in again.switches]) == (3, [1, 2])
    forget_dead_ends(a.server, again)
    clear_claim(a.server)
    a.make_standby()
    await a.start()
    await promote(a.server, again, a.relay, deadline_s=10)
    assert await timeline_of(a) == 3
    assert await a.fetchval("SELECT count(*) FROM t") == 100
