"""Breadth-first search through every state of a small world, with the shortest story of what goes wrong.

A model tells its first states, what may happen in a state, and one representative of all states that differ only by
names (`canonical`). Only 64-bit hashes of representatives are kept, each with the hash of the state before it; the
story is found again by walking forward from a first state along the hashes, so that names in it stay the same. Two states
of one hash would hide one of them: with n states the chance is about n * n / 2**65, below one in a million for six
million states.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class Violation:
    """What must never be: the end of a story."""

    what: str


State = TypeVar("State", bound=Hashable)


class Model(Protocol[State]):
    """A world."""

    @property
    def name(self) -> str: ...

    @property
    def bounds(self) -> str:
        """What is limited, in words."""
        ...

    def first(self) -> Iterable[tuple[str, State]]: ...

    def after(self, state: State) -> Iterator[tuple[str, State | Violation]]:
        """Every event that may happen next. Nothing has to: whoever is paused is simply not scheduled."""
        ...

    def canonical(self, state: State) -> Hashable: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    states: int
    events: int
    seconds: float
    """Of one core."""
    complete: bool
    """False: ended at a violation or at the limit of states."""
    violation: Violation | None = None
    story: tuple[str, ...] = ()
    depth: int = 0
    """Events from a first state to the farthest one."""


@dataclass(frozen=True, slots=True)
class Progress:
    states: int
    queue: int
    depth: int
    seconds: float

    def __str__(self) -> str:
        rate = self.states / self.seconds if self.seconds > 0 else 0.0
        return f"{self.states:,} states, {self.queue:,} waiting, depth {self.depth}, {rate:,.0f} states/s"


def walk(
    model: Model[State],
    *,
    state_limit: int = 100_000_000,
    tell: Callable[[Progress], None] | None = None,
    tell_every_s: float = 10.0,
) -> Result:
    """Every state that can be reached, or the shortest way to a violation."""
    started_s = time.process_time()
    told_s = time.monotonic()
    came_from: dict[int, int] = {}
    todo: deque[tuple[int, State]] = deque()
    next_level: deque[tuple[int, State]] = deque()
    for _, state in model.first():
        key = hash(model.canonical(state))
        if key not in came_from:
            came_from[key] = key
            todo.append((key, state))
    events = depth = 0
    while todo:
        key, state = todo.popleft()
        for event, after in model.after(state):
            events += 1
            if isinstance(after, Violation):
                return Result(
                    states=len(came_from),
                    events=events,
                    seconds=time.process_time() - started_s,
                    complete=False,
                    violation=after,
                    story=(*_story(model, came_from, key), event),
                    depth=depth,
                )
            after_key = hash(model.canonical(after))
            if after_key not in came_from:
                came_from[after_key] = key
                next_level.append((after_key, after))
        if not todo and next_level:
            todo, next_level = next_level, todo
            depth += 1
        if len(came_from) >= state_limit:
            break
        if tell is not None and events % 64 == 0 and time.monotonic() - told_s >= tell_every_s:
            told_s = time.monotonic()
            tell(Progress(len(came_from), len(todo) + len(next_level), depth, time.process_time() - started_s))
    return Result(
        states=len(came_from),
        events=events,
        seconds=time.process_time() - started_s,
        complete=not todo and not next_level,
        depth=depth,
    )


def _story(model: Model[State], came_from: dict[int, int], key: int) -> list[str]:
    """The events to the state of this hash, told with one set of names."""
    path = [key]
    while came_from[key] != key:
        key = came_from[key]
        path.append(key)
    path.reverse()
    text, state = next((text, state) for text, state in model.first() if hash(model.canonical(state)) == path[0])
    story = [text]
    for wanted in path[1:]:
        for event, after in model.after(state):
            if not isinstance(after, Violation) and hash(model.canonical(after)) == wanted:
                story.append(event)
                state = after
                break
        else:
            raise AssertionError("the renaming of members changes what may happen: `canonical` is wrong")
    return story
