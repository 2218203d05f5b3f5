"""Bounded retries: full-jitter backoff under one deadline, for failures that another try may mend."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from instance_manager.ports import ContentDamaged, StoreUnreachable
from instance_manager.threads import monotonic_s

T = TypeVar("T")

_CHANCE = random.SystemRandom()


def without_tracebacks(error: BaseException) -> None:
    """A traceback holds on to what its calls worked with, such as a whole segment, and often on itself: for the text of an error that is enough."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            waiting += [linked for linked in (each.__cause__, each.__context__) if linked is not None]


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long. Pauses are drawn evenly from 0 to a bound that doubles, so that many do not come at once."""

    total_s: float = 60.0
    attempt_s: float = 20.0
    attempts_max: int = 6
    first_pause_s: float = 0.2
    longest_pause_s: float = 10.0

    async def call(self, attempt: Callable[[float], Awaitable[T]], *, on_retry: Callable[[], None] = lambda: None) -> T:
        """The outcome of `attempt(deadline_s)`, tried again on StoreUnreachable and ContentDamaged; the last one is raised."""
        end_s = monotonic_s() + self.total_s
        bound_s = self.first_pause_s
        for number in range(1, self.attempts_max + 1):
            left_s = end_s - monotonic_s()
            try:
                return await attempt(max(0.001, min(self.attempt_s, left_s)))
            except (StoreUnreachable, ContentDamaged) as error:
                without_tracebacks(error)
                pause_s = _CHANCE.uniform(0, bound_s)
                if number == self.attempts_max or monotonic_s() + pause_s >= end_s:
                    raise
            on_retry()
            await asyncio.sleep(pause_s)
            bound_s = min(2 * bound_s, self.longest_pause_s)
        raise AssertionError("at least one attempt is made")
