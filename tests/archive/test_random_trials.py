"""Kills, a failing store and failovers at random moments: what is acknowledged is there, once, and recovery reaches it.

`ARCHIVE_TRIALS=1000` for more; a failing seed is in the test's name, and `ARCHIVE_FIRST_SEED` begins elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from trial_world import World

TRIALS = int(os.environ.get("ARCHIVE_TRIALS", "24"))
FIRST_SEED = int(os.environ.get("ARCHIVE_FIRST_SEED", "1"))
STEPS = 60


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + TRIALS))
async def test_nothing_acknowledged_is_lost_or_overwritten(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path, seed)
    try:
        for _ in range(STEPS):
            await world.step()
        await world.settle()
        await world.check_nothing_acknowledged_is_missing_or_other()
        await world.check_recovery_reaches_all_that_is_durable()
    finally:
        await world.close()
