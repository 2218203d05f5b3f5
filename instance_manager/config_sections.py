"""The sections of an instance's configuration: names, types and defaults. What must fit together is checked in `config`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

Durability = Literal["preferred", "required", "asynchronous"]
ReplicasFrom = Literal["auto", "archive", "primary"]
ARCHIVE_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TIME_OF_DAY_PATTERN = re.compile(r"([01]\d|2[0-3]):[0-5]\d")
TAG_NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of the configuration."""


class ClusterSection(Section, frozen=True):
    name: str
    uid: str = ""
    """Random id of this cluster, so that a Lease of another cluster of this name is recognised (R14).

    On Kubernetes it may be left out: then whoever creates the Lease makes one at random, each volume remembers it from the
    first time that it follows or leads, and takes no other for its own. (Nothing that is known before the Lease would do: the
    uid of a StatefulSet changes when it is deleted with `--cascade=orphan` and made anew, a secret is rotated, a
    namespace outlives its clusters.)"""
    instances: Annotated[int, msgspec.Meta(ge=1, le=99)] | None = None
    """On Kubernetes: how many members there are, NAME-0 to NAME-(instances - 1)."""
    durability: Durability = "preferred"
    synchronous_standbys: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """How many standbys must hold a commit before it is acknowledged; by default half the instances, rounded down."""
    maximum_lag_on_failover_bytes: Annotated[int, msgspec.Meta(ge=0)] = 16 * 1024 * 1024
    """Asynchronous clusters only: a candidate further behind the last known position does not take over by itself."""


class MemberSection(Section, frozen=True):
    name: str
    host: str
    postgres_port: Port
    http_port: Port
    peer_port: Port | None = None
    """With `tls.peers`: where the members talk to each other. On Kubernetes 8009."""


class InstanceSection(Section, frozen=True, kw_only=True):
    name: str = ""
    """On Kubernetes the pod's name, and not given."""
    directory: Path
    """Volume of this instance: holds `data/` (Postgres), `state/` (promises, outside the data directory: P6),
    `socket/`, `log/` and `control.sock`."""
    log_directory: Path | None = None
    """Of this instance alone, for at most some 100 MiB of Postgres's log that wait to be told; by default `log/` in `directory`."""
    listen_host: str | None = None
    """Address that Postgres and HTTP bind; by default the member's own `host`."""
    priority: int = 0
    """Among equal logs the higher one is preferred as primary."""
    run_as: str = "postgres"
    """Operating system user of Postgres when the instance manager runs as root; ignored otherwise."""
    tags: dict[str, str | bool | int | float] = {}
    """Shown by the HTTP API, and matched by its `?tag_NAME=VALUE`; `noloadbalance: true` takes it from all reads."""
    termination_log: Path | None = None
    minimum_free_bytes: Annotated[int, msgspec.Meta(ge=0)] = 32 * 1024 * 1024
    """A primary with less free space on its volume hands over to a voter that has more; two segments of WAL."""
    shutdown_timeout_s: Annotated[float, msgspec.Meta(ge=5, le=3600)] = 25.0
    """After SIGTERM everything that is left is killed then: some seconds less than the pod's grace period, after which the
    kubelet would do it."""


class LocalCoordinationSection(Section, frozen=True):
    directory: Path
    """Holds the Lease record; shared by all instances of this machine."""
    locks_directory: Path
    """One lock file per instance, held by its supervisor and its Postgres: the proof of life and death."""


class KubernetesCoordinationSection(Section, frozen=True):
    namespace: str = ""
    """Of the Lease and the pods: by default the pod's own ($POD_NAMESPACE, else its service account's)."""
    lease: str = ""
    """Name of the Lease; by default the cluster's."""
    kubeconfig: Path | None = None
    """For development outside of a pod; by default the pod's service account."""


class CoordinationSection(Section, frozen=True):
    """Exactly one of both."""

    local: LocalCoordinationSection | None = None
    kubernetes: KubernetesCoordinationSection | None = None


class SecretsSection(Section, frozen=True):
    """Files with one secret each; read at use, never logged, never in an argument list."""

    peer_token: Path
    replication_password: Path
    application_password: Path
    monitoring_password: Path
    superuser_password: Path | None = None
    """By default the superuser has no password, and logs in over the Unix socket only. With this file it may also from
    `postgres.application_networks`, over TLS."""

    @property
    def files(self) -> dict[str, Path]:
        """Those that are given, by their key."""
        given = {key: getattr(self, key) for key in self.__struct_fields__}
        return {key: path for key, path in given.items() if path is not None}


class PostgresSection(Section, frozen=True):
    bin_directory: Path | None = None
    parameters: dict[str, str | int | float | bool] = {}
    host_based_access: tuple[str, ...] = ()
    """Lines of pg_hba.conf for applications, after the instance manager's own."""
    application_networks: tuple[str, ...] = ("127.0.0.1/32", "::1/128")
    """Networks from which the application's owner may log in with its password."""
    application_database: str = "app"
    application_owner: str = "app"


