"""What a data directory has outside of itself, and what is to be removed there with a copy that never came into place.

A copy has its tablespaces where its source has them. The directory in place, or one that was set aside, may have its own there: only
what is surely the copy's is removed. All functions block on the disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from instance_manager.postgres.files import fsync_directory, read_if_present

log = logging.getLogger("instance_manager.postgres.tablespaces")

UNFINISHED = "instance-manager.restoring"
"""From before the first file until pg_control is there: what lies beside it is ours, and may be removed. Also in each tablespace, of
which it names in the data directory all."""
LINKS = "pg_tblspc"

_OF_POSTGRES = re.compile(r"PG_\d{1,3}_\d{9}")
"""All that a tablespace is; major version and version of the catalogue."""


def places_of(directory: Path) -> frozenset[Path]:
    """Of its tablespaces, as its links tell. OSError."""
    return frozenset(place for link in _links(directory) if (place := link.readlink()).is_absolute())


def _links(directory: Path) -> list[Path]:
    folder = directory / LINKS
    return [each for each in folder.iterdir() if each.is_symlink()] if folder.is_dir() else []


def take_along(aside: Path, suffix: str) -> None:
    """The places of the tablespaces of a directory that was set aside become free too: each is renamed, and an empty one made. One that
    cannot be, such as a mount itself, stays."""
    for link in _links(aside):
        place = link.readlink()
        moved = place.with_name(place.name + suffix)
        if not place.is_absolute() or place.is_symlink() or not place.is_dir() or moved.exists():
            continue
        try:
            place.rename(moved)
        except OSError as error:
            log.warning("the tablespace in %s is left there, and no other can be: %s", place, error)
            continue
        was = moved.stat()
        place.mkdir(mode=0o700)
        os.chown(place, was.st_uid, was.st_gid)
        fsync_directory(place.parent)
        new = link.with_name(f"{link.name}{suffix}")
        new.symlink_to(moved)
        new.replace(link)


def kept_places(aside: Path, suffix: str) -> list[Path]:
    """Those that `take_along` could not free, where there is anything in them."""
    places = [place for place in sorted(places_of(aside)) if not place.name.endswith(suffix)]
    return [place for place in places if place.is_dir() and any(place.iterdir())]


def remove_aside(aside: Path, suffix: str) -> None:
    """A directory that was set aside, with what it took along."""
    for place in places_of(aside):
        # A kill may have come before its link was changed.
        shutil.rmtree(place.with_name(place.name.removesuffix(suffix) + suffix), ignore_errors=True)
    shutil.rmtree(aside)


def unfinished_places(directory: Path) -> list[Path]:
    """Which it was making when it was killed. One that somebody has taken for something else since has no mark of ours."""
    named = read_if_present(directory / UNFINISHED) or b""
    places = [Path(line) for line in named.decode(errors="surrogateescape").splitlines()]
    return [place for place in places if (place / UNFINISHED).exists()]


def empty(roots: Iterable[Path]) -> None:
    """What says whose it is goes last."""
    for root in roots:
        for entry in sorted(root.iterdir(), key=lambda each: each.name == UNFINISHED):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def remove_places(copy: Path, others: Iterable[Path]) -> None:
    """What `copy`, on which nobody works, has in tablespaces, unless one of the directories `others` has its own there. OSError."""
    theirs = {place.resolve() for other in others for place in places_of(other)}
    empty(place for place in unfinished_places(copy) if place.resolve() not in theirs)
    for place in places_of(copy):
        if place.resolve() not in theirs:
            for entry in _of_postgres(place):
                shutil.rmtree(entry)


def _of_postgres(place: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(place) as entries:
        yield from [
            Path(each.path)
            for each in entries
            if _OF_POSTGRES.fullmatch(each.name) and each.is_dir(follow_symlinks=False)
        ]
