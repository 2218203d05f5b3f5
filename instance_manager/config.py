"""The whole configuration of one instance, as one validated, immutable model read from a YAML file.

Unknown keys, wrong types and unsound timings are errors that say where and what to do; nothing is guessed.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from instance_manager import kubernetes_names
from instance_manager.core.timing import Timings
from instance_manager.core.types import MEMBER_NAME_PATTERN, MemberName

Durability = Literal["preferred", "required", "asynchronous"]
ARCHIVE_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ROOM_ON_KUBERNETES = 9
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class ConfigurationError(Exception):
    """The configuration cannot be used; the text names the key and the mend."""


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


class InstanceSection(Section, frozen=True, kw_only=True):
    name: str = ""
    """On Kubernetes the pod's name, and not given."""
    directory: Path
    """Volume of this instance: holds `data/` (Postgres), `state/` (promises, outside the data directory: P6),
    `socket/` and `control.sock`."""
    listen_host: str | None = None
    """Address that Postgres and HTTP bind; by default the member's own `host`."""
    priority: int = 0
    """Among equal logs the higher one is preferred as primary."""
    run_as: str = "postgres"
    """Operating system user of Postgres when the instance manager runs as root; ignored otherwise."""
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


class PostgresSection(Section, frozen=True):
    bin_directory: Path | None = None
    parameters: dict[str, str | int | float | bool] = {}
    host_based_access: tuple[str, ...] = ()
    """Lines of pg_hba.conf for applications, after the instance manager's own."""
    application_networks: tuple[str, ...] = ("127.0.0.1/32", "::1/128")
    """Networks from which the application's owner may log in with its password."""
    application_database: str = "app"
    application_owner: str = "app"


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


