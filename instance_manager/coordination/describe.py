"""The record for people, in the manner of `kubectl describe lease`."""

from __future__ import annotations

from collections.abc import Iterable

from instance_manager.core.record import ClusterRecord, StoredRecord
from instance_manager.core.types import format_lsn


def describe(stored: StoredRecord) -> str:
    """Several lines, without an end of line after the last."""
    record = stored.record
    lines = [
        *_pairs(
            0,
            ("Name", record.cluster_name),
            ("Cluster UID", record.cluster_uid),
            ("Version", stored.version),
        ),
        "Spec:",
        *_pairs(
            2,
            ("Holder Identity", _holder(record)),
            ("Lease Duration Seconds", f"{record.lease_duration_s:g}"),
            ("Lease Transitions", f"{record.epoch}  (the epoch)"),
            ("Acquire Time", record.acquired_at or "<unset>"),
            ("Renew Time", f"{record.renewed_at or '<unset>'}  (renewal {record.renewals})"),
        ),
        "Memory:",
        *_pairs(
            2,
            ("Mode", record.mode),
            ("System Identifier", record.system_identifier or "<none>"),
            ("Timelines", _timelines(record)),
            ("Highest Timeline Claimed", str(record.highest_timeline)),
            ("Position", str(record.position) if record.position is not None else "<none>"),
            ("Voters", _listed(record.voters)),
            ("Quorum", _quorum(record)),
            ("Opened", "yes" if record.opened else "no"),
            ("Release", _release(record)),
            ("Switchover", _switchover(record)),
            ("Fenced", _listed(record.fenced)),
            ("Paused", "yes: no failover" if record.paused else "no"),
            ("Excluded", _listed(record.excluded)),
            ("Retired", _listed(record.retired)),
            ("Configuration Counter", str(record.configuration_counter)),
            ("Last Write", record.write_id or "<none>"),
        ),
    ]
    problems = record.problems()
    if problems:
        lines += ["Problems:", *(f"  {problem}" for problem in problems)]
    return "\n".join(lines)


def _pairs(indent: int, *pairs: tuple[str, str]) -> Iterable[str]:
    width = max(len(name) for name, _ in pairs) + 1
    return (f"{'':{indent}}{name + ':':{width}}  {value}" for name, value in pairs)


def _holder(record: ClusterRecord) -> str:
    if record.holder is None:
        return "<none>"
    return f"{record.holder.member_id}, incarnation {record.holder.incarnation}"


def _timelines(record: ClusterRecord) -> str:
    if record.chain is None:
        return "<none>"
    switches = (
        f" -> {switch.timeline} at {format_lsn(switch.switch_lsn)} (epoch {switch.epoch})"
        for switch in record.chain.switches
    )
    return f"{record.chain.first}{''.join(switches)}"


def _quorum(record: ClusterRecord) -> str:
    if record.promises_needed is None:
        return "0  (nobody can be elected)"
    return f"{record.quorum}  ({record.promises_needed} of {len(record.voters)} promises elect)"


def _release(record: ClusterRecord) -> str:
    if record.release is None:
        return "<none>"
    release = record.release
    return (
        f"by {release.releaser} in epoch {release.epoch} at {release.end}, for {release.target or 'any that holds it'}"
    )


def _switchover(record: ClusterRecord) -> str:
    if record.switchover is None:
        return "<none>"
    return f"to {record.switchover.target or 'any standby'}, asked in epoch {record.switchover.epoch}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "<none>"
