"""What the agent asks of the process that makes a standby's directory from an archive. Without the stores: the agent needs none of them."""

from __future__ import annotations

from dataclasses import dataclass

from instance_manager.archive.recovery.origin import Origin
from instance_manager.core.types import Lsn, TimelineChain

NOT_FROM_ARCHIVE = 3
"""The exit code where nothing was begun, because the primary is the better source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRequest:
    """What the agent knows of its cluster, and no archive does."""

    system_identifier: str
    cluster_uid: str
    major: int
    """Of the programs here."""
    chain: TimelineChain
    position: Lsn | None = None
    """How far the primary had written when the Lease was last renewed."""
    primary_conninfo: str
    """For what an archive does not hold yet; names a file with the password."""
    history: str = ""
    """Of the chain's first timeline, as the primary has it: what was before the cluster; empty: nothing was."""
    origin: Origin | None = None
    keeps_fork: bool = False
    """Has the primary still the segment in which the chain's first timeline begins?"""
    tablespaces: tuple[tuple[int, str], ...] = ()
    """Each with its oid, and where the primary has it."""