class MetricsSection(Section, frozen=True):
    queries: tuple[Path, ...] = ()
    """Files of custom queries, in postgres_exporter's form or CloudNativePG's."""
    tables: bool = True
    """Statistics of each table: some 20 series for each."""
    refresh_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 30.0
    """How old statistics of tables and sizes of databases may be before a scrape has them looked at again."""


class S3Section(Section, frozen=True):
    """An S3 bucket. What is left out is taken from the environment, as AWS's own tools do (a web identity too)."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    """Bucket in the path instead of the host's name, as most stores other than AWS want it."""
    credentials_file: Path | None = None
    """In the form of `~/.aws/credentials`; read again when the store refuses."""
    profile: str | None = None
    ca_file: Path | None = None
    """Certificates of the authority that signed the endpoint's."""
    server_side_encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key_id: str | None = None
    conditional_writes: Literal["required", "emulated"] = "required"
    """`emulated`, for a store that ignores `If-None-Match`: look before each write. Not safe against two writers at once."""


class RetentionSection(Section, frozen=True):
    """What is kept: what either of both keeps. Without both nothing expires."""

    window_days: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Every moment of so many days before the newest good backup can be recovered."""
    count: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """So many of the newest good backups stay."""


class BackupScheduleSection(Section, frozen=True):
    at: tuple[str, ...]
    """Times of day in UTC, `03:00`."""
    weekdays: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = ()
    """By default every day."""
    full_every: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    """Each so manieth is a full one, those between are incremental, each on the one before."""


class BackupSection(Section, frozen=True):
    """Base backups."""

    schedule: BackupScheduleSection | None = None
    """For clusters without the controller; None: only by `instance-manager backup`."""
    retention: RetentionSection = RetentionSection()
    """Applied after each backup."""
    codec: Literal["lz4", "gzip", "none"] = "lz4"
    """What barman-cloud-restore can read: it has no zstd for base backups."""
    parallel: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    rate_limit_bytes_per_s: Annotated[int, msgspec.Meta(ge=1 << 20)] | None = None
    """Of what is read from the data directory."""
    incremental: bool = False
    """The server summarizes its WAL, so that incremental backups can be taken (Postgres 17 and later); also on where `full_every` is above 1."""
    verify_checksums: bool = True
    """Look at the checksum of every page, where the cluster has them."""

    @property
    def needs_summaries(self) -> bool:
        return self.incremental or (self.schedule is not None and self.schedule.full_every > 1)


class ArchiveSection(Section, frozen=True):
    directory: Path | None = None
    """A file system that survives the loss of this instance's volume; this or `s3`."""
    s3: S3Section | None = None
    server_name: str | None = None
    """The archive's name in the store, by default the cluster's; one per cluster for ever."""
    codec: Literal["zstd", "lz4", "gzip", "none"] = "zstd"
    """Fixed when the archive is begun."""
    level: int | None = None
    parallel: Annotated[int, msgspec.Meta(ge=1, le=12)] = 4
    stream_interval_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """How much the loss of every volume at once may cost, besides the upload; 0: only finished segments are archived."""
    prefetch_bytes: Annotated[int, msgspec.Meta(ge=0)] = 128 * 1024 * 1024
    backup: BackupSection = BackupSection()


class RecoveryTargetSection(Section, frozen=True):
    """At most one of the first five; none: all that the archive holds."""

    time: str | None = None
    """With its zone: `2025-11-28 21:05:00+00`."""
    lsn: str | None = None
    xid: str | None = None
    name: str | None = None
    """Of pg_create_restore_point."""
    immediate: bool = False
    """As soon as the backup is consistent."""
    timeline: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """By default the newest of the archive."""
    exclusive: bool = False
    """Just before the target, not with it."""


class RecoverySection(Section, frozen=True, kw_only=True):
    """Where a new cluster comes from, instead of initdb. The source is only read."""

    archive: ArchiveSection
    """Of the source, with its `server_name`."""
    target: RecoveryTargetSection = RecoveryTargetSection()
    backup: str | None = None
    """Id or name; by default the newest before the target."""
    accept_end: bool = False
    """Open also where the archive ends before the target."""
    outage_patience_s: Annotated[float, msgspec.Meta(ge=0)] = 3600.0
    tablespaces: dict[str, Path] = {}
    """New places by name."""


class BootstrapSection(Section, frozen=True):
    """How data directories are made."""

    recovery: RecoverySection | None = None
    """The first one of a cluster that has no data yet. Of a cluster that began so, also where its standbys may come from."""
    replicas_from: ReplicasFrom = "auto"
    """A standby's that has none: from a backup in an archive where that is cheaper than a copy of the primary, or wherever it can be,
    or never. What fails there is a copy of the primary."""
