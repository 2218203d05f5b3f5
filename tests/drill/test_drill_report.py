"""What a drill says and with which exit code it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instance_manager.cli import main
from instance_manager.drill.cases import CASES, Case
from instance_manager.drill.checker import Findings, judge
from instance_manager.drill.history import HistoryReader, HistoryWriter, Outcome, Sample, Seen, Write
from instance_manager.drill.report import CaseReport, CaseRun, as_json, exit_code, table

CASE = next(case for case in CASES if case.name == "kill-all")


def findings(*, outage_s: float = 1.0, lost: bool = False) -> Findings:
    writes = [
        Write(1, 1, "demo-1", 0.0, 1.0, Outcome.ACKNOWLEDGED, 1),
        Write(1, 2, "demo-2", 1.0, 1.0 + outage_s, Outcome.ACKNOWLEDGED, 2),
    ]
    rows = {(1, 1): 1} if lost else {(1, 1): 1, (1, 2): 1}
    return judge(writes, [], rows, from_s=1.0, to_s=1.0 + outage_s)


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
    assert reports[0].verdict == "BROKEN PROMISE"
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
