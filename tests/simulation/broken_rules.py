"""The checkers are checked: every rule removed or bent, one at a time, and each must be caught.

`BROKEN` is run; `COVERED` was tried once, with 25 to 120 seeds, and broke nothing by itself; `NOT_HERE` says who holds the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from broken_elections import ELECTIONS
from broken_lease import LEASE
from broken_logs import LOGS
from broken_quorum import QUORUM
from broken_rule import BrokenRule

BROKEN: dict[str, BrokenRule] = {rule.name: rule for rule in (*LEASE, *ELECTIONS, *QUORUM, *LOGS)}


@dataclass(frozen=True, slots=True)
class Unbroken:
    """A bent rule that costs nothing by itself, or that the simulation cannot hold; `why` says what stands behind it."""

    name: str
    rule: str
    why: str


COVERED: tuple[Unbroken, ...] = (
    Unbroken(
        "the supervisor accepts an epoch that was revoked",
        "R10",
        "each agent has a link of its own, deadlines are absolute and capped, and Postgres has ended before a release",
    ),
    Unbroken(
        "a late message of a killed agent is read",
        "R10",
        "what it says is an absolute deadline, never later than what the store granted",
    ),
    Unbroken(
        "an agent takes by time right after its own start",
        "R10",
        "how long the record was unchanged is counted by the agent itself, so it is never older than the agent",
    ),
    Unbroken(
        "silence of the store counts as silence of the holder",
        "R12",
        "the store's first answer wakes the loop, which decides anew and ends the takeover before its write; and that is "
        "conditional",
    ),
    Unbroken(
        "to synchronous without the wait of one lease duration",
        "R8",
        "a takeover by time is conditional on the record's mode and quorum: the change of the mode refuses it",
    ),
    Unbroken(
        "one epoch is promised to two candidates",
        "section 4",
        "both would write on the same grounds, and one conditional write lands",
    ),
    Unbroken(
        "what was told to Postgres counts at once",
        "P1, P5",
        "the barrier refuses a list that was not confirmed",
    ),
    Unbroken(
        "the winner opens with the empty list",
        "R13, P8",
        "its gate stays closed until a barrier was passed on a list that is confirmed, and the quorum's steps set that first",
    ),
    Unbroken(
        "flushed is believed without sent",
        "P10",
        "a standby whose log is not a part of the history is never followed from (P4), so it cannot claim what it lacks",
    ),
    Unbroken(
        "a directory that was a primary's starts as one, without the Lease",
        "section 3",
        "the loop kills a writable Postgres of an instance that does not hold the Lease before its recovery has ended; and "
        "the supervisor starts none without a permit",
    ),
    Unbroken(
        "a stale switchover is carried out",
        "R4",
        "it is an ordinary switchover, with a stamp that only the very end of the log can take; it costs a moment",
    ),
    Unbroken(
        "a writable Postgres goes on when another holder is read",
        "section 3",
        "its permit ends, and until then the quorum acknowledges nothing; it costs stale reads",
    ),
)

NOT_HERE: tuple[Unbroken, ...] = (
    Unbroken(
        "a standby starts with its upstream set, whatever it promised",
        "R5",
        "found by one seed in some hundreds only: a voter must start again within the seconds between its promise and the "
        "takeover's write. `a promise does not bind whom to follow` is the same loss without the restart",
    ),
    Unbroken(
        "the mode is changed and q stays",
        "R8",
        "a loss once in several hundred seeds: the quorum's table lowers q in the record before Postgres stops waiting, so it "
        "takes a crash between two steps",
    ),
    Unbroken(
        "a promise lies in the data directory and is lost with it",
        "P6",
        "not run: what was cloned or rewound is another member, without a vote (R6), so that only the tests of the volume "
        "can tell",
    ),
    Unbroken(
        "an epoch is asked for that was promised to another",
        "R12",
        "nobody is elected until that other candidate is back, and in the simulation everybody comes back",
    ),
    Unbroken(
        "a claim that was given back is claimed again",
        "R2",
        "a winner must fail to open for 20 s and have written its timeline all the same; giving back looks for that. The "
        "exhaustive check",
    ),
    Unbroken(
        "dropped walsenders are not waited for; a raised k is taken for loaded; the mark is older than the list",
        "P5",
        "a late walsender releases by its older list at one moment only, some seconds after SIGHUP: 60 to 100 seeds of four "
        "instances found nothing. The exhaustive check, and the tests of the model of Postgres",
    ),
    Unbroken(
        "a read closes an unknown write; an unknown outcome is taken for a failure",
        "R1",
        "the agent's next renewal comes within 2 s and overtakes the late write: too rare for seeds. The exhaustive check",
    ),
    Unbroken(
        "two walsenders of one name count twice",
        "P7",
        "a slot has one walsender, so both rules must go and a half-open connection must stay: the exhaustive check",
    ),
    Unbroken(
        "clients enter before the quorum has caught up",
        "P8",
        "a holder rarely starts again before somebody is elected: the exhaustive check, and the tests on real Postgres",
    ),
    Unbroken(
        "the upstream is set before the promise is persisted",
        "R5",
        "one write apart, and a voter that reads the record refuses that epoch anyway: the exhaustive check calls it redundant",
    ),
    Unbroken("restore after the vote", "P9", "there is no archive yet: the restore command answers for histories only"),
    Unbroken(
        "scale-down, cold starts, owners of a deleted cluster",
        "R14",
        "availability in an environment that the simulation does not have",
    ),
)
