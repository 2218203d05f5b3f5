"""What a cluster on one machine consists of, and its files: one directory, written once, found again by its marker."""

from __future__ import annotations

import os
import pwd
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import yaml

from instance_manager.codec import from_json, to_json
from instance_manager.config_sections import Durability, ReplicasFrom

MARKER = "instance-manager-cluster.json"
APPLICATION = "app"
ADMINISTRATOR = "admin"
"""Whose certificate may control the instances of a demo with TLS."""


class DirectoryUnusable(Exception):
    """The directory cannot hold the cluster; the text says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberPlan:
    name: str
    host: str
    """Address for the peers."""
    postgres_port: int
    http_port: int
    client_host: str
    """Address for applications; another network than the peers' in a drill."""
    listen_host: str | None = None
    peer_port: int | None = None
    """With TLS only, as `control_port`."""
    control_port: int | None = None

    @property
    def ports(self) -> tuple[int, ...]:
        every = (self.postgres_port, self.http_port, self.peer_port, self.control_port)
        return tuple(port for port in every if port is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivePlan:
    """A directory beside the instances; with `endpoint`, a bucket there, with credentials from the environment."""

    endpoint: str | None = None
    bucket: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """The archive of another cluster, from which this one begins."""

    directory: str | None = None
    endpoint: str | None = None
    bucket: str = ""
    server_name: str
    target_time: str | None = None
    accept_end: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    name: str
    uid: str
    durability: Durability
    members: tuple[MemberPlan, ...]
    application_networks: tuple[str, ...] = ("127.0.0.1/32",)
    bin_directory: str | None = None
    parameters: tuple[tuple[str, str], ...] = ()
    tls: bool = False
    """Certificates for everything, by an authority of its own."""
    managed: str = ""
    """The section `managed` of every instance, as YAML; for tests."""
    archive: ArchivePlan | None = None
    recovery: RecoveryPlan | None = None
    replicas_from: ReplicasFrom = "auto"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    def member(self, name: str) -> MemberPlan:
        return next(member for member in self.members if member.name == name)


def loopback_plan(
    *,
    instances: int,
    base_port: int,
    durability: Durability = "preferred",
    bin_directory: str | None = None,
    parameters: tuple[tuple[str, str], ...] = (),
    tls: bool = False,
    managed: str = "",
    archive: ArchivePlan | None = None,
    recovery: RecoveryPlan | None = None,
    replicas_from: ReplicasFrom = "auto",
) -> ClusterPlan:
    """Members demo-1, demo-2, ... on 127.0.0.1: Postgres from `base_port` on, HTTP on the ports after those; see `ports_needed`."""
    members = tuple(
        MemberPlan(
            name=f"demo-{number + 1}",
            host="127.0.0.1",
            client_host="127.0.0.1",
            postgres_port=base_port + number,
            http_port=base_port + instances + number,
            peer_port=base_port + 2 * instances + number if tls else None,
            control_port=base_port + 3 * instances + number if tls else None,
        )
        for number in range(instances)
    )
    return ClusterPlan(
        name="demo",
        uid=secrets.token_hex(8),
        durability=durability,
        members=members,
        bin_directory=bin_directory,
        parameters=parameters,
        tls=tls,
        managed=managed,
        archive=archive,
        recovery=recovery,
        replicas_from=replicas_from,
    )


def ports_needed(instances: int, *, tls: bool) -> int:
    """In a row, by `loopback_plan`."""
    return (4 if tls else 2) * instances


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a cluster is."""

    directory: Path

    @property
    def marker(self) -> Path:
        return self.directory / MARKER

    @property
    def store(self) -> Path:
        return self.directory / "store"

    @property
    def archive(self) -> Path:
        """Where the WAL goes, unless it is a bucket."""
        return self.directory / "archive"

    @property
    def locks(self) -> Path:
        return self.directory / "locks"

    @property
    def secrets(self) -> Path:
        return self.directory / "secrets"

    @property
    def certificates(self) -> Path:
        return self.directory / "certificates"

    @property
    def requests(self) -> Path:
        """Wishes of a drill to the demo that runs this cluster."""
        return self.directory / "requests"

    @property
    def pids(self) -> Path:
        return self.directory / "pids"

    @property
    def password_file(self) -> Path:
        """For applications, in libpq's format."""
        return self.directory / "pgpass"

    def store_link(self, name: str) -> Path:
        """Through it one instance reaches the store; a drill lets it point nowhere."""
        return self.directory / "stores" / name

    def instance(self, name: str) -> Path:
        return self.directory / name

    def data(self, name: str) -> Path:
        return self.instance(name) / "data"

    def control_socket(self, name: str) -> Path:
        return self.instance(name) / "control.sock"

    def config(self, name: str) -> Path:
        return self.directory / "config" / f"{name}.yaml"

    def log(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"


def write_files(layout: Layout, plan: ClusterPlan) -> None:
    """Make every directory, secret and configuration file; the marker last, so that half a cluster is never resumed."""
    layout.directory.mkdir(parents=True, exist_ok=True)
    layout.directory.chmod(0o755)
    for directory in (layout.store, layout.locks, layout.requests, layout.pids):
        directory.mkdir(mode=0o700, exist_ok=True)
    for name in ("config", "logs", "stores"):
        (layout.directory / name).mkdir(mode=0o755, exist_ok=True)
    layout.secrets.mkdir(mode=0o700, exist_ok=True)
    if plan.archive is not None and plan.archive.endpoint is None:
        layout.archive.mkdir(mode=0o700, exist_ok=True)
    for name in ("peer-token", "replication", "application", "monitoring"):
        _write_private(layout.secrets / name, secrets.token_urlsafe(24))
    password = (layout.secrets / "application").read_text(encoding="utf-8")
    _write_private(layout.password_file, f"*:*:{APPLICATION}:{APPLICATION}:{password}\n")
    if plan.tls:
        _make_certificates(layout, plan)
    for member in plan.members:
        connect_store(layout, member.name)
        layout.instance(member.name).mkdir(mode=0o755, exist_ok=True)
        layout.config(member.name).write_text(configuration_text(layout, plan, member), encoding="utf-8")
    layout.marker.write_bytes(to_json(plan))


def read_plan(layout: Layout) -> ClusterPlan:
    """DirectoryUnusable: not one of our directories, or not readable."""
    try:
        return from_json(layout.marker.read_bytes(), ClusterPlan)
    except FileNotFoundError:
        raise DirectoryUnusable(
            f"{layout.directory} was not made by `instance-manager demo` (no {MARKER} in it); "
            "give an empty or new directory"
        ) from None
    except (OSError, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise DirectoryUnusable(f"{layout.marker}: {error}") from error


def check_reachable(directory: Path) -> None:
    """DirectoryUnusable where Postgres's own user could not enter: every parent must let others through."""
    if os.geteuid() != 0:
        return
    for parent in directory.resolve().parents:
        if not parent.stat().st_mode & 0o001:
            raise DirectoryUnusable(
                f"the user postgres cannot enter {parent}, and Postgres does not run as root: "
                "give --data a directory elsewhere, such as below /var/tmp"
            )


def connect_store(layout: Layout, name: str) -> None:
    """Let the instance reach the store."""
    _point(layout.store_link(name), layout.store)


def disconnect_store(layout: Layout, name: str) -> None:
    """Cut the instance off from the store: for it the directory does not exist."""
    _point(layout.store_link(name), layout.directory / "store-is-unreachable")


def configuration_text(layout: Layout, plan: ClusterPlan, me: MemberPlan) -> str:
    """The instance's YAML file."""
    instance: dict[str, object] = {"name": me.name, "directory": str(layout.instance(me.name))}
    if me.listen_host is not None:
        instance["listen_host"] = me.listen_host
    postgres: dict[str, object] = {
        "parameters": dict(plan.parameters),
        "application_networks": list(plan.application_networks),
        "application_database": APPLICATION,
        "application_owner": APPLICATION,
    }
    if plan.bin_directory is not None:
        postgres["bin_directory"] = plan.bin_directory
    content: dict[str, object] = {
        "cluster": {"name": plan.name, "uid": plan.uid, "durability": plan.durability},
        "instance": instance,
        "members": [_member_content(member) for member in plan.members],
        "coordination": {"local": {"directory": str(layout.store_link(me.name)), "locks_directory": str(layout.locks)}},
        "secrets": {
            "peer_token": str(layout.secrets / "peer-token"),
            "replication_password": str(layout.secrets / "replication"),
            "application_password": str(layout.secrets / "application"),
            "monitoring_password": str(layout.secrets / "monitoring"),
        },
        "postgres": postgres,
    }
    if plan.tls:
        content["tls"] = {
            "directory": str(layout.certificates / "members" / me.name),
            "replication": str(layout.certificates / "replication"),
        }
        content["control"] = {"listen": f"{me.host}:{me.control_port}", "allowed_names": [ADMINISTRATOR]}
    if plan.managed:
        content["managed"] = yaml.safe_load(plan.managed)
    if plan.archive is not None:
        # A moment of every day lies behind: the first backup is taken at once.
        backup = {"schedule": {"at": ["03:00"]}, "retention": {"count": 7}}
        content["archive"] = {**_archive_section(layout, plan, plan.archive), "backup": backup}
    bootstrap: dict[str, object] = {"replicas_from": plan.replicas_from}
    if plan.recovery is not None:
        bootstrap["recovery"] = _recovery_section(plan.recovery)
    content["bootstrap"] = bootstrap
    return yaml.safe_dump(content, sort_keys=False)


def _archive_section(layout: Layout, plan: ClusterPlan, archive: ArchivePlan) -> dict[str, object]:
    if archive.endpoint is None:
        return {"directory": str(layout.archive)}
    return {
        "s3": {"endpoint": archive.endpoint, "bucket": archive.bucket, "path_style": True},
        # The bucket outlives the cluster, and each cluster has an archive of its own.
        "server_name": archive_server_name(plan),
    }


def archive_server_name(plan: ClusterPlan) -> str:
    """The archive's name in its store."""
    return plan.name if plan.archive is None or plan.archive.endpoint is None else f"{plan.name}-{plan.uid[:8]}"


def _recovery_section(recovery: RecoveryPlan) -> dict[str, object]:
    s3 = {"endpoint": recovery.endpoint, "bucket": recovery.bucket, "path_style": True}
    where: dict[str, object] = {"directory": recovery.directory} if recovery.endpoint is None else {"s3": s3}
    section: dict[str, object] = {
        "archive": {**where, "server_name": recovery.server_name},
        "accept_end": recovery.accept_end,
    }
    if recovery.target_time is not None:
        section["target"] = {"time": recovery.target_time}
    return section


def _member_content(member: MemberPlan) -> dict[str, object]:
    content: dict[str, object] = {
        "name": member.name,
        "host": member.host,
        "postgres_port": member.postgres_port,
        "http_port": member.http_port,
    }
    if member.peer_port is not None:
        content["peer_port"] = member.peer_port
    return content


def _make_certificates(layout: Layout, plan: ClusterPlan) -> None:
    # Only here: the package that makes certificates is an extra, and no instance needs it.
    try:
        from instance_manager import certificates
    except ImportError as error:
        raise DirectoryUnusable(
            f"certificates cannot be made ({error}): pip install 'instance-manager[certificates]'"
        ) from error
    wanted = [certificates.member(member.name, (member.host,)) for member in plan.members]
    certificates.make(
        layout.certificates,
        [*wanted, certificates.REPLICATION, certificates.user(ADMINISTRATOR)],
        cluster=plan.name,
        renew=False,
    )


def has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def with_durability(plan: ClusterPlan, durability: Durability) -> ClusterPlan:
    return replace(plan, durability=durability)


def _point(link: Path, target: Path) -> None:
    new = link.with_name(f"{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


def _write_private(path: Path, content: str) -> None:
    if path.exists():
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
