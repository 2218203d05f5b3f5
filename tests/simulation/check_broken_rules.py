"""Who catches what: every broken rule is run until a checker finds it, and the table of that is printed.

    python tests/simulation/check_broken_rules.py                      all, on all cores
    python tests/simulation/check_broken_rules.py "no barrier"         only these
    python tests/simulation/check_broken_rules.py --intact             the same scenarios and seeds with no rule broken
    python tests/simulation/check_broken_rules.py --markdown docs/broken-rules.md

Ends with 1 if a variant was not caught within its stated number of seeds, or if a scenario fails with no rule broken. One
seed of a variant with its trace: python tests/simulation/simulate.py --seed N --variant NAME
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import simulation_branches  # noqa: E402

simulation_branches.count_branches()

import simulated_cluster  # noqa: E402
from bending import NoLongerFits  # noqa: E402
from broken_rules import BROKEN, COVERED, NOT_HERE  # noqa: E402
from simulated_cluster import Outcome, run_seed  # noqa: E402

EXHAUSTIVE = HERE.parent / "exhaustive"
HASH_SEED = "0"
FINDING_LETTERS = 150


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one variant, or of its scenario with no rule broken."""

    name: str
    caught_by: str | None
    """The kind of failure that counts for it."""
    seed: int | None
    seeds: int
    """Of them so many were run."""
    cpu_s: float
    finding: str
    others: tuple[str, ...]
    """Failures of another kind, each with its seed."""


def run_variant(name: str) -> Result:
    """Seed after seed until it is caught, or the stated number is used up."""
    variant = BROKEN[name]
    cpu_s = 0.0
    others: list[str] = []
    for seed in range(variant.seeds):
        try:
            outcome = run_seed(seed, variant=name)
        except NoLongerFits as error:
            return Result(name, None, None, seed, cpu_s, "", (f"it no longer fits the code: {error}",))
        cpu_s += outcome.cpu_s
        if outcome.failure is None:
            continue
        kind, _, finding = outcome.failure.partition(": ")
        if kind in variant.breaks:
            return Result(name, kind, seed, seed + 1, cpu_s, finding, tuple(others))
        others.append(f"seed {seed}: {outcome.failure}")
    return Result(name, None, None, variant.seeds, cpu_s, "", tuple(others))


def run_intact(name: str) -> Result:
    """The scenario alone: every failure is a false alarm, or a defect."""
    variant = BROKEN[name]
    outcomes: list[Outcome] = []
    with variant.watched():
        for seed in range(variant.seeds):
            outcomes.append(simulated_cluster._run_seed(seed, variant.scenario, traced=False))
    failures = tuple(f"seed {each.seed}: {each.failure}" for each in outcomes if each.failure is not None)
    return Result(name, None, None, variant.seeds, sum(each.cpu_s for each in outcomes), "", failures)


def run_all(names: Sequence[str], jobs: int, *, intact: bool) -> Iterable[Result]:
    """As they come; a process for each, so that none finds what another has left."""
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(run_intact if intact else run_variant, names)


def exhaustive_variants() -> list[dict[str, str]]:
    """The registry of the exhaustive check, from a process of its own: both folders have modules of one name."""
    if not (EXHAUSTIVE / "broken_protocols.py").exists():
        return []
    code = (
        "import json; from broken_protocols import BROKEN\n"
        "values = BROKEN.values() if isinstance(BROKEN, dict) else BROKEN\n"
        "print(json.dumps([{'name': b.name, 'rule': b.rule, 'what': b.bent, 'model': b.model} for b in values]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=EXHAUSTIVE, capture_output=True, text=True, check=True, timeout=60
    )
    found: list[dict[str, str]] = json.loads(answer.stdout)
    return found


def line(result: Result, *, intact: bool) -> str:
    variant = BROKEN[result.name]
    if intact:
        said = "; ".join(result.others) or "no failure"
        return f"{result.name:<55} {result.seeds:>4} seeds {result.cpu_s:>7.1f} s  {said}"
    kind, seed = result.caught_by or "NOT CAUGHT", "-" if result.seed is None else str(result.seed)
    said = result.finding or "; ".join(result.others)
    return (
        f"{result.name:<55} {variant.rule:<10} {kind:<17} {seed:>4} of {variant.seeds:<4} {result.cpu_s:>6.1f} s  "
        f"{said[:FINDING_LETTERS]}"
    )


