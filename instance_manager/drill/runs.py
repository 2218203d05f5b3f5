"""Sets of numbers as runs: 1, 2, 3, 7, 8 are (1, 3) and (7, 8). Exact, and small where the holes are few."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

Run = tuple[int, int]
"""Lowest and highest number, both included."""

NO_END = 2**63 - 1
"""Above every number: Postgres' largest bigint."""


def as_runs(numbers: Iterable[int]) -> tuple[Run, ...]:
    """In any order; a number that comes twice counts once."""
    found: list[Run] = []
    for number in sorted(numbers):
        if found and number <= found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def gaps(first: int, last: int, runs: Sequence[Run]) -> Iterator[Run]:
    """What of `first` to `last` is in none of the runs, which are ascending and within them."""
    following = first
    for low, high in runs:
        if low > following:
            yield following, low - 1
        following = high + 1
    if following <= last:
        yield following, last


def amount(runs: Iterable[Run]) -> int:
    return sum(high - low + 1 for low, high in runs)


def numbers_of(runs: Iterable[Run]) -> Iterator[int]:
    for low, high in runs:
        yield from range(low, high + 1)


class Numbers:
    """A growing set of numbers. Adding and asking cost by the number of runs touched, not by their length."""

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []

    def add(self, run: Run) -> None:
        low, high = run
        begin = bisect_left(self._highs, low - 1)
        end = bisect_right(self._lows, high + 1)
        if begin < end:
            low, high = min(low, self._lows[begin]), max(high, self._highs[end - 1])
        self._lows[begin:end] = [low]
        self._highs[begin:end] = [high]

    def within(self, run: Run) -> Iterator[Run]:
        """The members that are in the run."""
        low, high = run
        index = bisect_left(self._highs, low)
        while index < len(self._lows) and self._lows[index] <= high:
            yield max(low, self._lows[index]), min(high, self._highs[index])
            index += 1

    def without(self, run: Run) -> Iterator[Run]:
        """What of the run is no member."""
        return gaps(*run, tuple(self.within(run)))

    def __contains__(self, number: int) -> bool:
        return any(self.within((number, number)))
