"""The configuration file, watched: what the kubelet puts in its place is taken over, and an error keeps what was good."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from instance_manager.agent.context import Journal
from instance_manager.config import ConfigurationError
from instance_manager.ports import Clock
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.threads import Threads, TooManyCalls

log = logging.getLogger("instance_manager.agent.configuration")

LOOK_EVERY_S = 10.0
"""The kubelet itself looks once a minute or so."""
LOOK_DEADLINE_S = 1.0

Signature = tuple[int, int, int, int]


def signature(path: Path) -> Signature | None:
    """Of what the path leads to: the kubelet replaces the folder `..data` behind the file's symbolic link. None: nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


async def keep_reading(
    path: Path, seen: Signature | None, reload: Callable[[], Awaitable[str]], journal: Journal, clock: Clock
) -> None:
    """Reload whenever the file is another than `seen`, the one that was read; for ever."""
    threads = Threads("configuration")
    while True:
        await clock.sleep(LOOK_EVERY_S)
        now = None
        with contextlib.suppress(TimeoutError, TooManyCalls):
            now = await threads.call(lambda: signature(path), deadline_s=LOOK_DEADLINE_S)
        if now is None or now == seen:
            continue
        try:
            journal.note("configuration", await reload())
        except ConfigurationError as error:
            journal.note("configuration refused", f"the last good one stays: {error}")
        except (LocalPostgresError, OSError, TimeoutError) as error:
            log.warning("the configuration is read again: it could not be taken over: %s", error)
            continue
        seen = now
