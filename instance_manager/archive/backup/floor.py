"""Between an expiry and a backup that begins at the same time: one of both sees the other, however long either is paused.

<server>/instance-manager/floor/<16 hex digits>-<8 random ones>     the log before this segment's number may be gone

| who | first | then |
|---|---|---|
| expiry | creates a floor | looks at the backups, begun ones too; deletes below the floor only what none of them needs |
| backup | marks its id as begun, begins | looks at the floors; it fails if it begins below one |

If the backup does not see the floor, the floor was created after that look, so the expiry sees its mark. No clock has a part in it.
A floor stays, for what begins later; the next one replaces it.
"""

from __future__ import annotations

import re
import secrets

from instance_manager.archive.content import MemoryContent
from instance_manager.archive.layout import Layout
from instance_manager.codec import to_json
from instance_manager.ports import ObjectStore
from instance_manager.wall_clock import timestamp

_FLOOR = re.compile(r"([0-9A-F]{16})-[0-9a-f]{8}")


class LogExpired(Exception):
    """The log that a backup would need may be deleted already, or any moment."""


def floors(layout: Layout) -> str:
    """The folder."""
    return f"{layout.server}/instance-manager/floor/"


async def raise_floor(store: ObjectStore, layout: Layout, number: int, *, deadline_s: float) -> str:
    """From its return on no backup that begins below segment `number` becomes whole; the object's name."""
    name = f"{floors(layout)}{number:016X}-{secrets.token_hex(4)}"
    await store.create(name, MemoryContent.of(to_json({"at": timestamp()})), deadline_s=deadline_s)
    return name


async def take_floor_back(store: ObjectStore, floor: str, *, deadline_s: float) -> None:
    """Only where nothing was deleted under it."""
    await store.delete(floor, deadline_s=deadline_s)


async def replace_floors(store: ObjectStore, layout: Layout, floor: str, *, deadline_s: float) -> None:
    """Those that `floor`, which stays, says as well."""
    own = _number(layout, floor)
    found = [entry.name async for entry in store.entries(floors(layout), deadline_s=deadline_s)]
    for name in found:
        number = _number(layout, name)
        # One of the same height may be relied upon by another, who would miss it: it stays.
        if own is not None and number is not None and number < own:
            await store.delete(name, deadline_s=deadline_s)


async def require_above_floor(store: ObjectStore, layout: Layout, number: int, *, deadline_s: float) -> None:
    """LogExpired. Only after the mark of the backup that begins in segment `number` is in the store."""
    async for entry in store.entries(floors(layout), deadline_s=deadline_s):
        floor = _number(layout, entry.name)
        if floor is not None and number < floor:
            raise LogExpired(
                f"it begins in segment {number}, and the log before segment {floor} has expired: this server's last checkpoint is older "
                "than the oldest backup that is kept. Take it later, or from the primary"
            )


def _number(layout: Layout, name: str) -> int | None:
    match = _FLOOR.fullmatch(name.removeprefix(floors(layout)))
    return None if match is None else int(match[1], 16)
