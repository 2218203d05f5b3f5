"""What the HTTP surface needs of the instance, and the errors that cross it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from instance_manager.http.details import Details
from instance_manager.status import ClusterStatus, Probes

DEADLINE_HEADER = "Deadline-Seconds"
"""How long the asking peer waits for an answer."""
LINES_CONTENT_TYPE = "application/jsonl"
"""What a peer accepts that wants to be told again and again, and not answered once."""


class UnknownCall(Exception):
    """No such peer call or control verb: 404."""


class MalformedCall(Exception):
    """The body or an argument is not what the call takes; the text says what it takes: 400."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlProgress:
    """One line for the user while a verb is at work."""

    progress: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlResult:
    """How a verb ended: what happened, in words, and the state after it."""

    ok: bool
    message: str
    status: ClusterStatus | None = None


class InstanceService(Protocol):
    """The instance, as the HTTP surface sees it."""

    def probes(self) -> Probes:
        """The latest snapshot, at once: no Postgres, no disk."""
        ...

    def status(self) -> ClusterStatus:
        """All that is known, at once: no Postgres, no disk."""
        ...

    def details(self) -> Details:
        """What tools that know Patroni ask for beyond that, at once: no Postgres, no disk."""
        ...

    async def metrics(self) -> bytes:
        """One scrape in Prometheus's text format, within a second, whatever Postgres does."""
        ...

    async def answer_peer(self, call: str, body: bytes) -> bytes:
        """Answer another instance. Raises UnknownCall or MalformedCall."""
        ...

    def tell_peer(self, call: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """Tell another instance, without an end, what it asked to hear; pieces without a line break.

        Raises UnknownCall or MalformedCall before the first. An async generator function fits.
        """
        ...

    def control(self, verb: str, arguments: dict[str, object]) -> AsyncIterator[ControlProgress | ControlResult]:
        """Carry out a user's verb; the last item is the ControlResult. An async generator function fits.

        Raises UnknownCall or MalformedCall before the first item. It is run to its end even if the user goes away.
        """
        ...
