"""What the duties of one agent count while they work, since that agent's start. Memory only: nothing here waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import get_args

from instance_manager.core.decide import Act
from instance_manager.metrics.exposition import Block, Counter, Histogram

RENEWAL_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5)
LAG_BOUNDS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
PHASE_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)
FENCE_REASONS = ("soft_deadline", "hard_deadline", "unhealthy", "lease_lost")
TAKEOVER_KINDS = ("election", "handover", "time")
PHASES = ("suspicion", "election", "promotion", "opening")
"""In their order: until it stood, until it had the Lease, until Postgres was promoted, until clients entered."""


class Measures:
    """Counters and histograms, made once for an agent."""

    def __init__(self) -> None:
        self.renewals = Counter(
            "instance_manager_lease_renewals_total", "Tries to renew the Lease, by what came of them.", ("result",)
        )
        self.renewal_seconds = Histogram(
            "instance_manager_lease_renewal_seconds", "How long renewals took that succeeded.", RENEWAL_BOUNDS_S
        )
        self.decisions = Counter(
            "instance_manager_decisions_total",
            "Changes of the decision, by the new one.",
            ("decision",),
            known=[(act,) for act in get_args(Act)],
        )
        self.self_fences = Counter(
            "instance_manager_self_fences_total",
            "Times that this instance stopped its own writable Postgres at once, by reason.",
            ("reason",),
            known=[(reason,) for reason in FENCE_REASONS],
        )
        self.promises = Counter(
            "instance_manager_promises_total", "Answers to candidates that asked for a promise.", ("result",)
        )
        self.takeovers = Counter(
            "instance_manager_failovers_total",
            "Takeovers of the Lease that were completed here, by how: election, handover or time.",
            ("kind",),
            known=[(kind,) for kind in TAKEOVER_KINDS],
        )
        self.takeover_seconds = Histogram(
            "instance_manager_failover_phase_seconds",
            "How long the phases took of takeovers that were completed here.",
            PHASE_BOUNDS_S,
            ("phase",),
        )
        self.rejoins = Counter(
            "instance_manager_rejoins_total",
            "Rewinds and clones of the data directory, by how they ended.",
            ("kind", "result"),
            known=[
                (kind, result)
                for kind in ("clone", "rewind", "set aside and clone")
                for result in ("failed", "success")
            ],
        )
        self.loop_lag = Histogram(
            "instance_manager_event_loop_lag_seconds", "How late the agent's loop came to its tick.", LAG_BOUNDS_S
        )
        self.fsync_seconds: float | None = None
        self._decision = ""
        self._takeover: _Takeover | None = None

    def decided(self, act: str) -> None:
        """Asked many times a second: only a change counts."""
        if act != self._decision:
            self._decision = act
            self.decisions.add(act)

    def renewed(self, result: str, seconds: float) -> None:
        self.renewals.add(result)
        if result == "success":
            self.renewal_seconds.observe(seconds)

    @contextlib.contextmanager
    def rejoining(self, kind: str) -> Iterator[None]:
        """Around a rewind or a clone."""
        try:
            yield
        except BaseException:
            self.rejoins.add(kind, "failed")
            raise
        self.rejoins.add(kind, "success")

    # A takeover: begun, then a mark at the end of each phase but the last.

    def takeover_begins(self, kind: str, now_s: float, suspected_since_s: float | None) -> None:
        self._takeover = _Takeover(kind, now_s if suspected_since_s is None else suspected_since_s)
        self._takeover.mark(now_s)

    def takeover_reached(self, phase: str, now_s: float) -> None:
        """The Lease (`election`), or the promotion (`promotion`). One that was not begun here is not measured."""
        if self._takeover is not None and PHASES[len(self._takeover.marks)] == phase:
            self._takeover.mark(now_s)

    def takeover_failed(self) -> None:
        self._takeover = None

    def opened(self, now_s: float) -> None:
        """Clients enter: the end of a takeover, if there was one."""
        takeover, self._takeover = self._takeover, None
        if takeover is None or len(takeover.marks) != len(PHASES) - 1:
            return
        takeover.mark(now_s)
        self.takeovers.add(takeover.kind)
        before_s = takeover.since_s
        for phase, at_s in zip(PHASES, takeover.marks, strict=True):
            self.takeover_seconds.observe(at_s - before_s, phase)
            before_s = at_s

    def blocks(self) -> list[Block]:
        return [
            each.block()
            for each in (
                self.renewals,
                self.renewal_seconds,
                self.decisions,
                self.self_fences,
                self.promises,
                self.takeovers,
                self.takeover_seconds,
                self.rejoins,
                self.loop_lag,
            )
        ]


class _Takeover:
    def __init__(self, kind: str, since_s: float) -> None:
        self.kind = kind
        self.since_s = since_s
        self.marks: list[float] = []

    def mark(self, now_s: float) -> None:
        self.marks.append(now_s)
