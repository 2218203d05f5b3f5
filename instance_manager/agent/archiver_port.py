"""Port: the archiver beside this agent. It is told what holds, and never waited for."""

from __future__ import annotations

from typing import Protocol

from instance_manager.archive.orders import Orders
from instance_manager.core.archive_state import ArchiveState


class Archiver(Protocol):
    @property
    def is_configured(self) -> bool: ...

    @property
    def taken(self) -> Orders | None:
        """The last orders that the archiver has confirmed; None while it does not answer."""
        ...

    @property
    def state(self) -> ArchiveState | None:
        """As it told with its last answer; None before the first."""
        ...

    @property
    def silent_since_s(self) -> float | None:
        """CLOCK_BOOTTIME since which it does not answer; None: it answers."""
        ...

    @property
    def why_silent(self) -> str: ...

    def give(self, orders: Orders) -> None:
        """From now on these hold; the last ones count, and are told again and again, for an archiver that restarts."""
        ...

    async def run(self) -> None: ...


class NoArchiver:
    """Where no archive is configured."""

    is_configured = False
    taken: Orders | None = None
    state: ArchiveState | None = None
    silent_since_s: float | None = None
    why_silent = ""

    def give(self, orders: Orders) -> None:
        return None

    async def run(self) -> None:
        return None
