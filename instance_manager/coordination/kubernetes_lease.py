"""The cluster's record as a Lease object, and back: pure, strict, and readable with `kubectl describe lease`.

The spec holds what every Lease holds: the holder (the pod's name first), how long, since when, and the epoch as
`leaseTransitions`. Each other fact is an annotation of its own under `instance-manager.dev/`. All of them are always
there, so that one that is missing, misspelt or contradicts the spec is noticed (R3) and never taken for a default. Times
are for people and compared by nobody. What others wrote into the object (labels, annotations, owners) is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from instance_manager.core.record import ClusterRecord, Holder, Mode, Release, SwitchoverRequest
from instance_manager.core.types import (
    MEMBER_ID_PATTERN,
    MEMBER_NAME_PATTERN,
    Epoch,
    Lsn,
    MemberId,
    MemberName,
    Timeline,
    TimelineChain,
    TimelineSwitch,
    WalEnd,
    format_lsn,
    make_member_id,
    member_name_of,
    parse_lsn,
)
from instance_manager.kubernetes_names import CLUSTER_LABEL, PREFIX

Plain = dict[str, Any]

HOLDER_POD_UID = f"{PREFIX}holder-pod-uid"
"""Of the pod in which the holder lives, for the proof of its death (R9); beside the record, written by the holder."""
SUMMARY = f"{PREFIX}summary"
"""A sentence for people, derived from the facts and never read."""
NONE = "none"
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_INCARNATION = re.compile(r"[0-9A-Za-z-]{4,64}")
_SWITCH = re.compile(r"(\d+) from (\d+) at ([0-9A-F/]+) in epoch (\d+)")
_RELEASE = re.compile(r"by (\S+) in epoch (\d+) at (\S+) for (\S+)")
_SWITCHOVER = re.compile(r"to (\S+), asked in epoch (\d+), request ([0-9a-zA-Z-]+)")
HEARTBEAT = frozenset({f"{PREFIX}{name}" for name in ("renewals", "position", "write-id", "summary")})
"""What every renewal changes, and nobody needs to hurry for."""


# Each fact: how it is written, and how it is read. ValueError: it says nothing that we wrote.


def _write_flag(value: bool) -> str:
    return "yes" if value else "no"


def _read_flag(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _read_number(text: str) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no number")
    return int(text)


def _write_seconds(value: float) -> str:
    return f"{value:g} s" if float(f"{value:g}") == value else f"{value!r} s"


def _read_seconds(text: str) -> float:
    seconds = float(text.removesuffix(" s"))
    if not text.endswith(" s") or not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"{text!r} is no time in seconds")
    return seconds


def _write_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or NONE


def _read_member_ids(text: str) -> frozenset[MemberId]:
    return frozenset(_read_member_id(each) for each in _listed(text))


def _read_member_names(text: str) -> frozenset[MemberName]:
    return frozenset(_read_member_name(each) for each in _listed(text))


def _listed(text: str) -> list[str]:
    names = [] if text == NONE else text.split(", ")
    if len(set(names)) != len(names):
        raise ValueError(f"{text!r} names one twice")
    return names


def _read_member_id(text: str) -> MemberId:
    if MEMBER_ID_PATTERN.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no data directory's id")
    return MemberId(text)


def _read_member_name(text: str) -> MemberName:
    if MEMBER_NAME_PATTERN.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no instance's name")
    return MemberName(text)


def _read_mode(text: str) -> Mode:
    if text == "synchronous":
        return "synchronous"
    if text == "asynchronous":
        return "asynchronous"
    raise ValueError(f"{text!r} is neither synchronous nor asynchronous")


def _write_chain(chain: TimelineChain | None) -> str:
    """`1, 2 from 1 at 0/5000060 in epoch 2`."""
    if chain is None:
        return NONE
    switches = (
        f"{each.timeline} from {each.parent} at {format_lsn(each.switch_lsn)} in epoch {each.epoch}"
        for each in chain.switches
    )
    return ", ".join([str(chain.first), *switches])


def _read_chain(text: str) -> TimelineChain | None:
    if text == NONE:
        return None
    first, *rest = text.split(", ")
    return TimelineChain(Timeline(_read_number(first)), tuple(_read_switch(each) for each in rest))


def _read_switch(text: str) -> TimelineSwitch:
    match = _SWITCH.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} tells no change of timeline")
    return TimelineSwitch(
        Timeline(_read_number(match[1])),
        Timeline(_read_number(match[2])),
        parse_lsn(match[3]),
        Epoch(_read_number(match[4])),
    )


def _write_end(end: WalEnd | None) -> str:
    return NONE if end is None else str(end)


def _read_end(text: str) -> WalEnd | None:
    return None if text == NONE else _read_position(text)


def _read_position(text: str) -> WalEnd:
    timeline, colon, lsn = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} is no position on a timeline")
    return WalEnd(Timeline(_read_number(timeline)), Lsn(parse_lsn(lsn)))


def _write_release(release: Release | None) -> str:
    if release is None:
        return NONE
    return f"by {release.releaser} in epoch {release.epoch} at {release.end} for {release.target or 'any'}"


def _read_release(text: str) -> Release | None:
    if text == NONE:
        return None
    match = _RELEASE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no release")
    return Release(
        releaser=_read_member_id(match[1]),
        epoch=Epoch(_read_number(match[2])),
        end=_read_position(match[3]),
        target=None if match[4] == "any" else _read_member_id(match[4]),
    )


def _write_switchover(request: SwitchoverRequest | None) -> str:
    if request is None:
        return NONE
    return f"to {request.target or 'any'}, asked in epoch {request.epoch}, request {request.request_id}"


def _read_switchover(text: str) -> SwitchoverRequest | None:
    if text == NONE:
        return None
    match = _SWITCHOVER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no request")
    return SwitchoverRequest(
        request_id=match[3],
        epoch=Epoch(_read_number(match[2])),
        target=None if match[1] == "any" else _read_member_name(match[1]),
    )


def _write_text(value: str | None) -> str:
    return value or NONE


def _read_text(text: str) -> str:
    return "" if text == NONE else text


def _read_optional_text(text: str) -> str | None:
    return None if text == NONE else text


@dataclass(frozen=True, slots=True)
class _Fact:
    field: str
    """Of the record."""
    write: Callable[[Any], str]
    read: Callable[[str], Any]


FACTS: dict[str, _Fact] = {
    "cluster": _Fact("cluster_name", _write_text, _read_text),
    "cluster-uid": _Fact("cluster_uid", _write_text, _read_text),
    "mode": _Fact("mode", str, _read_mode),
    "lease-duration": _Fact("lease_duration_s", _write_seconds, _read_seconds),
    "epoch": _Fact("epoch", str, lambda text: Epoch(_read_number(text))),
    "system-identifier": _Fact("system_identifier", _write_text, _read_optional_text),
    "voters": _Fact("voters", _write_names, _read_member_ids),
    "quorum": _Fact("quorum", str, _read_number),
    "timelines": _Fact("chain", _write_chain, _read_chain),
    "highest-timeline-claimed": _Fact("highest_timeline", str, lambda text: Timeline(_read_number(text))),
    "opened": _Fact("opened", _write_flag, _read_flag),
    "position": _Fact("position", _write_end, _read_end),
    "release": _Fact("release", _write_release, _read_release),
    "switchover": _Fact("switchover", _write_switchover, _read_switchover),
    "fenced": _Fact("fenced", _write_names, _read_member_names),
    "paused": _Fact("paused", _write_flag, _read_flag),
    "excluded": _Fact("excluded", _write_names, _read_member_ids),
    "retired": _Fact("retired", _write_names, _read_member_ids),
    "configuration-counter": _Fact("configuration_counter", str, _read_number),
    "write-id": _Fact("write_id", _write_text, _read_text),
    "renewals": _Fact("renewals", str, _read_number),
}
"""By the name of the annotation behind `instance-manager.dev/`. With holder and times in the spec that is all."""


# The whole object.


def to_lease(
    record: ClusterRecord, *, name: str, namespace: str, holder_pod_uid: str | None, before: Plain | None = None
) -> Plain:
    """The object to write. `before`: as it was read; everything of others in it is kept, and its resourceVersion conditions."""
    metadata = dict((before or {}).get("metadata") or {})
    metadata.pop("managedFields", None)
    others = {k: v for k, v in (metadata.get("annotations") or {}).items() if not k.startswith(PREFIX)}
    facts = {f"{PREFIX}{key}": fact.write(getattr(record, fact.field)) for key, fact in FACTS.items()}
    own = {**facts, HOLDER_POD_UID: holder_pod_uid or NONE, SUMMARY: summary(record)}
    metadata |= {
        "name": name,
        "namespace": namespace,
        "labels": {**(metadata.get("labels") or {}), CLUSTER_LABEL: record.cluster_name},
        "annotations": {**others, **own},
    }
    spec = dict((before or {}).get("spec") or {})
    spec |= {
        "holderIdentity": identity_of(record.holder) if record.holder is not None else None,
        "leaseDurationSeconds": _whole_seconds(record.lease_duration_s),
        "leaseTransitions": record.epoch,
        "acquireTime": _micro_time(record.acquired_at),
        "renewTime": _micro_time(record.renewed_at),
    }
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {key: value for key, value in spec.items() if value is not None},
    }


def from_lease(lease: Plain) -> ClusterRecord:
    """The record that the object holds; ValueError tells what in it nobody of us wrote."""
    spec = lease.get("spec") or {}
    annotations = (lease.get("metadata") or {}).get("annotations") or {}
    own = {key.removeprefix(PREFIX): value for key, value in annotations.items() if key.startswith(PREFIX)}
    expected = {*FACTS, *(key.removeprefix(PREFIX) for key in (HOLDER_POD_UID, SUMMARY))}
    if missing := sorted(set(FACTS) - set(own)):
        raise ValueError(f"the annotation {PREFIX}{missing[0]} is missing")
    if unknown := sorted(set(own) - expected):
        raise ValueError(f"the annotation {PREFIX}{unknown[0]} is none of ours")
    values: dict[str, Any] = {}
    for key, fact in FACTS.items():
        try:
            values[fact.field] = fact.read(own[key])
        except (ValueError, TypeError) as error:
            raise ValueError(f"the annotation {PREFIX}{key}: {error}") from error
    record = ClusterRecord(
        **values,
        holder=holder_of(spec.get("holderIdentity")),
        acquired_at=spec.get("acquireTime") or "",
        renewed_at=spec.get("renewTime") or "",
    )
    for key, told in (
        ("leaseTransitions", record.epoch),
        ("leaseDurationSeconds", _whole_seconds(record.lease_duration_s)),
    ):
        if spec.get(key) != told:
            raise ValueError(f"spec.{key} is {spec.get(key)}, and the annotations say {told}")
    return record


def identity_of(holder: Holder) -> str:
    """`orders-1_1a2b3c4d_8f1e2d3c4b5a6978`: the pod, its data directory, and the life of its supervisor."""
    if _INCARNATION.fullmatch(holder.incarnation) is None:
        raise ValueError(f"{holder.incarnation!r} is no supervisor's incarnation")
    return f"{holder.name}_{holder.member_id.rsplit('_', 1)[1]}_{holder.incarnation}"


def holder_of(identity: object) -> Holder | None:
    """ValueError: it is nobody of ours."""
    if identity is None or identity == "":
        return None
    name, directory, incarnation = (*str(identity).split("_"), "", "")[:3]
    if _INCARNATION.fullmatch(incarnation) is None or str(identity).count("_") != 2:
        raise ValueError(f"spec.holderIdentity {identity!r} is none of ours")
    return Holder(member_id=make_member_id(MemberName(name), directory), incarnation=incarnation)


def summary(record: ClusterRecord) -> str:
    """What people ask first."""
    if record.holder is None:
        who = "nobody is primary"
        if record.release is not None:
            who += f": {record.release.releaser} has handed over to {record.release.target or 'any that holds its log'}"
    else:
        who = f"{record.holder.name} is primary in epoch {record.epoch}"
        if not record.opened:
            who = f"{record.holder.name} becomes primary in epoch {record.epoch}"
    names = ", ".join(sorted(member_name_of(voter) for voter in record.voters))
    if record.paused:
        failover = "no failover: paused"
    elif record.mode == "asynchronous":
        failover = f"asynchronous: {names or 'nobody'} may take over"
    elif record.promises_needed is None:
        failover = "no standby may take over, and none is waited for"
    else:
        failover = f"a failover needs {record.promises_needed} of {names}"
    return f"{who}; {failover}"


def without_heartbeat(lease: Plain) -> tuple[object, ...]:
    """What in a Lease is more than a renewal: when it changes, it is read at once."""
    spec = lease.get("spec") or {}
    annotations = (lease.get("metadata") or {}).get("annotations") or {}
    facts = sorted((key, value) for key, value in annotations.items() if key not in HEARTBEAT)
    return spec.get("holderIdentity"), spec.get("leaseTransitions"), tuple(facts)


def _whole_seconds(seconds: float) -> int:
    return max(1, math.ceil(seconds))


def _micro_time(timestamp: str) -> str | None:
    """Of a time as `wall_clock.timestamp` writes it; nothing else can be stored."""
    return timestamp if _MICRO_TIME.fullmatch(timestamp) is not None else None
