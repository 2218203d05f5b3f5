"""What may be deleted: a pure function of what is in the archive.

The deciding machine's clock has no part in it: the window is counted back from the newest good backup, so where backups are no
longer taken nothing expires. The times are those of the servers that were backed up: one that runs behind is noticed and stops
everything, and when one leaps ahead nothing grows old by that.

- Good is what can be restored, has no damaged page, and is part of the accepted history. Only such a backup lets an older one go:
  what lies behind a fork leads nowhere, however far it went.
- `window_s`: kept are all good backups that ended within it, and the newest from before it: from that one its begin is reached.
- `count`: the newest so many good ones are kept. With both, what either keeps. Incremental backups count as one with the full one that they
  stand on.
- A backup goes only with, and never before, all that stands on it.
- A keep holds for ever: `full` with all of the log from its begin on, `standalone` with the log that makes it consistent.
- WAL goes only below the begin of the oldest backup that stays, and never while none does. Positions never fall in the history
  of a system, so what a backup needs begins at its own begin, on whatever timeline.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from instance_manager.archive.backup.catalogue import Listed, chain_of, is_part_of
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.core.types import TimelineChain

STANDALONE = "standalone"


class RetentionRefused(Exception):
    """What is in the archive contradicts itself: nothing is deleted before somebody has looked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """None: that rule keeps nothing. With neither nothing ever expires."""

    window_s: float | None = None
    count: int | None = None

    @property
    def keeps_all(self) -> bool:
        return self.window_s is None and self.count is None


@dataclass(frozen=True, slots=True)
class WalNeeded:
    """Segments that must stay, by number, whatever their timeline."""

    from_number: int
    ranges: tuple[tuple[int, int], ...]
    """Of standalone backups below that: first and last."""

    def holds(self, number: int) -> bool:
        return number >= self.from_number or any(first <= number <= last for first, last in self.ranges)


@dataclass(frozen=True, slots=True)
class Expiry:
    """What goes, oldest first but never before what stands on it, and what of the log stays then."""

    backups: tuple[Listed, ...]
    wal: WalNeeded | None
    """None: all of it stays."""


def expiry(listed: Sequence[Listed], policy: Policy, chain: TimelineChain | None = None) -> Expiry:
    """`chain`: the accepted history; None: all are part of it. RetentionRefused: times and positions are in a different order."""
    good = [
        (each, each.info)
        for each in listed
        if each.state == "done" and each.info is not None and (chain is None or is_part_of(each.info, chain))
    ]
    good.sort(key=lambda pair: (pair[1].begin_lsn, pair[0].backup_id))
    _require_order([info for _, info in good])
    staying = {each.backup_id for each, _ in good} if policy.keeps_all else _wanted(good, policy, listed)
    # A kept one stays for itself: it holds no other.
    oldest = next((info for each, info in good if each.backup_id in staying and each.keep is None), None)
    going = []
    for each in listed:
        is_whole = each.is_restorable or each.state == "orphaned"
        if each.backup_id in staying or each.keep is not None or not is_whole or each.info is None:
            continue
        # A damaged one, or one of a broken chain, expires with what is older than everything that stays, as a good one would.
        if oldest is not None and each.info.begin_lsn < oldest.begin_lsn:
            going.append(each)
    going = _in_safe_order(_without_held(going, listed))
    return Expiry(tuple(going), wal_needed([each for each in listed if each not in going]))


def stands_on(listed: Sequence[Listed], backup_id: str) -> list[str]:
    """What is lost with a backup: all that stands on it, directly or not, oldest first."""
    found = {backup_id}
    while more := {each.backup_id for each in listed if each.parent_id in found} - found:
        found |= more
    return sorted(found - {backup_id})


def _without_held(going: list[Listed], listed: Sequence[Listed]) -> list[Listed]:
    """Those on which something stands that does not go: a kept one, one that is being taken, or one of a later time."""
    parents = {each.backup_id: each.parent_id for each in listed}
    leaving = {each.backup_id for each in going}
    for each in listed:
        if each.backup_id not in leaving and each.state != "deleting":
            above = each.parent_id
            while above in leaving:
                leaving.discard(above)
                above = parents.get(above)
    return [each for each in going if each.backup_id in leaving]


