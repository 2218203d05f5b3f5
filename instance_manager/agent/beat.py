"""Timers joined: whoever waits without hurry wakes together with all the others, because wake-ups cost more than work."""

from __future__ import annotations

from instance_manager.ports import Clock

BEAT_S = 0.5


class Beat:
    """Moments of one grid, which begins with the agent's life."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.now_s()

    def left_s(self, seconds: float) -> float:
        """From now to the moment nearest to `seconds` from now, and at least a quarter of a beat."""
        lived_s = self._clock.now_s() - self._began_s
        left_s = round((lived_s + seconds) / BEAT_S) * BEAT_S - lived_s
        return left_s if left_s >= BEAT_S / 4 else left_s + BEAT_S

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(self.left_s(seconds))
