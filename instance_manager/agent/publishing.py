"""Which notes of the agent's journal become Events for people, and nobody's publication where there is no cluster around."""

from __future__ import annotations

from instance_manager.ports import Publication, PublishedRole


class Unpublished:
    """`ports.Publication` on one machine: clients ask the instances themselves, and people the log."""

    def publish_role(self, role: PublishedRole) -> None:
        return None

    async def role_is_published(self, *, deadline_s: float) -> bool:
        return True

    def publish_event(self, reason: str, message: str, *, warning: bool) -> None:
        return None

    async def finish(self, *, deadline_s: float) -> None:
        return None

    async def run(self) -> None:
        return None


NORMAL = {
    "create the Lease": "ClusterCreated",
    "initialised": "Initialised",
    "take the Lease": "LeaseTaken",
    "promoted": "Promoted",
    "resume": "PrimaryStarted",
    "open": "OpenForWrites",
    "hand over": "HandingOver",
    "release": "LeaseReleased",
    "clone": "Cloned",
    "rewind": "Rewound",
    "configuration": "ConfigurationReloaded",
    "archive works": "ArchiveWorks",
    "archive gap filled": "ArchiveGapFilled",
}
WARNINGS = {
    "give back": "LeaseGivenBack",
    "reaffirm": "PrimaryReaffirmed",
    "repair": "LeaseRepaired",
    "failover with loss": "FailoverWithLoss",
    "set aside and clone": "SetAsideAndCloned",
    "switchover refused": "SwitchoverRefused",
    "extend": "ApiServerAway",
    "no data anywhere": "NoDataAnywhere",
    "configuration refused": "ConfigurationRefused",
    "archive trouble": "ArchiveTrouble",
    "archive gap": "ArchiveGap",
    "archive copy failed": "ArchiveCopyFailed",
}


DECISIONS = {"stop": "Demoted", "kill": "Fenced", "fence": "FencedByUser"}
"""Warnings too, when they are decided: others tell more once they are carried out."""


def publish_note(publication: Publication, what: str, reason: str, *, decided: bool) -> None:
    """What is in no table is for the log only."""
    word = DECISIONS.get(what) if decided else NORMAL.get(what) or WARNINGS.get(what)
    if word is not None:
        publication.publish_event(word, reason, warning=decided or what in WARNINGS)
