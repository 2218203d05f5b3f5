"""What a drill prints: one row per case, and the same as JSON. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from instance_manager.drill.cases import Case, outage_limit_s
from instance_manager.drill.checker import Findings, describe

LEGEND = """\
outage      longest gap between two acknowledged writes, over all clients; median of the runs (worst)
lost        acknowledged rows that the final primary does not have, or has twice
former      rows begun on a former primary after its successor acknowledged one, and acknowledged all the same
stale read  age of the most outdated answer of a former primary that still took itself for the primary
redundant   from the end of the fault until every instance does its part again (worst)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRun:
    """One run of one case."""

    case: str
    findings: Findings | None = None
    began_s: float | None = None
    redundant_after_s: float | None = None
    broken: tuple[str, ...] = ()
    """Expectations of the case that did not hold."""
    failure: str | None = None
    """Why it could not finish."""
    events: tuple[tuple[float, str], ...] = ()
    """What was done when, in seconds since the first fault."""

    @property
    def last_stale_read_after_s(self) -> float | None:
        if self.findings is None or self.findings.last_stale_read_s is None or self.began_s is None:
            return None
        return self.findings.last_stale_read_s - self.began_s


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseReport:
    """All runs of one case."""

    case: Case
    runs: tuple[CaseRun, ...] = ()
    unavailable: str | None = None
    """Why this machine or cluster cannot produce it."""
    problems: tuple[str, ...] = field(default=())

    @property
    def judged(self) -> tuple[Findings, ...]:
        return tuple(run.findings for run in self.runs if run.findings is not None)

    @property
    def breaks_the_promise(self) -> bool:
        return any(findings.breaks_the_promise for findings in self.judged)

    @property
    def broken_rules(self) -> tuple[str, ...]:
        return tuple(sorted({each.rule.value for findings in self.judged for each in findings.contradictions}))

    @property
    def could_not_finish(self) -> bool:
        return any(run.failure is not None for run in self.runs)

    @property
    def median_outage_s(self) -> float | None:
        return statistics.median(each.longest_outage_s for each in self.judged) if self.judged else None

    @property
    def verdict(self) -> str:
        if self.unavailable is not None:
            return f"not run: {self.unavailable}"
        if self.breaks_the_promise:
            return f"BROKEN PROMISE: {', '.join(self.broken_rules)}"
        if failures := [run.failure for run in self.runs if run.failure is not None]:
            return f"not finished: {failures[0]}"
        if missed := self.missed:
            return f"missed: {'; '.join(missed)}"
        return "good"

    @property
    def missed(self) -> tuple[str, ...]:
        """Targets and expectations that were not met."""
        found = []
        limit_s, median_s = outage_limit_s(self.case), self.median_outage_s
        if limit_s is not None and median_s is not None and median_s > limit_s:
            found.append(f"outage {median_s:.2f} s, target {self.case.target_s:g} s")
        limit_s = self.case.stale_read_limit_s
        stale = [run.last_stale_read_after_s for run in self.runs if run.last_stale_read_after_s is not None]
        if limit_s is not None and stale and max(stale) > limit_s:
            found.append(f"last stale read {max(stale):.1f} s after the fault, target {limit_s:g} s")
        found += sorted({text for run in self.runs for text in run.broken})
        return tuple(found)


def table(reports: Sequence[CaseReport]) -> str:
    """For people; GitHub's Markdown shows it as a table too."""
    header = (
        "case",
        "outage s",
        "target s",
        "acknowledged",
        "lost",
        "former",
        "stale read s",
        "redundant s",
        "verdict",
    )
    rows = [header, *(_row(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    widths[-1] = len(header[-1])
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def as_json(reports: Sequence[CaseReport], *, seed: int) -> dict[str, object]:
    """For machines."""
    return {
        "seed": seed,
        "cases": [
            {
                "case": report.case.name,
                "title": report.case.title,
                "target_s": report.case.target_s,
                "verdict": report.verdict,
                "median_outage_s": report.median_outage_s,
                "runs": [
                    {**asdict(run), "findings": None if run.findings is None else findings_as_json(run.findings)}
                    for run in report.runs
                ],
            }
            for report in reports
        ],
    }


def exit_code(reports: Sequence[CaseReport], *, strict: bool) -> int:
    """0 good; 1 what clients saw contradicts the promise; 3 a case could not finish; 4 a target was missed."""
    if any(report.breaks_the_promise for report in reports):
        return 1
    if any(report.could_not_finish for report in reports):
        return 3
    if strict and any(report.missed for report in reports):
        return 4
    return 0


def _row(report: CaseReport) -> tuple[str, ...]:
    judged = report.judged
    target = "" if report.case.target_s is None else f"{report.case.target_s:g}"
    if not judged:
        return (report.case.name, "", target, "", "", "", "", "", report.verdict)
    outages = [findings.longest_outage_s for findings in judged]
    redundant = [run.redundant_after_s for run in report.runs if run.redundant_after_s is not None]
    median = f"{statistics.median(outages):.2f}"
    return (
        report.case.name,
        median if len(outages) == 1 else f"{median} ({max(outages):.2f})",
        target,
        str(sum(findings.acknowledged for findings in judged)),
        str(sum(len(findings.lost) + len(findings.duplicated) for findings in judged)),
        str(sum(len(findings.by_former_primary) for findings in judged)),
        f"{max(findings.longest_stale_read_s for findings in judged):.1f}",
        f"{max(redundant):.1f}" if redundant else "",
        report.verdict,
    )


def judged_text(findings: Findings) -> str:
    """Of one history: what was judged, and what was found."""
    lines = [
        f"{findings.attempts} writes: {findings.acknowledged} acknowledged, {findings.unknown} without an answer, "
        f"{findings.cancelled_waits} with a cancelled wait; {findings.reads} reads of contents",
        f"longest outage {findings.longest_outage_s:.2f} s, oldest stale read {findings.longest_stale_read_s:.1f} s",
    ]
    if not findings.closed:
        lines.append("no closing read: whether rows were lost in the end is not known")
    lines.append(describe(findings.contradictions) or "no contradiction")
    return "\n".join(lines)


def findings_as_json(findings: Findings) -> dict[str, object]:
    return {
        "attempts": findings.attempts,
        "acknowledged": findings.acknowledged,
        "unknown": findings.unknown,
        "cancelled_waits": findings.cancelled_waits,
        "lost": [[write.client, write.number, write.member] for write in findings.lost],
        "duplicated": [list(row) for row in findings.duplicated],
        "by_former_primary": [[write.client, write.number, write.member] for write in findings.by_former_primary],
        "longest_outage_s": round(findings.longest_outage_s, 4),
        "longest_stale_read_s": round(findings.longest_stale_read_s, 4),
        "timelines": list(findings.timelines),
        "reads": findings.reads,
        "closed": findings.closed,
        "contradictions": [
            {
                "rule": each.rule.value,
                "client": each.client,
                "rows": [list(run) for run in each.runs],
                "text": each.describe().splitlines(),
            }
            for each in findings.contradictions
        ],
    }
