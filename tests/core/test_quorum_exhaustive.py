"""Every interleaving of the quorum's steps, late writes, old views, restarts and elections, for two and three standbys.

And the check is checked: each broken variant of a rule must lose a commit, with a story that can be read.
"""

from __future__ import annotations

import pytest
from quorum_model import Result, Rules, Walk

from instance_manager.core.quorum import (
    QuorumStep,
    RecordVoters,
    SetSynchronous,
    SynchronousSet,
    next_step,
)
from instance_manager.core.types import MemberId

Members = frozenset[MemberId]


def add_voter_in_postgres_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    adds = quorum > 0 and wanted.k >= quorum and wanted.members - voters
    if adds and (synchronous != wanted or not confirmed):
        return SetSynchronous(wanted, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def drop_voter_in_record_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k >= quorum > 0 and wanted.members < voters and synchronous != wanted:
        return RecordVoters(wanted.members, quorum, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def lower_q_in_postgres_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k < quorum and (synchronous != wanted or not confirmed):
        return SetSynchronous(wanted, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def raise_q_in_record_first(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    if wanted.k > quorum and wanted.members == voters and synchronous != wanted:
        return RecordVoters(voters, wanted.k, "broken")
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=confirmed, wanted=wanted)


def unconfirmed_is_good_enough(
    *, voters: Members, quorum: int, synchronous: SynchronousSet, confirmed: bool, wanted: SynchronousSet
) -> QuorumStep:
    return next_step(voters=voters, quorum=quorum, synchronous=synchronous, confirmed=True, wanted=wanted)


BROKEN = {
    "add a voter: Postgres, then record": Rules(next_step=add_voter_in_postgres_first),
    "drop a voter: record, then Postgres": Rules(next_step=drop_voter_in_record_first),
    "lower q: Postgres, then record": Rules(next_step=lower_q_in_postgres_first),
    "raise q: record, then Postgres": Rules(next_step=raise_q_in_record_first),
    "no barrier": Rules(barrier="none"),
    "barrier over acknowledged commits only": Rules(barrier="acknowledged"),
    "the barrier's mark before the old views are gone (P5)": Rules(mark_before_confirmed=True),
    "old views are not waited for (P1, P5)": Rules(next_step=unconfirmed_is_good_enough),
    "a read closes an unknown write (R1)": Rules(unknown_closed_by_read=True),
    "one promise fewer": Rules(promises_needed=lambda voters, quorum: voters - quorum if quorum else None),
    "q = 0 elects like q = 1 (R7)": Rules(promises_needed=lambda voters, quorum: voters - max(quorum, 1) + 1),
    "others than voters promise (R7)": Rules(only_voters_promise=False),
    "any promiser wins, not the best log": Rules(best_log_wins=False),
    "the winner inherits the voters": Rules(voters_of_winner="inherited"),
    "every promiser becomes a voter": Rules(voters_of_winner="all promisers"),
    "a promise does not stop the walreceiver (P2)": Rules(promise_stops_receiving=False),
    "a restart forgets the list (P8)": Rules(restart_from_record=False),
    "the takeover's write is unconditional": Rules(election_on_current_record=False),
}
NEEDS_TWO_EPOCHS = {"barrier over acknowledged commits only", "the winner inherits the voters"}


def _story(result: Result) -> str:
    return "\n".join(["", *result.events, f"=> {result.loss}"])


@pytest.mark.parametrize(
    ("standbys", "k_max", "stale_max", "least"),
    [(2, 1, 2, 2_000), (2, 2, 2, 4_000), (3, 2, 1, 40_000)],
)
def test_an_elected_log_holds_every_acknowledged_commit_in_every_interleaving(
    standbys: int, k_max: int, stale_max: int, least: int
) -> None:
    result = Walk(Rules(), standbys=standbys, k_max=k_max, stale_max=stale_max).run()
    print(f"{standbys} standbys, k up to {k_max}, {stale_max} old views: {result.states} states")
    assert result.loss is None, _story(result)
    assert result.states >= least, "the walk has become smaller: is something no longer reached?"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_loses_a_commit(name: str) -> None:
    result = Walk(BROKEN[name], standbys=3, k_max=2).run()
    print(f"{name}: found after {result.states} states{_story(result)}")
    assert result.loss is not None, f"{name} was not caught in {result.states} states"
    if name in NEEDS_TWO_EPOCHS:
        assert sum("elected by" in event for event in result.events) >= 2, _story(result)