def _in_safe_order(going: list[Listed]) -> list[Listed]:
    """A crash between two deletions leaves nothing that stands on what is gone."""
    by_id = {each.backup_id: each for each in going}

    def key(each: Listed) -> tuple[str, int]:
        depth, root = 0, each
        while (above := by_id.get(root.parent_id or "")) is not None and depth < len(going):
            depth, root = depth + 1, above
        return root.backup_id, -depth

    order = {each.backup_id: place for place, each in enumerate(going)}
    return sorted(going, key=lambda each: (order[key(each)[0]], key(each)[1], each.backup_id))


def wal_needed(staying: Sequence[Listed]) -> WalNeeded | None:
    """By every backup that there is then, the unfinished ones included. None: nothing is known that would end the need."""
    begins, ranges = [], []
    for each in staying:
        if each.info is None:
            # From where on such a one needs the log nobody knows: it may be one that is being taken right now.
            if each.state in ("unreadable", "incomplete"):
                return None
            # Of one that is kept the deletion takes its mark back.
            if each.state == "deleting" and each.keep is not None:
                return None
            continue
        if each.keep == STANDALONE and each.is_restorable:
            ranges.append((each.info.begin_segment.number, each.info.end_segment.number))
        elif each.is_restorable or each.state == "started":
            begins.append(each.info.begin_segment.number)
    good = any(each.state == "done" and each.keep != STANDALONE for each in staying)
    return WalNeeded(min(begins), tuple(sorted(ranges))) if begins and good else None


def _wanted(good: list[tuple[Listed, BackupInfo]], policy: Policy, listed: Sequence[Listed]) -> set[str]:
    """By the policy, with all that those stand on; and the kept ones."""
    # A kept one is there anyway, and does not stand in for one of the policy.
    counted = [(each, info) for each, info in good if each.keep is None]
    chains = {each.backup_id: [one.backup_id for one in chain_of(listed, each)] for each, _ in counted}
    wanted: set[str] = set()
    if policy.count is not None:
        newest = list(dict.fromkeys(chains[each.backup_id][0] for each, _ in reversed(counted)))[: policy.count]
        wanted |= {backup_id for backup_id, chain in chains.items() if chain[0] in newest}
    if policy.window_s is not None and counted:
        for (each, _), age_s in zip(reversed(counted), _ages_s([info for _, info in counted]), strict=True):
            wanted.add(each.backup_id)
            if age_s >= policy.window_s:
                break
    stood_on = {below for backup_id in wanted for below in chains[backup_id]}
    return wanted | stood_on | {each.backup_id for each, _ in good if each.keep is not None}


def _ages_s(infos: list[BackupInfo]) -> Iterator[float]:
    """How much older than the newest each is, from that one back.

    The longest time between two counts as the second longest: when a clock leaps ahead, nothing older grows old by that.
    """
    between_s = [
        max(0.0, (after.end_time - before.end_time).total_seconds())
        for before, after in itertools.pairwise(infos)
        if before.end_time is not None and after.end_time is not None
    ]
    longest_s = sorted(between_s)[-2] if len(between_s) > 1 else math.inf
    return itertools.accumulate((min(each_s, longest_s) for each_s in reversed(between_s)), initial=0.0)


def _require_order(infos: list[BackupInfo]) -> None:
    for before, after in itertools.pairwise(infos):
        if before.end_time is not None and after.end_time is not None and after.end_time < before.begin_time:
            raise RetentionRefused(
                f"backup {after.backup_id} is behind {before.backup_id} in the log, but it ended at {after.end_time}, before that one "
                f"began, at {before.begin_time}: a clock was wrong, or two systems are mixed. Nothing expires while both are there: "
                "look at `instance-manager backups`, and `instance-manager backup delete ID` the one whose time is wrong"
            )
