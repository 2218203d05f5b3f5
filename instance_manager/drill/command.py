"""`instance-manager drill`: prove on this machine what the cluster promises.

Exit codes: 0 nothing was lost; 1 what clients saw contradicts the promise: a row was lost, or another rule of
docs/histories.md is broken; 2 wrong use; 3 a case could not finish; 4 with --strict: a target was missed.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

import msgspec

from instance_manager.demo.cluster import NotInTime
from instance_manager.demo.plan import DirectoryUnusable
from instance_manager.demo.ports import PortsTaken
from instance_manager.demo.prerequisites import missing_prerequisite
from instance_manager.demo_locator import DemoLocatorError, read_running_demo
from instance_manager.drill import haproxy
from instance_manager.drill.cases import CASES, Case
from instance_manager.drill.checker import MalformedHistory, judge
from instance_manager.drill.disk import DiskFailed
from instance_manager.drill.environment import (
    Environment,
    Need,
    attach_environment,
    open_environment,
    why_unavailable,
)
from instance_manager.drill.history import HistoryReader
from instance_manager.drill.network import NetworkFailed
from instance_manager.drill.report import (
    LEGEND,
    CaseReport,
    CaseRun,
    as_json,
    exit_code,
    findings_as_json,
    judged_text,
    table,
)
from instance_manager.drill.runner import Options, run_case

DEFAULT_RANDOM_S = 1800.0
QUICK_RANDOM_S = 180.0
_WRONG_USE = 2
_COULD_NOT_FINISH = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", metavar="NAME", help="only this one; may be given several times")
    parser.add_argument("--list", action="store_true", help="show the cases and which of them this machine can produce")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="run each case so often; the median counts")
    parser.add_argument("--json", action="store_true", help="the result for machines, on standard output")
    parser.add_argument("--yes", action="store_true", help="use the running demo instead of a cluster of its own")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of the random case (1800; --quick: 180)")
    parser.add_argument("--seed", type=int, help="of the random case; by default a new one, which is printed")
    parser.add_argument("--quick", action="store_true", help="shorter holds, for CI")
    parser.add_argument("--strict", action="store_true", help="exit with 4 when a target was missed")
    parser.add_argument("--durability", choices=("preferred", "required"), default="preferred")
    parser.add_argument(
        "--archive", action="store_true", help="with a WAL archive; without, so that runs compare with those before"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy history and logs of runs that went wrong there")
    parser.add_argument("--haproxy", action="store_true", help="expect a HAProxy to follow each primary in one check")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="run nothing; judge this recorded history again")


def run(namespace: argparse.Namespace) -> int:
    """Run the chosen cases; returns the exit code."""
    if namespace.judge is not None:
        return _judge_recorded(namespace.judge, as_json=namespace.json)
    names = [case.name for case in CASES]
    wrong = [name for name in namespace.case or () if name not in names]
    if wrong or namespace.repeat < 1 or (namespace.seconds is not None and namespace.seconds <= 0):
        problem = f"no such case: {', '.join(wrong)}; `drill --list` shows them" if wrong else "at least 1, please"
        return _complain(problem, _WRONG_USE)
    cases = [case for case in CASES if not namespace.case or case.name in namespace.case]
    if namespace.list:
        _print_list(cases)
        return 0
    if (missing := missing_prerequisite()) is not None:
        return _complain(missing, _WRONG_USE)
    if namespace.haproxy and (missing := haproxy.why_unavailable()) is not None:
        return _complain(missing, _WRONG_USE)
    options = Options(
        quick=namespace.quick,
        seed=namespace.seed if namespace.seed is not None else secrets.randbelow(2**31),
        random_seconds=namespace.seconds or (QUICK_RANDOM_S if namespace.quick else DEFAULT_RANDOM_S),
        keep=namespace.keep,
        haproxy=namespace.haproxy,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        if namespace.yes:
            reports = _run_on_demo(cases, namespace.repeat, options)
        else:
            reports = _run_on_own(cases, namespace, options)
    except (DirectoryUnusable, DemoLocatorError, PortsTaken) as error:
        return _complain(str(error), _WRONG_USE)
    except (NotInTime, NetworkFailed, DiskFailed) as error:
        return _complain(str(error), _COULD_NOT_FINISH)
    if namespace.json:
        print(json.dumps(as_json(reports, seed=options.seed), indent=2))
    else:
        print(f"\n{table(reports)}\n\n{LEGEND}")
        if any(report.case.is_random for report in reports):
            print(f"seed of the random case: {options.seed}")
    return exit_code(reports, strict=namespace.strict)


def _run_on_own(cases: Sequence[Case], namespace: argparse.Namespace, options: Options) -> list[CaseReport]:
    """One cluster for all cases that need the same."""
    available = {need: why_unavailable(need) for need in Need}
    reports: dict[str, CaseReport] = {}
    groups: dict[frozenset[Need], list[Case]] = {}
    for case in cases:
        reasons = [reason for need in sorted(case.needs) if (reason := available[need]) is not None]
        if reasons and not case.is_random:
            reports[case.name] = CaseReport(case=case, unavailable=reasons[0])
            _say(f"{case.name}: {reasons[0]}")
            continue
        for reason in reasons:
            _say(f"{case.name}: without some kinds of faults: {reason}")
        groups.setdefault(frozenset(need for need in case.needs if available[need] is None), []).append(case)
    for needs, group in groups.items():
        environment = open_environment(needs, durability=namespace.durability, archive=namespace.archive, say=_say)
        _run_group(group, environment, namespace.repeat, options, reports)
    return [reports[case.name] for case in cases]


def _run_on_demo(cases: Sequence[Case], repeat: int, options: Options) -> list[CaseReport]:
    demo = read_running_demo()
    if demo is None:
        raise DirectoryUnusable("no demo is running; start `instance-manager demo`, or drill without --yes")
    reports: dict[str, CaseReport] = {}
    possible = []
    for case in cases:
        if case.needs and not case.is_random:
            need = min(case.needs)
            reports[case.name] = CaseReport(
                case=case, unavailable=f"needs a {need} of its own, which the running demo has not; drill without --yes"
            )
        else:
            possible.append(case)
    _run_group(possible, attach_environment(demo.directory), repeat, options, reports)
    return [reports[case.name] for case in cases]


def _run_group(
    cases: Sequence[Case],
    opening: AbstractContextManager[Environment],
    repeat: int,
    options: Options,
    reports: dict[str, CaseReport],
) -> None:
    with opening as environment:
        for case in cases:
            runs: list[CaseRun] = []
            for number in range(1, repeat + 1):
                _say(f"{case.name} ({number} of {repeat}): {case.title}")
                if case.is_random:
                    _say(f"seed {options.seed}, {options.random_seconds:g} s")
                runs.append(run_case(case, environment, options, _say))
            reports[case.name] = CaseReport(case=case, runs=tuple(runs))
            _say(f"{case.name}: {reports[case.name].verdict}")


def _judge_recorded(path: Path, *, as_json: bool) -> int:
    history = HistoryReader(path)
    try:
        path.stat()
        history.read_on()
        findings = judge(history.writes, history.samples, history.reads)
    except OSError as error:
        return _complain(f"{path}: {error.strerror}", _WRONG_USE)
    except (msgspec.DecodeError, MalformedHistory) as error:
        return _complain(f"{path}: no history: {error}", _WRONG_USE)
    print(json.dumps(findings_as_json(findings), indent=2) if as_json else judged_text(findings))
    return int(findings.breaks_the_promise)


def _print_list(cases: Sequence[Case]) -> None:
    for case in cases:
        target = "" if case.target_s is None else f"{case.target_s:g} s"
        print(f"{case.name:26} {target:>6}  {case.title}")
        for need in sorted(case.needs):
            if (reason := why_unavailable(need)) is not None:
                print(f"{'':36}{'without it: ' if case.is_random else 'cannot run here: '}{reason}")


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(text: str, code: int) -> int:
    print(f"instance-manager drill: {text}", file=sys.stderr)
    return code
