"""Ports: how the agent reaches the world. Each has a real and a simulated implementation (DESIGN.md section 5).

Every call that leaves the process has a deadline in seconds; no port retries by itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

from instance_manager.core.record import ClusterRecord, Holder, StoredRecord


class Clock(Protocol):
    """CLOCK_BOOTTIME: goes on during suspend, is never stepped. The wall clock decides nothing."""

    def now_s(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class CoordinationError(Exception):
    """Base of what a store can answer other than success."""


class Conflict(CoordinationError):
    """The version is not the current one (or the record exists, for `create`): certainly not applied."""


class StoreUnavailable(CoordinationError):
    """The request did not reach the store, or the store refused it: certainly not applied."""


class OutcomeUnknown(CoordinationError):
    """The write may or may not have been, or yet be, applied. Only a later conditional write of our own closes it (R1)."""


class RecordUnreadable(CoordinationError):
    """Something is stored under the name, but it is no record: damaged (R3). Carries the reason."""


class Coordination(Protocol):
    """The Lease: one register with linearizable conditional writes.

    `read` answers from the store itself, never from a watch's cache (R1). A cancelled write counts as unknown.
    """

    async def read(self, *, deadline_s: float) -> StoredRecord | None:
        """The current record; None only when the store said that there is none."""
        ...

    async def create(self, record: ClusterRecord, *, deadline_s: float) -> StoredRecord: ...

    async def replace(self, record: ClusterRecord, *, version: str, deadline_s: float) -> StoredRecord: ...

    def changes(self) -> AsyncIterator[None]:
        """Yields when the record may have changed: a hint to read, never a fact."""
        ...

    async def is_proven_dead(self, holder: Holder, *, deadline_s: float) -> bool:
        """Is it proven that this very life of the instance, its Postgres included, is over (R9)? False when in doubt."""
        ...

    async def close(self) -> None: ...


PublishedRole = Literal["primary", "replica"]


class Publication(Protocol):
    """What others see of this instance without asking it: the role by which clients are led to it, events for people.

    Nothing here waits or fails: what cannot be published now is tried again in the background, by `run`.
    """

    def publish_role(self, role: PublishedRole) -> None:
        """From now on; the last one counts. Cheap when nothing changes."""
        ...

    async def role_is_published(self, *, deadline_s: float) -> bool:
        """Wait until clients can see the role last given; False when it took longer."""
        ...

    def publish_event(self, reason: str, message: str, *, warning: bool) -> None:
        """`reason` is one word, as `kubectl get events` shows it."""
        ...

    async def finish(self, *, deadline_s: float) -> None:
        """This instance ends: what waits gets a last chance while `run` still runs."""
        ...

    async def run(self) -> None: ...


class PeerUnreachable(Exception):
    """A peer's agent gave no answer; the subclasses say how."""


class PeerRefused(PeerUnreachable):
    """Nobody listens there: the connection was refused."""


class PeerSilent(PeerUnreachable):
    """No answer in time, a broken connection, or an answer that cannot be understood."""


class PeerRejected(PeerUnreachable):
    """The peer answered that it will not: `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"rejected with {status}: {text}")
        self.status = status


class PeerCaller(Protocol):
    """Calls between agents: one question, one answer, one deadline; authenticated both ways by the cluster's token."""

    async def call(self, name: str, call: str, body: bytes, *, deadline_s: float) -> bytes:
        """The answer of the member `name`; PeerUnreachable by its subclass."""
        ...


class ObjectExists(Exception):
    """A conditional create met an object of that name: nothing was written. Whether it is the same is the caller's question."""


class ObjectStore(Protocol):
    """Where the archive lies: objects are created once and never overwritten (DESIGN.md section 7).

    Names are relative, with `/` between their parts. An error other than the stated ones says nothing of whether the
    object is there: "absent" is only what the store itself said.
    """

    async def create(self, name: str, content: bytes, *, deadline_s: float) -> None:
        """Durable when it returns; ObjectExists."""
        ...

    async def read(self, name: str, *, deadline_s: float) -> bytes | None:
        """The whole object; None only when the store said that there is none."""
        ...

    def names(self, prefix: str) -> AsyncIterator[str]:
        """Every name that begins with `prefix`, in order."""
        ...
