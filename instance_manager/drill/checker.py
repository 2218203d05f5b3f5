"""The judgement: pure functions over what the clients saw and what the final primary holds.

- *Lost*: acknowledged, and not on the final primary.
- *Duplicated*: on the final primary more than once.
- *By a former primary*: begun after a row on a later timeline had been acknowledged, and itself acknowledged on an
  earlier one. A takeover claims a new timeline (P4), so this is what a fenced primary can never do.
- *Stale read*: a read that a former primary, still taking itself for the primary, answered after the first row of its
  successor was acknowledged. Its age is the time since that acknowledgement: so long has what it shows been out of date.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from instance_manager.drill.history import Outcome, Sample, Seen, Write

Row = tuple[int, int]
"""(client, number)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    attempts: int
    acknowledged: int
    unknown: int
    cancelled_waits: int
    lost: tuple[Write, ...]
    duplicated: tuple[Row, ...]
    by_former_primary: tuple[Write, ...]
    longest_outage_s: float
    """Between two acknowledgements next to each other, over all clients, where the gap touches the window."""
    outage_began_s: float | None
    longest_stale_read_s: float
    last_stale_read_s: float | None
    """When the last one was answered, CLOCK_BOOTTIME."""
    timelines: tuple[int, ...]
    """On which rows were acknowledged, in order of their first."""

    @property
    def breaks_the_promise(self) -> bool:
        return bool(self.lost or self.duplicated or self.by_former_primary)


def judge(
    writes: Sequence[Write],
    samples: Sequence[Sample],
    final_rows: Mapping[Row, int],
    *,
    from_s: float,
    to_s: float,
) -> Findings:
    """`final_rows`: how often each row is on the final primary. The window bounds the search for the outage only."""
    acknowledged = sorted(
        (write for write in writes if write.outcome is Outcome.ACKNOWLEDGED), key=lambda write: write.end_s
    )
    outage_s, began_s = longest_outage([write.end_s for write in acknowledged], from_s, to_s)
    first_ends_s = first_acknowledgements(acknowledged)
    stale = stale_reads(samples, first_ends_s)
    return Findings(
        attempts=len(writes),
        acknowledged=len(acknowledged),
        unknown=sum(write.outcome is Outcome.UNKNOWN for write in writes),
        cancelled_waits=sum(write.outcome is Outcome.CANCELLED_WAIT for write in writes),
        lost=tuple(write for write in acknowledged if (write.client, write.number) not in final_rows),
        duplicated=tuple(sorted(row for row, count in final_rows.items() if count > 1)),
        by_former_primary=former_primary_writes(acknowledged, first_ends_s),
        longest_outage_s=outage_s,
        outage_began_s=began_s,
        longest_stale_read_s=max((age_s for _, age_s in stale), default=0.0),
        last_stale_read_s=max((sample.end_s for sample, _ in stale), default=None),
        timelines=tuple(sorted(first_ends_s, key=lambda timeline: first_ends_s[timeline])),
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


def former_primary_writes(acknowledged: Iterable[Write], first_ends_s: Mapping[int, float]) -> tuple[Write, ...]:
    """Rows begun after a later timeline had acknowledged, and acknowledged all the same."""
    superseded_s = _superseded(first_ends_s)
    return tuple(
        write
        for write in acknowledged
        if write.timeline is not None and write.begin_s > superseded_s.get(write.timeline, float("inf"))
    )


def stale_reads(samples: Iterable[Sample], first_ends_s: Mapping[int, float]) -> tuple[tuple[Sample, float], ...]:
    """Each stale read with its age."""
    found = []
    for sample in samples:
        if sample.seen is Seen.PRIMARY and sample.timeline is not None:
            later_s = [end_s for timeline, end_s in first_ends_s.items() if timeline > sample.timeline]
            # Begun after: a read that overlaps the takeover may rightly show either state.
            if later_s and sample.begin_s > min(later_s):
                found.append((sample, sample.end_s - min(later_s)))
    return tuple(found)


def _superseded(first_ends_s: Mapping[int, float]) -> dict[int, float]:
    return {
        timeline: min((end_s for later, end_s in first_ends_s.items() if later > timeline), default=float("inf"))
        for timeline in first_ends_s
    }
