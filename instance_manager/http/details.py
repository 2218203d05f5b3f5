"""What tools that know Patroni ask of an instance beyond its status: the server's own figures, and where members are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationLine:
    """One walsender of the local server."""

    user: str | None
    application_name: str
    client_address: str | None
    state: str
    sync_state: str
    sync_priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDetails:
    """As the running server told at the last look."""

    version_number: int
    started: str
    """Wall-clock time of the postmaster's start, as Postgres writes it."""
    flushed_lsn: int | None
    """A primary's; None on a standby."""
    received_lsn: int | None
    replayed_lsn: int | None
    replayed_timestamp: str | None
    replay_paused: bool
    pending_restart: tuple[str, ...]
    """Settings that were changed and take effect at a restart."""
    replication: tuple[ReplicationLine, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberAddress:
    host: str
    postgres_port: int
    http_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryLine:
    """One change of the timeline."""

    timeline: int
    """The one that was left."""
    lsn: int
    """Where it was left."""
    epoch: int
    """In which the next one was claimed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """Put together from memory; nothing here waits for Postgres or a network."""

    name: str
    cluster: str
    role: str
    postgres: str
    """running, starting, stopped, unresponsive."""
    has_data: bool
    receiving: bool
    voter: bool
    """Its promise may elect."""
    holds_every_commit: bool
    """A voter of a record in which all voters hold each acknowledged commit (q is their number)."""
    has_primary: bool
    """The record names a holder."""
    paused: bool
    timeline: int | None
    system_identifier: str | None
    record_age_s: float | None
    """Since the record was last read; None: never."""
    server: ServerDetails | None
    """None: it does not answer."""
    addresses: Mapping[str, MemberAddress]
    history: tuple[HistoryLine, ...]
    """Oldest first."""
    tags: Mapping[str, str | bool | int | float]
    maximum_lag_bytes: int
    """How far a standby may be behind by default, where a route asks for it."""
    settings: Mapping[str, object]
    """The configuration of the cluster in Patroni's words; holds no secret."""
