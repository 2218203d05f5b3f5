"""Which archive a cluster was recovered from: a file of its data directory, that every copy of it has too.

A configuration says what somebody wrote into it; an archive of the same system may be another cluster's, whose log looks alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from instance_manager.codec import from_json, to_json

ORIGIN_FILE = "instance-manager.origin.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """Of the source."""

    server_name: str
    cluster_uid: str
    """Of the archive's lineage; empty: it had none, as barman-cloud leaves it."""


def render_origin(origin: Origin) -> bytes:
    return to_json(origin)


def parse_origin(content: bytes | str | None) -> Origin | None:
    """None: there is none, or none that this version can read."""
    if content is None:
        return None
    try:
        return from_json(content, Origin)
    except msgspec.MsgspecError:
        return None
