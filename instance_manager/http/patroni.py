"""Patroni's read routes, as its REST API is documented for 4.1: which code each answers, and the same JSON.

HAProxy, check_patroni and other tools work by these unchanged. Where "in order" has two readings, the stricter one is
taken: a holder of the Lease that keeps clients out is no `/primary`, a standby that neither streams nor suspects its
primary is no `/replica`, and a `lag` that cannot be read is a 400 and not "any lag".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from instance_manager import __version__
from instance_manager.core.types import format_lsn
from instance_manager.http import probes as checks
from instance_manager.http.details import Details
from instance_manager.status import ClusterStatus, InstanceStatus, Probes

API_VERSION = "4.1.4"
"""Of Patroni, whose API these routes follow: its tools look at the version to know which states they may meet."""

_TAG_PREFIX = "tag_"
_STATES = {"running": "running", "starting": "starting", "stopped": "stopped", "unresponsive": "unknown"}
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Looked:
    """One request's view of the instance."""

    probes: Probes
    details: Details
    query: Mapping[str, str]
    age_s: float


class Xlog(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    location: int | None = None
    received_location: int | None = None
    replayed_location: int | None = None
    replayed_timestamp: str | msgspec.UnsetType | None = msgspec.UNSET
    paused: bool | None = None


class Replication(msgspec.Struct, frozen=True, kw_only=True):
    usename: str | None
    application_name: str
    client_addr: str | None
    state: str
    sync_state: str
    sync_priority: int


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    scope: str
    name: str


class Manager(msgspec.Struct, frozen=True, kw_only=True):
    version: str


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Patroni's description of a node, and why the route that was asked says 503."""

    state: str
    role: str
    patroni: Scope
    instance_manager: Manager
    postmaster_start_time: str | None = None
    server_version: int | None = None
    xlog: Xlog | None = None
    timeline: int | None = None
    replication_state: str | None = None
    sync_standby: bool = False
    quorum_standby: bool = False
    replication: tuple[Replication, ...] = ()
    pause: bool = False
    cluster_unlocked: bool = False
    dcs_last_seen: int | None = None
    tags: dict[str, str | bool | int | float] = {}
    database_system_identifier: str | None = None
    pending_restart: bool = False
    pending_restart_reason: dict[str, dict[str, str]] = {}
    reasons: tuple[str, ...] = ()


class ClusterMember(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    role: str
    """leader, sync_standby, quorum_standby, replica."""
    state: str
    api_url: str | msgspec.UnsetType = msgspec.UNSET
    host: str | msgspec.UnsetType = msgspec.UNSET
    port: int | msgspec.UnsetType = msgspec.UNSET
    timeline: int | str = _UNKNOWN
    receive_lag: int | str | msgspec.UnsetType = msgspec.UNSET
    receive_lsn: str | msgspec.UnsetType = msgspec.UNSET
    replay_lag: int | str | msgspec.UnsetType = msgspec.UNSET
    replay_lsn: str | msgspec.UnsetType = msgspec.UNSET
    lag: int | str | msgspec.UnsetType = msgspec.UNSET
    lsn: str | msgspec.UnsetType = msgspec.UNSET


class Cluster(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    members: tuple[ClusterMember, ...]
    scope: str
    pause: bool = False


HistoryRow = tuple[int | str, ...]
"""The timeline that was left, where, and why: not told item by item, because readers of OpenAPI differ about that."""


def node_status(looked: Looked, *, now_unix_s: float, reasons: tuple[str, ...] = ()) -> NodeStatus:
    details, server = looked.details, looked.details.server
    xlog = None
    if server is not None and server.flushed_lsn is not None:
        xlog = Xlog(location=server.flushed_lsn)
    elif server is not None:
        xlog = Xlog(
            received_location=server.received_lsn,
            replayed_location=server.replayed_lsn,
            replayed_timestamp=server.replayed_timestamp,
            paused=server.replay_paused,
        )
    standby = server is not None and server.flushed_lsn is None
    return NodeStatus(
        state=_state(details.role, details.postgres),
        role=_role(details),
        patroni=Scope(version=API_VERSION, scope=details.cluster, name=details.name),
        instance_manager=Manager(version=__version__),
        postmaster_start_time=_with_minutes(server.started) if server is not None else None,
        server_version=server.version_number if server is not None else None,
        xlog=xlog,
        timeline=details.timeline,
        replication_state="streaming" if standby and details.receiving else None,
        sync_standby=standby and is_sync_standby(details),
        quorum_standby=standby and is_quorum_standby(details),
        replication=tuple(
            Replication(
                usename=line.user,
                application_name=line.application_name,
                client_addr=line.client_address,
                state=line.state,
                sync_state=line.sync_state,
                sync_priority=line.sync_priority,
            )
            for line in (server.replication if server is not None else ())
        ),
        pause=details.paused,
        cluster_unlocked=not details.has_primary,
        dcs_last_seen=int(now_unix_s - details.record_age_s) if details.record_age_s is not None else None,
        tags=dict(details.tags),
        database_system_identifier=details.system_identifier,
        pending_restart=server is not None and bool(server.pending_restart),
        pending_restart_reason={name: {} for name in (server.pending_restart if server is not None else ())},
        reasons=reasons,
    )


def cluster(status: ClusterStatus, details: Details) -> Cluster:
    """Patroni's `/cluster`: every member as this instance sees it."""
    return Cluster(
        members=tuple(_member(instance, status, details) for instance in status.instances),
        scope=status.cluster,
        pause=status.paused,
    )


def history(details: Details) -> tuple[HistoryRow, ...]:
    return tuple((line.timeline, line.lsn, f"claimed in epoch {line.epoch}") for line in details.history)


def is_sync_standby(details: Details) -> bool:
    """Every acknowledged commit is here, by the record: all voters hold each."""
    return details.voter and details.holds_every_commit


def is_quorum_standby(details: Details) -> bool:
    """A commit waits for some of several, of which this is one."""
    return details.voter and not details.holds_every_commit


def _with_minutes(time: str) -> str:
    """Postgres writes an offset of whole hours without minutes, Python and Patroni with them."""
    return f"{time}:00" if time[-3:-2] in ("+", "-") else time


def _state(role: str, postgres: str) -> str:
    if postgres == "stopped" and role in ("cloning", "rewinding"):
        return "creating replica"
    if postgres == "stopped" and role == "initialising":
        return "initializing new cluster"
    if role == "stopping" and postgres != "stopped":
        return "stopping"
    return _STATES.get(postgres, _UNKNOWN)


def _role(details: Details) -> str:
    if details.role == "primary":
        return "primary"
    return "replica" if details.has_data else "uninitialized"


def _member(instance: InstanceStatus, status: ClusterStatus, details: Details) -> ClusterMember:
    leads = instance.name == status.primary
    if leads:
        role = "leader"
    elif instance.voter and status.quorum and status.durability != "asynchronous":
        role = "sync_standby" if status.quorum == len(status.voters) else "quorum_standby"
    else:
        role = "replica"
    if not instance.reachable:
        state = _UNKNOWN
    elif not leads and instance.receiving:
        state = "streaming"
    else:
        state = _state(instance.role, instance.postgres)
    where = details.addresses.get(instance.name)
    member = ClusterMember(name=instance.name, role=role, state=state, timeline=instance.timeline or _UNKNOWN)
    if where is not None:
        host = f"[{where.host}]" if ":" in where.host else where.host
        member = msgspec.structs.replace(
            member,
            api_url=f"http://{host}:{where.http_port}/patroni",
            host=where.host,
            port=where.postgres_port,
        )
    return member if leads else _with_lag(member, instance)


def _with_lag(member: ClusterMember, instance: InstanceStatus) -> ClusterMember:
    """As Patroni tells it: `unknown` of a member that does not answer, or whose Postgres does not run."""
    behind, unreplayed = instance.lag_bytes, instance.replay_lag_bytes
    if not instance.reachable or instance.lsn is None or behind is None:
        return msgspec.structs.replace(
            member,
            receive_lag=_UNKNOWN,
            receive_lsn=_UNKNOWN,
            replay_lag=_UNKNOWN,
            replay_lsn=_UNKNOWN,
            lag=_UNKNOWN,
            lsn=_UNKNOWN,
        )
    high, low = instance.lsn.split("/")
    received = (int(high, 16) << 32) | int(low, 16)
    return msgspec.structs.replace(
        member,
        receive_lag=behind,
        receive_lsn=instance.lsn,
        replay_lag=behind + unreplayed if unreplayed is not None else _UNKNOWN,
        replay_lsn=format_lsn(received - unreplayed) if unreplayed is not None else _UNKNOWN,
        lag=behind,
        lsn=instance.lsn,
    )


# The checks: each tells why the answer is 503; nothing to tell is 200.


def primary(looked: Looked) -> list[str]:
    """Holds the Lease and takes writes. Tags do not count."""
    return checks.why_no_primary(looked.probes, looked.age_s)


def standby_leader(looked: Looked) -> list[str]:
    """Never: there are no standby clusters here."""
    return ["there is no standby cluster here"]


def replica(looked: Looked) -> list[str]:
    """A standby that serves reads, no further behind than `lag`, with the tags that are asked for."""
    refusals = checks.why_no_replica(looked.probes, looked.query, looked.age_s)
    return [*refusals, *_not_balanced(looked), *_other_tags(looked)]


def read_only(looked: Looked) -> list[str]:
    """Whoever serves reads: a primary too."""
    refusals = checks.why_not_readable(looked.probes, looked.query, looked.age_s)
    if looked.probes.role != "primary":
        refusals += _not_balanced(looked)
    return [*refusals, *_other_tags(looked)]


def synchronous(looked: Looked) -> list[str]:
    """A replica on which every acknowledged commit is."""
    refusals = [] if is_sync_standby(looked.details) else ["it is no synchronous standby"]
    return [*replica(looked), *refusals]


def read_only_synchronous(looked: Looked) -> list[str]:
    """A synchronous standby, or the primary."""
    return _or_primary(looked, synchronous(looked))


def quorum(looked: Looked) -> list[str]:
    """A replica that is one of several, of which some hold each acknowledged commit."""
    refusals = [] if is_quorum_standby(looked.details) else ["it is no quorum standby"]
    return [*replica(looked), *refusals]


def read_only_quorum(looked: Looked) -> list[str]:
    """A quorum standby, or the primary."""
    return _or_primary(looked, quorum(looked))


def asynchronous(looked: Looked) -> list[str]:
    """A replica for which no commit waits."""
    refusals = ["commits wait for it"] if looked.details.voter else []
    return [*replica(looked), *refusals]


def health(looked: Looked) -> list[str]:
    """Postgres runs and answers."""
    return [] if looked.details.postgres == "running" else [f"Postgres is {looked.details.postgres}"]


def liveness(looked: Looked) -> list[str]:
    """The agent's loops tick: nothing of Postgres or a network."""
    return [] if looked.probes.alive else ["the agent's loops do not tick"]


def readiness(looked: Looked) -> list[str]:
    """The primary, or a standby that streams and is no further behind than `lag` (`mode`: apply or write)."""
    mode = looked.query.get("mode", "apply")
    if mode not in ("apply", "write"):
        raise checks.MalformedQuery(f"mode is apply or write, not {mode[:50]!r}")
    given = looked.query.get("lag")
    maximum = checks.parse_size_bytes(given) if given is not None else looked.details.maximum_lag_bytes
    refusals = primary(looked)
    if not refusals or looked.probes.role == "primary":
        return refusals
    refusals = checks.why_no_replica(looked.probes, {}, looked.age_s)
    behind, unreplayed = looked.probes.lag_bytes, looked.probes.replay_lag_bytes
    if behind is not None and mode == "apply":
        behind = behind + unreplayed if unreplayed is not None else None
    if behind is None:
        refusals.append("the lag is not known")
    elif behind > maximum:
        refusals.append(f"{behind} bytes behind, {maximum} allowed")
    return refusals


CHECKS: Mapping[str, Callable[[Looked], list[str]]] = {
    "/primary": primary,
    "/read-write": primary,
    "/leader": primary,
    "/master": primary,
    "/standby-leader": standby_leader,
    "/standby_leader": standby_leader,
    "/replica": replica,
    "/read-only": read_only,
    "/synchronous": synchronous,
    "/sync": synchronous,
    "/read-only-sync": read_only_synchronous,
    "/read-only-synchronous": read_only_synchronous,
    "/quorum": quorum,
    "/read-only-quorum": read_only_quorum,
    "/asynchronous": asynchronous,
    "/async": asynchronous,
    "/health": health,
}


def _or_primary(looked: Looked, refusals: list[str]) -> list[str]:
    if looked.probes.role != "primary":
        return refusals
    return [*primary(looked), *_other_tags(looked)]


def _not_balanced(looked: Looked) -> list[str]:
    refusals = []
    if looked.details.tags.get("noloadbalance") is True:
        refusals.append("its tag noloadbalance is true")
    wanted = looked.query.get("replication_state")
    if wanted and not (wanted == "streaming" and looked.details.receiving):
        refusals.append(f"its replication state is not {wanted[:64]}")
    return refusals


def _other_tags(looked: Looked) -> list[str]:
    """As Patroni compares them: a tag that is not set equals nothing; booleans and numbers by their text in lower case."""
    refusals = []
    for key, wanted in looked.query.items():
        if not key.startswith(_TAG_PREFIX):
            continue
        name = key.removeprefix(_TAG_PREFIX)
        value = looked.details.tags.get(name)
        text = value if isinstance(value, str) or value is None else str(value).lower()
        if text != wanted:
            refusals.append(f"its tag {name[:64]} is not the one that is asked for")
    return refusals
