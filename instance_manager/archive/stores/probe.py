"""Does the store keep its word? One round before anything of value is written to it."""

from __future__ import annotations

import secrets

from instance_manager.archive.content import MemoryContent, read_object
from instance_manager.ports import ContentDamaged, ObjectExists, ObjectStore, StoreNotConditional, StoreRefused

PROBE_DEADLINE_S = 20.0


async def probe(store: ObjectStore, folder: str, *, deadline_s: float = PROBE_DEADLINE_S) -> None:
    """Create an object below `folder`, read it, see a second create of it refused, delete it, see it absent.

    StoreNotConditional, StoreRefused or ContentDamaged say what is wrong and what to do; other ObjectStoreErrors as met.
    """
    name = f"{folder}/{secrets.token_hex(8)}"
    first, second = secrets.token_bytes(64), secrets.token_bytes(64)
    await store.create(name, MemoryContent.of(first), deadline_s=deadline_s)
    try:
        try:
            await store.create(name, MemoryContent.of(second), deadline_s=deadline_s)
        except ObjectExists:
            pass
        else:
            raise StoreNotConditional(
                "the store ignores If-None-Match: two primaries could overwrite one another's WAL. Use a store that has "
                "conditional writes, or set archive.s3.conditional_writes to `emulated` (a look before each write, which "
                "is not safe against two writers at the same time)"
            )
        if await read_object(store, name, deadline_s=deadline_s) != first:
            raise ContentDamaged("the store gave back something else than was stored: do not use it")
    finally:
        await store.delete(name, deadline_s=deadline_s)
    if await read_object(store, name, deadline_s=deadline_s) is not None:
        raise StoreRefused(
            "a deleted object is still there: is the bucket versioned behind a cache, or deletes withheld?"
        )
    await store.learn(folder, deadline_s=deadline_s)
