"""How much waits in pg_wal for the archive, and what that calls for.

| level | when | what the archiver does |
|---|---|---|
| calm | fewer than `behind_files` wait, the oldest for less than `behind_s` | streams the unfinished segment |
| behind | else | no pieces: all requests are for whole segments |
| pressed | behind, and less than a fifth of the volume is free | the same, an alarm |
| critical | behind, and less than `critical_free_bytes` are free | the same, an alarm: hand over or add space |

At no level is a file acknowledged that is not durable in the archive: a full volume stops the writes of this primary, it
never costs one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instance_manager.archive.counters import Backlog

Level = Literal["calm", "behind", "pressed", "critical"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When which level begins."""

    behind_files: int = 32
    behind_s: float = 60.0
    pressed_free_share: float = 0.2
    critical_free_bytes: int = 512 << 20


def level_of(ready: int, oldest_age_s: float, free_bytes: int, volume_bytes: int, thresholds: Thresholds) -> Level:
    """By the table above."""
    if ready < thresholds.behind_files and oldest_age_s < thresholds.behind_s:
        return "calm"
    if free_bytes < thresholds.critical_free_bytes:
        return "critical"
    if free_bytes < volume_bytes * thresholds.pressed_free_share:
        return "pressed"
    return "behind"


class BacklogWatch:
    """Looks at pg_wal/archive_status; one listing for each look, whatever waits."""

    def __init__(self, wal_directory: Path, now_s: Callable[[], float], thresholds: Thresholds) -> None:
        self._wal_directory = wal_directory
        self._now_s = now_s
        self._thresholds = thresholds
        self._oldest = ""
        self._oldest_since_s = 0.0

    def look(self, *, archives: bool) -> Backlog:
        """`archives`: this is a primary. What a former primary left its successor brings; here Postgres asks for none of it any
        more, and would leave it there until the segment is recycled. OSError. Blocks on the disk.
        """
        ready, oldest = self._waiting() if archives else (0, "")
        now_s = self._now_s()
        if oldest != self._oldest:
            self._oldest, self._oldest_since_s = oldest, now_s
        age_s = now_s - self._oldest_since_s if oldest else 0.0
        volume = os.statvfs(self._wal_directory)
        free, whole = volume.f_bavail * volume.f_frsize, volume.f_blocks * volume.f_frsize
        level = level_of(ready, age_s, free, whole, self._thresholds)
        return Backlog(ready, oldest.removesuffix(".ready"), age_s, free, whole, level)

    def _waiting(self) -> tuple[int, str]:
        """How many, and the first of them."""
        ready, oldest = 0, ""
        with os.scandir(self._wal_directory / "archive_status") as entries:
            for entry in entries:
                if entry.name.endswith(".ready"):
                    ready += 1
                    if not oldest or entry.name < oldest:
                        oldest = entry.name
        return ready, oldest
