"""What a deliberately broken rule is, and the checks that a variant may bring for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import simulated_faults
from bending import Patch, replaced
from directed_faults import DIRECTED
from simulated_cluster import Scenario, SimulatedCluster
from simulated_server import PostgresServer

from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Timeline

LOSS = ("PromiseBroken", "HistoryViolation")
WEDGED = ("Stuck",)
Check = Callable[[SimulatedCluster], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenRule:
    """One rule, bent in the real code (or in the model, where the rule lives there), and where it must show."""

    name: str
    rule: str
    """Of PROTOCOL.md (R5), POSTGRES.md (P2) or a section of DESIGN.md."""
    what: str
    """What is bent, and what that costs."""
    patch: Patch
    scenario: Scenario
    seeds: int
    """It must be caught by one of the seeds 0 to this."""
    breaks: tuple[str, ...] = LOSS
    """The failures that count as caught: the checkers' own, `Stuck`, or one of a check of the variant."""
    checks: tuple[Check, ...] = ()
    slow: bool = False
    """Too slow for every run of the tests: only the command runs it."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Only the scenario: with it nothing may fail."""
        run = SimulatedCluster.run

        def checked_run(cluster: SimulatedCluster) -> float:
            for check in self.checks:
                check(cluster)
            return run(cluster)

        with ExitStack() as stack:
            stack.enter_context(replaced(simulated_faults, "FAULTS", (*simulated_faults.FAULTS, *DIRECTED)))
            stack.enter_context(replaced(SimulatedCluster, "run", checked_run))
            yield

    @contextmanager
    def applied(self) -> Iterator[None]:
        with self.watched(), self.patch():
            yield


# Checks for rules that are about availability, or about what the promise checker is not told of.


class Deposed(Exception):
    """Another became primary although nothing was wrong with the one before."""


class Disturbed(Exception):
    """Something stopped that had no reason to; the text says what."""


def nobody_is_deposed(cluster: SimulatedCluster) -> None:
    """Where no fault touches the primary's Postgres, the first primary stays."""
    on_applied = cluster.store.on_applied

    def applied(by: str, before: ClusterRecord | None, after: ClusterRecord) -> None:
        on_applied(by, before, after)
        if before is None or before.holder is None or not before.opened:
            return
        if after.holder is None or after.holder.member_id != before.holder.member_id:
            taken_by = after.holder.name if after.holder is not None else "nobody"
            cluster.world.stop(Deposed(f"epoch {after.epoch}: {taken_by} in the place of {before.holder.name}"))

    cluster.store.on_applied = applied


def nobody_reaffirms(cluster: SimulatedCluster) -> None:
    """Where nobody can be elected, no voter promises, and the primary needs no later epoch."""
    on_applied = cluster.store.on_applied

    def applied(by: str, before: ClusterRecord | None, after: ClusterRecord) -> None:
        on_applied(by, before, after)
        if before is not None and before.opened and after.epoch > before.epoch:
            cluster.world.stop(Disturbed(f"epoch {after.epoch} after {before.epoch}, and nothing had happened"))

    cluster.store.on_applied = applied


def nobody_starts_again(cluster: SimulatedCluster) -> None:
    """Where no fault touches Postgres or its agent, the primary becomes writable once."""
    on_read_write = cluster.postgres.on_read_write
    first: list[str] = []

    def became_writable(server: PostgresServer, timeline: Timeline) -> None:
        on_read_write(server, timeline)
        first.append(server.host.name)
        if len(first) > 1:
            cluster.world.stop(
                Disturbed(f"{first[-1]} became writable after {first[0]}, and nothing was wrong with it")
            )

    cluster.postgres.on_read_write = became_writable


def voters_keep_their_directories(cluster: SimulatedCluster) -> None:
    """A rewind or a set-aside of a voter of the record (R6)."""
    cluster.postgres.on_destroying = cluster.checker.on_destroying


def writes_stop_for_no_longer_than(limit_s: float) -> Check:
    """Somebody acknowledges something again within that time, while the faults last."""

    def check(cluster: SimulatedCluster) -> None:
        last = [0, 0.0]

        def look() -> None:
            if cluster.clients.stopped:
                return
            count, now_s = cluster.checker.acknowledgements, cluster.world.now_s
            if count == 0 or count > last[0]:
                last[:] = [count, now_s]
            elif now_s - last[1] > limit_s:
                cluster.world.stop(Disturbed(f"nothing was acknowledged for {now_s - last[1]:.0f} s"))
            cluster.world.call_later(0.5, look)

        look()

    return check
