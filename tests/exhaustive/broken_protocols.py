"""Every rule removed or bent, one at a time: the walk that holds it must find the violation.

`BROKEN` is one table, for this check and for whoever prints it together with the simulation's. What a walk cannot hold is in
`NOT_HERE`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bent_functions as bent
from breadth_first import Model
from permits_model import PermitRules, PermitsModel
from permits_words import Ticks
from protocol_model import ProtocolModel
from protocol_rules import ProtocolRules
from protocol_words import Bounds
from views_model import ViewRules, ViewsModel


@dataclass(frozen=True, kw_only=True)
class Broken:
    """One variant: `model` names the walk, `build` makes it with the smallest bounds that show the loss."""

    name: str
    rule: str
    bent: str
    model: str
    build: Callable[[], Model[Any]]
    elections: int = 0
    """The story has at least so many: a loss that needs two epochs proves that the second is walked."""


def views(
    name: str, rule: str, bent: str, rules: ViewRules, *, elections: int = 0, standbys: int = 3, k: int = 2
) -> Broken:
    def build() -> Model[Any]:
        return ViewsModel(rules, standbys=standbys, k_max=k, late_writes=rules.unknown_closed_by_read, name="views")

    return Broken(name=name, rule=rule, bent=bent, model="views", build=build, elections=elections)


def protocol(name: str, rule: str, bent: str, rules: ProtocolRules, **bounds: Any) -> Broken:
    def build() -> Model[Any]:
        return ProtocolModel(rules, Bounds(**bounds))

    return Broken(name=name, rule=rule, bent=bent, model="protocol", build=build)


def permits(name: str, rule: str, bent: str, rules: PermitRules, **bounds: Any) -> Broken:
    settings: dict[str, Any] = {
        "mode": "asynchronous",
        "epochs": 2,
        "restarts": 0,
        "releases": 0,
        "extensions": False,
        "ticks": Ticks(2, 3, 1),
    }

    def build() -> Model[Any]:
        return PermitsModel(rules, **(settings | bounds))

    return Broken(name=name, rule=rule, bent=bent, model="permits", build=build)


EXTENDING = {"extensions": True}
SYNCHRONOUS = {"mode": "synchronous", "extensions": True}

BROKEN: tuple[Broken, ...] = (
    # Section 4's table, its barrier, and Postgres's own delays.
    views(
        "add a voter: Postgres, then record",
        "section 4",
        "Postgres counts a standby before the record knows it",
        ViewRules(next_step=bent.add_voter_in_postgres_first),
    ),
    views(
        "drop a voter: record, then Postgres",
        "section 4",
        "the record forgets a voter that Postgres still counts",
        ViewRules(next_step=bent.drop_voter_in_record_first),
    ),
    views(
        "lower q: Postgres, then record",
        "section 4",
        "Postgres waits for fewer before the record says so",
        ViewRules(next_step=bent.lower_q_in_postgres_first),
    ),
    views(
        "raise q: record, then Postgres",
        "section 4",
        "the record elects with fewer before Postgres waits for more",
        ViewRules(next_step=bent.raise_q_in_record_first),
    ),
    views("no barrier", "section 4", "recorded as soon as Postgres is told", ViewRules(barrier="none")),
    views(
        "barrier over acknowledged commits only",
        "section 4",
        "the barrier does not wait for what the log held and nobody was told of",
        ViewRules(barrier="acknowledged"),
        k=1,
        elections=2,
    ),
    views(
        "the barrier's mark before the old views are gone",
        "P5",
        "the mark is taken before the new list is confirmed",
        ViewRules(mark_before_confirmed=True),
        k=1,
    ),
    views(
        "dropped names are not waited for",
        "P5",
        "a list counts as confirmed while a walsender of a dropped name lists itself",
        ViewRules(dropped_names_let_go=False),
    ),
    views(
        "the checkpointer is not waited for",
        "P1",
        "a list counts as confirmed while backends do not wait",
        ViewRules(flag_is_seen=False),
    ),
    views(
        "old views are not waited for at all",
        "P1, P5",
        "what was told to Postgres counts as what it runs by",
        ViewRules(next_step=bent.unconfirmed_is_good_enough, flag_is_seen=False, dropped_names_let_go=False),
    ),
    views(
        "a smaller k may release during the barrier",
        "P5",
        "one mark both proves the new k and bounds the log: a walsender of the smaller k releases a commit after it, by "
        "what another has flushed",
        ViewRules(smaller_k_is_gone="with the mark"),
        standbys=2,
    ),
    views(
        "a smaller k may stay",
        "P5",
        "after k was raised the other listed walsenders need not pass",
        ViewRules(barrier_ends_smaller_k=False),
    ),
    views(
        "the barrier counts walsenders",
        "P7",
        "a half-open walsender and its successor are two",
        ViewRules(barrier_counts_names="walsenders"),
        standbys=2,
    ),
    views(
        "a read closes an unknown write",
        "R1",
        "the primary goes on by what it reads while its write may land later",
        ViewRules(unknown_closed_by_read=True),
        k=1,
    ),
    views(
        "one promise fewer, whatever the views",
        "section 4",
        "|N| - q promises elect",
        ViewRules(promises_needed=bent.one_fewer),
    ),
    views(
        "q = 0 elects like q = 1",
        "R7",
        "promises of all of N elect although commits need none of them",
        ViewRules(promises_needed=bent.needed_also_without_quorum),
    ),
    views("others than voters promise", "R7", "anybody's promise counts", ViewRules(only_voters_promise=False)),
    views("any promiser wins", "section 4", "not the best log of the promisers", ViewRules(best_log_wins=False)),
    views(
        "the winner inherits the voters, whatever they hold",
        "section 4, R13",
        "the old N and q stay",
        ViewRules(voters_of_winner="inherited"),
        elections=2,
    ),
    views(
        "every promiser becomes a voter",
        "section 4, R13",
        "also those whose log is not the winner's",
        ViewRules(voters_of_winner="all promisers"),
        elections=2,
    ),
    views(
        "a promise does not stop the walreceiver",
        "P2",
        "who promised goes on acknowledging",
        ViewRules(promise_stops_receiving=False),
    ),
    views(
        "a restart forgets the list", "P8", "Postgres starts with the empty list", ViewRules(restart_from_record=False)
    ),
    views(
        "commits do not wait right after a start",
        "P1, P8",
        "a promotion or a start begins with waiting switched off",
        ViewRules(waits_from_the_first_commit=False),
    ),
    views(
        "a takeover on an older record",
        "section 4",
        "the write does not stand on what the promises stood on",
        ViewRules(election_on_current_record=False),
    ),
    # The protocol, message by message.
    protocol(
        "writes are not conditional",
        "section 3, R1",
        "a late write lands whatever was written since",
        ProtocolRules(conditional_writes=False),
        unknown_writes=1,
        epochs=2,
    ),
    protocol(
        "an unknown write is closed by a read",
        "R1",
        "quorum steps go on by what is read",
        ProtocolRules(read_closes_unknown=True),
        unknown_writes=1,
        epochs=2,
    ),
    protocol(
        "a new agent begins without a write of its own",
        "R1",
        "a write of the agent before it may land later",
        ProtocolRules(unknown_blocks=False),
        unknown_writes=1,
        agent_restarts=1,
        epochs=2,
    ),
    protocol(
        "the takeover's grounds are not compared",
        "R12, section 4",
        "promises of one record take another",
        ProtocolRules(takeover_on_its_grounds=False),
        epochs=2,
    ),
    protocol(
        "a promise is not persisted",
        "R3, section 4",
        "acted on, but not on the volume",
        ProtocolRules(promise_persisted=False),
        instances=3,
        epochs=2,
        quorum_steps="none",
    ),
    protocol(
        "the position is told before the walreceiver is gone",
        "P2, R5",
        "what arrives in between is in no answer",
        ProtocolRules(position="before"),
        instances=3,
        epochs=2,
        quorum_steps="none",
    ),
    protocol(
        "a restarted voter tells its replay position",
        "P3, R5",
        "less than what it acknowledged",
        ProtocolRules(position="replayed"),
        instances=3,
        epochs=2,
        quorum_steps="none",
        crashes=1,
    ),
    protocol(
        "who promised follows the old primary again",
        "section 4",
        "a promise does not forbid a lower epoch",
        ProtocolRules(may_follow=bent.always, following=bent.follows_whatever_was_promised),
        instances=3,
        epochs=2,
        quorum_steps="none",
    ),
    protocol(
        "a candidate ahead is ignored",
        "section 4",
        "enough promises elect whoever asked",
        ProtocolRules(judge_promises=bent.ahead_is_ignored),
        instances=3,
        epochs=2,
        quorum_steps="none",
    ),
    protocol(
        "one promise fewer",
        "section 4",
        "|N| - q promises elect",
        ProtocolRules(judge_promises=bent.one_promise_fewer),
        instances=3,
        epochs=2,
        quorum_steps="none",
    ),
    protocol(
        "the winner inherits the voters",
        "section 4, R13",
        "the old N stays",
        ProtocolRules(judge_promises=bent.winner_inherits_voters),
        instances=3,
        epochs=3,
        quorum_steps="none",
    ),
    protocol(
        "the claim follows the own log",
        "R2, P4",
        "two winners take one timeline number from different logs",
        ProtocolRules(claimed=bent.claims_after_its_own_log),
        instances=3,
        epochs=3,
        quorum_steps="none",
    ),
    protocol(
        "a claim that was given back is claimed again",
        "R2, P4",
        "a number is used for two logs",
        ProtocolRules(claimed=bent.claims_after_the_chain),
        epochs=3,
        give_back=True,
        unknown_writes=1,
        instances=3,
        quorum_steps="none",
    ),
    protocol(
        "a restored Lease is believed",
        "R3",
        "an epoch below the highest seen is no damage",
        ProtocolRules(record_damage=bent.nothing_is_damage),
        epochs=3,
        damages=1,
    ),
    protocol(
        "a Lease is repaired without asking",
        "R3",
        "the last holder that it knows of writes it anew",
        ProtocolRules(repair=bent.repair_without_asking),
        epochs=3,
        damages=1,
    ),
    protocol(
        "a Lease is repaired whatever the voters promised",
        "R3",
        "that they answer is enough",
        ProtocolRules(repair=bent.repair_by_what_was_intended),
        epochs=3,
        damages=1,
    ),
    protocol(
        "a release is taken by one that does not hold the end",
        "R4",
        "the stamp's position is not compared",
        ProtocolRules(taken_from_release=bent.release_by_anybody),
        epochs=2,
        releases=1,
    ),
    protocol(
        "an empty holder counts as a release",
        "R4",
        "a Lease cleared by hand is taken without promises",
        ProtocolRules(taken_from_release=bent.empty_holder_is_a_release),
        epochs=2,
        damages=1,
    ),
    protocol(
        "the release names members that were not asked",
        "P12, R13",
        "a clean shutdown counts as proof that everybody has its end",
        ProtocolRules(holding_is_seen=False),
        instances=3,
        epochs=3,
        releases=1,
        quorum_steps="none",
    ),
    protocol(
        "a rolled-back directory keeps its identity",
        "R6, P7",
        "its vote counts as that of the log before",
        ProtocolRules(new_identity_when_copied=False),
        epochs=2,
        rollbacks=1,
    ),
    protocol(
        "a restarted holder asks nobody",
        "R16",
        "its disk may have lost what it acknowledged",
        ProtocolRules(judge_restart=bent.restart_without_asking),
        epochs=3,
        lost_tails=1,
    ),
    protocol(
        "a restarted holder opens alone",
        "P8",
        "the list at a start is weaker than the record",
        ProtocolRules(synchronous_for=bent.alone_after_a_start),
        epochs=3,
        crashes=1,
    ),
    protocol(
        "given back with one vote",
        "R13",
        "the N and q that it found are made easier",
        ProtocolRules(given_back=bent.given_back_with_one_vote),
        instances=3,
        epochs=3,
        give_back=True,
        quorum_steps="none",
    ),
    protocol(
        "no barrier, message by message",
        "section 4",
        "q is raised as soon as the list is set",
        ProtocolRules(barrier=False),
        epochs=2,
    ),
    # Time.
    permits(
        "a permit counts from the answer",
        "section 3",
        "not from when the renewal was sent",
        PermitRules(permit_counts_from="answer"),
        ticks=Ticks(3, 4, 2),
    ),
    permits(
        "a record counts as seen from when the read was sent",
        "R12",
        "it may have been written after that",
        PermitRules(record_is_seen_from="the sending"),
        ticks=Ticks(3, 4, 2),
    ),
    permits(
        "an unknown outcome is a renewal",
        "section 3",
        "a write without an answer extends the permit",
        PermitRules(unknown_outcome_renews=True),
    ),
    permits(
        "the agent alone enforces the permit",
        "section 2",
        "a paused agent's Postgres goes on",
        PermitRules(supervisor_enforces=False),
    ),
    permits(
        "a shorter duration than the record's",
        "R8",
        "the candidate waits by its own configuration",
        PermitRules(entitled_by_time=bent.waits_a_tick_less),
    ),
    permits(
        "an empty holder is taken at once",
        "R4",
        "the last holder's permit may still run",
        PermitRules(entitled_by_time=bent.free_means_free),
        clears=1,
    ),
    permits(
        "a takeover by time is not conditional",
        "section 3",
        "the write lands on whatever is there",
        PermitRules(conditional=False),
    ),
    permits(
        "a takeover by time stands on the grounds, not on the version",
        "section 4, R11",
        "a renewal between the last look and the write goes unnoticed",
        PermitRules(time_stands_on="the grounds"),
        **EXTENDING,
    ),
    permits(
        "one of several voters extends",
        "R11",
        "the others are enough for an election",
        PermitRules(all_members_extend=False),
        **(SYNCHRONOUS | {"instances": 3, "quorum": 2}),
    ),
    permits(
        "who extended takes over all the same",
        "R11",
        "the promise does not bind a takeover by time",
        PermitRules(bound_is_kept=False),
        **EXTENDING,
    ),
    permits(
        "an extension is forgotten by a restart",
        "R11",
        "it is not on the volume",
        PermitRules(bound_survives_restart=False),
        **(SYNCHRONOUS | {"restarts": 1}),
    ),
    permits(
        "an extension after a later promise",
        "R11",
        "who promised another epoch promises the old holder, too",
        PermitRules(judge_extension=bent.extends_whatever_was_promised),
        **(SYNCHRONOUS | {"instances": 3}),
    ),
    permits(
        "a promise during an extension",
        "R11",
        "the voter forgets that it is bound",
        PermitRules(judge_vote=bent.votes_during_an_extension),
        **SYNCHRONOUS,
    ),
    permits(
        "released before Postgres has stopped",
        "R10",
        "the target opens while the releaser still writes",
        PermitRules(stops_before_release=False, revokes=False),
        releases=1,
    ),
)

REDUNDANT: tuple[tuple[str, str], ...] = (
    (
        "an epoch is promised twice (judge_vote)",
        "`VolumeState.promising` refuses it again, and the register elects one",
    ),
    (
        "following without a promise",
        "a voter that has read the record of e refuses e anyway",
    ),
    ("a voter is copied anew", "a copy of the holder's whole log never holds less; a rolled-back one is bent above"),
    (
        "an extension during an own takeover",
        "the takeover's own promise refuses it again; by time the permit has ended",
    ),
    ("time without a successful read", "a takeover by time on exactly the version fails where the record was renewed"),
    ("a restarted agent takes by time at once", "what it has seen is never older than itself"),
    ("q = 0 in judge_promises", "voters refuse it, too; bent in the views, where it loses"),
)
"""Rules whose single removal loses nothing in these worlds, because another one holds the same."""

NOT_HERE: tuple[tuple[str, str], ...] = (
    ("R9", "what counts as proof of death comes from the outside; no model of the promise holds it"),
    ("R14", "availability at cold starts and scale-down: without it nobody is elected, and nothing is lost"),
    ("R15", "a verb that may lose by definition; the simulation and the tests of the verb hold it"),
    (
        "P6",
        "where the volume's memory lies is a fact of the file system; lost promises are bent in section 4's variants",
    ),
    (
        "P9",
        "what a voter restores after its vote it tells no former primary; it then leaves the history and is copied anew, "
        "which costs time, not writes",
    ),
    ("P10", "how a mark is found is Postgres's business; here a mark is exact"),
    ("P11", "ends of logs are exact here; torn tails are in the tests on real Postgres"),
    ("P13", "what a client takes for an acknowledgement is the drill's and the simulation's"),
)
"""Rules that an exhaustive walk cannot hold, and why."""
