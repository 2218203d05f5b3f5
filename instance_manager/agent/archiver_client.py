"""The real `Archiver`: one task that says the last word over the archiver's socket, and hears how it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from instance_manager.archive.orders import Orders
from instance_manager.codec import from_json, to_json
from instance_manager.core.archive_state import ArchiveState
from instance_manager.ports import Clock

log = logging.getLogger("instance_manager.agent.archiver")

REPEAT_S = 2.0
"""The same is said again after this time: an archiver that restarted knows nothing."""
RETRY_S = 0.25
ANSWER_DEADLINE_S = 2.0
ANSWER_MAX_BYTES = 64 * 1024


class ArchiverClient:
    """`on_answer` is called whenever what is public here may have changed."""

    is_configured = True

    def __init__(self, socket: Path, clock: Clock, *, on_answer: Callable[[], None]) -> None:
        self._socket = socket
        self._clock = clock
        self._on_answer = on_answer
        self._orders: Orders | None = None
        self._news = asyncio.Event()
        self.taken: Orders | None = None
        self.state: ArchiveState | None = None
        self.silent_since_s: float | None = None
        self.why_silent = ""

    def give(self, orders: Orders) -> None:
        if orders != self._orders:
            self._orders = orders
            self._news.set()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPEAT_S):
                    await self._news.wait()
            self._news.clear()
            if self._orders is not None and not await self._tell(self._orders):
                # Not at once: what is said meanwhile is said then.
                await self._clock.sleep(RETRY_S)
                self._news.set()

    async def _tell(self, orders: Orders) -> bool:
        """False: worth another try soon."""
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                answer = await self._ask(b"orders\t" + to_json(orders))
            self.state = _state_of(answer)
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, msgspec.MsgspecError) as error:
            self.taken = None
            self.why_silent = str(error) or f"no answer within {ANSWER_DEADLINE_S:g} s"
            if self.silent_since_s is None:
                self.silent_since_s = self._clock.now_s()
                log.info("the archiver does not answer: %s", self.why_silent)
                self._on_answer()
            return False
        changed = self.taken != orders or self.silent_since_s is not None
        self.taken, self.silent_since_s = orders, None
        if changed or self.state.trouble is not None:
            self._on_answer()
        return True

    async def _ask(self, request: bytes) -> str:
        reader, writer = await asyncio.open_unix_connection(str(self._socket), limit=ANSWER_MAX_BYTES)
        try:
            writer.write(request + b"\n")
            return (await reader.readuntil(b"\n")).decode().rstrip("\n")
        except asyncio.LimitOverrunError as error:
            raise ValueError(f"its answer is longer than {ANSWER_MAX_BYTES} bytes") from error
        finally:
            writer.close()


def _state_of(answer: str) -> ArchiveState:
    """ValueError: the orders were refused."""
    word, _, text = answer.partition(" ")
    if word != "done":
        raise ValueError(f"it refuses its orders: {text}")
    return from_json(text, ArchiveState)
