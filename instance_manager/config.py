"""The whole configuration of one instance, as one validated, immutable model read from a YAML file.

Unknown keys, wrong types and unsound timings are errors that say where and what to do; nothing is guessed.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from instance_manager import kubernetes_names
from instance_manager.config_managed import ManagedSection, check_managed
from instance_manager.config_sections import (
    ARCHIVE_NAME_PATTERN,
    TAG_NAME_PATTERN,
    TIME_OF_DAY_PATTERN,
    ArchiveSection,
    BootstrapSection,
    ClusterSection,
    CoordinationSection,
    InstanceSection,
    MemberSection,
    MetricsSection,
    PostgresSection,
    RecoverySection,
    SecretsSection,
    Section,
)
from instance_manager.config_security import ControlSection, TlsSection, check_security
from instance_manager.core.timing import Timings
from instance_manager.core.types import MEMBER_NAME_PATTERN, MemberName

ROOM_ON_KUBERNETES = 9
TAGS_OF_PATRONI_ONLY = frozenset(
    ("clonefrom", "failover_priority", "nofailover", "nostream", "nosync", "replicatefrom", "sync_priority")
)
"""They decide something in Patroni and would decide nothing here."""


class ConfigurationError(Exception):
    """The configuration cannot be used; the text names the key and the mend."""


class Configuration(Section, frozen=True, kw_only=True):
    """As `load_configuration` returns it, everything that a default stands for is filled in."""

    cluster: ClusterSection
    instance: InstanceSection
    members: tuple[MemberSection, ...] = ()
    coordination: CoordinationSection
    secrets: SecretsSection
    postgres: PostgresSection = PostgresSection()
    archive: ArchiveSection | None = None
    bootstrap: BootstrapSection = BootstrapSection()
    tls: TlsSection | None = None
    control: ControlSection | None = None
    managed: ManagedSection = ManagedSection()
    timings: Timings = Timings()
    metrics: MetricsSection = MetricsSection()
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
    def log_directory(self) -> Path:
        """Files of Postgres's log, until they were told on standard output; never inside the data directory (P6)."""
        return self.instance.log_directory or self.instance.directory / "log"

    @property
    def certificates_directory(self) -> Path:
        """Copies of the proven certificates, for Postgres's user; beside the data, so that no backup takes them."""
        return self.state_directory / "tls"

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
        peer_port=kubernetes_names.PEER_PORT,
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
    found += _check_tags(configuration.instance.tags)
    wanted = configuration.cluster.synchronous_standbys
    if wanted is not None and wanted >= configuration.instances:
        found.append(
            f"cluster.synchronous_standbys: {wanted} needs at least {wanted + 1} members, there are {configuration.instances}"
        )
    if not configuration.log_directory.is_absolute():
        found.append(f"instance.log_directory: {configuration.log_directory} must be an absolute path")
    elif configuration.log_directory.is_relative_to(configuration.data_directory):
        found.append("instance.log_directory: must not be in the data directory, which a rewind or a clone replaces")
    if configuration.archive is not None:
        found += _check_archive(configuration.archive)
    bootstrap = configuration.bootstrap
    if bootstrap.replicas_from == "archive" and configuration.archive is None and bootstrap.recovery is None:
        found.append("bootstrap.replicas_from: there is no archive; give the section archive, or leave it at auto")
    if bootstrap.recovery is not None:
        found += _check_recovery(configuration, bootstrap.recovery)
    found += check_security(configuration.tls, configuration.control, configuration.members)
    if configuration.secrets.superuser_password is not None and not _postgres_has_tls(configuration):
        found.append("secrets.superuser_password: the superuser logs in over TLS only; set tls.postgres")
    found += check_managed(configuration.managed, configuration.postgres)
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


def _postgres_has_tls(configuration: Configuration) -> bool:
    return configuration.tls is not None and configuration.tls.for_postgres is not None


def _check_tags(tags: Mapping[str, object]) -> list[str]:
    found = []
    for name in tags:
        if TAG_NAME_PATTERN.fullmatch(name) is None:
            found.append(
                f"instance.tags: {name!r} is no tag's name: letters, digits, _ and -, beginning with a letter, 63 at most"
            )
        elif name in TAGS_OF_PATRONI_ONLY:
            found.append(
                f"instance.tags.{name}: has no effect here; leave it out (instance.priority says who is preferred)"
            )
    if not isinstance(tags.get("noloadbalance", False), bool):
        found.append("instance.tags.noloadbalance: is true or false")
    return found


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
    schedule = archive.backup.schedule
    if schedule is not None and (
        not schedule.at or not all(TIME_OF_DAY_PATTERN.fullmatch(each) for each in schedule.at)
    ):
        found.append("archive.backup.schedule.at: times of day in UTC, like ['03:00']")
    s3 = archive.s3
    if s3 is not None and s3.kms_key_id is not None and s3.server_side_encryption != "aws:kms":
        found.append("archive.s3.kms_key_id: needs server_side_encryption: aws:kms")
    if s3 is not None and s3.prefix and any(not ARCHIVE_NAME_PATTERN.fullmatch(part) for part in s3.prefix.split("/")):
        found.append(
            "archive.s3.prefix: names of letters, digits, '.', '_' and '-' with one / between them, none at the ends"
        )
    return found


def _check_recovery(configuration: Configuration, recovery: RecoverySection) -> list[str]:
    source, target, own = recovery.archive, recovery.target, configuration.archive
    found = [f"bootstrap.recovery.{problem}" for problem in _check_archive(source)]
    if source.server_name is None:
        found.append(
            "bootstrap.recovery.archive.server_name: is missing; it is the name of the cluster that the archive is of"
        )
    given = [each for each in (target.time, target.lsn, target.xid, target.name) if each is not None]
    if len(given) + target.immediate > 1:
        found.append("bootstrap.recovery.target: give at most one of time, lsn, xid, name and immediate")
    if own is not None and (
        (own.directory, own.s3, own.server_name or configuration.cluster.name)
        == (source.directory, source.s3, source.server_name)
    ):
        found.append(
            f"archive.server_name: {source.server_name!r} is the source's archive, which the new cluster must not write to; give "
            "another name"
        )
    return found
