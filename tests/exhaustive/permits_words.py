"""The words of the permits' model: a member, what it has seen of the register, and its requests."""

from __future__ import annotations

from typing import Literal, NamedTuple

from instance_manager.core.record import ClusterRecord, Holder, Mode, Release
from instance_manager.core.types import Epoch, Lsn, MemberId, Timeline, TimelineChain, WalEnd

LETTERS = "abc"
END = WalEnd(Timeline(1), Lsn(1))


class Ticks(NamedTuple):
    """As in the defaults, the margin between the first two is shorter than a request may take."""

    hard: int = 3
    lease: int = 4
    timeout: int = 2


DEFAULT_TICKS = Ticks()


class Seen(NamedTuple):
    """A state of the register, as somebody read it."""

    holder: int
    """-1: nobody."""
    epoch: int
    released_to: int
    """-1: no stamp."""
    current: bool
    """Is this the very version that is stored?"""


Kind = Literal["read", "renew", "take", "reaffirm", "release"]


class Request(NamedTuple):
    kind: Kind
    age: int
    """Since it was sent."""
    wanted: Seen | None
    """What a write makes of the register."""
    on_grounds: tuple[int, int, int] | None
    """(holder, epoch, release) that it stands on."""
    effect: Seen | None
    """What the store answered; None: it has not taken effect."""
    same: bool
    """The answer shows the very version that was seen before."""


class Ask(NamedTuple):
    """A round of questions for an extension."""

    age: int
    granted: int


class Member(NamedTuple):
    # Supervisor and Postgres.
    writable: int
    """Epoch under which Postgres is writable; 0: it is not."""
    permit: int
    """Ticks left."""
    by_extension: bool
    revoked: int
    """No permit of this epoch or below is accepted any more."""
    # The volume.
    promised: int
    bound: int
    """Ticks for which this member promised not to promise, and not to take over."""
    # The agent.
    age: int
    seen: Seen | None
    unchanged: int
    """From when the record was first seen as it is to when the last successful read was sent; negative right after."""
    read_age: int
    """Ticks since the last successful read was sent."""
    request: Request | None
    ask: Ask | None
    standing: int
    """Epoch that promises are asked of; 0: none."""
    promises: int
    """Bits of those that promised it."""
    takeover_open: bool


class State(NamedTuple):
    register: Seen
    members: tuple[Member, ...]
    orphans: tuple[Seen, ...]
    """Writes on exactly what is stored, whose sender has given up."""
    restarts: int
    releases: int
    clears: int


def record_of(mode: Mode, count: int, quorum: int, lease: int, seen: Seen) -> ClusterRecord:
    ids = [MemberId(f"{letter}_00000000") for letter in LETTERS[:count]]
    holder = None if seen.holder < 0 else Holder(member_id=ids[seen.holder], incarnation="life")
    stamp = None
    if seen.released_to >= 0:
        stamp = Release(releaser=ids[0], epoch=Epoch(seen.epoch), end=END, target=ids[seen.released_to])
    return ClusterRecord(
        cluster_name="model",
        cluster_uid="model",
        mode=mode,
        lease_duration_s=lease,
        epoch=Epoch(seen.epoch),
        holder=holder,
        release=stamp,
        system_identifier="1",
        chain=TimelineChain(Timeline(1)),
        highest_timeline=Timeline(1),
        voters=frozenset(each for index, each in enumerate(ids) if index != seen.holder),
        quorum=quorum,
        position=END,
    )


def grounds_of(seen: Seen) -> tuple[int, int, int]:
    return seen.holder, seen.epoch, seen.released_to


def holds(index: int, member: Member) -> bool:
    return member.seen is not None and member.seen.holder == index


def renamed_state(state: State, order: tuple[int, ...]) -> State:
    def mask(bits: int) -> int:
        return sum(1 << order[index] for index in range(len(order)) if bits >> index & 1)

    def seen(value: Seen) -> Seen:
        return value._replace(
            holder=order[value.holder] if value.holder >= 0 else -1,
            released_to=order[value.released_to] if value.released_to >= 0 else -1,
        )

    members = list(state.members)
    for old, new in enumerate(order):
        member = state.members[old]
        request, ask = member.request, member.ask
        if request is not None:
            grounds = request.on_grounds
            if grounds is not None:
                changed = seen(Seen(*grounds, current=True))
                grounds = (changed.holder, changed.epoch, changed.released_to)
            request = request._replace(
                wanted=None if request.wanted is None else seen(request.wanted),
                effect=None if request.effect is None else seen(request.effect),
                on_grounds=grounds,
            )
        members[new] = member._replace(
            seen=None if member.seen is None else seen(member.seen),
            request=request,
            ask=None if ask is None else ask._replace(granted=mask(ask.granted)),
            promises=mask(member.promises),
        )
    return state._replace(
        register=seen(state.register),
        members=tuple(members),
        orphans=tuple(sorted(seen(each) for each in state.orphans)),
    )
