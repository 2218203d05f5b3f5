"""Walk every interleaving of the failover protocol for small clusters, and see that every broken variant is caught.

    python tests/exhaustive/check.py                      # CI's setting: about two minutes of one core
    python tests/exhaustive/check.py --setting deep       # bigger bounds: many hours, and memory
    python tests/exhaustive/check.py --variant "no barrier"   # one variant, with its story
    python tests/exhaustive/check.py --list

Exit code 1: the rules as they are lose something, a variant is not caught, or a walk is smaller than it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from breadth_first import Result, walk  # noqa: E402
from broken_protocols import BROKEN, NOT_HERE, REDUNDANT, Broken  # noqa: E402
from walk_settings import SETTINGS, Walked  # noqa: E402

VARIANT_LIMIT = 400_000
"""States after which a variant counts as not caught."""


def story(result: Result) -> str:
    end = [f"=> {result.violation.what}"] if result.violation is not None else []
    return "\n".join(f"    {event}" for event in (*result.story, *end))


def judge_walk(walked: Walked, result: Result) -> str | None:
    """What is wrong with a walk over the rules as they are; None if nothing is."""
    if result.violation is not None:
        return f"{result.violation.what}\n{story(result)}"
    if not result.complete and walked.state_limit is None:
        return "it ended before every state was seen"
    if result.states < walked.least:
        return (
            f"{result.states:,} states are fewer than the {walked.least:,} there were: is something no longer reached?"
        )
    return None


def judge_variant(broken: Broken, result: Result) -> str | None:
    if result.violation is None:
        return f"not caught in {result.states:,} states"
    elections = sum("elected by" in event for event in result.story)
    if elections < broken.elections:
        return f"caught after {elections} elections only, {broken.elections} were expected\n{story(result)}"
    return None


def run_walk(walked: Walked, *, quiet: bool = False) -> Result:
    model = walked.build()
    return walk(
        model,
        state_limit=walked.state_limit or 1_000_000_000,
        tell=None if quiet else lambda progress: print(f"  {model.name}: {progress}", flush=True),
    )


def run_variant(broken: Broken) -> Result:
    return walk(broken.build(), state_limit=VARIANT_LIMIT)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="ci")
    parser.add_argument("--variant", metavar="NAME", help="only variants whose name contains NAME, with their stories")
    parser.add_argument("--list", action="store_true", help="name walks, variants and what is not held here")
    options = parser.parse_args(arguments)
    if options.list:
        print_list()
        return 0
    failed = []
    chosen = [each for each in BROKEN if options.variant is None or options.variant in each.name]
    if not chosen:
        parser.error(f"no variant is called {options.variant!r}; --list names them")
    if options.variant is None:
        failed += check_walks(options.setting)
    failed += check_variants(chosen, tell_stories=options.variant is not None)
    for each in failed:
        print(f"\nFAILED: {each}")
    return 1 if failed else 0


def check_walks(setting: str) -> list[str]:
    failed = []
    states = events = 0
    seconds = 0.0
    lines = []
    for walked in SETTINGS[setting]:
        model = walked.build()
        print(f"{model.name}: {model.bounds}", flush=True)
        result = run_walk(walked)
        wrong = judge_walk(walked, result)
        states, events, seconds = states + result.states, events + result.events, seconds + result.seconds
        what = "held" if wrong is None else "FAILED"
        what += "" if result.complete or result.violation else " so far"
        lines.append(f"{model.name:9} {result.states:>12,} {result.seconds:>8.1f} {what:8} {model.bounds}")
        if wrong is not None:
            failed.append(f"{model.name} ({model.bounds}): {wrong}")
    print(f"\n{'model':9} {'states':>12} {'seconds':>8} {'result':8} bounds")
    print("\n".join(lines))
    print(f"{'together':9} {states:>12,} {seconds:>8.1f}          {events:,} events\n")
    return failed


def check_variants(chosen: Sequence[Broken], *, tell_stories: bool) -> list[str]:
    failed = []
    seconds = 0.0
    print(f"{'variant':58} {'rule':16} {'model':9} {'states':>8} {'seconds':>8} {'story':>6}")
    for broken in chosen:
        result = run_variant(broken)
        wrong = judge_variant(broken, result)
        seconds += result.seconds
        caught = f"{len(result.story):>6}" if result.violation is not None else "MISSED"
        row = f"{broken.name:58} {broken.rule:16} {broken.model:9} {result.states:>8,} {result.seconds:>8.1f} {caught}"
        print(row, flush=True)
        if tell_stories and result.violation is not None:
            print(f"  bent: {broken.bent}\n{story(result)}")
        if wrong is not None:
            failed.append(f"{broken.name}: {wrong}")
    print(f"{len(chosen) - len(failed)} of {len(chosen)} variants caught, {seconds:.1f} s")
    return failed


def print_list() -> None:
    for name, walks in SETTINGS.items():
        print(f"setting {name}:")
        for walked in walks:
            model = walked.build()
            print(f"  {model.name:9} {model.bounds}")
    print(f"\n{len(BROKEN)} broken variants:")
    for broken in BROKEN:
        print(f"  {broken.name:58} {broken.rule:16} {broken.model:9} {broken.bent}")
    print("\nheld twice, so that leaving out one of the two loses nothing here:")
    for name, why in REDUNDANT:
        print(f"  {name}: {why}")
    print("\nnot held by a walk:")
    for rule, why in NOT_HERE:
        print(f"  {rule}: {why}")


if __name__ == "__main__":
    sys.exit(main())
