"""What an instance tells people about itself and its cluster: `status`, `/status` and the demo's view read only this."""

from __future__ import annotations

from dataclasses import dataclass

from instance_manager.core.archive_state import ArchiveState


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionLine:
    """One decision, with the inputs' summary that made it. Repeated ones are counted, not repeated."""

    age_s: float
    decision: str
    reason: str
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    name: str
    member_id: str | None
    role: str
    """primary, standby, candidate, promoting, starting, stopping, stopped, fenced, cloning, rewinding, unknown."""
    reachable: bool
    postgres: str
    """running, starting, stopped, unresponsive."""
    timeline: int | None = None
    lsn: str | None = None
    """Primary: flushed. Standby: received and flushed; what a promise would report."""
    lag_bytes: int | None = None
    replay_lag_bytes: int | None = None
    followed_epoch: int | None = None
    promised_epoch: int | None = None
    receiving: bool = False
    """A standby whose walreceiver streams."""
    voter: bool = False
    problem: str | None = None
    """What an operator should look at, in one sentence."""
    operation: str | None = None
    """What it is doing now that takes long, with its progress: `cloning from demo-1: 45 % of 1.2 GB`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateStatus:
    """A certificate that the telling instance uses."""

    use: str
    """postgres, peers, control, replication."""
    names: tuple[str, ...]
    days_left: float | None
    problem: str | None = None
    """Why what is in its directory is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedStatus:
    """One thing that the configuration declares inside Postgres, as the primary last saw it."""

    what: str
    """`role reporting`, `database orders`, `extension pg_trgm in orders`."""
    state: str
    """as declared, changed, failed, left alone."""
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    cluster: str
    told_by: str
    primary: str | None
    epoch: int | None
    timeline: int | None
    system_identifier: str | None
    lease_age_s: float | None
    """Since this instance last saw the record change, on its own clock."""
    lease_readable: bool
    seconds_to_fence: float | None
    """On the primary: until Postgres is stopped unless the Lease is renewed."""
    durability: str
    voters: tuple[str, ...]
    quorum: int | None
    synchronous_wanted: int
    synchronous_standby_names: str | None
    """On the primary: what Postgres runs with."""
    paused: bool
    fenced: tuple[str, ...]
    accepts_clients: bool
    """On the primary: are clients let in?"""
    at_risk: tuple[str, ...]
    """Sentences that answer `is anything at risk`; empty when nothing is."""
    instances: tuple[InstanceStatus, ...]
    decisions: tuple[DecisionLine, ...]
    """Of this instance, newest first."""
    switchover: str | None = None
    certificates: tuple[CertificateStatus, ...] = ()
    """Of the instance that tells."""
    managed: tuple[ManagedStatus, ...] = ()
    """On the primary: what `managed` declares."""
    archive: ArchiveState | None = None
    """Of the primary's archiver; None: no archive is configured, or the primary does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """The snapshot from which every HTTP probe answers at once, whatever Postgres and the disk do."""

    taken_s: float
    """CLOCK_BOOTTIME of the snapshot, seconds."""
    role: str
    alive: bool
    """The agent's loops tick. Says nothing of the network or of Postgres."""
    started: bool
    """Postgres answers, or its recovery advances."""
    ready: bool
    """Primary: lets clients in. Standby: streams or replays, and answers SQL."""
    accepts_writes: bool
    accepts_reads: bool
    lag_bytes: int | None
    replay_lag_bytes: int | None
    timeline: int | None
    reasons: tuple[str, ...] = ()
    """Why something above is false."""