class Configuration(Section, frozen=True, kw_only=True):
    """As `load_configuration` returns it, everything that a default stands for is filled in."""

    cluster: ClusterSection
    instance: InstanceSection
    members: tuple[MemberSection, ...] = ()
    coordination: CoordinationSection
    secrets: SecretsSection
    postgres: PostgresSection = PostgresSection()
    archive: ArchiveSection | None = None
    timings: Timings = Timings()
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def me(self) -> MemberSection:
        return next(member for member in self.members if member.name == self.instance.name)

    @property
    def is_member(self) -> bool:
        """False for a pod beyond `cluster.instances`: it is leaving, or nobody knows it yet."""
        return self.is_configured(self.instance.name)

    def is_configured(self, name: str) -> bool:
        """Is it one of the members that the cluster should have? On Kubernetes `cluster.instances` says."""
        if self.coordination.kubernetes is None or self.cluster.instances is None:
            return any(member.name == name for member in self.members)
        ordinal = kubernetes_names.ordinal_of(name, self.cluster.name)
        return ordinal is not None and ordinal < self.cluster.instances

    def member(self, name: str) -> MemberSection | None:
        """Where a member is reached; None if there can be none of that name.

        On Kubernetes also one that is not configured any more, or not yet: the record may name it.
        """
        found = next((member for member in self.members if member.name == name), None)
        if found is not None or self.coordination.kubernetes is None:
            return found
        if kubernetes_names.ordinal_of(name, self.cluster.name) is None:
            return None
        return _kubernetes_member(name, self.cluster.name, self.coordination.kubernetes.namespace)

    @property
    def instances(self) -> int:
        """How many members the cluster should have."""
        return self.cluster.instances or len(self.members)

    @property
    def room_for_instances(self) -> int:
        """How many members the settings of Postgres leave room for: where members come and go, none needs its restart."""
        return max(self.instances, len(self.members), ROOM_ON_KUBERNETES if self.coordination.kubernetes else 0)

    @property
    def peers(self) -> tuple[MemberSection, ...]:
        return tuple(member for member in self.members if member.name != self.instance.name)

    @property
    def name(self) -> MemberName:
        return MemberName(self.instance.name)

    @property
    def listen_host(self) -> str:
        return self.instance.listen_host or self.me.host

    @property
    def wanted_synchronous_standbys(self) -> int:
        """k when every instance is well: a commit is then on a majority of the instances, the primary included."""
        if self.instances == 1 or self.cluster.durability == "asynchronous":
            return 0
        return self.cluster.synchronous_standbys or max(1, self.instances // 2)

    @property
    def data_directory(self) -> Path:
        return self.instance.directory / "data"

    @property
    def state_directory(self) -> Path:
        return self.instance.directory / "state"

    @property
    def socket_directory(self) -> Path:
        return self.instance.directory / "socket"

    @property
    def control_socket(self) -> Path:
        return self.instance.directory / "control.sock"

    @property
    def archive_socket(self) -> Path:
        return self.instance.directory / "archive.sock"

    @property
    def lock_file(self) -> Path:
        """Held by the supervisor and its Postgres. On Kubernetes it lies on the volume: two pods that have mounted the same
        one on one node exclude each other by it."""
        if self.coordination.local is not None:
            return self.coordination.local.locks_directory / f"{self.instance.name}.lock"
        return self.instance.directory / "supervisor.lock"


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError


def load_configuration(path: Path, environment: Mapping[str, str] | None = None) -> Configuration:
    """Read and check the file; ConfigurationError with the file's name, the place in it and the mend.

    `environment`: by default this process's; on Kubernetes it tells the pod's name, namespace and address.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: is not YAML: {error}") from error
    try:
        configuration = msgspec.convert(raw, Configuration, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    # `Timings` is a dataclass of the core, in which msgspec overlooks keys that it does not know.
    unknown = set(raw.get("timings") or {}) - {field.name for field in fields(Timings)}
    if unknown:
        raise ConfigurationError(f"{path}: Object contains unknown field `{min(unknown)}` - at `$.timings`")
    problems = _check_coordination(configuration)
    if not problems:
        configuration = _filled_in(configuration, os.environ if environment is None else environment)
        problems = check(configuration)
    if problems:
        raise ConfigurationError("\n".join(f"{path}: {problem}" for problem in problems))
    return configuration


def _check_coordination(configuration: Configuration) -> tuple[str, ...]:
    """What does not fit together, before anything is filled in."""
    local, kubernetes = configuration.coordination.local, configuration.coordination.kubernetes
    if (local is None) == (kubernetes is None):
        return ("coordination: give exactly one of `local` and `kubernetes`",)
    cluster, instance, members = configuration.cluster, configuration.instance, configuration.members
    wrong: tuple[tuple[bool, str], ...]
    if local is not None:
        wrong = (
            (not cluster.uid, "cluster.uid: is missing; make one with `openssl rand -hex 8`, the same in every file"),
            (not instance.name, "instance.name: is missing; it is one of the members' names"),
            (not members, "members: is missing; list every instance of the cluster"),
            (
                cluster.instances is not None,
                "cluster.instances: is for `coordination.kubernetes`; here `members` counts",
            ),
        )
    else:
        wrong = (
            (
                cluster.instances is None,
                "cluster.instances: is missing; on Kubernetes it says how many members there are",
            ),
            (
                bool(members),
                "members: is for `coordination.local`; on Kubernetes `cluster.instances` says who they are",
            ),
            (bool(instance.name), "instance.name: is for `coordination.local`; on Kubernetes it is the pod's name"),
        )
    return tuple(problem for is_wrong, problem in wrong if is_wrong)


def _filled_in(configuration: Configuration, environment: Mapping[str, str]) -> Configuration:
    """On Kubernetes: the name, the addresses and the members, from the environment of the pod."""
    kubernetes, cluster = configuration.coordination.kubernetes, configuration.cluster
    if kubernetes is None:
        return configuration
    namespace = kubernetes.namespace or kubernetes_names.own_namespace(environment, kubernetes.kubeconfig)
    kubernetes = msgspec.structs.replace(kubernetes, namespace=namespace, lease=kubernetes.lease or cluster.name)
    name = environment.get("POD_NAME", "")
    instance = msgspec.structs.replace(
        configuration.instance,
        name=name,
        listen_host=configuration.instance.listen_host or environment.get("POD_IP") or None,
    )
    names = [f"{cluster.name}-{ordinal}" for ordinal in range(cluster.instances or 0)]
    if name not in names and kubernetes_names.ordinal_of(name, cluster.name) is not None:
        # Beyond `instances`: on its way out, or faster than the news of it.
        names.append(name)
    return msgspec.structs.replace(
        configuration,
        instance=instance,
        members=tuple(_kubernetes_member(each, cluster.name, namespace) for each in names),
        coordination=CoordinationSection(kubernetes=kubernetes),
    )


def _kubernetes_member(name: str, cluster_name: str, namespace: str) -> MemberSection:
    return MemberSection(
        name=name,
        host=kubernetes_names.host_of(name, cluster_name, namespace),
        postgres_port=kubernetes_names.POSTGRES_PORT,
        http_port=kubernetes_names.HTTP_PORT,
    )


def _check_kubernetes(configuration: Configuration) -> list[str]:
    kubernetes, cluster = configuration.coordination.kubernetes, configuration.cluster
    if kubernetes is None:
        return []
    found = []
    if kubernetes_names.NAME_PATTERN.fullmatch(cluster.name) is None:
        found.append(
            f"cluster.name: {cluster.name!r} cannot name the pods: lower-case letters, digits and -, starting with a letter, "
            "50 at most"
        )
    elif kubernetes_names.ordinal_of(configuration.instance.name, cluster.name) is None:
        found.append(
            f"$POD_NAME: {configuration.instance.name!r} is no pod of the StatefulSet {cluster.name}, "
            f"whose pods are {cluster.name}-0 and so on; set it by the downward API (metadata.name)"
        )
    if not kubernetes.namespace:
        found.append(
            "coordination.kubernetes.namespace: is not known; set it, or $POD_NAMESPACE by the downward API "
            "(metadata.namespace)"
        )
    return found


def check(configuration: Configuration) -> tuple[str, ...]:
    """What is wrong although every type is right; each a sentence for the user."""
    found = [f"timings: {problem}" for problem in configuration.timings.problems()]
    if wrong_names := _check_kubernetes(configuration):
        # The members are named by these.
        return (*found, *wrong_names)
    names = [member.name for member in configuration.members]
    found += [
        f"members: {name!r} is no instance name: lower-case letters, digits and -, starting with a letter, 53 at most"
        for name in names
        if MEMBER_NAME_PATTERN.fullmatch(name) is None
    ]
    if len(set(names)) != len(names):
        found.append("members: every name must be there once")
    if configuration.instance.name not in names:
        found.append(f"instance.name: {configuration.instance.name!r} is not among members: {', '.join(names)}")
    wanted = configuration.cluster.synchronous_standbys
    if wanted is not None and wanted >= configuration.instances:
        found.append(
            f"cluster.synchronous_standbys: {wanted} needs at least {wanted + 1} members, there are {configuration.instances}"
        )
    if configuration.archive is not None:
        found += _check_archive(configuration.archive)
    # A Unix socket's path is limited to 107 bytes by the kernel.
    longest = configuration.socket_directory / f".s.PGSQL.{65535}.lock"
    if len(os.fsencode(longest)) > 107:
        found.append(
            f"instance.directory: {configuration.instance.directory} is too long for a Unix socket; use a shorter path"
        )
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(configuration.instance.run_as)
        except KeyError:
            found.append(
                f"instance.run_as: there is no user {configuration.instance.run_as!r}, and Postgres refuses to run as root"
            )
    return tuple(found)


def _check_archive(archive: ArchiveSection) -> list[str]:
    found = []
    if (archive.directory is None) == (archive.s3 is None):
        found.append("archive: give either directory or s3, and not both")
    if archive.directory is not None and not archive.directory.is_absolute():
        found.append(f"archive.directory: {archive.directory} must be an absolute path")
    if archive.server_name is not None and ARCHIVE_NAME_PATTERN.fullmatch(archive.server_name) is None:
        found.append(
            "archive.server_name: letters, digits, '.', '_' and '-', beginning with a letter or a digit, 100 at most"
        )
    levels = {"zstd": (1, 19), "lz4": (0, 16), "gzip": (0, 9), "none": None}[archive.codec]
    if archive.level is not None and (levels is None or not levels[0] <= archive.level <= levels[1]):
        found.append(
            f"archive.level: {archive.level} is no level of {archive.codec}"
            + (f" ({levels[0]} to {levels[1]})" if levels else "")
        )
    s3 = archive.s3
    if s3 is not None and s3.kms_key_id is not None and s3.server_side_encryption != "aws:kms":
        found.append("archive.s3.kms_key_id: needs server_side_encryption: aws:kms")
    if s3 is not None and s3.prefix and any(not ARCHIVE_NAME_PATTERN.fullmatch(part) for part in s3.prefix.split("/")):
        found.append(
            "archive.s3.prefix: names of letters, digits, '.', '_' and '-' with one / between them, none at the ends"
        )
    return found
