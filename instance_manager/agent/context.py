"""What the duties of one agent share: its ports, and the little state that several of them need."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from instance_manager.agent.archiver_port import Archiver, NoArchiver
from instance_manager.agent.beat import Beat
from instance_manager.agent.database import Database
from instance_manager.agent.health import Health
from instance_manager.agent.lease_keeper import LeaseKeeper
from instance_manager.agent.peering import Peers
from instance_manager.agent.publishing import Unpublished
from instance_manager.agent.supervisor_link import SupervisorLink
from instance_manager.agent.volume import Volume
from instance_manager.config import Configuration
from instance_manager.core.quorum import NOBODY, SynchronousSet
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.roles import TRANSITIONS, Role
from instance_manager.core.types import Lsn, MemberId
from instance_manager.metrics.measures import Measures
from instance_manager.ports import Clock, Coordination, Publication
from instance_manager.status import CertificateStatus, DecisionLine, ManagedStatus

log = logging.getLogger("instance_manager.agent")


class OperationFailed(Exception):
    """A duty could not be done now; the text tells why. The next decision tries again or does something else."""


REPEATS_WITHIN = 3
"""A step that is tried again and again says so in a line or two: those are counted, not repeated."""


class Journal:
    """The last decisions with their reasons and what became of them.

    A decision that only says again what the last one said is counted; steps between do not make it new.
    """

    def __init__(self, clock: Clock, on_line: Callable[[str, str, bool], None] = lambda _, __, ___: None) -> None:
        self._clock = clock
        self._on_line = on_line
        """Called with what, its reason and whether it is a decision, for each line that is not only a repetition."""
        self._lines: deque[tuple[float, str, str, int]] = deque(maxlen=100)
        self._last_decision = self._last_told = ("", "")

    def decided(self, act: str, reason: str) -> None:
        if (act, reason) == self._last_told:
            return
        self._last_told = (act, reason)
        key = (act, _without_numbers(reason))
        if key == self._last_decision:
            return
        self._last_decision = key
        self._add(act, reason, {}, decided=True)

    def note(self, what: str, reason: str, **inputs: object) -> None:
        """A step, or how one failed. One that only repeats what was just said is counted, and logged once."""
        self._add(what, reason, inputs, decided=False)

    def _add(self, what: str, reason: str, inputs: Mapping[str, object], *, decided: bool) -> None:
        for index, (at_s, last, last_reason, count) in enumerate(list(self._lines)[:REPEATS_WITHIN]):
            if (last, _without_numbers(last_reason)) == (what, _without_numbers(reason)):
                self._lines[index] = (at_s, last, reason, count + 1)
                return
        self._lines.appendleft((self._clock.now_s(), what, reason, 1))
        log.info("%s: %s", what, reason, extra={"fields": {"decision": what, **inputs}})
        self._on_line(what, reason, decided)

    def lines(self, most: int = 20) -> tuple[DecisionLine, ...]:
        now_s = self._clock.now_s()
        return tuple(
            DecisionLine(age_s=round(now_s - at_s, 1), decision=decision, reason=reason, count=count)
            for at_s, decision, reason, count in list(self._lines)[:most]
        )


_NO_DIGITS = str.maketrans("", "", "0123456789")


def _without_numbers(text: str) -> str:
    return text.translate(_NO_DIGITS)


@dataclass(slots=True)
class Context:
    configuration: Configuration
    clock: Clock
    coordination: Coordination
    link: SupervisorLink
    volume: Volume
    keeper: LeaseKeeper
    peers: Peers
    database: Database
    health: Health
    journal: Journal
    started_s: float
    boot_id: str
    beat: Beat
    chance: random.Random
    """Ids and randomised waits: the system's own randomness; in a simulation, the seed's."""
    publication: Publication = field(default_factory=Unpublished)
    measures: Measures = field(default_factory=Measures)
    archiver: Archiver = field(default_factory=NoArchiver)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    announced: asyncio.Event = field(default_factory=asyncio.Event)
    voting: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Promising and following exclude one another: who has promised a later epoch must not begin to follow an earlier."""
    role: Role = Role.STARTING
    synchronous: SynchronousSet = NOBODY
    """What Postgres was last told."""
    synchronous_confirmed: bool = False
    gate_open: bool = False
    """Clients are let in."""
    giving_up: bool = False
    """In order, and still serving: new clients are led elsewhere."""
    archived_to: tuple[MemberId, Lsn] | None = None
    """The last primary that told how far its archive is, and what it told."""
    archives_to_the_end: bool = False
    """It stops with nobody to take over: what is left goes to the archive while Postgres ends."""
    opened_s: float | None = None
    """When this primary began to run read-write."""
    takeover_open: bool = False
    dead_holder: Holder | None = None
    """Whose life is proven to be over (R9): this one's, and no later one's of the same instance."""
    extended_until_s: float = 0.0
    """Until then those who were asked have promised not to take over (R11)."""
    suspects: str | None = None
    yielding: str | None = None
    yielding_since_s: float | None = None
    took_at_s: float | None = None
    """When this agent was about to take the Lease, CLOCK_BOOTTIME; None: an agent before it was, if anybody (R13)."""
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What a part of this instance wants somebody to look at, a sentence each, by the name of the part."""
    certificates: Callable[[], tuple[CertificateStatus, ...]] = tuple
    managed: Callable[[], tuple[ManagedStatus, ...]] = tuple
    operation: str | None = None
    """What takes long, with its progress, for people."""
    paused_until_s: float = 0.0
    reaffirm_again_s: float = 0.0
    stand_again_s: float = 0.0

    @property
    def record(self) -> ClusterRecord:
        """The record last read. OperationFailed when there is none."""
        record = self.keeper.record
        if record is None:
            raise OperationFailed("the Lease is not known")
        return record

    @property
    def member_id(self) -> MemberId:
        member_id = self.volume.state.member_id
        if member_id is None:
            raise OperationFailed("there is no data directory here, so this instance is no member")
        return member_id

    @property
    def holder(self) -> Holder | None:
        """Who this instance is as holder; None without a data directory."""
        member_id = self.volume.state.member_id
        if member_id is None or not self.link.incarnation:
            return None
        return Holder(member_id=member_id, incarnation=self.link.incarnation)

    @property
    def holds_lease(self) -> bool:
        record = self.keeper.record
        return record is not None and record.holder is not None and record.holder == self.holder

    @property
    def cluster_uid(self) -> str | None:
        """As configured, else as this volume remembers it; None: any is taken, and remembered (R14)."""
        return self.configuration.cluster.uid or self.volume.state.cluster_uid

    def is_proven_dead(self, record: ClusterRecord | None) -> bool:
        return record is not None and record.holder is not None and record.holder == self.dead_holder

    def announce(self) -> None:
        """Peers that watch look at this instance's state again."""
        self.announced.set()
        self.announced = asyncio.Event()

    def take_role(self, role: Role, reason: str) -> None:
        """Only by the table of roles; anything else is a defect that must not stay unseen."""
        if role is self.role:
            return
        if role not in TRANSITIONS[self.role]:
            log.error("role %s does not follow %s: %s", role, self.role, reason)
        log.info("role %s, was %s: %s", role, self.role, reason, extra={"fields": {"role": role, "was": self.role}})
        self.role = role
        self.publish_role()
        self.announce()
        self.wake.set()

    def publish_role(self) -> None:
        """`primary` only while it is open for writes, and not from the moment that it means to stop."""
        if self.role is Role.STARTING and self.database.running_read_write:
            # The agent restarted over a primary that serves on: what it is was published already.
            return
        serves = self.role is Role.PRIMARY and self.gate_open and not self.giving_up
        self.publication.publish_role("primary" if serves else "replica")

    def start_yielding(self, reason: str) -> None:
        if self.yielding is None:
            self.yielding, self.yielding_since_s = reason, self.clock.now_s()
            self.announce()

    def stop_yielding(self) -> None:
        self.yielding = self.yielding_since_s = None

    def wanted_k(self) -> int:
        return self.configuration.wanted_synchronous_standbys
