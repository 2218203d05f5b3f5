"""Runs one case: load, steady state, faults, recovery, judgement."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from instance_manager.demo.cluster import NotInTime
from instance_manager.demo.processes import now_s
from instance_manager.drill.cases import Case
from instance_manager.drill.checker import describe, judge
from instance_manager.drill.disk import DiskFailed
from instance_manager.drill.environment import ClientsFailed, Environment
from instance_manager.drill.faults import CannotInject
from instance_manager.drill.haproxy import ProxyUnavailable, watched_proxy
from instance_manager.drill.history import HistoryWriter, Read, Seen, whole_read
from instance_manager.drill.network import NetworkFailed
from instance_manager.drill.report import CaseRun
from instance_manager.drill.stage import CaseFailed, Stage

_STEADY_S = 2.0
_AFTER_S = 1.0
_REDUNDANT_S = 180.0
_STANDBYS_EQUAL_S = 20.0
PGBENCH_SCALE = 5
_EXPECTED = (NotInTime, CaseFailed, CannotInject, ClientsFailed, NetworkFailed, DiskFailed, ProxyUnavailable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    quick: bool
    seed: int
    random_seconds: float
    keep: Path | None
    """Where the histories and logs of runs that went wrong are copied."""
    clients: int = 4
    interval_s: float = 0.01
    haproxy: bool = False
    """Run one in front of the cluster, and expect it to follow every new primary within one interval of its checks."""


def run_case(case: Case, environment: Environment, options: Options, say: Callable[[str], None]) -> CaseRun:
    """Everything that can go wrong in it ends in the result, except errors of the drill itself."""
    events: list[tuple[float, str]] = []
    began_s = now_s()

    def tell(text: str) -> None:
        events.append((now_s(), text))
        say(f"{now_s() - began_s:6.1f} s  {text}")

    history = environment.work / f"{case.name}.history"
    history.unlink(missing_ok=True)
    try:
        result = _run(case, environment, options, history, tell)
    except _EXPECTED as error:
        result = CaseRun(case=case.name, failure=f"{type(error).__name__}: {error}")
        tell(result.failure or "")
    first_s = result.began_s if result.began_s is not None else began_s
    result = CaseRun(
        case=result.case,
        findings=result.findings,
        began_s=result.began_s,
        redundant_after_s=result.redundant_after_s,
        broken=result.broken,
        failure=result.failure,
        events=tuple((round(at_s - first_s, 3), text) for at_s, text in events),
    )
    went_wrong = result.failure or result.broken or (result.findings and result.findings.breaks_the_promise)
    if options.keep is not None and went_wrong:
        tell(f"its history and all logs: {_keep(environment, history, options.keep, case.name)}")
    return result


def _run(case: Case, environment: Environment, options: Options, history: Path, tell: Callable[[str], None]) -> CaseRun:
    cluster = environment.cluster
    cluster.wait_redundant(_REDUNDANT_S)
    environment.prepare_table()
    with contextlib.ExitStack() as stack:
        if case.pgbench:
            stack.enter_context(environment.pgbench(scale=PGBENCH_SCALE))
        proxy = stack.enter_context(watched_proxy(environment)) if options.haproxy else None
        clients = stack.enter_context(
            environment.clients(history, count=options.clients, interval_s=options.interval_s)
        )
        stage = Stage(
            environment,
            history,
            clients=clients,
            primary=cluster.wait_redundant(_REDUNDANT_S),
            quick=options.quick,
            seed=options.seed,
            random_seconds=options.random_seconds,
            say=tell,
        )
        stage.wait_writes(30)
        time.sleep(_STEADY_S)
        failure: str | None = None
        redundant_after_s: float | None = None
        try:
            case.run(stage)
        except _EXPECTED as error:
            failure = f"{type(error).__name__}: {error}"
            tell(failure)
        finally:
            stage.heal_all()
        try:
            cluster.wait_redundant(_REDUNDANT_S)
            redundant_after_s = now_s() - (stage.healed_s or now_s())
            stage.wait_writes(30)
        except _EXPECTED as error:
            failure = failure or f"{type(error).__name__}: {error}"
            tell(str(error))
        time.sleep(_AFTER_S)
        to_s = now_s()
    if proxy is not None:
        stage.broken += proxy.late_moves()
    stage.history.read_on()
    closing, standby_problems = _closing_read(stage)
    _record(closing, history)
    findings = judge(
        stage.history.writes,
        stage.history.samples,
        [*stage.history.reads, closing],
        from_s=stage.began_s if stage.began_s is not None else to_s,
        to_s=to_s,
    )
    tell(
        f"outage {findings.longest_outage_s:.2f} s, {findings.acknowledged} acknowledged, {len(findings.lost)} lost, "
        f"{len(findings.by_former_primary)} by a former primary, {findings.reads} reads of contents"
    )
    if findings.contradictions:
        tell(describe(findings.contradictions))
    return CaseRun(
        case=case.name,
        findings=findings,
        began_s=stage.began_s,
        redundant_after_s=redundant_after_s,
        broken=(*stage.broken, *standby_problems),
        failure=failure,
    )


def _closing_read(stage: Stage) -> tuple[Read, tuple[str, ...]]:
    """What the primary holds, and which standbys do not come to hold the same. The clients have ended."""
    primary = stage.cluster.wait_primary(_REDUNDANT_S)
    begin_s = now_s()
    rows = stage.environment.rows_of(primary)
    closing = whole_read(primary, begin_s, now_s(), Seen.PRIMARY, None, rows.elements())
    waiting = {name for name in stage.cluster.names if name != primary}
    ends_s = now_s() + _STANDBYS_EQUAL_S
    while True:
        for name in sorted(waiting):
            with contextlib.suppress(ClientsFailed):
                if stage.environment.rows_of(name) == rows:
                    waiting.discard(name)
        if not waiting or now_s() >= ends_s:
            return closing, tuple(f"{name} does not hold the same rows as {primary}" for name in sorted(waiting))
        time.sleep(0.5)


def _record(closing: Read, history: Path) -> None:
    """So that the file alone can be judged again."""
    with history.open("ab") as file:
        writer = HistoryWriter(file)
        writer.add(closing)
        writer.flush()


def _keep(environment: Environment, history: Path, keep: Path, name: str) -> Path:
    target = keep / f"{name}-{int(now_s() * 10)}"
    target.mkdir(parents=True, exist_ok=True)
    layout = environment.cluster.layout
    sources = [history, history.with_suffix(".log"), *(layout.log(each) for each in environment.cluster.names)]
    for source in sources:
        with contextlib.suppress(OSError):
            shutil.copy(source, target)
    with contextlib.suppress(OSError):
        shutil.copytree(layout.store, target / "store", dirs_exist_ok=True)
    return target
