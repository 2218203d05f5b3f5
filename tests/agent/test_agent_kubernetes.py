"""What changes where members come and go: peers, the role that is published, events, and the cluster's uid."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from agent_builders import A, B, held_by_a, peer_state, record
from agent_fakes import Fault, HandClock, settle
from agent_instance import Instance
from msgspec.structs import replace as changed

from instance_manager.agent.context import Journal, OperationFailed
from instance_manager.agent.elections import Elections
from instance_manager.agent.extension import _extend
from instance_manager.agent.giving_up import GivingUp
from instance_manager.agent.membership import Membership
from instance_manager.agent.peering import WatchAnswer
from instance_manager.agent.primary import PrimaryDuties
from instance_manager.agent.publishing import publish_note
from instance_manager.agent.rejoining import Rejoining
from instance_manager.config import Configuration
from instance_manager.config_sections import CoordinationSection, KubernetesCoordinationSection
from instance_manager.core.record import ClusterRecord
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch, MemberId, MemberName
from instance_manager.core.voting import Verdict
from instance_manager.ports import PublishedRole


class Recorded:
    """`ports.Publication` that a test looks at."""

    def __init__(self, events: list[str] | None = None) -> None:
        self.role: str | None = None
        self.published: list[tuple[str, str, bool]] = []
        self.events = events if events is not None else []

    def publish_role(self, role: PublishedRole) -> None:
        if role != self.role:
            self.role = role
            self.events.append(f"role {role}")

    async def role_is_published(self, *, deadline_s: float) -> bool:
        self.events.append("role seen")
        return True

    def publish_event(self, reason: str, message: str, *, warning: bool) -> None:
        self.published.append((reason, message, warning))

    async def finish(self, *, deadline_s: float) -> None:
        return None

    async def run(self) -> None:
        return None


def on_kubernetes(configuration: Configuration, instances: int) -> Configuration:
    """The members `p-0` and so on; the fixtures' own names are `a`, `b`, `p`, of which only those listed are configured."""
    listed = configuration.members[:instances]
    return changed(
        configuration,
        cluster=changed(configuration.cluster, uid=""),
        members=listed,
        coordination=CoordinationSection(kubernetes=KubernetesCoordinationSection(namespace="test")),
    )


# Peers


async def test_peers_come_and_go_and_what_is_known_of_those_that_stay_is_kept(tmp_path: Path) -> None:
    async with Instance(tmp_path, "p", record()) as p:
        for name in "abc":
            p.caller.on(name, "watch", WatchAnswer(digest="1", state=peer_state(name)))
        watching = asyncio.create_task(p.peers.run())
        await asyncio.sleep(3)
        assert set(p.caller.told) == {"a", "b"}
        before = p.peers.views()[MemberName("a")].state
        assert before is not None
        p.peers.set_names(frozenset({MemberName("a"), MemberName("c")}))
        assert p.peers.views()[MemberName("a")].state is before
        await settle()
        p.caller.told.clear()
        await asyncio.sleep(3)
        assert set(p.caller.told) == {"a", "c"}
        p.peers.set_names(frozenset({MemberName("a"), MemberName("b"), MemberName("c")}))
        await asyncio.sleep(3)
        assert set(p.caller.told) == {"a", "b", "c"}
        assert all(view.answers for view in p.peers.views().values())
        watching.cancel()


async def test_whoever_the_record_names_is_a_peer_as_long_as_it_does(tmp_path: Path) -> None:
    async with Instance(tmp_path, "p", record()) as p:
        membership = Membership(p.context)
        former = MemberId("demo_4_00000000")
        p.context.configuration = on_kubernetes(p.context.configuration, 3)
        p.store.put(replace(p.record, voters=frozenset({A, former})))
        await p.keeper.read()
        membership.follow()
        assert set(p.peers.names) == {"a", "b", "demo-4"}
        p.store.put(replace(p.record, voters=frozenset({A})))
        await p.keeper.read()
        membership.follow()
        assert set(p.peers.names) == {"a", "b"}


# Extensions and takeovers where members come and go (R11)


