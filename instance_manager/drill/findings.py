"""What a judgement finds, and how it tells it: which rule is broken, and the operations that contradict one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from instance_manager.drill.history import Outcome, Read, Row, Seen, Write
from instance_manager.drill.runs import NO_END, Run, amount

_RUNS_SHOWN = 4


class Rule(StrEnum):
    """What must hold; docs/histories.md gives the reason of each and what it does not cover."""

    LOST = "lost"
    """An acknowledged row is in the closing read."""
    MISSING = "missing"
    """An acknowledged row is in every read of the primary that began after its acknowledgement."""
    VANISHED = "vanished"
    """A row that a read of the primary showed is in every later one."""
    OUT_OF_ORDER = "out of order"
    """No read shows a client's later row without an earlier acknowledged one."""
    NEVER_WRITTEN = "never written"
    """A read shows only what a client had begun to write."""
    DUPLICATED = "duplicated"
    """No row is there twice."""
    BY_FORMER_PRIMARY = "by a former primary"
    """Nothing begun after a later timeline has acknowledged is acknowledged on an earlier one."""
    LOSS_BEYOND_LIMIT = "loss beyond the limit"
    """Asynchronous: one takeover loses no more rows than stated."""
    OVERLAP_BEYOND_LIMIT = "two writers beyond the limit"
    """Asynchronous: a former primary acknowledges no longer than stated after its successor's first row."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One broken rule. Rows that later reads contradict in the same way are told once."""

    rule: Rule
    client: int
    runs: tuple[Run, ...]
    """The numbers of the rows."""
    operations: tuple[Write | Read, ...]
    """Those that contradict one another, in their order."""

    def describe(self) -> str:
        """A few lines for people; times are those of the history, so that its lines can be found."""
        count = amount(self.runs)
        rows = f"row {_runs_text(self.runs)}" if count == 1 else f"rows {_runs_text(self.runs)} ({count})"
        lines = [f"{self.rule}: client {self.client}, {rows}"]
        lines += [f"  {_operation_text(each, self.client, self.runs)}" for each in self.operations]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    attempts: int
    acknowledged: int
    unknown: int
    cancelled_waits: int
    reads: int
    """Of contents, by any member."""
    closed: bool
    """There is a closing read; without one it is not known what is lost."""
    lost: tuple[Write, ...]
    duplicated: tuple[Row, ...]
    by_former_primary: tuple[Write, ...]
    longest_outage_s: float
    """Between two acknowledgements next to each other, over all clients, where the gap touches the window."""
    outage_began_s: float | None
    longest_stale_read_s: float
    last_stale_read_s: float | None
    """When the last one was answered, on the clock of the history."""
    longest_overlap_s: float
    """How long after its successor's first acknowledgement a former primary still acknowledged new rows."""
    timelines: tuple[int, ...]
    """On which rows were acknowledged, in order of their first."""
    contradictions: tuple[Contradiction, ...]

    @property
    def breaks_the_promise(self) -> bool:
        return bool(self.contradictions)

    def contradicting(self, *rules: Rule) -> tuple[Contradiction, ...]:
        return tuple(each for each in self.contradictions if each.rule in rules)


def describe(contradictions: Sequence[Contradiction], *, limit: int = 10) -> str:
    """For a failure message: the first ones in full, and how many more there are. Empty if there are none."""
    parts = [each.describe() for each in contradictions[:limit]]
    if len(contradictions) > limit:
        parts.append(f"and {len(contradictions) - limit} more contradictions")
    return "\n".join(parts)


def _operation_text(operation: Write | Read, client: int, runs: Sequence[Run]) -> str:
    when = f"{operation.begin_s:.3f} to {operation.end_s:.3f} s"
    if isinstance(operation, Write):
        what = "cancelled wait" if operation.outcome is Outcome.CANCELLED_WAIT else operation.outcome
        timeline = "" if operation.timeline is None else f" on timeline {operation.timeline}"
        row = f"client {operation.client} row {operation.number}"
        return f"{when}  write to {operation.member}{timeline}: {row}: {what}"
    role = (
        operation.seen
        if operation.seen is not Seen.PRIMARY or operation.timeline is None
        else (f"{operation.seen} on timeline {operation.timeline}")
    )
    return f"{when}  read of {operation.member}, {role}, shows of client {client}: {_around(operation, client, runs)}"


def _around(read: Read, client: int, runs: Sequence[Run]) -> str:
    """The runs that the read shows next to the rows in question: its whole contents may be long."""
    shown = [run for span in read.spans if span.client == client for run in span.runs]
    twice = [number for span in read.spans if span.client == client for number in span.twice]
    lowest, highest = runs[0][0], runs[-1][1]
    below = [run for run in shown if run[1] < lowest]
    rest = [run for run in shown if run[1] >= lowest and run[0] <= highest]
    above = [run for run in shown if run[0] > highest]
    text = _runs_text([*below[-1:], *rest, *above[:1]]) or "nothing"
    return f"{text}; twice: {_runs_text([(each, each) for each in twice])}" if twice else text


def _runs_text(runs: Sequence[Run]) -> str:
    parts = [str(low) if low == high else f"{low}-{'' if high == NO_END else high}" for low, high in runs]
    return ", ".join(parts if len(parts) <= _RUNS_SHOWN else [*parts[:_RUNS_SHOWN], "..."])