def markdown(results: Sequence[Result]) -> str:
    by_name = {result.name: result for result in results}
    lines = [
        "# Broken rules",
        "",
        "<!-- Made by `python tests/simulation/check_broken_rules.py --markdown docs/broken-rules.md`. -->",
        "",
        "The simulation and the exhaustive check are only worth something if they notice when a rule is missing. So every",
        "rule of the design is removed or bent, one at a time, in the real code that the simulation runs (or in the model,",
        "where the rule lives there), and a checker has to find it within the stated number of seeds. A seed always gives the",
        "same run. Nothing is scripted: each variant only names the faults that make its trouble likely, and the same",
        "scenario with no rule broken must pass.",
        "",
        "- all of them, with their table: `python tests/simulation/check_broken_rules.py`",
        "- the scenarios with no rule broken: `python tests/simulation/check_broken_rules.py --intact`",
        "- one seed with its trace: `python tests/simulation/simulate.py --seed 3 --variant 'no barrier'`",
        "- the variants themselves: `tests/simulation/broken_*.py`",
        "",
        f"## Found by the simulation: {len(BROKEN)} variants",
        "",
        "`PromiseBroken` is the checker of the promise, at the very event; `HistoryViolation` the judge of what clients saw;",
        "`Stuck` says that the cluster did not heal; `Deposed` and `Disturbed` are checks that a variant brings along,",
        "because its rule is about availability. Seconds are of one core. Those marked * are run by the command only.",
        "",
        "| variant | rule | what it costs | caught by | seed | within | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, variant in BROKEN.items():
        result = by_name[name]
        caught = f"`{result.caught_by}`" if result.caught_by else "**not caught**"
        star = " *" if variant.slow else ""
        seed = "" if result.seed is None else str(result.seed)
        lines.append(
            f"| {name}{star} | {variant.rule} | {variant.what.replace('|', '&#124;')} | {caught} | {seed} | {variant.seeds} | {result.cpu_s:.1f} |"
        )
    lines += [
        "",
        f"## Covered by another rule: {len(COVERED)}",
        "",
        "Each of these was tried once, with 25 to 120 seeds, and broke nothing by itself: something else stands behind it.",
        "",
        "| what was bent | rule | what covers it |",
        "|---|---|---|",
        *(f"| {each.name} | {each.rule} | {each.why} |" for each in COVERED),
        "",
        "## Not found by the simulation",
        "",
        "| what would be bent | rule | why it is not here, and who holds it |",
        "|---|---|---|",
        *(f"| {each.name} | {each.rule} | {each.why} |" for each in NOT_HERE),
    ]
    others = exhaustive_variants()
    if others:
        lines += [
            "",
            f"## Found by the exhaustive check: {len(others)} variants",
            "",
            "Every interleaving of a small cluster, see `tests/exhaustive/`; each is found for certain.",
            "",
            "| variant | rule | what is bent | walk |",
            "|---|---|---|---|",
            *(f"| {each['name']} | {each['rule']} | {each['what']} | {each['model']} |" for each in others),
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of variants (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--intact", action="store_true", help="only the scenarios, with no rule broken")
    parser.add_argument("--quick", action="store_true", help="without the slow ones")
    parser.add_argument("--list", action="store_true", help="names, rules and stated seeds as JSON, and nothing else")
    parser.add_argument("--json", action="store_true", help="the results as JSON instead of the table")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page of the documentation")
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        # A seed is the same run everywhere only with this.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": HASH_SEED})  # noqa: S606
    names = arguments.names or [name for name, each in BROKEN.items() if not (arguments.quick and each.slow)]
    if unknown := [name for name in names if name not in BROKEN]:
        parser.error(f"no such variant: {', '.join(unknown)}; there are: {'; '.join(BROKEN)}")
    if arguments.list:
        print(json.dumps([{"name": name, "seeds": BROKEN[name].seeds, "slow": BROKEN[name].slow} for name in names]))
        return 0
    began_s, results = time.monotonic(), []
    for result in run_all(names, arguments.jobs, intact=arguments.intact):
        results.append(result)
        if not arguments.json:
            print(line(result, intact=arguments.intact), flush=True)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        cpu_s = sum(result.cpu_s for result in results)
        print(f"\n{len(results)} variants, {cpu_s:.0f} s of one core, {time.monotonic() - began_s:.0f} s in all")
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(results), encoding="utf-8")
    if arguments.intact:
        return 1 if any(result.others for result in results) else 0
    return 1 if any(result.caught_by is None for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
