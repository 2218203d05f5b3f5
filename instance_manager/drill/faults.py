"""One class per fault. `inject` does it, `heal` undoes it; `heal` may be called at any time and more than once."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import connect_store, disconnect_store
from instance_manager.demo.processes import InstanceProcesses
from instance_manager.drill.clock import Clocks
from instance_manager.drill.disk import Volumes
from instance_manager.drill.network import Network
from instance_manager.supervisor.fence import Process

Selector = Callable[[InstanceProcesses], Iterable[Process | None]]


class CannotInject(Exception):
    """What should be hit is not there; the text says what."""


class Fault(Protocol):
    @property
    def text(self) -> str:
        """What it does, for the log of the random case."""
        ...

    def inject(self) -> None: ...

    def heal(self) -> None: ...


def agent_of(found: InstanceProcesses) -> list[Process | None]:
    return [found.agent]


def postmaster_of(found: InstanceProcesses) -> list[Process | None]:
    return [found.postmaster]


def supervisor_and_agent_of(found: InstanceProcesses) -> list[Process | None]:
    return [found.supervisor, found.agent]


def one_client_backend_of(found: InstanceProcesses) -> list[Process | None]:
    """The backend of one application's session."""
    backends = found.children_of_postmaster("app app ")
    return [backends[0] if backends else None]


def walsenders_of(found: InstanceProcesses) -> list[Process | None]:
    return list(found.children_of_postmaster("walsender"))


class KillInstance:
    """SIGKILL to supervisor, agent and all of Postgres at once; healed by a start."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self._cluster, self._name = cluster, name
        self._is_down = False
        self.text = f"kill all of {name}"

    def inject(self) -> None:
        self._is_down = True
        self._cluster.kill(self._name)

    def heal(self) -> None:
        if self._is_down:
            self._is_down = False
            self._cluster.start(self._name)


class KillProcesses:
    """SIGKILL to some processes of an instance; nothing to heal: the instance does it."""

    def __init__(self, cluster: LocalCluster, name: str, select: Selector, what: str) -> None:
        self._cluster, self._name, self._select, self._what = cluster, name, select, what
        self.text = f"kill the {what} of {name}"

    def inject(self) -> None:
        processes.send(_present(self._cluster, self._name, self._select, self._what), signal.SIGKILL)

    def heal(self) -> None:
        pass


class StopProcesses:
    """SIGSTOP; healed by SIGCONT to those of them that are still there."""

    def __init__(self, cluster: LocalCluster, name: str, select: Selector, what: str) -> None:
        self._cluster, self._name, self._select, self._what = cluster, name, select, what
        self._stopped: tuple[Process, ...] = ()
        self.text = f"stop the {what} of {name}"

    def inject(self) -> None:
        self._stopped = _present(self._cluster, self._name, self._select, self._what)
        processes.send(self._stopped, signal.SIGSTOP)

    def heal(self) -> None:
        processes.send(self._stopped, signal.SIGCONT)
        self._stopped = ()


class StoreAway:
    """The coordination store does not exist for these instances."""

    def __init__(self, cluster: LocalCluster, names: Sequence[str]) -> None:
        self._cluster, self._names = cluster, tuple(names)
        self.text = f"store away for {', '.join(names)}"

    def inject(self) -> None:
        for name in self._names:
            disconnect_store(self._cluster.layout, name)

    def heal(self) -> None:
        for name in self._names:
            connect_store(self._cluster.layout, name)


class DestroyDirectory:
    """The instance is killed and everything on its volume deleted; healed by a start."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self._cluster, self._name = cluster, name
        self._kill = KillInstance(cluster, name)
        self.text = f"destroy the directory of {name}"

    def inject(self) -> None:
        self._kill.inject()
        for entry in self._cluster.layout.instance(self._name).iterdir():
            _remove(entry)

    def heal(self) -> None:
        self._kill.heal()


class CutFromPeersAndStore:
    """Only its clients still reach it."""

    def __init__(self, cluster: LocalCluster, network: Network, name: str) -> None:
        self._network, self._name = network, name
        self._store = StoreAway(cluster, [name])
        self.text = f"cut {name} off from peers and store"

    def inject(self) -> None:
        self._network.cut_from_peers(self._name)
        self._store.inject()

    def heal(self) -> None:
        self._network.join_peers(self._name)
        self._store.heal()


class CutPair:
    def __init__(self, network: Network, one: str, other: str) -> None:
        self._network, self._one, self._other = network, one, other
        self.text = f"cut {one} off from {other}"

    def inject(self) -> None:
        self._network.cut_pair(self._one, self._other)

    def heal(self) -> None:
        self._network.join_pair(self._one, self._other)


class DiskStall:
    def __init__(self, volumes: Volumes, name: str) -> None:
        self._volumes, self._name = volumes, name
        self.text = f"stall the disk of {name}"

    def inject(self) -> None:
        self._volumes.freeze(self._name)

    def heal(self) -> None:
        self._volumes.thaw(self._name)


class DiskFull:
    def __init__(self, volumes: Volumes, name: str) -> None:
        self._volumes, self._name = volumes, name
        self.text = f"fill the disk of {name}"

    def inject(self) -> None:
        self._volumes.fill(self._name)

    def heal(self) -> None:
        self._volumes.empty(self._name)


class ClockStep:
    def __init__(self, clocks: Clocks, name: str, seconds: int) -> None:
        self._clocks, self._name, self._seconds = clocks, name, seconds
        self.text = f"step the clock of {name} by {seconds:+d} s"

    def inject(self) -> None:
        self._clocks.step(self._name, self._seconds)

    def heal(self) -> None:
        self._clocks.step(self._name, 0)


class ActiveFaults:
    """Those that are in force; whatever happens, the end of the block heals them, the last one first."""

    def __init__(self) -> None:
        self._active: list[Fault] = []

    def inject(self, fault: Fault) -> None:
        self._active.append(fault)
        fault.inject()

    def heal(self, fault: Fault) -> None:
        fault.heal()
        if fault in self._active:
            self._active.remove(fault)

    @property
    def any_active(self) -> bool:
        return any(not isinstance(fault, KillProcesses) for fault in self._active)

    def heal_all(self) -> None:
        """Heal every one, even if one of them cannot be healed; the first error is raised at the end."""
        errors: list[Exception] = []
        while self._active:
            try:
                self._active.pop().heal()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def _present(cluster: LocalCluster, name: str, select: Selector, what: str) -> tuple[Process, ...]:
    found = tuple(process for process in select(cluster.processes(name)) if process is not None)
    if not found:
        raise CannotInject(f"{name} has no {what} now")
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
