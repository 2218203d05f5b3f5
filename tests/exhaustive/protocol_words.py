"""The words of the protocol's model: states made of small numbers, and what each number stands for.

Records, volumes, logs and lists are kept once and named by a number, so that a state is small, compares fast, and the
core's functions are called once for each different question. Everything here is about values; what happens is in
`protocol_model`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, Literal, NamedTuple, TypeVar

from instance_manager.core.quorum import SynchronousSet
from instance_manager.core.record import ClusterRecord, Holder, Release
from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, WalEnd
from instance_manager.core.voting import VolumeState

LETTERS = "abc"
UID = "model"
DOWN, STANDBY, PRIMARY = range(3)
SERVERS = ("down", "standby", "primary")
NOBODY_THERE = -1
NEVER_READ = -1
DELETED = 0
PROMOTION, SHUTDOWN = 0, 9
"""What stands in a log beside the writes 1, 2, ...: the first record of a timeline, and a shutdown checkpoint."""

T = TypeVar("T", bound=Hashable)


class Kept(Generic[T]):
    """Each value once, named by a number from 1."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self._values: list[T] = []

    def number(self, value: T) -> int:
        number = self._numbers.get(value)
        if number is None:
            self._values.append(value)
            number = self._numbers[value] = len(self._values)
        return number

    def __getitem__(self, number: int) -> T:
        return self._values[number - 1]


RECORDS: Kept[ClusterRecord] = Kept()
VOLUMES: Kept[VolumeState] = Kept()
LOGS: Kept[tuple[tuple[int, int], ...]] = Kept()
SETS: Kept[SynchronousSet] = Kept()


class Campaign(NamedTuple):
    """What a candidate has in memory."""

    epoch: int
    grounds: int
    """The record that it stands on."""
    promises: tuple[int, ...]
    """Per instance the log that it told the end of; 0: no promise."""


class Node(NamedTuple):
    """One instance: its Postgres, its volume, and the memory of its agent."""

    server: int
    log: int
    view: int
    """The synchronous list of a primary; 0: the one that nobody satisfies."""
    term: int
    """Epoch under which it last became primary."""
    upstream: int
    """Whom its walreceiver receives from."""
    volume: int
    life: int
    """Of its supervisor: the holder's incarnation."""
    # The agent's memory, gone with a restart of the agent:
    snapshot: int
    """The record that it last read."""
    unknown: bool
    """A write of its own has an unknown outcome, or it has just started (R1)."""
    gate: bool
    """Clients are let in (Postgres remembers it, not the agent)."""
    leaving: bool
    """It has stopped clean and is about to release."""
    found: int
    """The record from which it took the Lease."""
    campaign: Campaign | None
    vote: tuple[int, int] | None
    """(epoch, candidate): the promise is persisted, its position not told yet."""
    # In the network, outliving the sender:
    request: tuple[int, int] | None
    """(epoch, epoch of the record) of its last request for promises, which may arrive any time, and again."""


class Spent(NamedTuple):
    """How much of each limited trouble has been had."""

    crashes: int = 0
    agent_restarts: int = 0
    unknown_writes: int = 0
    damages: int = 0
    clones: int = 0
    rollbacks: int = 0
    lost_tails: int = 0
    releases: int = 0
    reaffirms: int = 0


