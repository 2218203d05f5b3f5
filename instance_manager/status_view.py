"""`ClusterStatus` on one screen: who is primary, why, is anything at risk."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from instance_manager.core.archive_state import ArchiveState, BackupsState
from instance_manager.core.types import format_lsn
from instance_manager.status import ClusterStatus, DecisionLine, InstanceStatus

WIDTH = 80
HEIGHT = 24
_BOLD, _RED, _GREEN, _YELLOW, _END = "\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\uffff]+")
_COLUMNS = ("INSTANCE", "ROLE", "POSTGRES", "TL", "POSITION", "LAG", "REPLAY", "EPOCH", "VOTER")
_RIGHT = frozenset(("TL", "LAG", "REPLAY", "EPOCH"))


def render_status(status: ClusterStatus, width: int = WIDTH, *, height: int = HEIGHT, colour: bool = False) -> str:
    """Lines of at most `width` characters, at most `height` of them unless there is that much to warn of."""
    lines = [
        *_head(status, width, colour),
        *_risks(status, width, colour),
        "",
        *_table(status, width, colour),
        *_remarks(status.instances, width),
    ]
    left = height - len(lines) - 2
    if left > 0 and status.decisions:
        lines += ["", *_decisions(status, width, left)]
    return "\n".join(lines)


def instance_table(status: ClusterStatus, width: int = WIDTH) -> str:
    """Only the instances, for a command that needs the user to compare them."""
    return "\n".join([*_table(status, width, False), *_remarks(status.instances, width)])


def format_bytes(size: int) -> str:
    """`0 B`, `512 B`, `16 kB`, `1.2 GB`, with 1024 as Postgres does."""
    value, unit = float(size), "B"
    for following in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, following
    return f"{value:.0f} {unit}" if abs(value) >= 10 else f"{value:.1f}".removesuffix(".0") + f" {unit}"


def format_seconds(seconds: float) -> str:
    """`0.5 s`, `12 s`, `3 min`, `2 h`, `4 d`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def _head(status: ClusterStatus, width: int, colour: bool) -> Iterable[str]:
    if status.primary is None:
        primary = _paint("no primary", _RED, colour)
    else:
        primary = f"primary {_paint(_plain(status.primary), _BOLD, colour)}"
        primary += ", clients are let in" if status.accepts_clients else ", clients are not let in"
    facts = [
        f"epoch {status.epoch}" if status.epoch is not None else "no epoch",
        f"timeline {status.timeline}" if status.timeline is not None else "no timeline",
    ]
    yield _cut(f"{_plain(status.cluster)}: {primary}, {', '.join(facts)}", width, colour)
    lease = "lease: never read"
    if status.lease_age_s is not None:
        lease = f"lease: changed {format_seconds(status.lease_age_s)} ago"
    if not status.lease_readable:
        lease += ", not readable now"
    if status.seconds_to_fence is not None:
        lease += f", Postgres stops in {format_seconds(max(status.seconds_to_fence, 0))} unless it is renewed"
    yield _cut(lease, width)
    synchronous = _plain(status.synchronous_standby_names or "nobody waited for")
    yield _cut(f"durability {status.durability}: {synchronous} (wanted: {status.synchronous_wanted})", width)
    yield _cut(f"voters: {', '.join(status.voters) or 'none'}; q = {_or_dash(status.quorum)}", width)
    if status.archive is not None:
        yield _cut(_archive(status.archive), width)
        if status.archive.backups is not None:
            yield _cut(_backups(status.archive.backups), width)
    if status.certificates:
        lives = (f"{_plain(each.use)} {_life(each.days_left)}" for each in status.certificates)
        yield _cut(f"certificates: {', '.join(lives)}", width)
    if status.managed:
        states = [each.state for each in status.managed]
        counts = ", ".join(f"{states.count(state)} {_plain(state)}" for state in dict.fromkeys(states))
        yield _cut(f"kept inside Postgres: {counts}", width)
    special = []
    if status.paused:
        special.append("PAUSED: no failover")
    if status.fenced:
        special.append(f"fenced: {', '.join(status.fenced)}")
    if status.switchover is not None:
        special.append(f"switchover: {_plain(status.switchover)}")
    if special:
        yield _cut("; ".join(special), width)


