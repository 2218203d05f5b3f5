"""Ports: how the agent reaches the world. Each has a real and a simulated implementation (DESIGN.md section 5).

Every call that leaves the process has a deadline in seconds; no port retries by itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from instance_manager.core.record import ClusterRecord, Holder, StoredRecord

T = TypeVar("T")


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
    """Calls between agents: one question, and one answer or many; authenticated by the cluster's token."""

    async def call(self, name: str, call: str, body: bytes, *, deadline_s: float) -> bytes:
        """The answer of the member `name`; PeerUnreachable by its subclass."""
        ...

    def listen(self, name: str, call: str, body: bytes, *, silence_s: float) -> AsyncGenerator[bytes, None]:
        """What the member `name` goes on telling over one held connection, piece by piece, the first of them at once.

        PeerUnreachable by its subclass as for `call`, and PeerSilent when nothing has come for `silence_s`. A connection that
        breaks is noticed when it does. It ends when the peer ends it in order, to be asked again. To be closed by whoever
        leaves it before (`contextlib.aclosing`).
        """
        ...


class ObjectStoreError(Exception):
    """The store did not do it, or it is not known whether it did. Says nothing of whether an object is there."""


class StoreUnreachable(ObjectStoreError):
    """No answer in time, a broken connection, or a store that is busy or failing: worth another try.

    After a `create` it is unknown whether the object is there: the next attempt may meet its own.
    """


class StoreForbidden(ObjectStoreError):
    """The store refuses these credentials, or has none to try; another try without a change does not help."""


class StoreMissing(ObjectStoreError):
    """The bucket or the directory itself is not there."""


class StoreRefused(ObjectStoreError):
    """The store understood the request and will not do it; another try without a change does not help."""


class StoreNotConditional(ObjectStoreError):
    """The store ignores or refuses `If-None-Match`: two writers could overwrite each other's objects."""


class ContentDamaged(ObjectStoreError):
    """What was stored, or what came back, is not what was sent."""


class ObjectExists(Exception):
    """A conditional create met an object of that name: nothing was written. Whether it is the same is the caller's question."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What the store tells of an object without sending its content."""

    name: str
    size_bytes: int
    metadata: Mapping[str, str]
    """What was given at its creation; keys in lower case."""
    vouched: bool = False
    """The store itself has confirmed, by a digest of its own, that its content is what `metadata` was written for."""


class Content(Protocol):
    """What an object is made of. Read in a thread of the store, from the start each time it is asked."""

    @property
    def size_bytes(self) -> int | None:
        """None: not known before it is read; then it is sent in parts."""
        ...

    def chunks(self) -> Iterator[bytes]: ...


class ObjectStore(Protocol):
    """Where the archive lies: objects are created once and never overwritten (DESIGN.md section 7).

    Names are relative, with `/` between their parts. Every call raises ObjectStoreError by its subclass; "absent" is
    only what the store itself said, never the outcome of an error. A deadline that passes is StoreUnreachable.
    """

    async def learn(self, folder: str, *, deadline_s: float) -> None:
        """See what this store can do beyond what it must, by objects below `folder` that do not stay. What fails is not used."""
        ...

    async def create(
        self, name: str, content: Content, *, metadata: Mapping[str, str] | None = None, deadline_s: float
    ) -> None:
        """Durable, and confirmed to be what was sent, when it returns. ObjectExists: nothing was written."""
        ...

    async def receive(
        self,
        name: str,
        receiver: Callable[[ObjectInfo, Iterator[bytes]], T],
        *,
        byte_range: tuple[int, int] | None = None,
        deadline_s: float,
    ) -> T | None:
        """What `receiver` returns, run in a thread of the store over the object's content; None: there is none.

        `byte_range` is (first, behind the last). Bytes that are missing at the end raise in the receiver's iteration,
        and so does the deadline: the receiver owns, and clears up, what it writes.
        """
        ...

    async def info(self, name: str, *, deadline_s: float) -> ObjectInfo | None:
        """None only when the store said that there is none."""
        ...

    def entries(
        self, prefix: str, *, after: str = "", shallow: bool = False, deadline_s: float
    ) -> AsyncIterator[ObjectInfo]:
        """Every object whose name begins with `prefix` and comes after `after`, in order; without metadata.

        `shallow`: what lies behind a further `/` is one entry, its name with the `/` at the end, of size 0. The deadline
        is for each page of the answer.
        """
        ...

    async def delete(self, name: str, *, deadline_s: float) -> None:
        """Gone when it returns; also when it was not there."""
        ...

    async def close(self) -> None: ...
