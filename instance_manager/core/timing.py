"""The timing constants, derived from one another, and the inequality that makes them sound (DESIGN.md section 3).

Synchronous clusters keep the promise without these; they decide how long stale reads last and, for an asynchronous
cluster, whether two instances can be writable at once. So a configuration that breaks the inequality is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """All times in seconds."""

    lease_duration_s: float = 10.0
    """How long a candidate must see the very same record before time alone entitles it."""
    renew_interval_s: float = 2.0
    """How often the holder writes the Lease: at most 0.5 API writes per second per cluster."""
    request_timeout_s: float = 1.5
    """Deadline of one request to the coordination store."""
    soft_s: float = 6.0
    """From the sending of the last good renewal: the agent itself stops Postgres."""
    hard_s: float = 8.0
    """From the sending of the last good renewal: the supervisor kills every Postgres process."""
    kill_budget_s: float = 1.0
    """How long the supervisor may take to kill (84 ms measured), scheduling included."""
    margin_s: float = 0.5
    """Left over on top of everything stated."""
    clock_rate_error: float = 0.005
    """rho: how far the rate of a CLOCK_BOOTTIME may be off. Crystals are off by less than 0.0002."""

    suspect_after_s: float = 3.0
    """A silent primary is suspected after this time; a refused connection counts at once."""
    relax_after_s: float = 2.0
    """A primary goes on without a lost standby after this time. Shorter than suspect_after, so that with two
    instances a healthy primary with a lost standby just goes on."""
    health_timeout_s: float = 4.0
    """A primary whose SQL or disk gave no fresh proof of health for this time stops renewing and steps down."""
    promise_timeout_s: float = 2.0
    """How long a voter may take to stop its walreceiver and prove it."""
    promote_timeout_s: float = 20.0
    """A winner that has not opened by then gives the Lease back."""
    takeover_timeout_s: float = 3.0
    """A release that names a target may be taken by another that holds the same log after this time."""
    stop_timeout_s: float = 2.0
    """How long a fast shutdown may take in a switchover before every process is killed instead."""
    handover_timeout_s: float = 3.0
    """A primary whose postmaster crashed waits this long for a voter to take over before it restarts in place."""
    peer_interval_s: float = 0.5
    """How often peers are asked for their state."""
    observe_interval_s: float = 0.5
    """How often the local Postgres is looked at."""
    stable_s: float = 1.0
    """How long a standby must stream before it is made a voter; doubles for one that flaps."""

    def problems(self) -> tuple[str, ...]:
        """What makes these timings unsound, each a sentence for the user; empty when sound."""
        if not all(math.isfinite(getattr(self, name)) for name in self.__slots__):
            return ("every timing must be a finite number of seconds",)
        found = []
        needed = self.hard_s / (1 - self.clock_rate_error) + self.kill_budget_s + self.margin_s
        granted = self.lease_duration_s / (1 + self.clock_rate_error)
        if needed > granted:
            found.append(
                f"hard_s {self.hard_s:g} is too long for lease_duration_s {self.lease_duration_s:g}: killing Postgres may end "
                f"{needed:.2f} s after a renewal was sent, but others may take the lease {granted:.2f} s after it; "
                "raise lease_duration_s or lower hard_s"
            )
        if 2 * self.renew_interval_s > self.soft_s:
            found.append(
                f"renew_interval_s {self.renew_interval_s:g} is too long for soft_s {self.soft_s:g}: one lost renewal would stop "
                "the primary; soft_s must be at least twice renew_interval_s"
            )
        if self.soft_s >= self.hard_s:
            found.append(
                f"soft_s {self.soft_s:g} must be below hard_s {self.hard_s:g}: the agent stops Postgres before it is killed"
            )
        if self.request_timeout_s >= self.renew_interval_s:
            found.append(
                f"request_timeout_s {self.request_timeout_s:g} must be below renew_interval_s {self.renew_interval_s:g}"
            )
        if self.relax_after_s >= self.suspect_after_s:
            found.append(
                f"relax_after_s {self.relax_after_s:g} must be below suspect_after_s {self.suspect_after_s:g}: else a lost standby "
                "of two instances costs the primary its place"
            )
        if not 0 <= self.clock_rate_error < 0.1:
            found.append(f"clock_rate_error {self.clock_rate_error:g} must be at least 0 and below 0.1")
        found += [
            f"{name} must be above 0"
            for name in self.__slots__
            if name != "clock_rate_error" and getattr(self, name) <= 0
        ]
        return tuple(found)
