"""Where a standby's tablespaces go: where its primary has them, as in a copy of it. What cannot be used there is told before anything is read.

Those that are younger than the backup the log makes, in places that have to be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from instance_manager.archive.backup.info import BackupInfo
from instance_manager.archive.recovery.replica_request import ReplicaRequest
from instance_manager.archive.recovery.restore import RestoreFailed
from instance_manager.postgres.directory import places_kept_by_others
from instance_manager.postgres.server import LocalServer


def places_for(info: BackupInfo, request: ReplicaRequest, given: Mapping[str, Path]) -> dict[str, Path]:
    """Of the backup's tablespaces, by name. One that the primary has no more goes where `given` or the backup says, until the log drops it."""
    now = {oid: Path(place) for oid, place in request.tablespaces}
    return {each.name: now.get(each.oid, given.get(each.name, Path(each.location))) for each in info.tablespaces}


def younger_places(info: BackupInfo, request: ReplicaRequest) -> dict[str, Path]:
    """Of the primary's tablespaces of which the backup has nothing, by a name for people."""
    old = {each.oid for each in info.tablespaces}
    return {f"with oid {oid}": Path(place) for oid, place in request.tablespaces if oid not in old}


def make_places(places: Mapping[str, Path], server: LocalServer) -> None:
    """Empty, and Postgres's user's. RestoreFailed: one cannot be used. `server`: with the data directory in its own place. Blocks; OSError."""
    for aside, kept in places_kept_by_others(server).items():
        # The log may make and drop again what is none of the primary's now, over the files of another.
        where = ", ".join(str(place) for place in kept)
        raise RestoreFailed(f"{aside} was set aside, and its tablespaces are still in {where}: move both away")
    taken = {"the data directory": server.data_directory}
    for name, place in places.items():
        if (problem := _cannot_be(place, taken) or _cannot_make(place, server)) is not None:
            raise RestoreFailed(f"the tablespace {name} cannot be in {place}: {problem}")
        taken[f"the tablespace {name}"] = place


def _cannot_be(place: Path, taken: Mapping[str, Path]) -> str | None:
    if not place.is_absolute() or ".." in place.parts:
        return "that is no full path"
    for what, other in taken.items():
        if place.is_relative_to(other) or other.is_relative_to(place):
            return f"{what} is in {other}"
    return None


def _cannot_make(place: Path, server: LocalServer) -> str | None:
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(place.iterdir()):
            return "it is not empty"
        place.chmod(0o700)
        if server.run_as is not None:
            os.chown(place, server.run_as.uid, server.run_as.gid)
    except OSError as error:
        return error.strerror or str(error)
    return None
