"""A real cluster on this machine: one supervisor per instance, each with its agent and its Postgres.

Used by the demo, the drill and the tests. It starts and ends whole instances, and tells what they say of themselves; what
happens inside is the instances' own business. Everything here blocks, with deadlines; the instances end with the thread
that started them, so use it from the main thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from instance_manager.config import load_configuration
from instance_manager.demo import processes, status_client
from instance_manager.demo.plan import (
    APPLICATION,
    ClusterPlan,
    DirectoryUnusable,
    Layout,
    check_reachable,
    connect_store,
    loopback_plan,
    read_plan,
    write_files,
)
from instance_manager.demo.ports import choose_base_port, ports_in_use
from instance_manager.demo.processes import InstanceProcesses, now_s
from instance_manager.launch import prepare_directories, supervisor_argv
from instance_manager.status import ClusterStatus
from instance_manager.supervisor import fence
from instance_manager.supervisor.fence import Process
from instance_manager.supervisor.processes import become_subreaper

STOP_DEADLINE_S = 20.0
QUIT_DEADLINE_S = 3.0
KILL_DEADLINE_S = 5.0
STATUS_TIMEOUT_S = 1.0
_POLL_S = 0.1
_RESTART_AFTER_S = 10.0

T = TypeVar("T")


class NotInTime(Exception):
    """What was waited for did not come; the text says what."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How one instance's supervisor is started, where it is not started plainly."""

    prefix: tuple[str, ...] = ()
    """Before the command: a network namespace to enter."""
    environment: Mapping[str, str] = field(default_factory=dict)
    isolated: bool = True
    """False: its Python obeys the environment's PYTHONPATH, as a faked clock needs."""


