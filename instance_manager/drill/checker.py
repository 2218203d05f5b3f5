"""The judgement: pure functions over what clients saw, in a real run or in a simulated one.

- *Lost*: acknowledged, and not in the closing read: the last one of the whole table on the primary, begun when all writes
  had ended.
- *By a former primary*: begun after a row on a later timeline had been acknowledged, and itself acknowledged on an
  earlier one. A takeover claims a new timeline (P4), so this is what a fenced primary can never do.
- *Stale read*: a look at a former primary, still taking itself for the primary, that it answered after the first row of
  its successor was acknowledged. Its age is the time since that acknowledgement: so long has what it shows been out of
  date. It is allowed, and measured.
- What every read must show is in `reads.py`. docs/histories.md has all rules, their reasons and their limits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from instance_manager.drill.findings import Contradiction, Findings, Rule, describe
from instance_manager.drill.history import Outcome, Read, Row, Sample, Seen, Write
from instance_manager.drill.reads import MalformedHistory, all_superseded, attempts_of, contradicting_reads, is_present
from instance_manager.drill.runs import Run, as_runs

__all__ = ["Asynchronous", "Findings", "MalformedHistory", "Row", "describe", "judge", "longest_outage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asynchronous:
    """What a cluster without synchronous replication may lose: it is judged by this instead of "nothing"."""

    lost_rows_limit: int
    """At each takeover, of the rows acknowledged on one timeline."""
    last_known_s: Mapping[int, float] = field(default_factory=dict)
    """For a timeline, when the position was taken by which its successor judged its lag: only rows acknowledged before
    count. Of a timeline that is not here all count."""
    overlap_limit_s: float = 0.0
    """So long may a former primary acknowledge new rows beside its successor."""


def judge(
    writes: Sequence[Write],
    samples: Sequence[Sample] = (),
    reads: Sequence[Read] = (),
    *,
    from_s: float = float("-inf"),
    to_s: float = float("inf"),
    asynchronous: Asynchronous | None = None,
) -> Findings:
    """In any order of the operations. The window bounds the search for the outage only. MalformedHistory."""
    attempts = attempts_of(writes)
    acknowledged = sorted(
        (write for write in writes if write.outcome is Outcome.ACKNOWLEDGED), key=lambda write: write.end_s
    )
    outage_s, began_s = _outage_in_window(acknowledged, from_s, to_s)
    first_ends_s = first_acknowledgements(acknowledged)
    superseded_s = all_superseded((sample.timeline for sample in samples if sample.timeline is not None), first_ends_s)
    succeeded_s = all_superseded((), _first_seen(reads, first_ends_s))
    closing = closing_read(writes, reads, succeeded_s)
    lost = lost_rows(acknowledged, closing)
    former = tuple(write for write in acknowledged if write.begin_s > _superseded_s(write, superseded_s))
    overlap_s = max((write.end_s - _superseded_s(write, superseded_s) for write in former), default=0.0)
    stale = stale_reads(samples, superseded_s)
    contradictions = contradicting_reads(
        attempts,
        reads,
        succeeded_s,
        closing=closing,
        asynchronous=asynchronous is not None,
    )
    if asynchronous is None:
        contradictions += [*_losses(lost, closing), *_former_primaries(former, acknowledged)]
    else:
        contradictions += _beyond_limits(asynchronous, lost, closing, former, acknowledged, superseded_s)
    return Findings(
        attempts=len(writes),
        acknowledged=len(acknowledged),
        unknown=sum(write.outcome is Outcome.UNKNOWN for write in writes),
        cancelled_waits=sum(write.outcome is Outcome.CANCELLED_WAIT for write in writes),
        reads=sum(read.seen is not Seen.NONE for read in reads),
        closed=closing is not None,
        lost=lost,
        duplicated=tuple(
            sorted({(span.client, number) for read in reads for span in read.spans for number in span.twice})
        ),
        by_former_primary=former,
        longest_outage_s=outage_s,
        outage_began_s=began_s,
        longest_stale_read_s=max((age_s for _, age_s in stale), default=0.0),
        last_stale_read_s=max((sample.end_s for sample, _ in stale), default=None),
        longest_overlap_s=overlap_s,
        timelines=tuple(sorted(first_ends_s, key=lambda timeline: first_ends_s[timeline])),
        contradictions=tuple(contradictions),
    )


def longest_outage(ends_s: Sequence[float], from_s: float, to_s: float) -> tuple[float, float | None]:
    """The longest gap that touches the window, and when it began. `ends_s` is sorted.

    Before the first and after the last acknowledgement the window's own ends count.
    """
    before = bisect_left(ends_s, from_s)
    inside = [end_s for end_s in ends_s[before:] if end_s <= to_s]
    start_s = ends_s[before - 1] if before > 0 else from_s
    last_s = next((end_s for end_s in ends_s[before + len(inside) :]), to_s)
    marks = [start_s, *inside, last_s]
    gaps = [(after_s - before_s, before_s) for before_s, after_s in pairwise(marks)]
    longest_s, began_s = max(gaps, key=lambda gap: gap[0])
    return max(0.0, longest_s), began_s


def first_acknowledgements(acknowledged: Iterable[Write]) -> dict[int, float]:
    """For each timeline, when its first row was acknowledged."""
    found: dict[int, float] = {}
    for write in acknowledged:
        if write.timeline is not None:
            found[write.timeline] = min(write.end_s, found.get(write.timeline, write.end_s))
    return found


def closing_read(writes: Iterable[Write], reads: Iterable[Read], superseded_s: Mapping[int, float]) -> Read | None:
    """The last whole read of the present primary, if it began when all writes had ended."""
    ended_s = max((write.end_s for write in writes), default=float("-inf"))
    possible = (read for read in reads if read.whole and read.begin_s >= ended_s and is_present(read, superseded_s))
    return max(possible, key=lambda read: read.begin_s, default=None)


def lost_rows(acknowledged: Sequence[Write], closing: Read | None) -> tuple[Write, ...]:
    """Acknowledged, and not in the closing read; nothing is known without one."""
    if closing is None:
        return ()
    lows = {span.client: [low for low, _ in span.runs] for span in closing.spans}
    highs = {span.client: [high for _, high in span.runs] for span in closing.spans}

    def there(write: Write) -> bool:
        index = bisect_left(highs.get(write.client, ()), write.number)
        return index < len(highs.get(write.client, ())) and lows[write.client][index] <= write.number

    return tuple(write for write in acknowledged if not there(write))


def stale_reads(samples: Iterable[Sample], superseded_s: Mapping[int, float]) -> tuple[tuple[Sample, float], ...]:
    """Each stale read with its age."""
    return tuple(
        (sample, sample.end_s - superseded_s[sample.timeline])
        for sample in samples
        # Begun after: a read that overlaps the takeover may rightly show either state.
        if sample.seen is Seen.PRIMARY
        and sample.timeline is not None
        and sample.begin_s > superseded_s[sample.timeline]
    )


def _outage_in_window(acknowledged: Sequence[Write], from_s: float, to_s: float) -> tuple[float, float | None]:
    """Without a window: from the first acknowledgement to the last."""
    ends_s = [write.end_s for write in acknowledged]
    if from_s == float("-inf"):
        from_s = ends_s[0] if ends_s else 0.0
    if to_s == float("inf"):
        to_s = ends_s[-1] if ends_s else from_s
    return longest_outage(ends_s, from_s, to_s)


def _first_seen(reads: Iterable[Read], first_ends_s: Mapping[int, float]) -> dict[int, float]:
    """For each timeline, when a client first saw its primary: by an acknowledgement or by a read."""
    found = dict(first_ends_s)
    for read in reads:
        if read.seen is Seen.PRIMARY and read.timeline is not None:
            found[read.timeline] = min(read.end_s, found.get(read.timeline, read.end_s))
    return found


def _losses(lost: Iterable[Write], closing: Read | None, rule: Rule = Rule.LOST) -> list[Contradiction]:
    """One for each client."""
    by_client: dict[int, list[Write]] = defaultdict(list)
    for write in lost:
        by_client[write.client].append(write)
    return [
        Contradiction(rule, client, _runs(found), (found[0], *(() if closing is None else (closing,))))
        for client, found in sorted(by_client.items())
    ]


def _former_primaries(
    former: Sequence[Write], acknowledged: Sequence[Write], rule: Rule = Rule.BY_FORMER_PRIMARY
) -> list[Contradiction]:
    """One for each client and timeline, beside the first row that was acknowledged on a later one."""
    found: dict[tuple[int, int], list[Write]] = defaultdict(list)
    for write in former:
        if write.timeline is not None:
            found[write.client, write.timeline].append(write)
    return [
        Contradiction(rule, client, _runs(writes), (_first_later(acknowledged, timeline), writes[0]))
        for (client, timeline), writes in sorted(found.items())
    ]


def _first_later(acknowledged: Iterable[Write], timeline: int) -> Write:
    return next(write for write in acknowledged if write.timeline is not None and write.timeline > timeline)


def _superseded_s(write: Write, superseded_s: Mapping[int, float]) -> float:
    return float("inf") if write.timeline is None else superseded_s[write.timeline]


def _beyond_limits(
    limits: Asynchronous,
    lost: Iterable[Write],
    closing: Read | None,
    former: Sequence[Write],
    acknowledged: Sequence[Write],
    superseded_s: Mapping[int, float],
) -> list[Contradiction]:
    by_timeline: dict[int | None, list[Write]] = defaultdict(list)
    for write in lost:
        if write.timeline is None or write.end_s < limits.last_known_s.get(write.timeline, float("inf")):
            by_timeline[write.timeline].append(write)
    found = []
    for writes in by_timeline.values():
        if len(writes) > limits.lost_rows_limit:
            found += _losses(writes, closing, Rule.LOSS_BEYOND_LIMIT)
    late = [write for write in former if write.end_s - _superseded_s(write, superseded_s) > limits.overlap_limit_s]
    return found + _former_primaries(late, acknowledged, Rule.OVERLAP_BEYOND_LIMIT)


def _runs(writes: Iterable[Write]) -> tuple[Run, ...]:
    return as_runs(write.number for write in writes)