class State(NamedTuple):
    record: int
    pending: tuple[int, ...]
    """Writes on exactly the register's version, with unknown outcomes, that may yet land."""
    nodes: tuple[Node, ...]
    acknowledged: int
    """Bits of the writes that a client was told of."""
    written: int
    promoted: tuple[tuple[int, int], ...]
    """(timeline, log before it) of every promotion."""
    backup: int
    tampered: bool
    """Somebody deleted, restored or edited the register and nobody has repaired it."""
    spent: Spent


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is limited; everything else may happen at any time and any number of times."""

    instances: int = 2
    k: int = 1
    writes: int = 1
    epochs: int = 3
    crashes: int = 0
    agent_restarts: int = 0
    unknown_writes: int = 0
    damages: int = 0
    clones: int = 0
    rollbacks: int = 0
    lost_tails: int = 0
    releases: int = 0
    reaffirms: int = 0
    quorum_steps: Literal["any", "alone or all", "none"] = "any"
    """Towards which sets the primary walks."""
    give_back: bool = False

    def __str__(self) -> str:
        parts = [f"{self.instances} instances", f"k {self.k}", f"{self.writes} writes", f"{self.epochs} epochs"]
        limited = ("crashes", "agent_restarts", "unknown_writes", "damages", "clones", "rollbacks", "lost_tails")
        parts += [
            f"{getattr(self, name)} {name.replace('_', ' ')}"
            for name in (*limited, "releases", "reaffirms")
            if getattr(self, name)
        ]
        if self.quorum_steps != "any":
            parts.append(f"quorum steps: {self.quorum_steps}")
        if self.give_back:
            parts.append("given back")
        return ", ".join(parts)


def volume_number(volume: VolumeState) -> int:
    """Without what only the verb that allows loss looks at."""
    return VOLUMES.number(replace(volume, known_record=None))


def member_id(index: int, incarnation: int = 0) -> MemberId:
    return MemberId(f"{LETTERS[index]}_{incarnation:08x}")


def index_of(member: MemberId) -> int:
    return LETTERS.index(member[0])


@cache
def id_of(volume: int) -> MemberId:
    member = VOLUMES[volume].member_id
    assert member is not None
    return member


def incarnation_of(member: MemberId) -> int:
    return int(member[2:], 16)


# Logs.


@cache
def appended(log: int, timeline: int, what: int) -> int:
    return LOGS.number((*LOGS[log], (timeline, what)))


@cache
def without_last(log: int) -> int:
    return LOGS.number(LOGS[log][:-1] or LOGS[log])


@cache
def end_of(log: int) -> WalEnd:
    entries = LOGS[log]
    return WalEnd(Timeline(entries[-1][0]), Lsn(len(entries)))


@cache
def writes_of(log: int) -> int:
    return sum(1 << what for _, what in LOGS[log] if what not in (PROMOTION, SHUTDOWN))


@cache
def next_streamed(log: int, source: int) -> int | None:
    """The log with one more record from the source's, as Postgres judges: by timeline and position alone (P4).

    None: nothing more there, or the source is not on a history that contains this end.
    """
    own, other = LOGS[log], LOGS[source]
    if len(other) <= len(own) or other[len(own) - 1][0] != own[-1][0]:
        return None
    return LOGS.number((*own, other[len(own)]))


@cache
def contradict(log: int, other: int) -> bool:
    """Two different logs that no comparison of ends can tell apart."""
    return log != other and end_of(log) == end_of(other)


# Renaming: names do not matter, so one state stands for all its renamings.

Order = tuple[int, ...]
"""New index of each instance."""


def _renamed_member(member: MemberId, order: Order) -> MemberId:
    return member_id(order[index_of(member)], incarnation_of(member))


def _renamed_record(record: ClusterRecord, order: Order) -> ClusterRecord:
    holder, release = record.holder, record.release
    if holder is not None:
        holder = Holder(member_id=_renamed_member(holder.member_id, order), incarnation=holder.incarnation)
    if release is not None:
        release = Release(
            releaser=_renamed_member(release.releaser, order),
            epoch=release.epoch,
            end=release.end,
            target=None if release.target is None else _renamed_member(release.target, order),
        )
    voters = frozenset(_renamed_member(voter, order) for voter in record.voters)
    return replace(record, holder=holder, release=release, voters=voters)


@cache
def renamed_record(number: int, order: Order) -> int:
    return RECORDS.number(_renamed_record(RECORDS[number], order)) if number > 0 else number


@cache
def renamed_volume(number: int, order: Order) -> int:
    volume = VOLUMES[number]
    last, intended = volume.last_record, volume.intended_record
    return volume_number(
        replace(
            volume,
            member_id=_renamed_member(id_of(number), order),
            promised_to=None if volume.promised_to is None else _renamed_member(volume.promised_to, order),
            last_record=None if last is None else _renamed_record(last, order),
            intended_record=None if intended is None else _renamed_record(intended, order),
        )
    )


@cache
def renamed_set(number: int, order: Order) -> int:
    if number == 0:
        return 0
    value = SETS[number]
    return SETS.number(SynchronousSet(value.k, frozenset(_renamed_member(each, order) for each in value.members)))


def renamed_node(node: Node, order: Order) -> Node:
    campaign, vote = node.campaign, node.vote
    if campaign is not None:
        promises = [0] * len(order)
        for old, new in enumerate(order):
            promises[new] = campaign.promises[old]
        campaign = Campaign(campaign.epoch, renamed_record(campaign.grounds, order), tuple(promises))
    if vote is not None:
        vote = (vote[0], order[vote[1]])
    return node._replace(
        view=renamed_set(node.view, order),
        upstream=order[node.upstream] if node.upstream >= 0 else NOBODY_THERE,
        volume=renamed_volume(node.volume, order),
        snapshot=renamed_record(node.snapshot, order),
        found=renamed_record(node.found, order),
        campaign=campaign,
        vote=vote,
    )


def renamed_state(state: State, order: Order) -> State:
    nodes: list[Node] = [*state.nodes]
    for old, new in enumerate(order):
        nodes[new] = renamed_node(state.nodes[old], order)
    return state._replace(
        record=renamed_record(state.record, order),
        pending=tuple(sorted(renamed_record(each, order) for each in state.pending)),
        nodes=tuple(nodes),
        backup=renamed_record(state.backup, order),
    )


def nameless(node: Node) -> tuple[object, ...]:
    """What is true of an instance whatever the names are."""
    volume = VOLUMES[node.volume]
    return (
        node.server,
        node.log,
        node.life,
        node.term,
        node.upstream >= 0,
        volume.promised_epoch,
        volume.recorded_epoch,
        node.gate,
        node.unknown,
        node.snapshot >= 0,
        node.campaign is None,
        node.vote is None,
        node.request or (),
    )


def first_state(bounds: Bounds) -> State:
    """A healthy cluster: a is the primary of epoch 1, everybody else a voter that follows it."""
    count = bounds.instances
    others = frozenset(member_id(index) for index in range(1, count))
    record = ClusterRecord(
        cluster_name=UID,
        cluster_uid=UID,
        mode="synchronous",
        lease_duration_s=10.0,
        epoch=Epoch(1),
        holder=Holder(member_id=member_id(0), incarnation="0"),
        system_identifier="1",
        voters=others,
        quorum=bounds.k,
        chain=TimelineChain(Timeline(1)),
        highest_timeline=Timeline(1),
        opened=True,
    )
    number = RECORDS.number(record)
    log = LOGS.number(((1, PROMOTION),))
    nodes = []
    for index in range(count):
        volume = VolumeState(cluster_uid=UID, member_id=member_id(index), volume_id=UID, boot_id="boot")
        volume = volume.following(record) if index else replace(volume.writing(record, None), was_primary=True)
        nodes.append(
            Node(
                server=PRIMARY if index == 0 else STANDBY,
                log=log,
                view=SETS.number(SynchronousSet(bounds.k, others)) if index == 0 else 0,
                term=1 if index == 0 else 0,
                upstream=NOBODY_THERE if index == 0 else 0,
                volume=volume_number(volume),
                life=0,
                snapshot=number,
                unknown=False,
                gate=index == 0,
                leaving=False,
                found=NEVER_READ,
                campaign=None,
                vote=None,
                request=None,
            )
        )
    return State(number, (), tuple(nodes), 0, 0, (), NEVER_READ, False, Spent())
