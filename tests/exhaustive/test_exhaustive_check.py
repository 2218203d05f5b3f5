"""Every interleaving within CI's bounds keeps the promise; and the check is checked: every broken variant is caught."""

from __future__ import annotations

import pytest
from broken_protocols import BROKEN, NOT_HERE, REDUNDANT, Broken
from check import judge_variant, judge_walk, main, run_variant, run_walk, story
from walk_settings import CI, SETTINGS, Walked


def _bounds(walked: Walked) -> str:
    model = walked.build()
    return f"{model.name}: {model.bounds}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("walked", CI, ids=_bounds)
def test_no_interleaving_breaks_the_promise(walked: Walked) -> None:
    result = run_walk(walked, quiet=True)
    print(f"{_bounds(walked)}: {result.states:,} states, {result.events:,} events, {result.seconds:.1f} s")
    assert judge_walk(walked, result) is None


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_variant_is_caught(broken: Broken) -> None:
    result = run_variant(broken)
    print(f"{broken.name} ({broken.rule}): caught after {result.states:,} states\n{story(result)}")
    assert judge_variant(broken, result) is None


def test_a_walk_that_became_smaller_fails() -> None:
    smallest = min(CI, key=lambda walked: walked.least)
    result = run_walk(smallest, quiet=True)
    more = Walked(build=smallest.build, least=result.states + 1)
    assert "fewer" in (judge_walk(more, result) or "")


def test_every_walk_has_a_floor_and_every_variant_a_name_of_its_own() -> None:
    assert all(walked.least > 1 for walks in SETTINGS.values() for walked in walks)
    names = [broken.name for broken in BROKEN]
    assert len(set(names)) == len(names) >= 50


def test_every_rule_of_the_protocol_is_bent_or_said_not_to_be() -> None:
    bent = " ".join(broken.rule for broken in BROKEN)
    elsewhere = {rule for rule, _ in NOT_HERE}
    rules = [f"R{number}" for number in range(1, 17)] + [f"P{number}" for number in range(1, 14)]
    words = set(bent.replace(",", " ").split())
    assert [rule for rule in rules if rule not in words and rule not in elsewhere] == []
    assert REDUNDANT


def test_one_variant_is_told_with_its_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--variant", "q = 0 elects like q = 1"]) == 0
    told = capsys.readouterr().out
    assert "=> the former primary can acknowledge something new" in told
    assert "1 of 1 variants caught" in told


def test_the_list_names_walks_variants_and_what_is_not_held(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    told = capsys.readouterr().out
    assert all(broken.name in told for broken in BROKEN)
    assert "not held by a walk" in told
