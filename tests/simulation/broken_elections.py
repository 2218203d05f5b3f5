"""Variants of elections: suspicion, promises, the takeover and what the winner records (section 4, R5, R7, R12, R13, R16)."""

from __future__ import annotations

from bending import bent, together
from broken_rule import WEDGED, BrokenRule, nobody_is_deposed, nobody_reaffirms
from simulated_cluster import Scenario
from simulated_store import SimulatedStore

from instance_manager.agent.elections import Elections
from instance_manager.agent.lease_keeper import LeaseKeeper
from instance_manager.core import decide, election, lease, voting
from instance_manager.core.record import ClusterRecord
from instance_manager.core.voting import VolumeState

FROZEN = ("primary's managers frozen",)
"""Postgres of the primary goes on acknowledging while the others elect: nothing but the quorum fences it."""
SLOW_ELECTION = ("managers frozen and writes late", "standbys' agents killed")
"""Between a promise and the takeover's write lie seconds, in which voters start again."""

_any_candidate = together(
    bent(election, "judge_promises", ("if end > me.end:", "if False:")),
    bent(election, "judge_pre_votes", ("if ahead:", "if False:")),
)

ELECTIONS = (
    BrokenRule(
        name="one promise fewer",
        rule="section 4",
        what="|N| - q promises: nobody of them needs to hold the last commits.",
        patch=bent(ClusterRecord, "promises_needed", ("- self.quorum + 1", "- self.quorum")),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("primary dies bit by bit", "primary and a standby crashed", "standby crashed"),
        ),
        seeds=100,
    ),
    BrokenRule(
        name="a promiser that is ahead is ignored",
        rule="section 4",
        what="Any promiser wins, not the one with the best log.",
        patch=_any_candidate,
        scenario=Scenario(
            durability="preferred", instances=3, faults=("primary dies bit by bit", "standbys' agents paused briefly")
        ),
        seeds=20,
    ),
    BrokenRule(
        name="others than voters elect",
        rule="R7",
        what="A standby that was dropped from N stands, and its own promise counts.",
        patch=together(
            bent(
                decide,
                "_may_stand",
                ("if o.volume.member_id not in record.voters or record.quorum == 0:", "if record.quorum == 0:"),
            ),
            bent(
                election,
                "judge_pre_votes",
                ("if me.member_id not in record.voters:", "if False:"),
                ("if answer.granted and voter in record.voters}", "if answer.granted}"),
            ),
            bent(
                election,
                "judge_promises",
                ("if voter in record.voters and answer.granted", "if answer.granted"),
                (
                    "frozenset(voter for voter, end in promised.items() if end == me.end)",
                    "frozenset(voter for voter, end in promised.items() if end == me.end and voter in record.voters)",
                ),
            ),
            bent(
                voting,
                "judge_vote",
                (
                    "elif volume.member_id is None or volume.member_id not in record.voters:",
                    "elif volume.member_id is None:",
                ),
                ("elif request.candidate not in record.voters:", "elif False:"),
            ),
        ),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("standby isolated", "standby cut from the primary", "primary crashed"),
        ),
        seeds=60,
    ),
    BrokenRule(
        name="q = 0 elects like q = 1",
        rule="R7",
        what="The primary has gone on alone, and a standby is elected that holds nothing of it.",
        patch=together(
            bent(
                ClusterRecord,
                "promises_needed",
                (
                    "len(self.voters) - self.quorum + 1 if self.quorum > 0 else None",
                    "len(self.voters) - max(self.quorum, 1) + 1",
                ),
            ),
            bent(voting, "judge_vote", ("elif record.quorum == 0:", "elif False:")),
            bent(decide, "_may_stand", ("not in record.voters or record.quorum == 0", "not in record.voters")),
        ),
        scenario=Scenario(durability="asynchronous", instances=2, faults=("durability changed", "primary isolated")),
        seeds=100,
    ),
    BrokenRule(
        name="a vote before the walreceiver is stopped",
        rule="section 4",
        what="The position is told first: what is received after it is acknowledged and not in the winner's log.",
        patch=bent(
            Elections,
            "_promise",
            (
                "end = await self._c.database.stop_following(",
                "told = await self._c.database._postgres.position(chain, deadline_s=1.0)\n"
                "            await self._c.database.stop_following(",
            ),
            ("        if not chain.contains(end):", "        end = told\n        if not chain.contains(end):"),
        ),
        scenario=Scenario(durability="preferred", instances=3, faults=FROZEN),
        seeds=60,
    ),
    BrokenRule(
        name="a promise is kept in memory only",
        rule="R3",
        what="The agent starts again, knows of no promise, and follows the old primary, which acknowledges by it.",
        patch=bent(
            Elections,
            "_promise",
            (
                "await self._c.volume.save(promised)",
                "self._c.volume.state = promised(self._c.volume.state)",
            ),
        ),
        scenario=Scenario(
            durability="preferred", instances=3, faults=("managers frozen and writes late", "agent killed")
        ),
        seeds=150,
    ),
    BrokenRule(
        name="a promise does not bind whom to follow",
        rule="R5",
        what="Having promised a later epoch, it follows the old primary again before the takeover is written.",
        patch=together(
            bent(VolumeState, "may_follow", (" and record.epoch >= self.promised_epoch", "")),
            bent(VolumeState, "following", (", promised_epoch=record.epoch, promised_to=record.holder.member_id", "")),
        ),
        scenario=Scenario(durability="preferred", instances=3, faults=SLOW_ELECTION),
        seeds=150,
    ),
    BrokenRule(
        name="suspicion is ignored by voters",
        rule="section 4",
        what="One standby that lost sight of a healthy primary deposes it.",
        patch=bent(
            voting,
            "judge_vote",
            ("elif voter.suspects is None and record.holder is not None", "elif False and record.holder is not None"),
        ),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("one standby cut from the primary", "primary's agent killed", "one standby without replication"),
        ),
        seeds=400,
        breaks=("Deposed",),
        checks=(nobody_is_deposed,),
    ),
    BrokenRule(
        name="no pre-vote",
        rule="R12",
        what="A standby alone in its suspicion persists a promise of the next epoch, and the primary needs a later one.",
        patch=bent(
            Elections,
            "_campaign",
            (
                "judged = judge_pre_votes(record, c.volume.state, me, votes)",
                "from instance_manager.core.election import Stand as Standing\n        judged = Standing(request.epoch)",
            ),
        ),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("one standby cut from the primary", "primary's agent killed", "one standby without replication"),
        ),
        seeds=120,
        breaks=("Disturbed",),
        checks=(nobody_reaffirms,),
    ),
    BrokenRule(
        name="a promise that nobody took is not overtaken",
        rule="R12",
        what="A voter that promised a later epoch never follows again.",
        patch=bent(decide, "_as_holder", ("if later and o.reaffirm_again_in_s <= 0:", "if False:")),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("primary isolated", "standby isolated", "primary's agent keeps crashing"),
        ),
        seeds=300,
        breaks=WEDGED,
    ),
    BrokenRule(
        name="a takeover on whatever the record says now",
        rule="R12",
        what="Meanwhile the primary has recorded other voters, and acknowledged by them.",
        patch=bent(
            LeaseKeeper, "_write", ("if grounds is not None and current.record.grounds() != grounds:", "if False:")
        ),
        scenario=Scenario(
            durability="preferred",
            instances=2,
            faults=("standby cut from the primary", "writes land late", "slow store"),
        ),
        seeds=250,
    ),
    BrokenRule(
        name="writes are not conditional",
        rule="section 3",
        what="The last writer wins: a takeover and a change of voters both land.",
        patch=bent(SimulatedStore, "write", ("!= expected:", "!= expected and False:")),
        scenario=Scenario(
            durability="preferred",
            instances=2,
            faults=("standby cut from the primary", "writes land late", "slow store"),
        ),
        seeds=60,
    ),
    BrokenRule(
        name="the winner inherits the voters",
        rule="section 4",
        what="Its record names voters that do not hold its log: they could be elected without it.",
        patch=bent(
            election,
            "judge_promises",
            ("frozenset(voter for voter, end in promised.items() if end == me.end)", "record.voters"),
        ),
        scenario=Scenario(durability="preferred", instances=3, faults=("primary dies bit by bit", "standby lags")),
        seeds=20,
    ),
    BrokenRule(
        name="every promiser becomes a voter",
        rule="R13",
        what="Also one that is behind the winner.",
        patch=bent(election, "judge_promises", ("if end == me.end)", ")")),
        scenario=Scenario(durability="preferred", instances=3, faults=("primary dies bit by bit", "standby lags")),
        seeds=20,
    ),
    BrokenRule(
        name="a restarted holder does not ask its voters",
        rule="R16",
        what="Its disk has lost what it acknowledged, and it serves without it.",
        patch=bent(lease, "judge_restart", ("    if needed is None:", "    if True:")),
        scenario=Scenario(
            durability="preferred", instances=3, faults=("primary's disk lost its tail", "standby cut from the primary")
        ),
        seeds=60,
    ),
    BrokenRule(
        name="a holder serves again without a later epoch",
        rule="section 4",
        what="Voters that promised the next epoch to somebody before its crash never follow it again.",
        patch=bent(lease, "reaffirmed", ("Epoch(max(record.epoch, highest_epoch) + 1)", "record.epoch")),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("primary crashed", "standby crashed", "writes land late", "standbys' agents killed"),
        ),
        seeds=60,
        breaks=(*WEDGED, "PromiseBroken"),
    ),
)
