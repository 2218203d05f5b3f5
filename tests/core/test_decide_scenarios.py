"""`decide` by scenarios in readable text: `scenarios/*.txt`.

A scenario is a block of `key: value` lines, apart from the next by an empty line. `scenario` names it (with the rule that it
holds), `me` is the instance that decides (`p` is the healthy primary at epoch 5, `a` and `b` its voters), `act` and `reason`
are what must come out; every other line changes one fact of the healthy cluster of `core_builders.observation`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from core_builders import holder, ids, observation, peer, record

from instance_manager.core.decide import decide
from instance_manager.core.observation import Observation
from instance_manager.core.record import Release, SwitchoverRequest
from instance_manager.core.types import Epoch, Lsn, MemberId, MemberName, Timeline, WalEnd

SCENARIOS = Path(__file__).parent / "scenarios"
_END = re.compile(r"([0-9]+):([0-9]+)")
_WORDS: dict[str, Any] = {"yes": True, "no": False, "none": None, "never": float("inf")}


@dataclass
class Scenario:
    name: str = ""
    me: str = "a"
    act: str = ""
    reason: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)


def load(path: Path) -> list[Scenario]:
    found = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            continue
        scenario = Scenario()
        for line in lines:
            key, separator, value = line.partition(": ")
            assert separator, f"{path.name}: no `key: value`: {line!r}"
            if key == "scenario":
                scenario.name = value
            elif key in ("me", "act", "reason"):
                setattr(scenario, key, value)
            else:
                scenario.facts.append((key, value))
        assert scenario.name, f"{path.name}: a block without a name: {lines}"
        assert scenario.act, f"{scenario.name}: no act"
        found.append(scenario)
    return found


def _release(text: str) -> Release | None:
    """`to a at 2:200`, of epoch 5."""
    if text == "none":
        return None
    _, target, _, end = text.split()
    return Release(releaser=MemberId("p_00000000"), epoch=Epoch(5), end=_end(end), target=next(iter(ids(target)), None))


def _end(text: str) -> WalEnd:
    timeline, lsn = text.split(":")
    return WalEnd(Timeline(int(timeline)), Lsn(int(lsn)))


def _value(key: str, text: str) -> Any:
    name = key.rsplit(".", 1)[-1]
    if name in ("voters", "excluded"):
        return ids("" if text == "none" else text)
    if key == "record.fenced":
        return frozenset(MemberName(one) for one in text.split())
    if name == "holder" and text != "none":
        member, _, life = text.partition(" ")
        return holder(next(iter(ids(member))), life or f"{member}-life-1")
    if name == "release":
        return _release(text)
    if name == "switchover":
        target, _, epoch = text.partition(" of epoch ")
        return SwitchoverRequest(request_id="r", epoch=Epoch(int(epoch)), target=MemberName(target))
    if name == "following" and text != "none":
        member, epoch = text.split()
        return next(iter(ids(member))), Epoch(int(epoch))
    if name == "last_record":
        return record()
    if name == "member_id" and text != "none":
        return next(iter(ids(text)))
    if text in _WORDS:
        return _WORDS[text]
    if _END.fullmatch(text):
        return _end(text)
    try:
        return int(text) if re.fullmatch(r"-?[0-9]+", text) else float(text)
    except ValueError:
        return text


def observe(scenario: Scenario) -> Observation:
    seen = observation(scenario.me)
    peers: dict[str, dict[str, Any]] = {}
    for key, text in scenario.facts:
        value = _value(key, text)
        part, _, name = key.partition(".")
        if key == "record" and value is None:
            seen = replace(seen, lease=replace(seen.lease, record=None))
        elif part == "record":
            assert seen.lease.record is not None
            seen = replace(seen, lease=replace(seen.lease, record=replace(seen.lease.record, **{name: value})))
        elif part == "peer":
            who, _, what = name.partition(".")
            peers.setdefault(who, {})[what] = value
        elif name:
            seen = replace(seen, **{part: replace(getattr(seen, part), **{name: value})})
        else:
            seen = replace(seen, **{part: value})
    changed = {MemberName(who): peer(who, **changes) for who, changes in peers.items()}
    return replace(seen, peers={**seen.peers, **changed})


ALL = [scenario for path in sorted(SCENARIOS.glob("*.txt")) for scenario in load(path)]


def test_every_scenario_has_a_name_of_its_own() -> None:
    names = [scenario.name for scenario in ALL]
    assert len(names) == len(set(names))
    assert len(names) >= 50


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_decide(scenario: Scenario) -> None:
    decision = decide(observe(scenario))
    assert (decision.act, scenario.reason in decision.reason) == (scenario.act, True), decision
