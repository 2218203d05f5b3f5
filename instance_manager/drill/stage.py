"""What a case works with: the cluster, the faults in force, and the times at which they came and went."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from instance_manager.demo import status_client
from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.processes import now_s
from instance_manager.drill.clock import Clocks
from instance_manager.drill.disk import Volumes
from instance_manager.drill.environment import Environment
from instance_manager.drill.faults import ActiveFaults, Fault
from instance_manager.drill.history import HistoryReader, Outcome
from instance_manager.drill.network import Network
from instance_manager.http.control_client import ControlError

CONTROL_TIMEOUT_S = 60.0


class CaseFailed(Exception):
    """The case could not be carried to its end; the text says what did not happen."""


class Stage:
    """One run of one case. `primary` and `standbys` are who they were when it began."""

    def __init__(
        self,
        environment: Environment,
        history: Path,
        *,
        clients: subprocess.Popen[bytes],
        primary: str,
        quick: bool,
        seed: int,
        random_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self.environment = environment
        self._clients = clients
        self.primary = primary
        self.standbys = tuple(name for name in environment.cluster.names if name != primary)
        self.history = HistoryReader(history)
        self.faults = ActiveFaults()
        self.quick = quick
        self.seed = seed
        self.random_seconds = random_seconds
        self.say = say
        self.began_s: float | None = None
        """When the first fault came."""
        self.healed_s: float | None = None
        """When the last fault went; of one that heals by itself, when it came."""
        self.broken: list[str] = []
        """Expectations of the case that did not hold."""

    @property
    def cluster(self) -> LocalCluster:
        return self.environment.cluster

    @property
    def network(self) -> Network:
        assert self.environment.network is not None  # noqa: S101
        return self.environment.network

    @property
    def volumes(self) -> Volumes:
        assert self.environment.volumes is not None  # noqa: S101
        return self.environment.volumes

    @property
    def clocks(self) -> Clocks:
        assert self.environment.clocks is not None  # noqa: S101
        return self.environment.clocks

    def mark(self) -> None:
        """Something that counts as a fault happens now."""
        self.healed_s = now_s()
        if self.began_s is None:
            self.began_s = self.healed_s

    def inject(self, fault: Fault) -> Fault:
        self.say(fault.text)
        self.mark()
        self.faults.inject(fault)
        return fault

    def heal(self, fault: Fault) -> None:
        self.say(f"healed: {fault.text}")
        self.healed_s = now_s()
        self.faults.heal(fault)

    def heal_all(self) -> None:
        """Whatever is still in force, as after a case that could not go on."""
        if self.faults.any_active:
            self.healed_s = now_s()
        self.faults.heal_all()

    def hold(self, seconds: float, *, quick_s: float | None = None) -> None:
        """Let the fault be; shorter in a quick drill where the case allows it."""
        time.sleep(quick_s if self.quick and quick_s is not None else seconds)

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.broken.append(text)

    def expect_same_primary(self) -> None:
        now = self.cluster.primary()
        self.expect(now == self.primary, f"the primary changed from {self.primary} to {now}")

    def switchover(self, target: str | None = None) -> str:
        """Through the primary's control socket, as the command does; what it answered. CaseFailed if nobody did."""
        try:
            result = status_client.control(
                self.cluster.layout.control_socket(self.standbys[0]),
                "switchover",
                {} if target is None else {"to": target},
                timeout_s=CONTROL_TIMEOUT_S,
            )
        except ControlError as error:
            raise CaseFailed(f"switchover: {error}") from error
        self.expect(result.ok, f"switchover: {result.message}")
        return result.message

    def try_switchover(self) -> None:
        """One that may fail: the cluster may be in any state."""
        self.mark()
        for name in self.cluster.names:
            socket = self.cluster.layout.control_socket(name)
            try:
                result = status_client.control(socket, "switchover", {}, timeout_s=CONTROL_TIMEOUT_S)
            except ControlError as error:
                self.say(f"switchover by {name}: {error}")
                continue
            self.say(f"switchover: {result.message}")
            return

    def acknowledged(self) -> int:
        self.history.read_on()
        return sum(write.outcome is Outcome.ACKNOWLEDGED for write in self.history.writes)

    def wait_writes(self, deadline_s: float, *, after_s: float | None = None, count: int = 20) -> None:
        """Until `count` rows that were begun after `after_s` (by default now) are acknowledged. CaseFailed."""
        since_s = now_s() if after_s is None else after_s
        ends_s = now_s() + deadline_s
        while True:
            self.history.read_on()
            found = sum(
                write.outcome is Outcome.ACKNOWLEDGED and write.begin_s >= since_s
                for write in reversed(self.history.writes)
            )
            if found >= count:
                return
            if self._clients.poll() is not None:
                raise CaseFailed(f"the drill's own clients ended with {self._clients.returncode}; see their log")
            if now_s() >= ends_s:
                raise CaseFailed(f"no writes within {deadline_s:g} s")
            time.sleep(0.1)

    def wait_other_primary(self, deadline_s: float) -> str:
        """Until another instance than at the beginning is the primary and takes clients. CaseFailed."""
        ends_s = now_s() + deadline_s
        while True:
            for name in self.cluster.names:
                if name == self.primary:
                    continue
                status = self.cluster.status(name)
                if status is not None and status.primary == name == status.told_by and status.accepts_clients:
                    return name
            if now_s() >= ends_s:
                raise CaseFailed(f"no other primary than {self.primary} within {deadline_s:g} s")
            time.sleep(0.1)
