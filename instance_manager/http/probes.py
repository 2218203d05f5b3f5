"""What each probe route answers, as a pure function of one snapshot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from instance_manager.status import Probes

SNAPSHOT_AGE_MAX_S = 8.0
"""An older snapshot lets nobody in: by then (`hard_s` of the defaults) a primary's permit has run out as well."""

_SIZE_PATTERN = re.compile(r"([0-9]{1,15})(B|kB|KB|KiB|MB|MiB|GB|GiB|TB|TiB)?")
_UNIT_BYTES = {
    "": 1,
    "B": 1,
    "kB": 1024,
    "KB": 1024,
    "KiB": 1024,
    "MB": 1024**2,
    "MiB": 1024**2,
    "GB": 1024**3,
    "GiB": 1024**3,
    "TB": 1024**4,
    "TiB": 1024**4,
}
"""As Postgres reads its own settings: MB is 1024 * 1024."""


class MalformedQuery(Exception):
    """A parameter cannot be read; the text says what can."""


class MalformedSize(MalformedQuery):
    """A query's size cannot be read; the text says what can."""


class ProbeBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a probe tells besides its code."""

    ok: bool
    role: str
    timeline: int | None
    reasons: tuple[str, ...] = ()
    """Why not."""


class LagBody(ProbeBody, frozen=True, kw_only=True, omit_defaults=True):
    lag_bytes: int | None
    """Behind the last position that the primary told."""
    replay_lag_bytes: int | None
    """Received and not replayed yet."""


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """200 or 503, and a small JSON body that says why."""

    ok: bool
    body: ProbeBody


def parse_size_bytes(text: str) -> int:
    """`16MB`, `1GiB`, `1048576`; MalformedSize for anything else."""
    match = _SIZE_PATTERN.fullmatch(text.strip())
    if match is None:
        raise MalformedSize(f"not a size: {text[:50]!r}; write bytes or a whole number with kB, MB, GB or TB, as 16MB")
    return int(match[1]) * _UNIT_BYTES[match[2] or ""]


def livez(probes: Probes, query: Mapping[str, str], age_s: float) -> ProbeAnswer:
    """The agent's own progress and nothing else: a liveness that depends on Postgres or a network kills the healthy."""
    return _answer(probes, [] if probes.alive else ["the agent's loops do not tick"])


def readyz(probes: Probes, query: Mapping[str, str], age_s: float) -> ProbeAnswer:
    """Primary: lets clients in. Standby: streams or replays, and answers."""
    return _answer(probes, [*_stale(age_s), *([] if probes.ready else _why(probes, "not ready"))])


def startupz(probes: Probes, query: Mapping[str, str], age_s: float) -> ProbeAnswer:
    """Postgres answers, or its recovery advances."""
    return _answer(probes, [] if probes.started else _why(probes, "Postgres has not started"))


def why_no_primary(probes: Probes, age_s: float) -> list[str]:
    """Empty: it takes writes."""
    refusals = _stale(age_s)
    if probes.role != "primary":
        refusals.append(f"the role is {probes.role}")
    elif not probes.accepts_writes:
        refusals += _why(probes, "takes no writes")
    return refusals


def why_no_replica(probes: Probes, query: Mapping[str, str], age_s: float) -> list[str]:
    """Empty: a standby for reads, with `lag` no further behind than that."""
    maximum = parse_size_bytes(query["lag"]) if "lag" in query else None
    refusals = _stale(age_s)
    if probes.role != "standby":
        refusals.append(f"the role is {probes.role}")
    elif not (probes.ready and probes.accepts_reads):
        refusals += _why(probes, "takes no reads")
    return [*refusals, *too_far(probes, maximum)]


def why_not_readable(probes: Probes, query: Mapping[str, str], age_s: float) -> list[str]:
    """Empty: takes reads, whatever its role; `lag` as for a replica."""
    maximum = parse_size_bytes(query["lag"]) if "lag" in query else None
    refusals = _stale(age_s)
    if not probes.accepts_reads:
        refusals += _why(probes, "takes no reads")
    return [*refusals, *too_far(probes, maximum)]


def lag(probes: Probes, query: Mapping[str, str], age_s: float) -> ProbeAnswer:
    """How far behind, for people; 503 only beyond `max`."""
    maximum = parse_size_bytes(query["max"]) if "max" in query else None
    refusals = [*(_stale(age_s) if maximum is not None else ()), *too_far(probes, maximum)]
    body = LagBody(
        ok=not refusals,
        role=probes.role,
        timeline=probes.timeline,
        reasons=tuple(refusals),
        lag_bytes=probes.lag_bytes,
        replay_lag_bytes=probes.replay_lag_bytes,
    )
    return ProbeAnswer(body.ok, body)


ROUTES: Mapping[str, Callable[[Probes, Mapping[str, str], float], ProbeAnswer]] = {
    "/livez": livez,
    "/readyz": readyz,
    "/startupz": startupz,
    "/lag": lag,
}


def _answer(probes: Probes, refusals: list[str]) -> ProbeAnswer:
    ok = not refusals
    return ProbeAnswer(ok, ProbeBody(ok=ok, role=probes.role, timeline=probes.timeline, reasons=tuple(refusals)))


def _why(probes: Probes, otherwise: str) -> list[str]:
    return list(probes.reasons) or [otherwise]


def _stale(age_s: float) -> list[str]:
    if age_s <= SNAPSHOT_AGE_MAX_S:
        return []
    return [f"the last look at this instance is {age_s:.0f} s old"]


def too_far(probes: Probes, maximum_bytes: int | None) -> list[str]:
    """Empty: no further than that. What a reader sees is what was replayed."""
    if maximum_bytes is None or probes.role == "primary":
        return []
    behind = probes.replay_lag_bytes if probes.replay_lag_bytes is not None else probes.lag_bytes
    if behind is None:
        return ["the lag is not known"]
    return [f"{behind} bytes behind, {maximum_bytes} allowed"] if behind > maximum_bytes else []
