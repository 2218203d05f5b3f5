"""A process that increments the record's counter by conditional writes; run by test_local_coordination.py."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from instance_manager.coordination.local import LocalCoordination
from instance_manager.ports import Conflict


async def increment(directory: Path, wins_wanted: int) -> None:
    store = LocalCoordination(directory, directory)
    wins = 0
    while wins_wanted < 0 or wins < wins_wanted:
        stored = await store.read(deadline_s=10)
        assert stored is not None
        record = replace(stored.record, renewals=stored.record.renewals + 1)
        try:
            written = await store.replace(record, version=stored.version, deadline_s=10)
        except Conflict:
            continue
        wins += 1
        print(stored.version, written.version, flush=True)


if __name__ == "__main__":
    asyncio.run(increment(Path(sys.argv[1]), int(sys.argv[2])))
