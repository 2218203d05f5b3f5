"""P5: what was released by the smaller k behind the barrier's mark is behind a second one (found by the simulation)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Mapping

from instance_manager.core.quorum import SynchronousSet
from instance_manager.core.types import Lsn, MemberId, Timeline
from instance_manager.postgres.deadlines import Deadline
from instance_manager.postgres.dynamic_settings import DynamicSettings
from instance_manager.postgres.running import Sender
from instance_manager.postgres.synchronous import SynchronousReplication

A, B = MemberId("a_0000000a"), MemberId("b_0000000b")


class Settings:
    """A file that every process has loaded as soon as it is written."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    async def read(self) -> dict[str, str]:
        return dict(self.values)

    async def write(self, settings: Mapping[str, str]) -> None:
        self.values = dict(settings)

    async def reload(self) -> None:
        return None

    async def shown(self, names: Iterable[str], deadline: Deadline) -> dict[str, str | None]:
        return {name: self.values.get(name) for name in names}


class Server:
    """A primary whose walsender of B looks at SIGHUP late: until then its k releases what only A has."""

    def __init__(self) -> None:
        self.settings_file = Settings()
        self.marks: list[int] = []
        self.end = 100
        self.b_flushed = 100
        self.looks = 0

    @contextlib.asynccontextmanager
    async def replication(self, deadline: Deadline) -> AsyncIterator[Server]:
        yield self

    @contextlib.asynccontextmanager
    async def processes(self, deadline: Deadline) -> AsyncIterator[Server]:
        raise NotImplementedError
        yield self

    async def block_directory(self) -> str:
        raise NotImplementedError

    async def primary_since(self, deadline: Deadline) -> str:
        return "today"

    async def senders(self, deadline: Deadline) -> list[Sender]:
        if self.marks:
            self.looks += 1
        if self.looks == 3:
            # By the old k: acknowledged with A alone, behind the first mark. Only then does it get to that mark.
            self.end += 100
            self.b_flushed = self.marks[0]
        elif self.looks > 6:
            self.b_flushed = self.end
        end = Lsn(self.end)
        return [
            Sender(1, "t1", A, "streaming", 1, end, end, A),
            Sender(2, "t2", B, "streaming", 1, end, Lsn(self.b_flushed), B),
        ]

    async def terminate_senders(self, pids: Collection[int], deadline: Deadline) -> None:
        raise AssertionError("nobody is late enough for it")

    async def write_mark(self, deadline: Deadline) -> tuple[Timeline, Lsn]:
        self.end += 10
        self.marks.append(self.end)
        return Timeline(1), Lsn(self.end)

    async def canary_waits(self, deadline: Deadline) -> bool:
        return True


async def test_p5_after_k_was_raised_a_second_mark_covers_what_the_smaller_k_released_behind_the_first() -> None:
    server = Server()
    replication = SynchronousReplication(server, DynamicSettings(server.settings_file))  # type: ignore[arg-type]
    await replication.apply(SynchronousSet(2, frozenset({A, B})), deadline_s=5)
    passed = await replication.barrier(Timeline(1), deadline_s=5)
    assert len(server.marks) == 2
    assert passed.state.mark == server.marks[1]
    assert server.b_flushed >= server.marks[1], "B holds what had been acknowledged without it"


async def test_p5_with_the_k_unchanged_one_mark_is_enough() -> None:
    server = Server()
    replication = SynchronousReplication(server, DynamicSettings(server.settings_file))  # type: ignore[arg-type]
    wanted = SynchronousSet(2, frozenset({A, B}))
    await replication.apply(wanted, deadline_s=5)
    await replication.barrier(Timeline(1), deadline_s=5)
    await replication.apply(wanted, deadline_s=5)
    await replication.barrier(Timeline(1), deadline_s=5)
    assert len(server.marks) == 3
