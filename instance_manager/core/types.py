"""The words of the protocol: positions, timelines, epochs, members, and how two logs compare.

A *member* is a data directory, not a machine: its id is made new at every initdb, clone and rewind (rule R6, P7), and is
at the same time its application_name, its slot and its entry in the record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NewType

Lsn = NewType("Lsn", int)
"""Byte position in the write-ahead log."""

Timeline = NewType("Timeline", int)
"""Postgres timeline id, from 1."""

Epoch = NewType("Epoch", int)
"""Count of elections of the cluster (`leaseTransitions` of the Lease); 0 before the first holder."""

MemberName = NewType("MemberName", str)
"""Name of an instance (the pod's name); survives its data directory."""

MemberId = NewType("MemberId", str)
"""Name of one data directory: `<member name with _>_<8 hex>`; valid as slot name and application_name."""

MEMBER_NAME_PATTERN = re.compile(r"[a-z]([-a-z0-9]{0,51}[a-z0-9])?")
MEMBER_ID_PATTERN = re.compile(r"[a-z][_a-z0-9]{0,53}_[0-9a-f]{8}")
_LSN_PATTERN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


def parse_lsn(text: str) -> Lsn:
    """The position written as Postgres writes it (`16/B374D848`); ValueError for anything else."""
    match = _LSN_PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"not a WAL position: {text!r}")
    return Lsn((int(match[1], 16) << 32) | int(match[2], 16))


def format_lsn(lsn: int) -> str:
    """The position as Postgres writes it, `16/B374D848`."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def make_member_id(name: MemberName, random_hex: str) -> MemberId:
    """The id of a new data directory of the instance `name`; `random_hex` is 8 random hex digits."""
    member_id = f"{name.replace('-', '_')}_{random_hex}"
    if MEMBER_NAME_PATTERN.fullmatch(name) is None or MEMBER_ID_PATTERN.fullmatch(member_id) is None:
        raise ValueError(
            f"not a member name that Postgres can use for a slot: {name!r} (lower case, digits, -, 52 at most)"
        )
    return MemberId(member_id)


def member_name_of(member_id: MemberId) -> MemberName:
    """The instance that the data directory belongs to. A name with `_` cannot exist, so the way back is unique."""
    return MemberName(member_id.rsplit("_", 1)[0].replace("_", "-"))


@dataclass(frozen=True, order=True, slots=True)
class WalEnd:
    """The end of the last complete record that a log holds, and the timeline of the segment that holds it (P11).

    Ordered as logs are ranked: with claimed timelines (P4) timeline order is epoch order, so a log on a later
    timeline is ahead of any on an earlier one.
    """

    timeline: Timeline
    lsn: Lsn

    def __str__(self) -> str:
        return f"{self.timeline}:{format_lsn(self.lsn)}"


@dataclass(frozen=True, slots=True)
class TimelineSwitch:
    """One link of the recorded chain: `timeline` was forked from `parent` at `switch_lsn` by the winner of `epoch`."""

    timeline: Timeline
    parent: Timeline
    switch_lsn: Lsn
    epoch: Epoch


def without_empty_timelines(history: Iterable[tuple[Timeline, Lsn]]) -> tuple[tuple[Timeline, Lsn], ...]:
    """A history of (parent, where it was left) without the timelines that were left where they began.

    Nothing was ever written on those: a standby that has fetched the history of a new primary, and none of its log, has
    such a one between when it is elected itself.
    """
    found: list[tuple[Timeline, Lsn]] = []
    for parent, left_at in history:
        if not found or left_at > found[-1][1]:
            found.append((parent, left_at))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class TimelineChain:
    """The accepted history of the cluster, oldest switch first; the first timeline has no switch.

    Source of the rule: P4 and R2. A timeline that is not in it was never claimed.
    """

    first: Timeline
    switches: tuple[TimelineSwitch, ...] = ()

    @property
    def current(self) -> Timeline:
        return self.switches[-1].timeline if self.switches else self.first

    def knows(self, timeline: Timeline) -> bool:
        """Is it one of the accepted history, whether or not a log on it left that history since?"""
        return timeline == self.first or any(switch.timeline == timeline for switch in self.switches)

    def agreed(self, end: WalEnd) -> WalEnd:
        """How far a log that ends at `end` goes along with this history; KeyError if it never did (`knows`)."""
        if end.timeline == self.current:
            return end
        for switch in self.switches:
            if switch.parent == end.timeline:
                return min(end, WalEnd(end.timeline, switch.switch_lsn))
        raise KeyError(end.timeline)

    def contains(self, end: WalEnd) -> bool:
        """Is a log that ends at `end` a prefix of, or equal to, the cluster's accepted history so far?"""
        if end.timeline == self.current:
            return True
        for switch in self.switches:
            if switch.parent == end.timeline:
                return end.lsn <= switch.switch_lsn
        return False

    def matches(self, history: tuple[tuple[Timeline, Lsn], ...]) -> bool:
        """Does a history file's list of (parent timeline, switch position) agree with this chain as far as it goes?"""
        own = without_empty_timelines((switch.parent, switch.switch_lsn) for switch in self.switches)
        told = without_empty_timelines(history)
        return own[: len(told)] == told

    def forked(self, switch: TimelineSwitch) -> TimelineChain:
        """The chain after a takeover from a log on `switch.parent`. Claims after the parent that nobody took up fall out.

        KeyError: the parent was never accepted. ValueError: the new number does not come after every one in the chain.
        """
        if switch.timeline <= self.current:
            raise ValueError(f"timeline {switch.timeline} was claimed before: the chain is at {self.current}")
        if switch.parent == self.first:
            return TimelineChain(self.first, (switch,))
        for index, link in enumerate(self.switches):
            if link.timeline == switch.parent:
                return TimelineChain(self.first, (*self.switches[: index + 1], switch))
        raise KeyError(switch.parent)