async def test_r11_only_voters_of_the_record_count_for_an_extension(tmp_path: Path) -> None:
    async with Instance(tmp_path, "p", record(voters=frozenset({B}), quorum=1)) as p:
        extended: list[object] = []
        p.context.link.extend = extended.append  # type: ignore[method-assign,assignment]
        granted = Verdict(granted=True, reason="")
        p.caller.on("a", "extend", granted)  # dropped, and has not heard of it yet
        await _extend(p.context, p.record)
        assert extended == []
        p.caller.on("b", "extend", granted)
        await _extend(p.context, p.record)
        assert len(extended) == 1


async def test_r11_asynchronous_a_member_that_the_record_no_longer_names_does_not_take_over(tmp_path: Path) -> None:
    found = record(mode="asynchronous", quorum=0, voters=frozenset({A}))
    async with Instance(tmp_path, "b", found, "asynchronous") as b:
        b.context.dead_holder = found.holder
        with pytest.raises(OperationFailed, match="not among those of the record"):
            await Elections(b.context).take_by_time("the primary is gone")
        assert b.store.attempts == []
        b.store.put(replace(found, voters=frozenset({A, B})))
        await Elections(b.context).take_by_time("the primary is gone")
        assert b.record.holder == b.holder


async def test_r11_asynchronous_the_record_names_only_members_that_are_configured(tmp_path: Path) -> None:
    found = record(mode="asynchronous", quorum=0, voters=frozenset({A, B}))
    async with Instance(tmp_path, "p", found, "asynchronous") as p:
        p.knows("a", "b")
        duties = PrimaryDuties(p.context)
        p.context.configuration = changed(p.context.configuration, members=p.context.configuration.members[:1])
        await duties._record_members(p.record)
        assert p.record.voters == {A}


# Scaling down


async def test_r14_a_primary_beyond_instances_asks_to_be_switched_over(tmp_path: Path) -> None:
    async with Instance(tmp_path, "p", record()) as p:
        p.knows("a", "b")
        p.database.senders = {A: 0, B: 0}
        duties = PrimaryDuties(p.context)
        for _ in range(3):
            duties.look()
            await asyncio.sleep(1)
        assert not await duties._leave_to_a_member(p.record)
        p.context.configuration = changed(p.context.configuration, members=p.context.configuration.members[:1])
        assert not p.context.configuration.is_member
        duties.look()
        assert await duties._leave_to_a_member(p.record)
        assert p.record.switchover is not None
        assert duties.best_target(p.record, None) == ("a", A)


# The role and the events


async def test_the_role_is_primary_only_while_clients_are_let_in_and_not_while_giving_up(tmp_path: Path) -> None:
    async with Instance(tmp_path, "p", record()) as p:
        told = Recorded()
        p.context.publication = told
        p.context.publish_role()
        assert told.role == "primary"
        p.context.giving_up = True
        p.context.publish_role()
        assert told.role == "replica"
        p.context.giving_up, p.context.gate_open = False, False
        p.context.publish_role()
        assert told.role == "replica"
        p.context.gate_open = True
        p.context.publish_role()
        p.context.take_role(Role.STOPPING, "the permit is over")
        assert told.role == "replica"


async def test_an_agent_that_restarted_over_a_serving_primary_leads_nobody_away(tmp_path: Path) -> None:
    async with Instance(tmp_path, "p", record()) as p:
        told = Recorded()
        p.context.publication, p.context.role, p.context.gate_open = told, Role.STARTING, False
        p.context.publish_role()
        assert told.role is None
        p.context.gate_open = True
        p.context.take_role(Role.PRIMARY, "the agent restarted over a serving primary")
        assert told.role == "primary"
    async with Instance(tmp_path, "b", record()) as b:
        b.context.publication, b.context.role = told, Role.STARTING
        b.context.publish_role()
        assert told.role == "replica"


