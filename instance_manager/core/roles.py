"""The roles of an instance and the only ways between them. The documentation's diagram is drawn from this table."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    STARTING = "starting"
    """Nothing is known yet: no decision was taken since the agent started."""
    INITIALISING = "initialising"
    """Holds the first Lease and runs initdb."""
    STOPPED = "stopped"
    """Postgres does not run, and nothing is under way."""
    CLONING = "cloning"
    REWINDING = "rewinding"
    STANDBY = "standby"
    CANDIDATE = "candidate"
    """Asks for promises, or has won and has not promoted."""
    PROMOTING = "promoting"
    """Holds the Lease; Postgres is opening read-write, clients are kept out."""
    PRIMARY = "primary"
    STOPPING = "stopping"
    """Gives up writing: switchover, lost Lease, fence or shutdown."""
    FENCED = "fenced"
    """Stopped by the user's wish until unfenced."""


TRANSITIONS: dict[Role, dict[Role, str]] = {
    Role.STARTING: {
        Role.INITIALISING: "no Lease and no data anywhere: this instance created the Lease",
        Role.STOPPED: "there is data, and Postgres does not run",
        Role.STANDBY: "the agent restarted over a running standby",
        Role.PRIMARY: "the agent restarted over a running primary and still holds the Lease",
        Role.CLONING: "there is no data, and a primary to clone from",
        Role.REWINDING: "its log left the cluster's history",
        Role.PROMOTING: "it holds the Lease and is not open yet",
        Role.CANDIDATE: "the agent restarted over a running standby without a primary",
        Role.STOPPING: "the agent restarted over a writable Postgres without the Lease",
        Role.FENCED: "the record fences this instance",
    },
    Role.INITIALISING: {
        Role.PROMOTING: "initdb has finished; Postgres starts read-write",
        Role.STOPPED: "initdb failed or the Lease was lost",
        Role.STOPPING: "shutdown",
    },
    Role.STOPPED: {
        Role.STANDBY: "its log is a prefix of the cluster's history",
        Role.REWINDING: "its log left the cluster's history",
        Role.CLONING: "the directory is missing or hopeless",
        Role.PROMOTING: "it still holds the Lease, wrote a later epoch, and no voter is ahead",
        Role.INITIALISING: "no Lease and no data anywhere",
        Role.STOPPING: "shutdown",
        Role.FENCED: "the record fences this instance",
    },
    Role.CLONING: {
        Role.STOPPED: "finished or failed",
        Role.STANDBY: "finished",
        Role.STOPPING: "shutdown",
        Role.FENCED: "fenced",
    },
    Role.REWINDING: {
        Role.STOPPED: "finished or failed",
        Role.STANDBY: "finished",
        Role.STOPPING: "shutdown",
        Role.FENCED: "fenced",
    },
    Role.STANDBY: {
        Role.CANDIDATE: "the primary is suspected, or released the Lease",
        Role.STOPPED: "Postgres ended",
        Role.STOPPING: "its log left the cluster's history, restart, or shutdown",
        Role.FENCED: "the record fences this instance",
    },
    Role.CANDIDATE: {
        Role.STANDBY: "not elected",
        Role.PROMOTING: "the Lease is taken",
        Role.STOPPED: "Postgres ended",
        Role.STOPPING: "shutdown",
        Role.FENCED: "the record fences this instance",
    },
    Role.PROMOTING: {
        Role.PRIMARY: "the first own record is on k of S, or q is 0: clients enter",
        Role.STANDBY: "another took the Lease before Postgres was promoted",
        Role.STOPPING: "promotion failed, or the Lease was lost",
        Role.STOPPED: "Postgres ended",
    },
    Role.PRIMARY: {
        Role.STOPPING: "switchover, lost Lease, deadline, bad health, fence or shutdown",
        Role.STOPPED: "Postgres ended",
        Role.PROMOTING: "restarted in place behind a later epoch",
    },
    Role.STOPPING: {
        Role.STANDBY: "the stop failed or is not wanted any more, and Postgres is the standby that it was",
        Role.STOPPED: "no Postgres process is left",
        Role.FENCED: "no Postgres process is left, and the record fences it",
    },
    Role.FENCED: {Role.STOPPED: "unfenced", Role.STOPPING: "shutdown"},
}


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> starting"]
    lines += [
        f"    {source} --> {target}: {why}"
        for source, targets in TRANSITIONS.items()
        for target, why in targets.items()
    ]
    return "\n".join(lines) + "\n"
