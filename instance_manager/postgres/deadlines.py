"""How long a question to a server may take, and how often it is asked."""

from __future__ import annotations

import asyncio

_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.05


class Deadline:
    """A point in time by the loop's clock. `left_s` is never 0, so that it can be handed on as a limit."""

    def __init__(self, deadline_s: float) -> None:
        self.whole_s = deadline_s
        self._until_s = asyncio.get_running_loop().time() + deadline_s

    @property
    def passed(self) -> bool:
        return asyncio.get_running_loop().time() >= self._until_s

    @property
    def left_s(self) -> float:
        return max(0.001, self._until_s - asyncio.get_running_loop().time())


class Pause:
    """Growing pauses between two looks at something that has no event."""

    def __init__(self, longest_s: float = _LONGEST_PAUSE_S) -> None:
        self._next_s = _FIRST_PAUSE_S
        self._longest_s = longest_s

    async def __call__(self, deadline: Deadline) -> None:
        await asyncio.sleep(min(self._next_s, deadline.left_s))
        self._next_s = min(self._next_s * 1.5, self._longest_s)
