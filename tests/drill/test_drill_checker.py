"""The drill's judgement: it must see every way in which the promise can be broken, and nothing else."""

from __future__ import annotations

from collections import Counter

from instance_manager.drill.checker import Findings, Row, judge, longest_outage
from instance_manager.drill.history import Outcome, Sample, Seen, Write, whole_read


def write(
    number: int,
    begin_s: float,
    *,
    took_s: float = 0.01,
    outcome: Outcome = Outcome.ACKNOWLEDGED,
    member: str = "demo-1",
    timeline: int | None = 1,
    client: int = 1,
) -> Write:
    return Write(client, number, member, begin_s, begin_s + took_s, outcome, timeline)


def judged(writes: list[Write], rows: dict[Row, int] | None = None, samples: list[Sample] | None = None) -> Findings:
    """With a closing read of these rows, each as often as stated; by default of all that was tried, once."""
    present = Counter({(each.client, each.number): 1 for each in writes} if rows is None else rows)
    closing = whole_read("demo-1", 30.0, 30.1, Seen.PRIMARY, None, present.elements())
    return judge(writes, samples or [], [closing], from_s=0.0, to_s=20.0)


def test_an_acknowledged_row_that_the_final_primary_lacks_is_lost() -> None:
    findings = judged([write(1, 1.0), write(2, 2.0)], {(1, 1): 1})
    assert [each.number for each in findings.lost] == [2]
    assert findings.breaks_the_promise


def test_a_row_without_an_acknowledgement_may_be_there_or_not() -> None:
    writes = [write(1, 1.0)]
    writes += [
        write(n, float(n), outcome=each) for n, each in enumerate(Outcome, 2) if each is not Outcome.ACKNOWLEDGED
    ]
    assert not judged(writes, {(1, 1): 1}).breaks_the_promise
    assert not judged(writes, {(1, each.number): 1 for each in writes}).breaks_the_promise


def test_success_with_a_cancelled_wait_is_no_acknowledgement() -> None:
    findings = judged([write(1, 1.0, outcome=Outcome.CANCELLED_WAIT)], {})
    assert (findings.acknowledged, findings.cancelled_waits, findings.lost) == (0, 1, ())


def test_a_row_that_is_there_twice_breaks_the_promise() -> None:
    findings = judged([write(1, 1.0)], {(1, 1): 2})
    assert findings.duplicated == ((1, 1),)
    assert findings.breaks_the_promise


def test_a_former_primary_that_acknowledges_after_the_takeover_is_caught_even_if_no_row_is_lost() -> None:
    writes = [
        write(1, 1.0),
        write(2, 5.0, member="demo-2", timeline=2),
        write(3, 6.0, member="demo-1", timeline=1),
    ]
    findings = judged(writes)
    assert [each.number for each in findings.by_former_primary] == [3]
    assert findings.breaks_the_promise


def test_a_row_begun_before_the_takeover_may_be_acknowledged_after_it() -> None:
    writes = [write(1, 4.0, took_s=3.0), write(1, 5.0, client=2, member="demo-2", timeline=2)]
    assert not judged(writes).breaks_the_promise


def test_the_same_member_may_be_primary_again_on_a_later_timeline() -> None:
    writes = [
        write(1, 1.0),
        write(2, 5.0, member="demo-2", timeline=2),
        write(3, 9.0, member="demo-1", timeline=3),
    ]
    findings = judged(writes)
    assert not findings.breaks_the_promise
    assert findings.timelines == (1, 2, 3)


def test_a_stale_read_is_as_old_as_the_first_row_that_it_lacks() -> None:
    writes = [write(1, 1.0), write(2, 5.0, timeline=2, member="demo-2")]
    samples = [
        Sample("demo-1", 4.0, 4.1, Seen.PRIMARY, 1),
        Sample("demo-1", 5.0, 5.1, Seen.PRIMARY, 1),
        Sample("demo-1", 8.0, 8.01, Seen.PRIMARY, 1),
        Sample("demo-1", 9.0, 9.1, Seen.STANDBY),
        Sample("demo-1", 10.0, 11.0, Seen.NONE),
        Sample("demo-2", 9.0, 9.1, Seen.PRIMARY, 2),
    ]
    findings = judged(writes, samples=samples)
    assert round(findings.longest_stale_read_s, 3) == 3.0
    assert findings.last_stale_read_s == 8.01


def test_the_outage_is_the_longest_gap_that_touches_the_window() -> None:
    assert longest_outage([1.0, 2.0, 5.0, 6.0, 20.0], 2.5, 7.0) == (14.0, 6.0)
    assert longest_outage([1.0, 2.0, 5.0, 6.0], 2.5, 6.5) == (3.0, 2.0)


def test_no_acknowledgement_at_all_is_an_outage_of_the_whole_window() -> None:
    assert longest_outage([], 2.0, 9.0) == (7.0, 2.0)


def test_writes_that_never_resume_count_to_the_windows_end() -> None:
    assert longest_outage([1.0, 2.0], 3.0, 9.0) == (7.0, 2.0)
