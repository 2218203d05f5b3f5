"""How far behind each member was over the last minutes, for the status page: bounded, in memory, gone with the agent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from instance_manager.status import ClusterStatus

INTERVAL_S = 10.0
SAMPLES_MAX = 60
MEMBERS_MAX = 100
MINUTES = round(INTERVAL_S * SAMPLES_MAX / 60)

Sample = int | None
"""Bytes that a reader there is behind; None: not known, or no answer."""


class LagHistory:
    def __init__(self) -> None:
        self._samples: dict[str, deque[Sample]] = {}

    def add(self, status: ClusterStatus) -> None:
        """One sample of every member; one that is gone leaves no trace."""
        seen: dict[str, deque[Sample]] = {}
        for instance in status.instances[:MEMBERS_MAX]:
            samples = self._samples.get(instance.name, deque(maxlen=SAMPLES_MAX))
            behind = instance.lag_bytes
            if instance.name == status.primary:
                behind = 0
            elif behind is not None:
                behind += instance.replay_lag_bytes or 0
            samples.append(behind if instance.reachable else None)
            seen[instance.name] = samples
        self._samples = seen

    def of(self, name: str) -> tuple[Sample, ...]:
        """Oldest first."""
        return tuple(self._samples.get(name, ()))

    async def keep(self, status: Callable[[], ClusterStatus]) -> None:
        """Sample until cancelled."""
        while True:
            self.add(status())
            await asyncio.sleep(INTERVAL_S)
