"""What a drill says and with which exit code it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instance_manager.cli import main
from instance_manager.drill.cases import CASES, Case
from instance_manager.drill.checker import Findings, judge
from instance_manager.drill.history import (
    HistoryReader,
    HistoryWriter,
    Outcome,
    Read,
    Sample,
    Seen,
    Span,
    Write,
    whole_read,
)
from instance_manager.drill.report import CaseReport, CaseRun, as_json, exit_code, table

CASE = next(case for case in CASES if case.name == "kill-all")


def findings(*, outage_s: float = 1.0, lost: bool = False) -> Findings:
    writes = [
        Write(1, 1, "demo-1", 0.0, 1.0, Outcome.ACKNOWLEDGED, 1),
        Write(1, 2, "demo-2", 1.0, 1.0 + outage_s, Outcome.ACKNOWLEDGED, 2),
    ]
    rows = [(1, 1)] if lost else [(1, 1), (1, 2)]
    closing = whole_read("demo-2", 2.0 + outage_s, 2.1 + outage_s, Seen.PRIMARY, None, rows)
    return judge(writes, [], [closing], from_s=1.0, to_s=1.0 + outage_s)


def report(*runs: CaseRun, case: Case = CASE) -> CaseReport:
    return CaseReport(case=case, runs=runs)


def good(outage_s: float = 1.0) -> CaseRun:
    return CaseRun(case="kill-all", findings=findings(outage_s=outage_s), began_s=1.0, redundant_after_s=3.0)


def test_a_good_case_ends_with_0() -> None:
    reports = [report(good())]
    assert (reports[0].verdict, exit_code(reports, strict=True)) == ("good", 0)


def test_a_lost_row_ends_with_1_whatever_else_there_is() -> None:
    bad = CaseRun(case="kill-all", findings=findings(lost=True), began_s=1.0)
    reports = [report(good(), bad), report(CaseRun(case="kill-all", failure="no writes"))]
    assert reports[0].verdict == "BROKEN PROMISE: lost"
    assert exit_code(reports, strict=False) == 1


def test_a_case_that_could_not_finish_ends_with_3() -> None:
    reports = [report(CaseRun(case="kill-all", failure="no writes within 60 s"))]
    assert "no writes within 60 s" in reports[0].verdict
    assert exit_code(reports, strict=False) == 3


def test_the_median_of_the_outages_is_held_against_the_target() -> None:
    within = report(good(1.0), good(2.0), good(30.0))
    beyond = report(good(1.0), good(4.0), good(30.0))
    assert within.verdict == "good"
    assert "outage 4.00 s, target 3 s" in beyond.verdict
    assert exit_code([beyond], strict=False) == 0
    assert exit_code([beyond], strict=True) == 4


def test_a_case_that_cannot_run_here_says_why_by_name() -> None:
    unavailable = CaseReport(case=CASE, unavailable="network namespaces need root")
    text = table([unavailable])
    assert "kill-all" in text
    assert "not run: network namespaces need root" in text
    assert exit_code([unavailable], strict=True) == 0


def test_the_json_holds_what_the_table_says() -> None:
    content = json.loads(json.dumps(as_json([report(good())], seed=7)))
    assert content["seed"] == 7
    (case,) = content["cases"]
    assert (case["case"], case["verdict"], case["median_outage_s"]) == ("kill-all", "good", 1.0)
    assert case["runs"][0]["findings"]["acknowledged"] == 2


def test_every_row_of_the_fault_table_is_a_case_with_its_own_name() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len(names) >= 19


def test_an_unknown_case_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--case", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_read_that_contradicts_a_write_ends_with_1_although_nothing_is_lost() -> None:
    writes = [Write(1, 1, "demo-1", 0.0, 1.0, Outcome.ACKNOWLEDGED, 1)]
    reads = [
        whole_read("demo-2", 2.0, 2.1, Seen.PRIMARY, 2, []),
        whole_read("demo-2", 3.0, 3.1, Seen.PRIMARY, 2, [(1, 1)]),
    ]
    found = judge(writes, [], reads)
    reports = [report(CaseRun(case="kill-all", findings=found))]
    assert (found.lost, reports[0].verdict) == ((), "BROKEN PROMISE: missing")
    assert exit_code(reports, strict=False) == 1
    (case,) = json.loads(json.dumps(as_json(reports, seed=7)))["cases"]
    (contradiction,) = case["runs"][0]["findings"]["contradictions"]
    assert (contradiction["rule"], contradiction["client"], contradiction["rows"]) == ("missing", 1, [[1, 1]])


def recorded(path: Path, *events: Write | Sample | Read) -> str:
    with path.open("ab") as file:
        writer = HistoryWriter(file)
        for event in events:
            writer.add(event)
        writer.flush()
    return str(path)


GOOD_WRITE = Write(1, 1, "demo-1", 1.0, 1.1, Outcome.ACKNOWLEDGED, 1)
LOOK = Sample("demo-1", 1.0, 1.1, Seen.PRIMARY, 1, 1.0)


def test_a_recorded_history_is_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closing = whole_read("demo-2", 5.0, 5.1, Seen.PRIMARY, None, [(1, 1)])
    assert main(["drill", "--judge", recorded(tmp_path / "good", GOOD_WRITE, LOOK, closing)]) == 0
    assert "no contradiction" in capsys.readouterr().out
    empty = whole_read("demo-2", 5.0, 5.1, Seen.PRIMARY, None, [])
    assert main(["drill", "--judge", recorded(tmp_path / "lost", GOOD_WRITE, LOOK, empty)]) == 1
    assert "lost: client 1, row 1\n" in capsys.readouterr().out
    assert main(["drill", "--json", "--judge", recorded(tmp_path / "lost")]) == 1
    assert json.loads(capsys.readouterr().out)["contradictions"][0]["rule"] == "lost"


def test_a_history_without_a_closing_read_says_that_losses_are_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drill", "--judge", recorded(tmp_path / "open", GOOD_WRITE)]) == 0
    assert "no closing read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ['["write",1]\n', "no json\n", '["write",1,1,"demo-1",1,2,"failed"]\n["write",1,1,"demo-1",3,4,"failed"]\n']
)
def test_what_is_no_history_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "history"
    path.write_text(text)
    assert main(["drill", "--judge", str(path)]) == 2
    assert "no history" in capsys.readouterr().err
    assert main(["drill", "--judge", str(tmp_path / "absent")]) == 2


def test_every_form_of_a_read_comes_back_from_its_line(tmp_path: Path) -> None:
    spans = (Span(0, 501, None, ((501, 900), (902, 950))), Span(1, 0, 499, (), (7,)))
    reads = [
        Read("demo-1", 1.0, 1.5, Seen.PRIMARY, 3, spans),
        whole_read("demo-2", 2.0, 2.5, Seen.STANDBY, None, [(0, 1), (0, 2), (0, 2), (1, 9)]),
    ]
    reader = HistoryReader(Path(recorded(tmp_path / "history", *reads)))
    reader.read_on()
    assert reader.reads == reads
    assert reads[1].spans == (Span(0, 0, None, ((1, 2),), (2,)), Span(1, 0, None, ((9, 9),)))


def test_a_history_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "history"
    events: tuple[Write, Sample] = (
        Write(1, 1, "demo-1", 1.0, 2.0, Outcome.UNKNOWN, None, "TimeoutError: "),
        Sample("demo-2", 1.0, 1.1, Seen.PRIMARY, 3, 0.5),
    )
    reader = HistoryReader(path)
    reader.read_on()
    with path.open("ab") as file:
        writer = HistoryWriter(file)
        writer.add(events[0])
        writer.flush()
        file.write(b'["sample","demo-2"')
        file.flush()
        reader.read_on()
        assert (reader.writes, reader.samples) == ([events[0]], [])
        file.seek(0, 2)
        file.write(b',1.0,1.1,"primary",3,0.5]\n')
        file.flush()
        reader.read_on()
    assert (reader.writes, reader.samples) == ([events[0]], [events[1]])
