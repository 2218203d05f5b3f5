"""The cluster of a drill, with the networks, volumes and clocks that its cases need, and the clients beside it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import msgspec

from instance_manager.config_sections import Durability
from instance_manager.demo import processes
from instance_manager.demo.cluster import Launch, LocalCluster
from instance_manager.demo.plan import APPLICATION, ArchivePlan, ClusterPlan, Layout, loopback_plan
from instance_manager.demo.ports import choose_base_port
from instance_manager.drill import clock, disk, network
from instance_manager.drill.checker import Row
from instance_manager.drill.clock import Clocks
from instance_manager.drill.disk import Volumes
from instance_manager.drill.network import Network

POSTGRES_PORT = 5432
HTTP_PORT = 8080
_CLIENT_DEADLINE_S = 60.0


class Need(StrEnum):
    """What a case needs beyond signals to processes."""

    NETWORK = "network"
    DISK = "disk"
    CLOCK = "clock"


class ClientsFailed(Exception):
    """The clients' process ended with an error; the text is its own."""


def why_unavailable(need: Need) -> str | None:
    """Why this machine cannot meet the need, for the user; None if it can."""
    match need:
        case Need.NETWORK:
            return network.why_unavailable()
        case Need.DISK:
            return disk.why_unavailable()
        case Need.CLOCK:
            return clock.why_unavailable()


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    cluster: LocalCluster
    work: Path
    """For histories and logs of clients."""
    network: Network | None = None
    volumes: Volumes | None = None
    clocks: Clocks | None = None

    def client_command(self, mode: str, *arguments: str, members: Sequence[str] | None = None) -> list[str]:
        """The clients' process, where the clients stand."""
        argv = [] if self.network is None else [*self.network.enter_clients()]
        argv += [sys.executable, "-m", "instance_manager.drill.client", mode]
        for name in members or self.cluster.names:
            member = self.cluster.plan.member(name)
            argv += ["--member", f"{name}={member.client_host}:{member.postgres_port}"]
        return [
            *argv,
            "--password-file",
            str(self.cluster.layout.password_file),
            "--user",
            APPLICATION,
            "--database",
            APPLICATION,
            *arguments,
        ]

    def prepare_table(self) -> None:
        """ClientsFailed: no primary took it."""
        self._run_client("prepare")

    def rows_of(self, name: str) -> Counter[Row]:
        """What the member holds. ClientsFailed."""
        answer = self._run_client("rows", members=[name])
        found = msgspec.json.decode(answer, type=list[tuple[int, int, int]])
        return Counter({(client, number): count for client, number, count in found})

    def _run_client(self, mode: str, members: Sequence[str] | None = None) -> bytes:
        try:
            done = subprocess.run(
                self.client_command(mode, members=members),
                capture_output=True,
                check=False,
                timeout=_CLIENT_DEADLINE_S,
            )
        except subprocess.TimeoutExpired as error:
            raise ClientsFailed(f"{mode}: no end within {_CLIENT_DEADLINE_S:g} s") from error
        if done.returncode != 0:
            raise ClientsFailed(done.stderr.decode(errors="replace").strip()[-1000:])
        return done.stdout

    @contextlib.contextmanager
    def clients(self, history: Path, *, count: int, interval_s: float) -> Iterator[subprocess.Popen[bytes]]:
        """The write probe and the sampler, until the end of the block."""
        argv = self.client_command(
            "run", "--output", str(history), "--clients", str(count), "--interval-s", str(interval_s)
        )
        with _background(argv, history.with_suffix(".log")) as process:
            yield process

    @contextlib.contextmanager
    def pgbench(self, *, scale: int) -> Iterator[None]:
        """pgbench through the printed connection string, until the end of the block."""
        program = shutil.which("pgbench")
        if program is None:
            raise ClientsFailed("pgbench is not installed (package postgresql)")
        argv = [] if self.network is None else [*self.network.enter_clients()]
        argv += [sys.executable, "-m", "instance_manager.drill.load", program]
        log = self.work / "pgbench.log"
        log.unlink(missing_ok=True)
        with _background([*argv, self.cluster.connection_string(), str(scale)], log):
            self.cluster.wait(lambda: b"ready" in log.read_bytes(), _CLIENT_DEADLINE_S, "pgbench has filled its tables")
            yield


@contextlib.contextmanager
def open_environment(
    needs: frozenset[Need], *, durability: Durability, archive: bool = False, say: Callable[[str], None]
) -> Iterator[Environment]:
    """A cluster of its own that is started and, whatever happens, ended and removed; with an archive in a directory beside it."""
    names = ("demo-1", "demo-2", "demo-3")
    with contextlib.ExitStack() as stack:
        plan = loopback_plan(
            instances=len(names),
            base_port=choose_base_port(6, None, spread=True),
            durability=durability,
            archive=ArchivePlan() if archive else None,
        )
        net: Network | None = None
        if Need.NETWORK in needs:
            net = Network(names)
            stack.callback(net.close)
            net.open()
            plan = _in_network(plan, net)
        cluster = LocalCluster.create(plan)
        stack.callback(cluster.close)
        layout = cluster.layout
        volumes: Volumes | None = None
        if Need.DISK in needs:
            volumes = Volumes(layout.directory / "volumes")
            stack.callback(volumes.close)
            volumes.open([(name, layout.instance(name)) for name in names])
        clocks = Clocks(layout.directory / "clock") if Need.CLOCK in needs else None
        for name in names:
            cluster.set_launch(
                name,
                Launch(
                    prefix=net.enter(name) if net is not None else (),
                    environment=clocks.open(name) if clocks is not None else {},
                    isolated=clocks is None,
                ),
            )
        work = layout.directory / "drill"
        work.mkdir()
        stack.callback(cluster.stop_all)
        if volumes is not None:
            stack.callback(_thaw_all, volumes, names)
        say(f"starting a cluster in {layout.directory}" + (f" with {', '.join(sorted(needs))}" if needs else ""))
        cluster.start_all()
        cluster.wait_redundant()
        yield Environment(cluster=cluster, work=work, network=net, volumes=volumes, clocks=clocks)


@contextlib.contextmanager
def attach_environment(directory: Path) -> Iterator[Environment]:
    """The cluster of a running demo, and files of ours beside it."""
    cluster = LocalCluster.attach(directory)
    work = Layout(directory).directory / f"drill-{secrets.token_hex(4)}"
    work.mkdir()
    try:
        yield Environment(cluster=cluster, work=work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _thaw_all(volumes: Volumes, names: Sequence[str]) -> None:
    for name in names:
        volumes.thaw(name)


def _in_network(plan: ClusterPlan, net: Network) -> ClusterPlan:
    members = tuple(
        replace(
            member,
            host=net.peers_address(member.name),
            client_host=net.clients_address(member.name),
            listen_host="0.0.0.0",  # noqa: S104 - all of a namespace that holds nothing else
            postgres_port=POSTGRES_PORT,
            http_port=HTTP_PORT,
        )
        for member in plan.members
    )
    return replace(plan, members=members, application_networks=("127.0.0.1/32", network.CLIENTS_NETWORK))


@contextlib.contextmanager
def _background(argv: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(os.environ),
            preexec_fn=processes.end_with_parent(signal.SIGTERM),
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
