"""The rules about reads: for each one a history that keeps it and one that breaks it, as near to each other as can be."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

import pytest

from instance_manager.drill.checker import Asynchronous, Findings, MalformedHistory, describe, judge
from instance_manager.drill.findings import Rule
from instance_manager.drill.history import Outcome, Read, Sample, Seen, Span, Write, whole_read
from instance_manager.drill.runs import as_runs

PRESENT = ("demo-2", 2)
FORMER = ("demo-1", 1)


def write(
    number: int,
    begin_s: float,
    outcome: Outcome = Outcome.ACKNOWLEDGED,
    *,
    timeline: int | None = 1,
    client: int = 1,
    took_s: float = 0.1,
) -> Write:
    return Write(client, number, f"demo-{timeline}", begin_s, begin_s + took_s, outcome, timeline)


def read(
    begin_s: float, numbers: Iterable[int], *, of: tuple[str, int] = FORMER, client: int = 1, took_s: float = 0.1
) -> Read:
    """Of a primary, the whole table."""
    member, timeline = of
    return whole_read(
        member, begin_s, begin_s + took_s, Seen.PRIMARY, timeline, [(client, number) for number in numbers]
    )


def standby_read(begin_s: float, numbers: Iterable[int]) -> Read:
    return whole_read("demo-3", begin_s, begin_s + 0.1, Seen.STANDBY, None, [(1, number) for number in numbers])


def judged(writes: Sequence[Write], *reads: Read, asynchronous: Asynchronous | None = None) -> Findings:
    return judge(writes, (), reads, asynchronous=asynchronous)


def broken(findings: Findings) -> list[tuple[Rule, tuple[tuple[int, int], ...]]]:
    return [(each.rule, each.runs) for each in findings.contradictions]


# Every acknowledged row is in every later read of the primary.


def test_a_read_of_the_primary_shows_what_was_acknowledged_before_it_began() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 3.0)]
    assert broken(judged(writes, read(2.5, [1, 2]), read(4.0, [1, 2, 3]))) == []
    assert broken(judged(writes, read(2.5, [1]), read(4.0, [1, 2, 3]))) == [(Rule.MISSING, ((2, 2),))]


def test_a_read_may_lack_what_was_acknowledged_while_it_ran() -> None:
    writes = [write(1, 1.0), write(2, 2.0)]
    assert broken(judged(writes, read(2.05, [1], took_s=1.0), read(4.0, [1, 2]))) == []
    assert broken(judged(writes, read(2.15, [1], took_s=1.0), read(4.0, [1, 2]))) == [(Rule.MISSING, ((2, 2),))]


def test_the_next_primary_shows_what_the_former_one_acknowledged() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 5.0, timeline=2)]
    assert broken(judged(writes, read(6.0, [1, 2, 3], of=PRESENT))) == []
    lacking = judged(writes, read(4.0, [1], of=PRESENT), read(6.0, [1, 2, 3], of=PRESENT))
    assert broken(lacking) == [(Rule.MISSING, ((2, 2),))]


def test_a_primary_without_any_row_of_a_client_lacks_them_all() -> None:
    writes = [write(1, 1.0), write(1, 1.0, client=2), write(2, 2.0, client=2)]
    contradictions = judged(writes, read(3.0, [1]), whole_read("demo-1", 4.0, 4.1, Seen.PRIMARY, 1, [(1, 1)]))
    (missing,) = contradictions.contradicting(Rule.MISSING)
    assert (missing.client, missing.runs) == (2, ((1, 2),))


def test_a_read_is_judged_only_by_the_numbers_it_asked_for() -> None:
    writes = [write(number, float(number)) for number in range(1, 9)]
    asked = Read("demo-1", 9.0, 9.1, Seen.PRIMARY, 1, (Span(1, 6, None, ((6, 8),)), Span(1, 1, 3, ((1, 3),))))
    lacking = Read("demo-1", 9.0, 9.1, Seen.PRIMARY, 1, (Span(1, 6, None, ((6, 8),)), Span(1, 1, 4, ((1, 3),))))
    assert broken(judged(writes, asked)) == []
    assert (Rule.MISSING, ((4, 4),)) in broken(judged(writes, lacking))


def test_a_standby_may_be_behind_and_so_may_a_former_primary() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 5.0, timeline=2)]
    assert broken(judged(writes, standby_read(7.0, [1]), read(7.0, [1, 2], of=FORMER))) == []
    present = [read(7.0, [1, 2], of=PRESENT), read(8.0, [1, 2, 3], of=PRESENT)]
    assert broken(judged(writes, *present)) == [(Rule.MISSING, ((3, 3),))]


def test_a_primary_is_a_former_one_as_soon_as_its_successor_was_read() -> None:
    writes = [write(1, 1.0), write(2, 5.0, Outcome.UNKNOWN, timeline=None)]
    successor = [read(6.0, [1, 2], of=PRESENT), read(6.2, [1, 2], of=PRESENT)]
    assert broken(judged(writes, *successor, read(7.0, [1], of=FORMER))) == []
    assert broken(judged(writes, *successor, read(7.0, [1], of=PRESENT))) == [(Rule.VANISHED, ((2, 2),))]


def test_a_hole_that_many_reads_show_is_told_once() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 3.0)]
    reads = [read(4.0 + step, [1, 3]) for step in range(50)]
    assert broken(judged(writes, *reads, read(90.0, [1, 2, 3]))) == [(Rule.MISSING, ((2, 2),))]


# Nothing is read that nobody wrote, nothing twice.


def test_whatever_a_client_tried_may_be_read_and_nothing_else() -> None:
    writes = [
        write(1, 1.0),
        write(2, 2.0, Outcome.UNKNOWN),
        write(3, 3.0, Outcome.FAILED),
        write(4, 4.0, Outcome.CANCELLED_WAIT),
    ]
    assert broken(judged(writes, read(5.0, [1, 2, 3, 4]), standby_read(5.0, [1, 2, 3, 4]))) == []
    assert broken(judged(writes, read(5.0, [1, 5]))) == [(Rule.NEVER_WRITTEN, ((5, 5),))]
    assert broken(judged(writes, standby_read(5.0, [0, 1, 2]))) == [(Rule.NEVER_WRITTEN, ((0, 0),))]
    assert (Rule.NEVER_WRITTEN, ((1, 1),)) in broken(judged(writes, read(5.0, [1], client=2)))


def test_a_row_may_be_read_once_its_write_has_begun_and_not_before() -> None:
    writes = [write(1, 1.0), write(2, 5.0, took_s=3.0)]
    assert broken(judged(writes, read(5.5, [1, 2]))) == []
    assert broken(judged(writes, read(4.0, [1, 2]), read(9.0, [1, 2]))) == [(Rule.NEVER_WRITTEN, ((2, 2),))]


def test_a_row_that_a_read_shows_twice_is_named_whoever_answered() -> None:
    writes = [write(1, 1.0), write(2, 2.0)]
    assert broken(judged(writes, standby_read(3.0, [1, 2]))) == []
    findings = judged(writes, standby_read(3.0, [1, 2, 2]))
    assert broken(findings) == [(Rule.DUPLICATED, ((2, 2),))]
    assert findings.duplicated == ((1, 2),)


# What a primary has shown stays.


def test_a_row_shown_before_its_acknowledgement_stays() -> None:
    writes = [write(1, 1.0, took_s=5.0)]
    assert broken(judged(writes, read(2.0, [1]), read(3.0, [1]))) == []
    assert broken(judged(writes, read(2.0, [1]), read(3.0, []))) == [(Rule.VANISHED, ((1, 1),))]
    assert broken(judged(writes, read(2.0, []), read(3.0, []))) == []


def test_a_row_without_an_answer_that_a_living_primary_showed_stays() -> None:
    writes = [write(1, 1.0), write(2, 2.0, Outcome.UNKNOWN)]
    shown = [read(3.0, [1, 2]), read(3.3, [1, 2])]
    assert broken(judged(writes, *shown, read(9.0, [1, 2], of=PRESENT))) == []
    assert broken(judged(writes, *shown, read(9.0, [1], of=PRESENT))) == [(Rule.VANISHED, ((2, 2),))]


def test_a_row_without_an_answer_may_show_up_for_a_moment_while_its_primary_stops() -> None:
    """Its wait for the standbys was cut short; no second read of that primary is answered."""
    writes = [write(1, 1.0), write(2, 2.0, Outcome.UNKNOWN)]
    assert broken(judged(writes, read(3.0, [1, 2]), read(9.0, [1], of=PRESENT))) == []
    overlapping = [read(3.0, [1, 2]), read(3.05, [1, 2])]
    assert broken(judged(writes, *overlapping, read(9.0, [1], of=PRESENT))) == []


def test_a_row_with_a_cancelled_wait_may_be_shown_and_vanish() -> None:
    shown = [read(3.0, [1]), read(3.3, [1]), read(9.0, [], of=PRESENT)]
    assert broken(judged([write(1, 1.0, Outcome.CANCELLED_WAIT)], *shown)) == []
    assert broken(judged([write(1, 1.0, Outcome.UNKNOWN)], *shown)) == [(Rule.VANISHED, ((1, 1),))]


def test_a_standby_may_show_what_then_vanishes() -> None:
    writes = [write(1, 1.0, Outcome.UNKNOWN)]
    assert broken(judged(writes, standby_read(3.0, [1]), standby_read(3.3, [1]), read(9.0, [], of=PRESENT))) == []


# A client's rows appear in its own order.


def test_any_read_shows_a_clients_rows_up_to_some_point_without_a_hole() -> None:
    writes = [write(1, 1.0), write(2, 2.0, Outcome.FAILED), write(3, 3.0), write(4, 4.0)]
    assert broken(judged(writes, standby_read(5.0, [1, 3]))) == []
    assert broken(judged(writes, standby_read(5.0, [1, 4]))) == [(Rule.OUT_OF_ORDER, ((3, 3),))]


def test_a_former_primary_is_not_exempt_from_the_order() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 5.0, timeline=2)]
    assert broken(judged(writes, read(7.0, [2], of=FORMER))) == [(Rule.OUT_OF_ORDER, ((1, 1),))]


def test_a_hole_is_seen_across_the_windows_of_one_read() -> None:
    writes = [write(number, float(number)) for number in range(1, 9)]
    kept = Read("demo-3", 9.0, 9.1, Seen.STANDBY, None, (Span(1, 6, None, ((6, 8),)), Span(1, 1, 3, ((1, 3),))))
    hole = Read("demo-3", 9.0, 9.1, Seen.STANDBY, None, (Span(1, 6, None, ((6, 8),)), Span(1, 1, 3, ((1, 2),))))
    assert broken(judged(writes, kept)) == []
    assert broken(judged(writes, hole)) == [(Rule.OUT_OF_ORDER, ((3, 3),))]


def test_a_hole_in_what_was_acknowledged_while_the_read_ran_is_out_of_order() -> None:
    writes = [write(1, 1.0), write(2, 2.0)]
    assert broken(judged(writes, read(0.5, [2], took_s=5.0))) == [(Rule.OUT_OF_ORDER, ((1, 1),))]
    assert broken(judged(writes, read(0.5, [1], took_s=5.0))) == []


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED_WAIT, Outcome.UNKNOWN])
def test_a_row_that_was_never_acknowledged_puts_nothing_out_of_order_on_a_former_primary(outcome: Outcome) -> None:
    writes = [write(1, 1.0), write(2, 2.0, timeline=2), write(3, 3.0, outcome)]
    assert broken(judged(writes, read(7.0, [1, 3], of=FORMER))) == []
    assert broken(judged([*writes, write(4, 4.0, timeline=2)], read(7.0, [1, 3, 4], of=FORMER))) == [
        (Rule.OUT_OF_ORDER, ((2, 2),))
    ]


# Closing reads.


def test_without_a_closing_read_nothing_is_known_to_be_lost() -> None:
    writes = [write(1, 1.0), write(2, 2.0)]
    for not_closing in (standby_read(3.0, [1]), read(2.05, [1]), Read("demo-1", 3.0, 3.1, Seen.PRIMARY, 1)):
        findings = judged(writes, not_closing)
        assert (findings.closed, findings.lost) == (False, ())
    findings = judged(writes, read(3.0, [1]))
    assert findings.closed
    assert broken(findings) == [(Rule.LOST, ((2, 2),))]


def test_a_former_primary_closes_nothing() -> None:
    writes = [write(1, 1.0), write(2, 2.0, timeline=2)]
    assert not judged(writes, read(3.0, [1], of=FORMER)).closed


def test_a_row_that_reads_showed_and_the_closing_read_lacks_has_vanished() -> None:
    writes = [write(1, 1.0), write(2, 2.0, Outcome.UNKNOWN)]
    assert broken(judged(writes, read(3.0, [1, 2]), read(3.3, [1, 2]), read(9.0, [1]))) == [(Rule.VANISHED, ((2, 2),))]


# Asynchronous clusters.


def test_an_asynchronous_takeover_may_lose_as_many_rows_as_stated() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 3.0), write(4, 5.0, timeline=2)]
    reads = [read(4.0, [1, 2, 3]), read(6.0, [1, 4], of=PRESENT)]
    assert broken(judged(writes, *reads, asynchronous=Asynchronous(lost_rows_limit=2))) == []
    beyond = judged(writes, *reads, asynchronous=Asynchronous(lost_rows_limit=1))
    assert broken(beyond) == [(Rule.LOSS_BEYOND_LIMIT, ((2, 3),))]
    assert [each.number for each in beyond.lost] == [2, 3]


def test_only_rows_before_the_last_known_position_count_against_the_limit() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 3.0), write(4, 5.0, timeline=2)]
    closing = read(6.0, [1, 4], of=PRESENT)
    for known_s, rules in ((2.5, []), (3.5, [Rule.LOSS_BEYOND_LIMIT])):
        limits = Asynchronous(lost_rows_limit=1, last_known_s={1: known_s})
        assert [rule for rule, _ in broken(judged(writes, closing, asynchronous=limits))] == rules


def test_an_asynchronous_takeover_loses_the_newest_rows_only() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 3.0), write(4, 5.0, timeline=2)]
    limits = Asynchronous(lost_rows_limit=9)
    assert broken(judged(writes, read(6.0, [1, 2, 4], of=PRESENT), asynchronous=limits)) == []
    hole = judged(writes, read(6.0, [1, 3, 4], of=PRESENT), asynchronous=limits)
    assert broken(hole) == [(Rule.OUT_OF_ORDER, ((2, 2),))]


def test_an_asynchronous_primary_still_shows_what_it_acknowledged_itself() -> None:
    writes = [write(1, 1.0), write(2, 2.0)]
    limits = Asynchronous(lost_rows_limit=9)
    findings = judged(writes, read(3.0, [1]), read(9.0, [1, 2]), asynchronous=limits)
    assert broken(findings) == [(Rule.MISSING, ((2, 2),))]


def test_an_asynchronous_cluster_is_judged_by_how_long_two_write() -> None:
    writes = [write(1, 1.0), write(2, 5.0, timeline=2), write(3, 6.0, timeline=1)]
    findings = judged(writes, asynchronous=Asynchronous(lost_rows_limit=9, overlap_limit_s=2.0))
    assert broken(findings) == []
    assert round(findings.longest_overlap_s, 3) == 1.0
    assert broken(judged(writes, asynchronous=Asynchronous(lost_rows_limit=9))) == [
        (Rule.OVERLAP_BEYOND_LIMIT, ((3, 3),))
    ]


def test_the_judge_needs_nothing_else_of_the_drill() -> None:
    """The simulation imports it: no sessions, no processes, no cases."""
    program = "import sys, instance_manager.drill.checker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    ours = {name for name in done.stdout.split() if name.startswith("instance_manager.")}
    pure = {"checker", "findings", "history", "reads", "runs"}
    assert ours == {"instance_manager.drill", *(f"instance_manager.drill.{name}" for name in pure)}
    assert "asyncpg" not in done.stdout.split()


# The history itself, and how a finding reads.


def test_a_client_that_does_two_things_at_once_is_no_history() -> None:
    with pytest.raises(MalformedHistory, match="client 1 began 2 before 1 had ended"):
        judged([write(1, 1.0, took_s=5.0), write(2, 2.0)])
    with pytest.raises(MalformedHistory, match="used a number twice"):
        judged([write(1, 1.0), write(1, 2.0)])


@pytest.mark.parametrize("runs", [((3, 4), (1, 2)), ((1, 3), (3, 4)), ((2, 1),), ((0, 3),), ((3, 9),)])
def test_a_read_whose_runs_are_not_in_order_is_no_history(runs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(MalformedHistory, match="demo-1 at 1"):
        judged([], Read("demo-1", 1.0, 1.1, Seen.PRIMARY, 1, (Span(1, 1, 8, runs),)))


def test_a_finding_names_the_operations_that_contradict_one_another() -> None:
    writes = [write(1, 1.0), write(2, 2.0), write(3, 3.0), write(4, 5.0, timeline=2)]
    findings = judged(writes, read(6.0, [1, 4], of=PRESENT), read(7.0, [1, 2, 3, 4], of=PRESENT))
    assert describe(findings.contradictions).splitlines() == [
        "missing: client 1, rows 2-3 (2)",
        "  2.000 to 2.100 s  write to demo-1 on timeline 1: client 1 row 2: acknowledged",
        "  6.000 to 6.100 s  read of demo-2, primary on timeline 2, shows of client 1: 1, 4",
    ]


def test_a_vanished_row_is_told_with_the_read_that_showed_it() -> None:
    writes = [write(1, 1.0, Outcome.UNKNOWN, timeline=None)]
    findings = judged(writes, read(2.0, [1]), read(3.0, [1]), read(9.0, [], of=PRESENT))
    assert [type(each) for each in findings.contradictions[0].operations] == [Write, Read, Read]
    assert "shows of client 1: nothing" in describe(findings.contradictions)


def test_a_description_has_a_bound() -> None:
    writes = [write(1, 1.0, client=client) for client in range(50)]
    findings = judged(writes, whole_read("demo-1", 3.0, 3.1, Seen.PRIMARY, None, []))
    text = describe(findings.contradictions, limit=3)
    assert text.count("lost: ") == 3
    assert text.endswith("and 47 more contradictions")


def test_the_cost_grows_with_the_length_of_the_history_and_not_with_its_square() -> None:
    few_s, many_s = cost_s(5_000), cost_s(40_000)
    assert many_s < 24 * few_s, f"8 times as much took {many_s / few_s:.0f} times as long"


def cost_s(count: int) -> float:
    """Of a history as a drill records it: 100 rows per second, a look every 50 ms, a window read every 300 ms."""
    never = 200
    writes = [
        write(number, number * 0.01, Outcome.UNKNOWN if number % never == 0 else Outcome.ACKNOWLEDGED, took_s=0.001)
        for number in range(1, count + 1)
    ]
    samples = [Sample("demo-1", at_s, at_s, Seen.PRIMARY, 1) for at_s in (step * 0.05 for step in range(count // 5))]
    reads = []
    for newest in range(30, count, 30):
        window = as_runs(number for number in range(max(1, newest - 500), newest + 1) if number % never)
        at_s = newest * 0.01 + 0.005
        for member, seen in (("demo-1", Seen.PRIMARY), ("demo-2", Seen.STANDBY)):
            reads.append(Read(member, at_s, at_s, seen, 1, (Span(1, max(1, newest - 500), None, window),)))
    begin_s = time.process_time()
    assert judge(writes, samples, reads).contradictions == ()
    return time.process_time() - begin_s
