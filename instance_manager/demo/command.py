"""`instance-manager demo`: a real cluster on this machine, a live view of it, and the lines to try it with.

Exit codes: 0 ended by Ctrl-C or SIGTERM, and nothing was left; 1 the cluster did not come up, or something was left; 2
wrong use: ports in use, Postgres missing, a directory of something else.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import (
    ADMINISTRATOR,
    ArchivePlan,
    DirectoryUnusable,
    Layout,
    RecoveryPlan,
    archive_server_name,
    loopback_plan,
    ports_needed,
)
from instance_manager.demo.ports import PortsTaken, choose_base_port
from instance_manager.demo.prerequisites import missing_prerequisite
from instance_manager.demo.processes import now_s
from instance_manager.demo_locator import DemoLocatorError, RunningDemo, remove_running_demo, write_running_demo
from instance_manager.status import ClusterStatus
from instance_manager.status_view import render_status

START_DEADLINE_S = 120.0
VIEW_INTERVAL_S = 1.0
S3_LOGINS = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SHARED_CREDENTIALS_FILE")
_INSTANCES_MAX = 9
_WRONG_USE = 2
_LOG_LINE_CHARACTERS = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="keep the data here, and resume it the next time")
    parser.add_argument("--instances", type=int, metavar="N", help="how many (3)")
    parser.add_argument(
        "--base-port", type=int, metavar="P", help="first of two ports per instance; default: a free block"
    )
    parser.add_argument("--durability", choices=("preferred", "required", "asynchronous"), help="default: preferred")
    parser.add_argument("--tls", action="store_true", help="certificates for Postgres, peers and control")
    archive = parser.add_mutually_exclusive_group()
    archive.add_argument(
        "--s3",
        metavar="ENDPOINT/BUCKET",
        help="archive to this bucket, with credentials from the environment; default: a directory beside the data",
    )
    archive.add_argument("--no-archive", action="store_true", help="no WAL archive")
    recovery = parser.add_argument_group("a cluster from the archive of another one")
    recovery.add_argument(
        "--recover-from", metavar="DIR/SERVER", help="or ENDPOINT/BUCKET/SERVER; that archive is only read"
    )
    recovery.add_argument("--target-time", metavar="TIME", help="with its zone; by default all that is there")
    recovery.add_argument(
        "--accept-end",
        action="store_true",
        help="also where the archive ends before the target: nothing was committed since",
    )
    parser.add_argument("--no-view", action="store_true", help="no live view, only what changes")
    parser.add_argument("--yes", action="store_true", help="do not ask anything (nothing is asked at present)")


def run(namespace: argparse.Namespace) -> int:
    """Start, show, wait for the end, stop; returns the exit code."""
    if namespace.instances is not None and not 1 <= namespace.instances <= _INSTANCES_MAX:
        return _complain(f"--instances must be between 1 and {_INSTANCES_MAX}")
    if (missing := missing_prerequisite()) is not None:
        return _complain(missing)
    if (namespace.target_time is not None or namespace.accept_end) and namespace.recover_from is None:
        return _complain("--target-time and --accept-end are for --recover-from")
    if namespace.s3 is not None and (problem := _s3_problem(namespace.s3)) is not None:
        return _complain(problem)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _, __: stop.set())
    try:
        cluster = _cluster(namespace)
    except (DirectoryUnusable, PortsTaken) as error:
        return _complain(str(error))
    # Whatever comes, `close` runs: it stops every instance and removes a temporary directory.
    with cluster, _told(cluster):
        print(f"{len(cluster.names)} instances in {cluster.layout.directory}; Ctrl-C stops everything", flush=True)
        cluster.start_all()
        came_up = _show_start(cluster, stop)
        if came_up:
            _print_lines(cluster)
            _show(cluster, stop, view=not namespace.no_view and sys.stdout.isatty())
        print("\nstopping", flush=True)
        left = cluster.stop_all(tell=lambda text: print(text, flush=True))
        if left:
            print("still there:\n" + "\n".join(left), flush=True)
        else:
            print("every instance has stopped, and no process is left", flush=True)
    if namespace.data is not None:
        print(f"the data is kept in {cluster.layout.directory}; the same command resumes it", flush=True)
    return 0 if not left and (came_up or stop.is_set()) else 1


def _cluster(namespace: argparse.Namespace) -> LocalCluster:
    """New or resumed, with its ports checked. DirectoryUnusable, PortsTaken."""
    if namespace.data is not None and Layout(namespace.data).marker.exists():
        cluster = LocalCluster.resume(namespace.data)
        try:
            _check_unchanged(cluster, namespace)
            _check_ports(cluster)
        except Exception:
            cluster.close()
            raise
        return cluster
    instances = namespace.instances or 3
    plan = loopback_plan(
        instances=instances,
        base_port=choose_base_port(ports_needed(instances, tls=namespace.tls), namespace.base_port),
        durability=namespace.durability or "preferred",
        tls=namespace.tls,
        archive=_archive_plan(namespace),
        recovery=_recovery_plan(namespace),
    )
    return LocalCluster.create(plan) if namespace.data is None else LocalCluster.create_in(namespace.data, plan)


def _s3_problem(place: str) -> str | None:
    """Why it cannot be an endpoint and a bucket, or nobody could log in there."""
    endpoint, _, bucket = place.rpartition("/")
    if not re.fullmatch(r"https?://[^/]+", endpoint) or not bucket:
        return f"--s3 {place}: give the endpoint's URL and a bucket, such as https://minio.example:9000/backups"
    if not any(os.environ.get(name) for name in S3_LOGINS):
        return f"--s3: no credentials in the environment; set one of {', '.join(S3_LOGINS)}"
    return None


def _archive_plan(namespace: argparse.Namespace) -> ArchivePlan | None:
    if namespace.no_archive:
        return None
    if namespace.s3 is None:
        return ArchivePlan()
    endpoint, _, bucket = namespace.s3.rpartition("/")
    return ArchivePlan(endpoint=endpoint, bucket=bucket)


def _recovery_plan(namespace: argparse.Namespace) -> RecoveryPlan | None:
    """DirectoryUnusable: there is no such archive."""
    if namespace.recover_from is None:
        return None
    place, _, server_name = namespace.recover_from.rstrip("/").rpartition("/")
    end = {"server_name": server_name, "target_time": namespace.target_time, "accept_end": namespace.accept_end}
    if re.match("https?://", place):
        endpoint, _, bucket = place.rpartition("/")
        return RecoveryPlan(endpoint=endpoint, bucket=bucket, **end)
    if not (Path(place) / server_name / "wals").is_dir():
        raise DirectoryUnusable(f"--recover-from {namespace.recover_from}: there is no archive")
    return RecoveryPlan(directory=str(Path(place).absolute()), **end)


def _check_unchanged(cluster: LocalCluster, namespace: argparse.Namespace) -> None:
    """DirectoryUnusable: what is asked for is not what is there; nothing is silently ignored."""
    plan = cluster.plan
    for option, wanted, present in (
        ("--instances", namespace.instances, len(plan.members)),
        ("--durability", namespace.durability, plan.durability),
        ("--tls", namespace.tls or None, plan.tls),
        ("--base-port", namespace.base_port, plan.members[0].postgres_port),
    ):
        if wanted is not None and wanted != present:
            raise DirectoryUnusable(
                f"{cluster.layout.directory} was made with {option} {present}; leave it out, or use another directory"
            )
    if namespace.recover_from is not None:
        raise DirectoryUnusable(f"{cluster.layout.directory} holds a cluster already; recover into another directory")
    if (namespace.s3 is not None or namespace.no_archive) and _archive_plan(namespace) != plan.archive:
        raise DirectoryUnusable(
            f"{cluster.layout.directory} was made with another archive; leave --s3 and --no-archive out, or use another directory"
        )


def _check_ports(cluster: LocalCluster) -> None:
    if taken := cluster.taken_ports():
        raise PortsTaken(
            f"{cluster.layout.directory} was made for ports of which others use {', '.join(map(str, taken))} now; "
            "stop them, or start another demo elsewhere"
        )


@contextmanager
def _told(cluster: LocalCluster) -> Iterator[None]:
    """Other commands find this demo without being told where it is."""
    layout = cluster.layout
    try:
        write_running_demo(RunningDemo(layout.directory, {name: layout.control_socket(name) for name in cluster.names}))
    except DemoLocatorError as error:
        print(f"commands need --socket: {error}", file=sys.stderr)
    try:
        yield
    finally:
        remove_running_demo(layout.directory)


def _show_start(cluster: LocalCluster, stop: threading.Event) -> bool:
    """Tell what each instance does until all do their part; False when they did not in time."""
    ends_s = now_s() + START_DEADLINE_S
    began_s = now_s()
    shown: dict[str, str] = {}
    while not stop.is_set():
        statuses = cluster.statuses()
        for name in cluster.names:
            text = _progress(cluster, name, statuses.get(name))
            if shown.get(name) != text:
                shown[name] = text
                print(f"{now_s() - began_s:5.1f} s  {name}: {text}", flush=True)
        if cluster.why_not_redundant() is None:
            print(f"{now_s() - began_s:5.1f} s  the cluster is complete", flush=True)
            return True
        if now_s() >= ends_s:
            print(f"not complete within {START_DEADLINE_S:g} s: {cluster.why_not_redundant()}", flush=True)
            for name in cluster.names:
                print(f"{cluster.layout.log(name)}: {_last_line(cluster.layout.log(name))}", flush=True)
            return False
        stop.wait(0.3)
    return False


def _progress(cluster: LocalCluster, name: str, status: ClusterStatus | None) -> str:
    """What the instance does now: by its own word, else by its log."""
    if cluster.supervisor_pid(name) is None:
        return f"ended: {_last_line(cluster.layout.log(name))}"
    if status is None:
        return "starting"
    own = next((instance for instance in status.instances if instance.name == name), None)
    if own is None:
        return "starting"
    voter = ", votes" if own.voter else ""
    return own.operation or own.problem or f"{own.role}, Postgres {own.postgres}{voter}"


def _show(cluster: LocalCluster, stop: threading.Event, *, view: bool) -> None:
    """The live view on a terminal; elsewhere a line whenever the state changes."""
    before = ""
    while not stop.wait(VIEW_INTERVAL_S):
        for name in cluster.keep_running():
            print(f"{name} had ended and was started again", flush=True)
        status = cluster.primary_status() or next(iter(cluster.statuses().values()), None)
        if view:
            columns, lines = shutil.get_terminal_size()
            text = "no instance answers" if status is None else render_status(status, columns, height=lines - 10)
            print(f"\x1b[H\x1b[2J{text}\n\n{_lines(cluster)}", flush=True)
            continue
        text = "no instance answers" if status is None else _summary(status)
        if text != before:
            print(text, flush=True)
            before = text


def _summary(status: ClusterStatus) -> str:
    risks = "; ".join(status.at_risk) or "nothing at risk"
    return (
        f"primary {status.primary}, epoch {status.epoch}, timeline {status.timeline}, "
        f"{len(status.voters)} voters, q {status.quorum}: {risks}"
    )


def _print_lines(cluster: LocalCluster) -> None:
    print(f"\n{_lines(cluster)}\n", flush=True)


def _lines(cluster: LocalCluster) -> str:
    text = cluster.connection_string()
    return (
        f'psql "{text}"\n'
        f'pgbench -i -s 10 "{text}" && pgbench -c 4 -T 600 -P 5 "{text}"\n'
        "instance-manager status | switchover | drill --yes    (in another terminal)\n"
        f"{_recovery_line(cluster)}"
        f"{_line_of_control(cluster)}"
        f"logs: {cluster.layout.directory / 'logs'}    {_archive_told(cluster)}    Ctrl-C stops everything"
    )


def _recovery_line(cluster: LocalCluster) -> str:
    """How to get the state of ten seconds ago into a second cluster."""
    archive = cluster.plan.archive
    if archive is None:
        return ""
    place = f"{archive.endpoint}/{archive.bucket}" if archive.endpoint else str(cluster.layout.archive)
    ago = "\"$(date -u -d '10 seconds ago' '+%F %T+00')\""
    source = f"{place}/{archive_server_name(cluster.plan)}"
    return f"instance-manager demo --recover-from {source} --target-time {ago} --accept-end\n"


def _archive_told(cluster: LocalCluster) -> str:
    archive = cluster.plan.archive
    if archive is None:
        return "no archive"
    return f"archive: {archive.endpoint}/{archive.bucket}" if archive.endpoint else f"archive: {cluster.layout.archive}"


def _line_of_control(cluster: LocalCluster) -> str:
    member = cluster.plan.members[0]
    if member.control_port is None:
        return ""
    certificate = cluster.layout.certificates / "control" / ADMINISTRATOR
    return f"instance-manager status --host {member.host}:{member.control_port} --certificate {certificate}    (over the network)\n"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    return lines[-1][:_LOG_LINE_CHARACTERS] if lines else "its log is empty"


def _complain(text: str) -> int:
    print(f"instance-manager demo: {text}", file=sys.stderr)
    return _WRONG_USE
