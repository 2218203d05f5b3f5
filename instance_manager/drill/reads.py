"""The rules about what reads show. Pure, and near linear: each read costs by its runs, not by the rows it stands for.

- A *present primary* is one that no later timeline has yet shown itself beside: neither an acknowledged write nor a read
  of a later primary had ended when the read began. Standbys and former primaries may be behind, never wrong.
- Real time: an operation comes before another one only if it ended before that one began.
- *Vanished* is judged of rows that were really shown as committed. Postgres makes a row visible on its primary when the
  wait for the standbys ends, which is durable, or is cut short (P13), which is not. So a row with a cancelled wait is
  exempt; and one without an answer counts as shown only when two reads of that same primary, one after the other, had
  it: a wait is also cut short when Postgres stops, but then no second read is answered.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from instance_manager.drill.findings import Contradiction, Rule
from instance_manager.drill.history import Outcome, Read, Seen, Span, Write
from instance_manager.drill.runs import NO_END, Numbers, Run, as_runs, gaps, numbers_of

Place = tuple[str, int | None]
"""A member on a timeline."""


class MalformedHistory(ValueError):
    """It cannot have been recorded so: the text says where."""


class Attempts:
    """All that one client tried, in the order of its numbers, which is that of time."""

    def __init__(self, client: int, writes: Sequence[Write]) -> None:
        self.writes = sorted(writes, key=lambda write: write.number)
        for before, after in pairwise(self.writes):
            if before.number == after.number or after.begin_s < before.end_s:
                raise MalformedHistory(
                    f"client {client} began {after.number} before {before.number} had ended, or used a number twice"
                )
        self.begins_s = [write.begin_s for write in self.writes]
        self.numbers = [write.number for write in self.writes]
        self.runs = as_runs(self.numbers)
        self.acknowledged = [write for write in self.writes if write.outcome is Outcome.ACKNOWLEDGED]
        self.acknowledged_numbers = [write.number for write in self.acknowledged]
        self._acknowledged_ends_s = [write.end_s for write in self.acknowledged]

    def acknowledged_in(self, run: Run) -> tuple[int, int]:
        """As a slice of `acknowledged`."""
        low, high = run
        return bisect_left(self.acknowledged_numbers, low), bisect_right(self.acknowledged_numbers, high)

    def acknowledged_before(self, at_s: float) -> int:
        return bisect_left(self._acknowledged_ends_s, at_s)

    def by_number(self, number: int) -> Write | None:
        index = bisect_left(self.numbers, number)
        return self.writes[index] if index < len(self.numbers) and self.numbers[index] == number else None


def attempts_of(writes: Iterable[Write]) -> dict[int, Attempts]:
    """By client. MalformedHistory."""
    by_client: dict[int, list[Write]] = defaultdict(list)
    for write in writes:
        by_client[write.client].append(write)
    return {client: Attempts(client, found) for client, found in by_client.items()}


def contradicting_reads(
    attempts: Mapping[int, Attempts],
    reads: Sequence[Read],
    superseded_s: Mapping[int, float],
    *,
    closing: Read | None,
    asynchronous: bool,
) -> list[Contradiction]:
    """In the order of the reads. `superseded_s`: for a timeline, since when there was a present primary on a later one.

    What the closing read lacks of the acknowledged rows is lost, not missing, and is judged elsewhere.
    """
    judge = _ReadJudge(attempts, superseded_s, closing, asynchronous)
    # At equal times what begins does not yet know of what ends.
    moments: list[tuple[float, bool, int]] = []
    for index, read in enumerate(reads):
        if read.seen is not Seen.NONE:
            moments += [(read.begin_s, False, index), (read.end_s, True, index)]
    moments.sort()
    views = {index: judge.view(reads[index]) for index in sorted({index for _, _, index in moments})}
    for _, ended, index in moments:
        judge.end(views[index]) if ended else judge.begin(views[index])
    return judge.found


@dataclass(slots=True)
class _View:
    """A read, made ready."""

    read: Read
    spans: tuple[Span, ...]
    present: bool
    """Of a present primary."""
    again: list[tuple[int, Run]] = field(default_factory=list)
    """(client, run): shown by an earlier read of the same primary too."""


@dataclass(slots=True)
class _Shown:
    """What reads of present primaries have shown of one client so far."""

    once: Numbers = field(default_factory=Numbers)
    twice: Numbers = field(default_factory=Numbers)
    by_place: defaultdict[Place, Numbers] = field(default_factory=lambda: defaultdict(Numbers))


class _ReadJudge:
    def __init__(
        self,
        attempts: Mapping[int, Attempts],
        superseded_s: Mapping[int, float],
        closing: Read | None,
        asynchronous: bool,
    ) -> None:
        self._attempts = attempts
        self._superseded_s = superseded_s
        self._closing = closing
        self._asynchronous = asynchronous
        self._told: defaultdict[tuple[Rule, int], Numbers] = defaultdict(Numbers)
        self._shown: defaultdict[tuple[int, int | None], _Shown] = defaultdict(_Shown)
        self._ended: list[Read] = []
        """Of present primaries."""
        self.found: list[Contradiction] = []

    def view(self, read: Read) -> _View:
        """MalformedHistory."""
        for span in read.spans:
            _check(read, span)
        spans = read.spans
        if read.whole:
            there = {span.client for span in spans}
            spans += tuple(Span(client, 0, None, ()) for client in self._attempts if client not in there)
        return _View(read, spans, is_present(read, self._superseded_s))

    def begin(self, view: _View) -> None:
        """Judge it by all that had ended before."""
        for span in view.spans:
            self._judge_validity(view.read, span)
            for gap in gaps(span.first, NO_END if span.last is None else span.last, span.runs):
                self._judge_gap(view, span.client, gap)
            if view.present:
                before = self._shown_before(view.read, span.client).by_place[_place(view.read)]
                view.again += [(span.client, run) for shown in span.runs for run in before.within(shown)]

    def end(self, view: _View) -> None:
        """From now on what it showed must stay."""
        if not view.present:
            return
        self._ended.append(view.read)
        for client, run in view.again:
            self._shown_before(view.read, client).twice.add(run)
        for span in view.spans:
            shown = self._shown_before(view.read, span.client)
            for run in span.runs:
                shown.once.add(run)
                shown.by_place[_place(view.read)].add(run)

    def _judge_validity(self, read: Read, span: Span) -> None:
        attempts = self._attempts.get(span.client)
        if span.twice:
            self._tell(Rule.DUPLICATED, span.client, as_runs(span.twice), read)
        if attempts is None:
            self._tell(Rule.NEVER_WRITTEN, span.client, span.runs, read)
            return
        begun = bisect_right(attempts.begins_s, read.end_s)
        for low, high in span.runs:
            first, end = bisect_left(attempts.numbers, low), bisect_right(attempts.numbers, high)
            if end - first < high - low + 1:
                tried = as_runs(attempts.numbers[first:end])
                self._tell(Rule.NEVER_WRITTEN, span.client, tuple(gaps(low, high, tried)), read)
            for early in attempts.writes[max(first, begun) : end]:
                self._tell(Rule.NEVER_WRITTEN, span.client, ((early.number, early.number),), read, early)

    def _judge_gap(self, view: _View, client: int, gap: Run) -> None:
        """Rows that the read was asked for and did not show."""
        read, attempts = view.read, self._attempts.get(client)
        if attempts is None:
            return
        first, end = attempts.acknowledged_in(gap)
        if view.present:
            due = min(end, max(first, attempts.acknowledged_before(read.begin_s)))
            if read is not self._closing:
                self._tell_missing(read, attempts.acknowledged[first:due])
            self._judge_vanished(read, client, attempts, gap)
            if not self._asynchronous:
                first = due
        if first < end and (later := self._later_shown(read, client, gap)) is not None:
            self._judge_order(read, attempts.acknowledged[first:end], later)

    def _tell_missing(self, read: Read, due: Sequence[Write]) -> None:
        if self._asynchronous:
            # A takeover may have lost them; a server does not lose what it wrote itself.
            due = [write for write in due if write.timeline == read.timeline]
        if due:
            self._tell(Rule.MISSING, due[0].client, as_runs(write.number for write in due), read, due[0])

    def _later_shown(self, read: Read, client: int, gap: Run) -> Write | None:
        """An acknowledged row above the gap that the read shows; in an asynchronous cluster, only the next one.

        Another row says nothing: of a cancelled wait, or without an answer, it may be where nobody else's history goes.
        """
        attempts = self._attempts[client]
        if not self._asynchronous:
            number = _next_shown_of(attempts.acknowledged_numbers, read, client, gap[1])
            return None if number is None else attempts.by_number(number)
        _, after = attempts.acknowledged_in(gap)
        following = attempts.acknowledged[after : after + 1]
        return following[0] if following and _shows(read, client, following[0].number) else None

    def _judge_order(self, read: Read, absent: Sequence[Write], later: Write) -> None:
        if self._asynchronous:
            # What a takeover lost is the newest of its timeline; the client went on with a later number on the next.
            absent = [each for each in absent if each.timeline == later.timeline]
        if absent:
            runs = as_runs(write.number for write in absent)
            self._tell(Rule.OUT_OF_ORDER, later.client, runs, read, absent[0], later)

    def _judge_vanished(self, read: Read, client: int, attempts: Attempts, gap: Run) -> None:
        shown = self._shown_before(read, client)
        due = attempts.acknowledged_before(read.begin_s)
        told = self._told[Rule.MISSING, client]
        absent = (run for each in shown.once.within(gap) for run in told.without(each))
        for number in numbers_of(absent):
            write = attempts.by_number(number)
            if write is None or write.outcome is Outcome.CANCELLED_WAIT:
                continue
            if write.outcome is Outcome.ACKNOWLEDGED:
                judged = bisect_left(attempts.acknowledged_numbers, number) >= due
            else:
                judged = number in shown.twice
            if judged:
                self._tell(Rule.VANISHED, client, ((number, number),), read, write, self._first_with(client, number))

    def _shown_before(self, read: Read, client: int) -> _Shown:
        """In an asynchronous cluster a takeover may take back what its predecessor showed."""
        return self._shown[client, read.timeline if self._asynchronous else None]

    def _first_with(self, client: int, number: int) -> Read:
        return next(read for read in self._ended if _shows(read, client, number))

    def _tell(self, rule: Rule, client: int, runs: Sequence[Run], read: Read, *others: Write | Read) -> None:
        told = self._told[rule, client]
        new = tuple(run for each in runs for run in told.without(each))
        for run in new:
            told.add(run)
        if new:
            operations = sorted((*others, read), key=lambda operation: operation.begin_s)
            self.found.append(Contradiction(rule, client, new, tuple(operations)))


def _check(read: Read, span: Span) -> None:
    ends = [number for run in span.runs for number in run]
    last = NO_END if span.last is None else span.last
    ordered = all(low <= high for low, high in span.runs) and all(
        before[1] < after[0] for before, after in pairwise(span.runs)
    )
    if not ordered or (ends and not span.first <= ends[0] <= ends[-1] <= last):
        raise MalformedHistory(
            f"the read of {read.member} at {read.begin_s:.3f} s: the runs of client {span.client} are not in order"
        )


def _place(read: Read) -> Place:
    return read.member, read.timeline


def _next_shown_of(numbers: Sequence[int], read: Read, client: int, above: int) -> int | None:
    """The lowest of these ascending `numbers` above `above`, which no run of the read contains, that the read shows."""
    runs = (run for span in read.spans if span.client == client for run in span.runs if run[0] > above)
    shown = (numbers[place] for low, high in runs if (place := bisect_left(numbers, low)) < bisect_right(numbers, high))
    return min(shown, default=None)


def _shows(read: Read, client: int, number: int) -> bool:
    return any(low <= number <= high for span in read.spans if span.client == client for low, high in span.runs)


def is_present(read: Read, superseded_s: Mapping[int, float]) -> bool:
    """Read from a primary that was the present one, as far as any client could know."""
    return read.seen is Seen.PRIMARY and (read.timeline is None or read.begin_s <= superseded_s[read.timeline])


def all_superseded(timelines: Iterable[int], first_ends_s: Mapping[int, float]) -> dict[int, float]:
    """For each timeline, when the first operation on a later one ended; infinity: none did."""
    found: dict[int, float] = {}
    earliest_s = float("inf")
    for timeline in sorted({*timelines, *first_ends_s}, reverse=True):
        found[timeline] = earliest_s
        earliest_s = min(earliest_s, first_ends_s.get(timeline, float("inf")))
    return found
