"""Variants of the Lease and the permit: what asynchronous clusters rest on, and what the record means (section 3, R1, R3, R4, R8 to R11, R15)."""

from __future__ import annotations

import simulated_server
from bending import bent, swapped, together
from broken_rule import BrokenRule, nobody_starts_again
from simulated_cluster import Scenario, SimulatedCluster
from simulated_supervisor import SimulatedSupervisor
from simulated_volume import PostgresBehaviour

from instance_manager.agent import extension, operator_failover
from instance_manager.agent.elections import Elections
from instance_manager.agent.giving_up import GivingUp
from instance_manager.agent.lease_keeper import LeaseKeeper
from instance_manager.core import decide, election, lease

HANGS = PostgresBehaviour(hanging_stop=1.0)
"""A fast shutdown does not end: only killing ends Postgres."""
CRASHING = ("primary's agent keeps crashing",)

LEASE = (
    BrokenRule(
        name="a permit counts from the answer",
        rule="section 3",
        what="The answer comes late, and the permit outlasts the time after which others take the Lease.",
        patch=bent(
            LeaseKeeper, "_write", ("self._succeeded(stored, sent_s)", "self._succeeded(stored, self._clock.now_s())")
        ),
        scenario=Scenario(
            durability="asynchronous",
            instances=2,
            faults=("primary's network dies", "primary's machine suspended"),
            behaviour=HANGS,
        ),
        seeds=300,
    ),
    BrokenRule(
        name="the hard deadline is not enforced",
        rule="section 2",
        what="With its agent gone Postgres goes on after others may have taken the Lease.",
        patch=together(
            bent(SimulatedSupervisor, "_enforce", ("if self.permit.must_fence(self.host.boottime_s()):", "if False:")),
            bent(SimulatedSupervisor, "_enforce_at_hard", ("and not self.fenced and permit is not None", "and False")),
        ),
        scenario=Scenario(durability="asynchronous", instances=2, faults=CRASHING),
        seeds=60,
    ),
    BrokenRule(
        name="the fence kills the postmaster only",
        rule="section 2",
        what="A busy backend goes on for seconds.",
        patch=together(
            bent(SimulatedSupervisor, "_fence", ("self.server.kill_all()", "self.server.kill_postmaster()")),
            swapped(simulated_server, "ORPHANS_LIVE_S", (2.5, 3.0)),
        ),
        scenario=Scenario(durability="asynchronous", instances=2, faults=CRASHING),
        seeds=60,
    ),
    BrokenRule(
        name="a heartbeat extends the permit",
        rule="section 2",
        what="An agent that lives and cannot renew keeps Postgres writable.",
        patch=bent(
            SimulatedSupervisor,
            "_obey",
            (
                "            case Tick():\n                pass",
                "            case Tick():\n"
                "                permit = self.permit.current\n"
                "                if permit is not None:\n"
                "                    now_s = self.host.boottime_s()\n"
                "                    self.permit.extend(now_s, permit.epoch, now_s + 6.0, now_s + 8.0)",
            ),
        ),
        scenario=Scenario(
            durability="asynchronous",
            instances=2,
            faults=("store unreachable for the primary", "agent killed"),
            behaviour=HANGS,
        ),
        seeds=60,
    ),
    BrokenRule(
        name="the duration is compared with the holder's clock",
        rule="section 4",
        what="A wall clock that is ahead takes the Lease from a living primary.",
        patch=together(
            bent(
                LeaseKeeper,
                "_write",
                (
                    "wanted = replace(change(current.record), write_id=write_id)",
                    "wanted = replace(change(current.record), write_id=write_id, renewed_at=str(self._clock._host.wall_s()))",
                ),
            ),
            bent(
                LeaseKeeper,
                "view",
                (
                    "unchanged_for_s=max(0.0, self._read_sent_s - self._seen_since_s) if self._read_ever else 0.0",
                    "unchanged_for_s=self._clock._host.wall_s() - float(record.renewed_at) if record is not None and record.renewed_at else 0.0",
                ),
            ),
        ),
        scenario=Scenario(
            durability="asynchronous", instances=2, faults=("wall clock stepped", "standby cut from the primary")
        ),
        seeds=20,
    ),
    BrokenRule(
        name="a dead agent is taken for a dead holder",
        rule="R9",
        what="Its Postgres lives on.",
        patch=bent(
            SimulatedCluster,
            "_is_dead",
            (
                "instance.is_over(holder.incarnation)",
                "instance.supervisor is None or instance.supervisor.agent is None",
            ),
        ),
        scenario=Scenario(durability="asynchronous", instances=2, faults=(*CRASHING, "standby without replication")),
        seeds=20,
    ),
    BrokenRule(
        name="an empty holder is free at once",
        rule="R4",
        what="The permit of the one that was there still runs.",
        patch=bent(
            lease,
            "entitled_by_time",
            (
                "if not (record.holder is not None and proven_dead):",
                "if record.holder is not None and not proven_dead:",
            ),
        ),
        scenario=Scenario(
            durability="asynchronous",
            instances=2,
            faults=("holder cleared by hand", "store unreachable for the primary"),
        ),
        seeds=20,
    ),
    BrokenRule(
        name="a member takes over in spite of its extension",
        rule="R11",
        what="It promised the primary not to, and the primary writes by that.",
        patch=together(
            bent(decide, "_may_stand", ("if o.now_s < o.volume.extension_until_s:", "if False:")),
            bent(Elections, "_why_not_by_time", ("if now_s < c.volume.state.extension_until_s:", "if False:")),
        ),
        scenario=Scenario(durability="asynchronous", instances=2, faults=("primary isolated bit by bit",)),
        seeds=20,
    ),
    BrokenRule(
        name="an extension by some, not by all",
        rule="R11",
        what="By time each of N may take over: one that was not asked does.",
        patch=bent(extension, "_extend", ("else len(record.voters)", "else min(1, len(record.voters))")),
        scenario=Scenario(durability="asynchronous", instances=3, faults=("primary without the store and a standby",)),
        seeds=60,
    ),
    BrokenRule(
        name="a lone primary extends its permit by itself",
        rule="R7",
        what="With q = 0 there is nobody to ask: isolated it stays writable for ever.",
        patch=bent(extension, "_extend", ("if needed == 0 or holder is None:", "if holder is None:")),
        scenario=Scenario(
            durability="preferred",
            instances=2,
            faults=("standby cut off for long", "primary isolated for long", "failover with loss asked"),
        ),
        seeds=100,
    ),
    BrokenRule(
        name="the failover that allows loss does not wait",
        rule="R15",
        what="The former primary is alive, and acknowledges what is lost.",
        patch=bent(
            operator_failover,
            "_wait_and_take",
            ("while not dead and c.clock.now_s()", "while False and c.clock.now_s()"),
        ),
        scenario=Scenario(
            durability="preferred",
            instances=2,
            faults=("standby cut off for long", "primary isolated for long", "failover with loss asked"),
        ),
        seeds=150,
    ),
    BrokenRule(
        name="a conflict is not read back",
        rule="section 3",
        what="One lost answer, and the primary never renews again: a healthy one stops.",
        patch=bent(
            LeaseKeeper,
            "_write",
            (
                "                await self._read()\n                continue",
                '                raise WriteRefused("conflict") from None',
            ),
        ),
        scenario=Scenario(durability="preferred", instances=1, faults=("store's answers lost",)),
        seeds=20,
        breaks=("Disturbed",),
        checks=(nobody_starts_again,),
    ),
    BrokenRule(
        name="a record of an earlier epoch is believed",
        rule="R3",
        what="The Lease is restored from a backup; a deposed primary finds itself the holder.",
        patch=bent(lease, "record_damage", ("if record.epoch < volume.recorded_epoch:", "if False:")),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("record restored from earlier", "primary isolated", "primary crashed"),
        ),
        seeds=60,
    ),
    BrokenRule(
        name="a damaged Lease is repaired from a stale memory",
        rule="R3",
        what="A deposed primary writes itself into the Lease again.",
        patch=bent(
            lease,
            "repair",
            ("if volume.recorded_epoch > last.epoch:", "if False:"),
            ("if volume.promised_epoch > last.epoch:", "if False:"),
            ("if len(confirmed) < each.quorum:", "if False:"),
        ),
        scenario=Scenario(
            durability="preferred", instances=3, faults=("record deleted", "record damaged", "primary crashed")
        ),
        seeds=60,
    ),
    BrokenRule(
        name="a release is taken by any log",
        rule="R4",
        what="Without promises, by one that does not hold the shutdown checkpoint.",
        patch=together(
            bent(election, "taken_from_release", ("    if end != release.end:", "    if False:")),
            bent(decide, "_as_standby", ("            and o.postgres.end == released.end\n", "")),
        ),
        scenario=Scenario(
            durability="preferred",
            instances=2,
            faults=("terminated", "standby cut from the primary", "standby crashed"),
        ),
        seeds=60,
    ),
    BrokenRule(
        name="an empty holder is taken for a release",
        rule="R4",
        what="The holder was cleared by hand: who comes first is primary, without promises.",
        patch=together(
            bent(
                decide,
                "_as_standby",
                (
                    "    if record.holder is None and record.release is not None:",
                    '    if record.holder is None and record.release is None and o.stand_again_in_s <= 0:\n        return Decision("take_release", "nobody holds the Lease")\n    if record.holder is None and record.release is not None:',
                ),
            ),
            bent(
                election,
                "taken_from_release",
                (
                    "    release = record.release\n",
                    "    from instance_manager.core.record import Release\n    release = record.release or Release(releaser=member, epoch=record.epoch, end=end, target=member)\n",
                ),
            ),
        ),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("holder cleared by hand", "standby lags", "standby without replication"),
        ),
        seeds=60,
    ),
    BrokenRule(
        name="a release names whoever was asked for",
        rule="P12",
        what="The walsender's connection died at the shutdown: its standby lacks the end, and is recorded as holding it.",
        patch=bent(
            GivingUp,
            "_give_up",
            ("holding = await self._who_holds(record, end, target)", "holding = self._primary._everybody()"),
        ),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("switchover asked", "standby without replication", "standby cut from the primary"),
        ),
        seeds=60,
    ),
)
