"""Where a recovery is to end, and from which backup it begins."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from instance_manager.archive.backup.catalogue import Listed, is_part_of
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.core.types import Lsn, Timeline, TimelineChain, format_lsn, parse_lsn

Kind = Literal["latest", "time", "lsn", "xid", "name", "immediate"]
_PAGE_BYTES = 8192
_LONG_HEADER_BYTES = 40
_SHORT_HEADER_BYTES = 24
_ZONE = re.compile(r"(Z|[+-]\d{2}(:?\d{2})?)$")


class TargetInvalid(Exception):
    """Not a target; says what one looks like."""


class NoBackupForTarget(Exception):
    """No backup leads to the target; says what there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One end of a recovery."""

    kind: Kind = "latest"
    value: str = ""
    """As Postgres is told it; for `time` always with its zone."""
    timeline: Timeline | None = None
    """None: the newest of the archive."""
    inclusive: bool = True

    def __str__(self) -> str:
        on = "" if self.timeline is None else f" on timeline {self.timeline}"
        before = "" if self.inclusive or self.kind in ("latest", "immediate") else " (just before it)"
        return f"{self.kind} {self.value}".strip() + before + on

    @property
    def time(self) -> datetime.datetime | None:
        return datetime.datetime.fromisoformat(self.value) if self.kind == "time" else None

    @property
    def lsn(self) -> Lsn | None:
        return parse_lsn(self.value) if self.kind == "lsn" else None

    def settings(self, current: Timeline) -> dict[str, str]:
        """Of Postgres, for the history that ends with the timeline `current`. It pauses at the target; nothing opens before that
        was looked at."""
        found = {"recovery_target_timeline": str(current), "recovery_target_action": "pause"}
        if self.kind == "immediate":
            found["recovery_target"] = "immediate"
        elif self.kind != "latest":
            found[f"recovery_target_{self.kind}"] = self.value
            found["recovery_target_inclusive"] = "on" if self.inclusive else "off"
        return found


def make_target(
    *,
    time: str | None = None,
    lsn: str | None = None,
    xid: str | None = None,
    name: str | None = None,
    immediate: bool = False,
    timeline: str | None = None,
    inclusive: bool = True,
) -> Target:
    """From what a user gives: at most one of the first five. TargetInvalid."""
    options: tuple[tuple[Kind, str | None], ...] = (("time", time), ("lsn", lsn), ("xid", xid), ("name", name))
    given = [(kind, value) for kind, value in options if value is not None]
    if len(given) + immediate > 1:
        raise TargetInvalid("give one target: a time, an LSN, a transaction id, a name, or immediate")
    no_value: tuple[Kind, str] = ("immediate" if immediate else "latest", "")
    kind, value = given[0] if given else no_value
    wanted = _timeline(timeline)
    if kind == "time":
        value = _time(value)
    elif kind == "lsn":
        try:
            value = format_lsn(parse_lsn(value))
        except ValueError as error:
            raise TargetInvalid(f"{error}: an LSN is like 16/B374D848") from error
    elif kind == "xid" and (not value.isascii() or not value.isdigit()):
        raise TargetInvalid(f"not a transaction id: {value!r}")
    elif kind == "name" and (not value or len(value.encode()) > 63 or not value.isprintable()):
        raise TargetInvalid(f"not the name of a restore point: {value!r}")
    return Target(kind=kind, value=value, timeline=wanted, inclusive=inclusive)


def _timeline(text: str | None) -> Timeline | None:
    if text in (None, "latest"):
        return None
    try:
        timeline = int(str(text), 0)
    except ValueError:
        timeline = 0
    if timeline < 1:
        raise TargetInvalid(f"not a timeline: {text!r}: a number from 1, or `latest`")
    return Timeline(timeline)


def _time(text: str) -> str:
    """A time that two machines read alike: one without a zone would be this machine's, or Postgres's."""
    if _ZONE.search(text) is None or "T" not in text.replace(" ", "T", 1):
        raise TargetInvalid(f"not a time with its zone: {text!r}; give it like '2025-11-28 21:05:00+00'")
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise TargetInvalid(f"not a time: {text!r}; give it like '2025-11-28 21:05:00+00'") from error
    return time.astimezone(datetime.UTC).isoformat(sep=" ", timespec="microseconds")


def choose_backup(listed: Sequence[Listed], target: Target, chain: TimelineChain) -> Listed:
    """The newest from which the target lies ahead. NoBackupForTarget."""
    usable = [each for each in listed if each.is_restorable and each.info is not None and is_part_of(each.info, chain)]
    fitting = [each for each in usable if each.info is not None and is_before(each.info, target)]
    if fitting:
        # One with damaged pages only where there is no other.
        sound = [each for each in fitting if each.state == "done"]
        return max(sound or fitting, key=lambda each: (each.info.end_lsn, each.backup_id) if each.info else (0, ""))
    raise NoBackupForTarget(_nothing_fits(listed, usable, target, chain))


def is_before(info: BackupInfo, target: Target) -> bool:
    """Is the backup consistent before the target? Of an xid or a name nobody knows where it is: the newest is tried."""
    time, lsn = target.time, target.lsn
    if time is not None:
        return info.end_time is not None and info.end_time <= time
    if lsn is not None:
        return info.end_lsn is not None and info.end_lsn <= with_header(lsn, info.segment_bytes)
    return True


def with_header(lsn: Lsn, segment_bytes: int) -> Lsn:
    """The position at which the record behind `lsn` begins: at the start of a page its header comes first.

    So a position at a boundary, which names no record, is the same as the one behind the header.
    """
    if lsn % segment_bytes == 0:
        return Lsn(lsn + _LONG_HEADER_BYTES)
    return Lsn(lsn + _SHORT_HEADER_BYTES) if lsn % _PAGE_BYTES == 0 else lsn


def _nothing_fits(listed: Iterable[Listed], usable: Sequence[Listed], target: Target, chain: TimelineChain) -> str:
    if usable:
        first = usable[0].info
        begin = "" if first is None else f": the oldest is complete at {first.end_time:%Y-%m-%d %H:%M:%S%z}, "
        at = "" if first is None or first.end_lsn is None else f"{format_lsn(first.end_lsn)}"
        return f"no backup is from before {target}{begin}{at}. Nothing earlier can be recovered"
    others = [each.backup_id for each in listed]
    if not others:
        return "there is no backup in the archive: mend the server's name, or take one with `instance-manager backup`"
    return f"none of the backups ({', '.join(others)}) can be restored and is part of the history of timeline {chain.current}"