def _archive(archive: ArchiveState) -> str:
    if archive.level == "unknown":
        return "archive: not known"
    parts = [f"archive: {_plain(archive.level)}"]
    if archive.position is not None:
        parts.append(f"complete to {format_lsn(archive.position)}")
    if archive.lag_bytes is not None and archive.lag_s is not None:
        parts.append(f"behind {format_bytes(archive.lag_bytes)}, {format_seconds(archive.lag_s)}")
    if archive.waiting:
        parts.append(f"{archive.waiting} wait, the oldest for {format_seconds(archive.oldest_age_s)}")
    return ", ".join(parts)


def _backups(backups: BackupsState) -> str:
    if not backups.good:
        return "backups: none that can be restored"
    age = f" {format_seconds(backups.newest_age_s)} ago" if backups.newest_age_s is not None else ""
    parts = [f"backups: {backups.good} good, the newest{age}"]
    if backups.recoverable_from:
        parts.append(f"recoverable since {_plain(backups.recoverable_from)} UTC")
    if backups.first_gap:
        parts.append(f"gap at {_plain(backups.first_gap)}")
    if backups.problem:
        parts.append("not looked at anew: the store fails")
    return ", ".join(parts)


def _life(days_left: float | None) -> str:
    return "?" if days_left is None else f"{days_left:.0f} d"


def _risks(status: ClusterStatus, width: int, colour: bool) -> Iterable[str]:
    if not status.at_risk:
        yield _paint("at risk: nothing", _GREEN, colour)
        return
    yield _paint("at risk:", _RED, colour)
    for risk in status.at_risk:
        for line in textwrap.wrap(_plain(risk), width - 4) or [""]:
            yield _paint(f"  ! {line}", _YELLOW, colour)


def _table(status: ClusterStatus, width: int, colour: bool) -> Iterable[str]:
    rows = [_COLUMNS, *(_row(instance, status.primary) for instance in status.instances)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(_COLUMNS))]
    # A long name gives way first, so that the figures stay on the screen.
    too_wide = sum(widths) + 2 * (len(widths) - 1) - width
    if too_wide > 0:
        widths[0] = max(8, widths[0] - too_wide)
    for number, row in enumerate(rows):
        cells = (
            cell[:size].rjust(size) if name in _RIGHT else cell[:size].ljust(size)
            for name, cell, size in zip(_COLUMNS, row, widths, strict=True)
        )
        line = "  ".join(cells).rstrip()[:width]
        yield _paint(line, _BOLD, colour) if number == 0 else line


def _row(instance: InstanceStatus, primary: str | None) -> tuple[str, ...]:
    epoch = _or_dash(instance.followed_epoch)
    if instance.promised_epoch is not None and instance.promised_epoch > (instance.followed_epoch or 0):
        epoch += f">{instance.promised_epoch}"
    return (
        _plain(instance.name) + ("*" if instance.name == primary else ""),
        _plain(instance.role),
        _plain(instance.postgres) if instance.reachable else "no answer",
        _or_dash(instance.timeline),
        _plain(instance.lsn or "-"),
        _size_or_dash(instance.lag_bytes),
        _size_or_dash(instance.replay_lag_bytes),
        epoch,
        "yes" if instance.voter else "-",
    )


def _remarks(instances: Sequence[InstanceStatus], width: int) -> Iterable[str]:
    for instance in instances:
        for remark in (instance.problem, instance.operation):
            if remark:
                yield _cut(f"  {_plain(instance.name)}: {_plain(remark)}", width)


def _decisions(status: ClusterStatus, width: int, most_lines: int) -> list[str]:
    lines = [_cut(f"why, as decided by {_plain(status.told_by)}, latest first:", width)]
    for decision in status.decisions:
        wrapped = _decision(decision, width)
        if len(lines) + len(wrapped) > most_lines + 1:
            break
        lines += wrapped
    return lines if len(lines) > 1 else []


def _decision(line: DecisionLine, width: int) -> list[str]:
    times = f" ({line.count} times)" if line.count > 1 else ""
    text = f"{_plain(line.decision)}{times}: {_plain(line.reason)}"
    return textwrap.wrap(
        text, width, initial_indent=f"{format_seconds(line.age_s):>8}  ", subsequent_indent=" " * 10, max_lines=2
    )


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _size_or_dash(value: int | None) -> str:
    return "-" if value is None else format_bytes(value)


def _plain(text: str) -> str:
    """What a peer tells may not steer the terminal."""
    return _UNPRINTABLE.sub(" ", text)


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_END}" if colour else text


def _cut(line: str, width: int, colour: bool = False) -> str:
    visible = len(re.sub(r"\x1b\[[0-9]*m", "", line)) if colour else len(line)
    if visible <= width:
        return line
    end = len(line) - (visible - width) - 3
    return f"{line[:end]}..."