async def test_new_clients_are_led_elsewhere_before_a_primary_stops_writing(tmp_path: Path) -> None:
    async with Instance(tmp_path, "p", record()) as p:
        told = Recorded(p.events)
        p.context.publication = told
        p.context.publish_role()
        p.knows("a", "b")
        assert p.database.at is not None
        p.caller.ends_at("a", p.database.at)
        giving_up = GivingUp(p.context, PrimaryDuties(p.context))
        await giving_up._give_up(p.record, (MemberName("a"), A), "switchover")
        order = [event for event in p.events if event in ("role replica", "role seen", "checkpoint", "stop")]
        assert order == ["role replica", "checkpoint", "role seen", "stop"]


async def test_a_handover_that_fails_before_anything_stopped_leads_clients_here_again(tmp_path: Path) -> None:
    async with Instance(tmp_path, "p", record()) as p:
        told = Recorded()
        p.context.publication = told

        async def fail() -> None:
            raise OperationFailed("no space")

        p.database.on["checkpoint"] = fail
        with pytest.raises(OperationFailed):
            await GivingUp(p.context, PrimaryDuties(p.context))._give_up(p.record, (MemberName("a"), A), "switchover")
        p.context.publish_role()
        assert told.role == "primary"


def test_notes_and_decisions_become_events_once() -> None:
    told = Recorded()
    journal = Journal(HandClock(), lambda what, why, decided: publish_note(told, what, why, decided=decided))
    journal.decided("kill", "no proof of health: the disk stalls for 4 s")
    for seconds in range(50):
        journal.decided("kill", f"no proof of health: the disk stalls for {seconds} s")
    journal.decided("resume", "nobody took over")
    journal.note("resume", "epoch 6")
    journal.decided("wait", "nothing to do")
    journal.note("promoted", "timeline 2")
    assert [(reason, warning) for reason, _, warning in told.published] == [
        ("Fenced", True),
        ("PrimaryStarted", False),
        ("Promoted", False),
    ]


# The cluster's uid


def without_uid(instance: Instance) -> None:
    instance.context.configuration = on_kubernetes(instance.context.configuration, 3)
    instance.keeper._cluster_uid = ""


async def test_r14_where_none_is_configured_the_first_uid_is_the_clusters_for_ever(tmp_path: Path) -> None:
    async with Instance(tmp_path, "b", record()) as b:
        without_uid(b)
        b.volume.state = replace(b.volume.state, cluster_uid=None)
        await b.keeper.read()
        assert b.keeper.view().damage is None
        await Rejoining(b.context).follow()
        assert b.volume.state.cluster_uid == "uid-1"
        b.store.put(replace(b.record, cluster_uid="of another cluster"))
        await b.keeper.read()
        assert "belongs to another cluster" in (b.keeper.view().damage or "")


async def test_r14_whoever_was_slower_to_create_the_lease_takes_the_uid_of_the_other(tmp_path: Path) -> None:
    async with Instance(tmp_path, "b", record()) as b:
        without_uid(b)
        b.volume.state = replace(b.volume.state, cluster_uid=None, recorded_epoch=Epoch(0))
        b.store.put(None)
        await b.keeper.read()
        first = record(epoch=Epoch(1), system_identifier=None, chain=None, voters=frozenset(), quorum=0, position=None)
        b.store.faults_of_writes.append(_somebody_was_faster(b, first))
        with pytest.raises(Exception, match="version"):
            await Rejoining(b.context).create_record("0123abcd")
        assert b.volume.state.cluster_uid is None
        await b.keeper.read()
        assert b.keeper.view().damage is None


async def test_r14_a_new_cluster_gets_a_random_uid_that_its_volume_remembers(tmp_path: Path) -> None:
    async with Instance(tmp_path, "b", held_by_a()) as b:
        without_uid(b)
        b.volume.state = replace(b.volume.state, cluster_uid=None, recorded_epoch=Epoch(0))
        b.store.put(None)
        await b.keeper.read()
        rejoining = Rejoining(b.context)
        await rejoining.create_record("0123abcd")
        made = b.record.cluster_uid
        assert len(made) == 16
        b.context.role = Role.STOPPED
        await rejoining.initialise()
        assert b.volume.state.cluster_uid == made


def _somebody_was_faster(instance: Instance, first: ClusterRecord) -> Fault:
    return Fault(before=lambda: instance.store.put(replace(first, holder=None)))