class LocalCluster:
    """A running or stopped cluster in one directory. As a context manager it stops everything at the end."""

    def __init__(
        self,
        directory: Path,
        plan: ClusterPlan,
        *,
        temporary: bool,
        attached: bool = False,
        launches: Mapping[str, Launch] | None = None,
    ) -> None:
        self.layout = Layout(directory)
        self.plan = plan
        self._temporary = temporary
        self._attached = attached
        self._launches = dict(launches or {})
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._gone_since_s: dict[str, float] = {}
        self._seen: dict[int, Process] = {}
        self._lock_fd: int | None = None

    # --- making one ---

    @classmethod
    def create(
        cls,
        plan: ClusterPlan | None = None,
        *,
        launches: Mapping[str, Launch] | None = None,
        below: Path | None = None,
    ) -> LocalCluster:
        """A new cluster in a temporary directory `below`, or in /tmp; by default three instances on free ports of loopback."""
        if plan is None:
            plan = loopback_plan(instances=3, base_port=choose_base_port(6, None, spread=True))
        directory = Path(tempfile.mkdtemp(prefix="instance-manager-", dir=below or "/tmp"))  # noqa: S108
        try:
            cluster = cls(directory, plan, temporary=True, launches=launches)
            write_files(cluster.layout, plan)
            cluster._own()
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return cluster

    @classmethod
    def create_in(cls, directory: Path, plan: ClusterPlan) -> LocalCluster:
        """A new cluster in a directory that is kept. DirectoryUnusable: it holds something else."""
        directory = directory.absolute()
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise DirectoryUnusable(f"{directory} is there and not empty, and is no cluster of ours")
        check_reachable(directory)
        cluster = cls(directory, plan, temporary=False)
        write_files(cluster.layout, plan)
        cluster._own()
        return cluster

    @classmethod
    def resume(cls, directory: Path) -> LocalCluster:
        """A cluster that was made before and is not running. DirectoryUnusable; PortsTaken is checked by the caller."""
        directory = directory.absolute()
        cluster = cls(directory, read_plan(Layout(directory)), temporary=False)
        check_reachable(directory)
        cluster._own()
        for name in cluster.names:
            connect_store(cluster.layout, name)
        return cluster

    @classmethod
    def attach(cls, directory: Path) -> LocalCluster:
        """The cluster that another process, a demo, runs in `directory`: it restarts what this one asks for."""
        return cls(directory, read_plan(Layout(directory)), temporary=False, attached=True)

    def _own(self) -> None:
        """One demo per directory. DirectoryUnusable when another has it."""
        descriptor = os.open(self.layout.directory / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DirectoryUnusable(f"{self.layout.directory}: another demo runs this cluster already") from None
        self._lock_fd = descriptor
        become_subreaper()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- facts ---

    @property
    def names(self) -> tuple[str, ...]:
        return self.plan.names

    @property
    def is_attached(self) -> bool:
        return self._attached

    def taken_ports(self) -> tuple[int, ...]:
        """Ports of the plan that another program uses; to be asked before a start, on loopback only."""
        ports = [port for member in self.plan.members for port in member.ports]
        return tuple(port for port in sorted(ports) if ports_in_use(range(port, port + 1)))

    def connection_string(self) -> str:
        """libpq's, over all members."""
        hosts = ",".join(member.client_host for member in self.plan.members)
        ports = ",".join(str(member.postgres_port) for member in self.plan.members)
        return (
            f"host={hosts} port={ports} target_session_attrs=read-write dbname={APPLICATION} user={APPLICATION} "
            f"passfile={self.layout.password_file}"
        )

    def supervisor_pid(self, name: str) -> int | None:
        """Of the living supervisor; None when there is none."""
        if self._attached:
            try:
                pid = int((self.layout.pids / name).read_text(encoding="ascii"))
            except (OSError, ValueError):
                return None
            return pid if str(self.layout.config(name)) in processes.title_of(pid) or _is_supervisor(pid) else None
        process = self._started.get(name)
        return process.pid if process is not None and process.poll() is None else None

    def processes(self, name: str) -> InstanceProcesses:
        """One look at the instance's processes."""
        found = processes.look(self.supervisor_pid(name), self.layout.data(name))
        self._seen.update((process.pid, process) for process in found.everything)
        return found

    def status(self, name: str, *, timeout_s: float = STATUS_TIMEOUT_S) -> ClusterStatus | None:
        """What the instance tells; None when it does not answer."""
        member = self.plan.member(name)
        told = None
        if self._launches.get(name, Launch()).prefix == ():
            told = status_client.status_over_tcp(member.host, member.http_port, timeout_s=timeout_s)
        if told is None and self.layout.control_socket(name).exists():
            told = status_client.status_over_socket(self.layout.control_socket(name), timeout_s=timeout_s)
        return told

    def statuses(self) -> dict[str, ClusterStatus]:
        """Of every instance that answers."""
        told = {name: self.status(name) for name in self.names}
        return {name: status for name, status in told.items() if status is not None}

    def primary_status(self) -> ClusterStatus | None:
        """What the primary itself says, if one says that it is and no other says so of a later epoch."""
        own = [status for status in self.statuses().values() if status.primary == status.told_by]
        return max(own, key=lambda status: status.epoch or 0, default=None)

    def primary(self) -> str | None:
        status = self.primary_status()
        return None if status is None else status.primary

    def standbys(self) -> tuple[str, ...]:
        primary = self.primary()
        return tuple(name for name in self.names if name != primary)

    def why_not_redundant(self) -> str | None:
        """What is missing to full redundancy, in words; None when every instance does its part."""
        return why_not_redundant(self.primary_status(), standbys=len(self.names) - 1)

    # --- starting ---

    def set_launch(self, name: str, launch: Launch) -> None:
        """How the instance is started from now on."""
        self._launches[name] = launch

    def start(self, name: str) -> None:
        """Start the instance's supervisor, or have the demo start it. RuntimeError: it runs already."""
        if self.supervisor_pid(name) is not None:
            raise RuntimeError(f"{name} runs already")
        self._gone_since_s.pop(name, None)
        if self._attached:
            (self.layout.requests / f"stay-away-{name}").unlink(missing_ok=True)
            (self.layout.requests / f"start-{name}").touch()
            self.wait(lambda: self.supervisor_pid(name), 10, f"the demo starts {name}")
            return
        self.reap_orphans()
        launch = self._launches.get(name, Launch())
        config = self.layout.config(name)
        argv = [*launch.prefix, sys.executable, "-m", "instance_manager", "run", "--config", str(config)]
        if not launch.isolated:
            configuration = load_configuration(config)
            prepare_directories(configuration)
            argv = [*launch.prefix, *(each for each in supervisor_argv(configuration, config) if each != "-I")]
        # SIGQUIT: if this process dies, the supervisor kills its Postgres at once and sees that nothing is left.
        with self.layout.log(name).open("ab") as log:
            self._started[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={**os.environ, **launch.environment},
                start_new_session=True,
                preexec_fn=processes.end_with_parent(signal.SIGQUIT),
            )
        (self.layout.pids / name).write_text(str(self._started[name].pid), encoding="ascii")

    def start_all(self) -> None:
        for name in self.names:
            self.start(name)

    def keep_running(self) -> tuple[str, ...]:
        """For a demo's loop: do what a drill asked for, and restart what ended by itself, as a kubelet would."""
        restarted = []
        self.reap_children()
        for name in self.names:
            if self.supervisor_pid(name) is not None:
                continue
            self._gone_since_s.setdefault(name, now_s())
            asked = self.layout.requests / f"start-{name}"
            stays_away = (self.layout.requests / f"stay-away-{name}").exists()
            is_due = now_s() - self._gone_since_s[name] >= _RESTART_AFTER_S
            if asked.exists() or (is_due and not stays_away):
                asked.unlink(missing_ok=True)
                self.start(name)
                restarted.append(name)
        return tuple(restarted)

    def reap_children(self) -> None:
        """Collect every dead child that is no supervisor, for a process that has no other children.

        A drill in another process kills instances whose orphans become ours: an unreaped postmaster looks alive to the
        next one, which then refuses to start over its postmaster.pid.
        """
        started = {process.pid for process in self._started.values()}
        own_pid = os.getpid()
        dead = [p for p in fence.read_processes().values() if p.ppid == own_pid and p.is_dead and p.pid not in started]
        processes.reap(dead)

    # --- ending ---

    def kill(self, name: str, *, budget_s: float = KILL_DEADLINE_S) -> None:
        """SIGKILL to supervisor, agent and all of Postgres at once, as when a machine loses its power. It stays away."""
        if self._attached:
            (self.layout.requests / f"stay-away-{name}").touch()
        first = self.processes(name)
        # The supervisor first, in the same breath: it would restart the others.
        processes.send(sorted(first.everything, key=lambda process: process != first.supervisor), signal.SIGKILL)
        known = {process.pid: process for process in first.everything}

        def left() -> list[Process]:
            for process in self.processes(name).everything:
                known.setdefault(process.pid, process)
            return list(known.values())

        processes.kill_until_gone(left, budget_s)
        if (process := self._started.get(name)) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(budget_s)
        self.reap_orphans()

    def stop(self, name: str, *, deadline_s: float = STOP_DEADLINE_S) -> int | None:
        """SIGTERM, as a kubelet sends it; killed at the deadline. The supervisor's exit code."""
        process = self._started.get(name)
        if process is None:
            return None
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill(name)
            return process.poll()

    def stop_all(
        self, *, deadline_s: float = STOP_DEADLINE_S, tell: Callable[[str], None] = lambda _: None
    ) -> tuple[str, ...]:
        """End every instance, orderly if it can be; what is left of them after that, in words (nothing, one hopes)."""
        running = {name: process for name, process in self._started.items() if process.poll() is None}
        for name in running:
            processes.send(self.processes(name).everything, signal.SIGCONT)
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for number, patience_s in ((None, deadline_s), (signal.SIGQUIT, QUIT_DEADLINE_S)):
            late = [name for name, process in running.items() if process.poll() is None]
            if number is not None and late:
                tell(f"{', '.join(late)} did not stop in {deadline_s:g} s: killing")
                for name in late:
                    running[name].send_signal(number)
            with contextlib.suppress(NotInTime):
                self.wait(lambda: all(process.poll() is not None for process in running.values()), patience_s, "stop")
        for name in self._started:
            self.kill(name)
        return tuple(
            f"{name}: process {process.pid} ({processes.title_of(process.pid)})"
            for name in self._started
            for process in self.processes(name).everything
        )

    def close(self) -> None:
        """Stop everything; remove the directory if it is temporary. An attached cluster is left as it is."""
        if self._attached:
            return
        self.stop_all()
        for name in self.names:
            (self.layout.pids / name).unlink(missing_ok=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
        if self._temporary:
            shutil.rmtree(self.layout.directory, ignore_errors=True)

    def reap_orphans(self) -> None:
        """Collect dead processes of instances whose supervisor died before them: they became our children."""
        started = {process.pid for process in self._started.values()}
        for pid in [pid for pid in self._seen if pid not in started]:
            try:
                ended, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                if not Path(f"/proc/{pid}").exists():
                    del self._seen[pid]
                continue
            if ended:
                del self._seen[pid]

    # --- waiting ---

    def wait(self, condition: Callable[[], T], deadline_s: float, what: str, *, poll_s: float = _POLL_S) -> T:
        """Ask until the answer is true. NotInTime."""
        ends_s = now_s() + deadline_s
        while True:
            answer = condition()
            if answer:
                return answer
            if now_s() >= ends_s:
                raise NotInTime(f"not within {deadline_s:g} s: {what}")
            time.sleep(poll_s)

    def wait_primary(self, deadline_s: float = 60.0) -> str:
        """Until one instance says that it is the primary and lets clients in; its name."""

        def ready() -> str | None:
            status = self.primary_status()
            return status.primary if status is not None and status.accepts_clients else None

        found = self.wait(ready, deadline_s, "a primary that lets clients in")
        assert found is not None  # noqa: S101
        return found

    def wait_redundant(self, deadline_s: float = 120.0) -> str:
        """Until every instance does its part; the primary's name. NotInTime says what was missing."""
        reason: str | None = "nobody was asked"

        def ready() -> bool:
            nonlocal reason
            reason = self.why_not_redundant()
            return reason is None

        try:
            self.wait(ready, deadline_s, "full redundancy", poll_s=0.2)
        except NotInTime as error:
            raise NotInTime(f"{error}: {reason}") from None
        primary = self.primary()
        return primary if primary is not None else self.wait_primary(5.0)


def _is_supervisor(pid: int) -> bool:
    return "instance_manager.supervisor" in processes.title_of(pid)


def why_not_redundant(status: ClusterStatus | None, *, standbys: int) -> str | None:
    """By what the primary says: what it lacks to as many standbys that do their part; None when nothing."""
    if status is None:
        return "no instance says that it is the primary"
    if not status.accepts_clients:
        return f"{status.primary} does not let clients in yet"
    for instance in status.instances:
        if not instance.reachable:
            return f"{status.primary} does not reach {instance.name}"
        if instance.name != status.primary and (instance.role != "standby" or instance.postgres != "running"):
            return f"{instance.name} is {instance.role}, its Postgres {instance.postgres}"
    if status.durability != "asynchronous" and (
        len(status.voters) < standbys or (status.quorum or 0) < min(status.synchronous_wanted, standbys)
    ):
        return f"{len(status.voters)} of {standbys} voters, q {status.quorum}"
    return None
