"""How a data directory comes back."""

from __future__ import annotations

from typing import Any

import pytest
from core_builders import CHAIN, A, C, end, record

from instance_manager.core.record import ClusterRecord
from instance_manager.core.rejoin import DirectoryFacts, Rejoin, RejoinPlan, plan_rejoin


def plan(of: ClusterRecord | None = None, **changes: Any) -> RejoinPlan:
    facts: dict[str, Any] = {
        "exists": True,
        "half_rewound": False,
        "foreign": None,
        "system_identifier": "7001",
        "end": end(200),
        "needs": None,
        "member_id": C,
        "failed_rewinds": 0,
        "excluded": False,
        **changes,
    }
    return plan_rejoin(of or record(), DirectoryFacts(**facts), chain=CHAIN)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, Rejoin.FOLLOW),
        ({"end": end(100, timeline=1)}, Rejoin.FOLLOW),
        ({"end": end(101, timeline=1)}, Rejoin.REWIND),
        ({"end": end(10, timeline=3)}, Rejoin.REWIND),
        ({"end": None}, Rejoin.REWIND),
        ({"half_rewound": True}, Rejoin.REWIND),
        ({"half_rewound": True, "failed_rewinds": 3}, Rejoin.SET_ASIDE_AND_CLONE),
        ({"end": None, "failed_rewinds": 3}, Rejoin.SET_ASIDE_AND_CLONE),
        ({"end": end(101, timeline=1), "failed_rewinds": 3}, Rejoin.SET_ASIDE_AND_CLONE),
        ({"exists": False}, Rejoin.CLONE),
        ({"excluded": True}, Rejoin.SET_ASIDE_AND_CLONE),
        ({"system_identifier": "7002"}, Rejoin.WAIT),
        ({"system_identifier": "7002", "own_initdb": True}, Rejoin.SET_ASIDE_AND_CLONE),
        ({"foreign": "made by hand"}, Rejoin.WAIT),
        ({"needs": end(150)}, Rejoin.FOLLOW_AT_ONCE),
        ({"needs": end(101, timeline=1)}, Rejoin.SET_ASIDE_AND_CLONE),
    ],
    ids=str,
)
def test_section_4_a_directory_comes_back_by_what_its_log_and_marks_say(
    facts: dict[str, Any], expected: Rejoin
) -> None:
    assert plan(**facts).rejoin is expected


@pytest.mark.parametrize(
    "facts",
    [{"end": end(101, timeline=1)}, {"half_rewound": True}, {"excluded": True, "half_rewound": True}, {"end": None}],
    ids=str,
)
def test_r6_p7_a_voter_is_neither_wiped_nor_rewound(facts: dict[str, Any]) -> None:
    assert plan(**facts, member_id=A).rejoin is Rejoin.WAIT


def test_r16_a_voter_that_was_given_up_serves_as_one_until_it_is_dropped() -> None:
    assert plan(excluded=True, member_id=A).rejoin is Rejoin.FOLLOW
    assert plan(excluded=True, member_id=A, end=end(101, timeline=1)).rejoin is Rejoin.WAIT


def test_r7_while_q_is_0_nobody_is_kept_from_being_rewound() -> None:
    assert plan(record(quorum=0), end=end(101, timeline=1), member_id=A).rejoin is Rejoin.REWIND


def test_r15_what_was_given_up_is_set_aside_and_never_rewound_or_followed() -> None:
    assert plan(excluded=True, half_rewound=True).rejoin is Rejoin.SET_ASIDE_AND_CLONE


def test_section_4_a_half_rewound_directory_is_never_followed_whatever_its_log_seems_to_be() -> None:
    assert plan(half_rewound=True, end=end(1, timeline=1)).rejoin is Rejoin.REWIND
