"""Variants of what a log and a directory are worth: positions, timelines, identities (P2, P3, P4, P6, P11, R2, R6)."""

from __future__ import annotations

from bending import bent, together
from broken_elections import FROZEN
from broken_rule import LOSS, WEDGED, BrokenRule, voters_keep_their_directories
from simulated_cluster import Scenario
from simulated_postgres import SimulatedPostgres
from simulated_volume import PostgresBehaviour

from instance_manager.agent.rejoining import Rejoining
from instance_manager.agent.volume import Volume
from instance_manager.core import decide, rejoin
from instance_manager.core.types import TimelineChain
from instance_manager.postgres import voting

BUSY_REPLAY = PostgresBehaviour(
    startup_busy=0.3, startup_busy_s=(0.05, 2.0), startup_asks_first=1.0, replay_s=(0.0, 0.5)
)
TORN = PostgresBehaviour(torn_send=0.5, torn_tail=1.0)

LOGS = (
    BrokenRule(
        name="a reload is trusted to stop the walreceiver",
        rule="P2",
        what="While the startup process is busy it goes on, and a voter acknowledges after its vote.",
        patch=bent(
            voting,
            "_end_walreceivers",
            ("            if not receivers and not unclassified:", "            if True:"),
        ),
        scenario=Scenario(durability="preferred", instances=3, faults=FROZEN, behaviour=BUSY_REPLAY),
        seeds=20,
    ),
    BrokenRule(
        name="nothing keeps another walreceiver from starting",
        rule="P2",
        what="The startup process asks for one with the settings that it still has, after the vote.",
        patch=bent(voting, "_stop", (', "dynamic_library_path": f"{block}:{underlying}"', "")),
        scenario=Scenario(durability="preferred", instances=3, faults=FROZEN, behaviour=BUSY_REPLAY),
        seeds=200,
    ),
    BrokenRule(
        name="a vote with the replay position",
        rule="P3, R5",
        what="What is received and not replayed does not count: one that lacks it wins.",
        patch=bent(SimulatedPostgres, "position", ("end = end_along(server.data.log, start, chain)", "end = start")),
        scenario=Scenario(
            durability="preferred", instances=3, faults=("primary crashed", *FROZEN), behaviour=BUSY_REPLAY
        ),
        seeds=20,
    ),
    BrokenRule(
        name="a vote with pg_last_wal_receive_lsn()",
        rule="P3",
        what="After a restart it is null, then a segment's start.",
        patch=bent(
            SimulatedPostgres,
            "position",
            (
                "end = end_along(server.data.log, start, chain)",
                "end = WalEnd(start.timeline, Lsn(server.receive_lsn or start.lsn))",
            ),
        ),
        scenario=Scenario(
            durability="preferred", instances=3, faults=("primary crashed", "standby crashed"), behaviour=BUSY_REPLAY
        ),
        seeds=100,
    ),
    BrokenRule(
        name="ends are compared amid a record",
        rule="P11",
        what="Half a record counts as more log; it is dropped at the promotion, and the fork is not where it was recorded.",
        patch=bent(
            SimulatedPostgres,
            "position",
            (
                "end = end_along(server.data.log, start, chain)",
                "end = end_along(server.data.log, start, chain)\n            end = WalEnd(end.timeline, Lsn(max(end.lsn, server.data.log.written)))",
            ),
        ),
        scenario=Scenario(durability="preferred", instances=3, faults=("primary crashed",), behaviour=TORN),
        seeds=60,
        breaks=(*LOSS, *WEDGED),
    ),
    BrokenRule(
        name="a promotion takes the number that Postgres finds",
        rule="P4",
        what="Two promotions take the same timeline, and a standby follows across the collision.",
        patch=together(
            bent(
                SimulatedPostgres,
                "promote",
                ("volume.claim = chain.current", "volume.claim = None"),
                ("                _verify(server, chain)\n", ""),
            ),
        ),
        scenario=Scenario(
            durability="preferred", instances=3, faults=("primary crashed", "standby crashed", "all crashed")
        ),
        seeds=300,
    ),
    BrokenRule(
        name="every log counts as a part of the history",
        rule="R2",
        what="A former primary that wrote past the fork follows without a rewind.",
        patch=bent(TimelineChain, "contains", ("return end.lsn <= switch.switch_lsn", "return True")),
        scenario=Scenario(durability="preferred", instances=3, faults=("primary isolated", "primary crashed")),
        seeds=60,
        breaks=(*LOSS, *WEDGED),
    ),
    BrokenRule(
        name="an identity without its random part",
        rule="R6, P7",
        what="A fresh directory cannot be told from the one that was given up, and is the voter of that name at once.",
        patch=bent(Volume, "new_member", ('f"{self._chance.getrandbits(32):08x}"', '"00000000"')),
        scenario=Scenario(
            durability="preferred", instances=3, faults=("standby reinitialised", "standby's volume destroyed")
        ),
        seeds=20,
        breaks=(*LOSS, *WEDGED),
    ),
    BrokenRule(
        name="a voter is rewound",
        rule="R6",
        what="A directory whose log an election may rest on loses its end.",
        patch=together(
            bent(decide, "_as_standby", (" and not record.needs_vote_of(o.volume.member_id)", "")),
            bent(rejoin, "plan_rejoin", ("votes = record.needs_vote_of(facts.member_id)", "votes = False")),
            bent(Rejoining, "rejoin", ("if record.needs_vote_of(c.volume.state.member_id):", "if False:")),
            bent(
                Rejoining,
                "_copy_from_primary",
                ("if rejoin is not Rejoin.CLONE and c.record.needs_vote_of(c.volume.state.member_id):", "if False:"),
                ("await c.volume.save(lambda state: replace(state, member_id=None))", "pass"),
            ),
        ),
        scenario=Scenario(
            durability="preferred",
            instances=3,
            faults=("instance reinitialised", "primary isolated", "primary crashed"),
        ),
        seeds=120,
        checks=(voters_keep_their_directories,),
    ),
)
