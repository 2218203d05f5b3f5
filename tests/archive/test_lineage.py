"""Whose archive it is: claimed once, refused to every other, taken over from barman-cloud only if it is ours."""

from __future__ import annotations

import asyncio

import pytest
from wal_builders import SIZE, SYSTEM, segment_content

from instance_manager.archive.codecs import Codec, CodecName
from instance_manager.archive.content import MemoryContent
from instance_manager.archive.layout import Layout
from instance_manager.archive.lineage import ForeignArchive, Lineage, claim_archive, read_lineage
from instance_manager.archive.wal_names import SegmentSize
from instance_manager.ports import ObjectStore

LAYOUT = Layout("orders", Codec("zstd"))
SEGMENT = "000000010000000000000007"


async def claim(
    store: ObjectStore, *, system: int = SYSTEM, uid: str = "uid-1", size: SegmentSize = SIZE, codec: CodecName = "zstd"
) -> Lineage:
    return await claim_archive(
        store, LAYOUT, system_identifier=system, cluster_uid=uid, size=size, codec=codec, deadline_s=10
    )


async def store_segment(store: ObjectStore, content: bytes, codec: str = "zstd") -> None:
    packed = b"".join(Codec(codec).compressed([content], len(content)))
    await store.create(Layout("orders", Codec(codec)).wal(SEGMENT), MemoryContent.of(packed), deadline_s=10)


async def test_an_empty_archive_becomes_ours_and_stays_ours(store: ObjectStore) -> None:
    assert await read_lineage(store, LAYOUT, deadline_s=10) is None
    first = await claim(store)
    assert await claim(store) == first
    assert (first.system_identifier, first.cluster_uid, first.codec) == (str(SYSTEM), "uid-1", "zstd")


async def test_of_two_clusters_that_claim_at_once_one_gets_it(store: ObjectStore) -> None:
    outcomes = await asyncio.gather(
        *(claim(store, system=SYSTEM + number, uid=f"uid-{number}") for number in range(4)), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in outcomes) == ["ForeignArchive"] * 3 + ["Lineage"]


async def test_another_cluster_is_refused_with_what_to_do(store: ObjectStore) -> None:
    await claim(store)
    with pytest.raises(ForeignArchive, match=r"of the system .* another archive\.server_name"):
        await claim(store, system=SYSTEM + 1)
    with pytest.raises(ForeignArchive, match="restored copy"):
        await claim(store, uid="uid-2")
    with pytest.raises(ForeignArchive, match=r"set archive\.codec to that"):
        await claim(store, codec="gzip")
    with pytest.raises(ForeignArchive, match="segments of"):
        await claim(store, size=SegmentSize(16 << 20))


async def test_a_lineage_of_a_later_version_is_not_written_over(store: ObjectStore) -> None:
    await store.create(LAYOUT.lineage, MemoryContent.of(b'{"format": 2, "owner": "?"}'), deadline_s=10)
    with pytest.raises(ForeignArchive, match="later version"):
        await claim(store)


async def test_an_archive_that_another_tool_began_is_taken_over_if_it_is_of_this_system(store: ObjectStore) -> None:
    await store_segment(store, segment_content(SEGMENT))
    assert (await claim(store)).codec == "zstd"


async def test_an_archive_that_another_tool_began_for_another_system_is_refused(store: ObjectStore) -> None:
    await store_segment(store, segment_content(SEGMENT))
    with pytest.raises(ForeignArchive, match="is there already, and it is of the system"):
        await claim(store, system=SYSTEM + 5)
    assert await read_lineage(store, LAYOUT, deadline_s=10) is None


async def test_an_archive_that_another_tool_began_keeps_its_codec(store: ObjectStore) -> None:
    await store_segment(store, segment_content(SEGMENT), codec="gzip")
    with pytest.raises(ForeignArchive, match=r"set archive\.codec to gzip"):
        await claim(store)
    assert (await claim(store, codec="gzip")).codec == "gzip"
