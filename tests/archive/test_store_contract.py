"""What every object store must do: the same tests for a directory and for S3 over real HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from instance_manager.archive.content import FileContent, MemoryContent, read_object, sha256_of
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.stores.probe import probe
from instance_manager.ports import ContentDamaged, ObjectExists, ObjectInfo, ObjectStore

DEADLINE_S = 15.0


async def put(store: ObjectStore, name: str, content: bytes, **metadata: str) -> None:
    await store.create(name, MemoryContent.of(content), metadata=metadata, deadline_s=DEADLINE_S)


async def names(store: ObjectStore, prefix: str, *, after: str = "", shallow: bool = False) -> list[str]:
    return [entry.name async for entry in store.entries(prefix, after=after, shallow=shallow, deadline_s=DEADLINE_S)]


async def test_what_was_created_is_read_back(store: ObjectStore) -> None:
    for content in (b"", b"x", os.urandom(300_000)):
        name = f"s/wals/{len(content)}.zst"
        await put(store, name, content)
        assert await read_object(store, name, deadline_s=DEADLINE_S) == content


async def test_size_and_metadata_are_known_without_the_content(store: ObjectStore) -> None:
    await put(store, "s/a", b"four", sha256="ab" * 32, epoch="7")
    found = await store.info("s/a", deadline_s=DEADLINE_S)
    assert found is not None
    assert (found.name, found.size_bytes) == ("s/a", 4)
    assert (found.metadata["sha256"], found.metadata["epoch"]) == ("ab" * 32, "7")


async def test_an_object_that_is_not_there_is_told_as_absent(store: ObjectStore) -> None:
    await put(store, "s/a/b", b"1")
    for name in ("s/a/c", "s/x/y/z", "s/a"):
        assert await read_object(store, name, deadline_s=DEADLINE_S) is None
        assert await store.info(name, deadline_s=DEADLINE_S) is None


async def test_a_second_create_changes_nothing(store: ObjectStore) -> None:
    await put(store, "s/a", b"first", epoch="1")
    with pytest.raises(ObjectExists):
        await put(store, "s/a", b"second", epoch="2")
    assert await read_object(store, "s/a", deadline_s=DEADLINE_S) == b"first"
    found = await store.info("s/a", deadline_s=DEADLINE_S)
    assert found is not None
    assert found.metadata["epoch"] == "1"


async def test_of_many_that_create_one_name_at_once_exactly_one_wins(store: ObjectStore) -> None:
    contents = [bytes([number]) * 10_000 for number in range(8)]
    outcomes = await asyncio.gather(*(put(store, "s/race", each) for each in contents), return_exceptions=True)
    winners = [content for content, outcome in zip(contents, outcomes, strict=True) if outcome is None]
    assert len(winners) == 1
    assert all(isinstance(outcome, ObjectExists) for outcome in outcomes if outcome is not None)
    assert await read_object(store, "s/race", deadline_s=DEADLINE_S) == winners[0]


class UnknownSize:
    """Content of which only its chunks are known, as a base backup's."""

    def __init__(self, chunk: bytes, count: int) -> None:
        self._chunk, self._count = chunk, count
        self.size_bytes = None

    def chunks(self) -> Iterator[bytes]:
        for _ in range(self._count):
            yield self._chunk


async def test_a_stream_of_unknown_length_is_stored_whole_and_only_once(store: ObjectStore) -> None:
    content = UnknownSize(os.urandom(1 << 20), 19)
    await store.create("s/large", content, metadata={"epoch": "3"}, deadline_s=30)
    found = await store.receive("s/large", lambda info, chunks: (info, sha256_of(chunks)), deadline_s=30)
    assert found is not None
    assert (found[0].size_bytes, found[0].metadata["epoch"]) == (19 << 20, "3")
    assert found[1] == sha256_of(content.chunks())
    with pytest.raises(ObjectExists):
        await store.create("s/large", UnknownSize(b"other", 1), deadline_s=30)


async def test_a_file_is_sent_from_its_place(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "segment"
    path.write_bytes(os.urandom(3 << 20))
    await store.create("s/file", FileContent(path, 3 << 20), deadline_s=DEADLINE_S)
    read = await read_object(store, "s/file", deadline_s=DEADLINE_S)
    assert read is not None
    assert hashlib.sha256(read).digest() == hashlib.sha256(path.read_bytes()).digest()


async def test_a_range_is_read_without_the_rest(store: ObjectStore) -> None:
    await put(store, "s/range", bytes(range(200)))

    async def part(first: int, behind: int) -> bytes | None:
        return await store.receive(
            "s/range", lambda _, chunks: b"".join(chunks), byte_range=(first, behind), deadline_s=DEADLINE_S
        )

    assert await part(10, 20) == bytes(range(10, 20))
    assert await part(190, 500) == bytes(range(190, 200))

    def size(info: ObjectInfo, chunks: Iterator[bytes]) -> int:
        list(chunks)
        return info.size_bytes

    assert await store.receive("s/range", size, byte_range=(0, 1), deadline_s=DEADLINE_S) == 200


async def test_entries_are_in_order_and_may_begin_behind_a_name(store: ObjectStore) -> None:
    made = ["s/a.b", "s/a/1", "s/a/2", "s/a0", "s/b/1/x", "t/1"]
    for name in made:
        await put(store, name, name.encode())
    assert await names(store, "s/") == sorted(each for each in made if each.startswith("s/"))
    assert await names(store, "s/a") == ["s/a.b", "s/a/1", "s/a/2", "s/a0"]
    assert await names(store, "s/", after="s/a/1") == ["s/a/2", "s/a0", "s/b/1/x"]
    assert await names(store, "none/") == []
    assert await names(store, "") == sorted(made)


async def test_shallow_entries_show_folders_once(store: ObjectStore) -> None:
    for name in ("s/1/a", "s/1/b", "s/2/c", "s/x"):
        await put(store, name, b"")
    assert await names(store, "s/", shallow=True) == ["s/1/", "s/2/", "s/x"]
    assert await names(store, "s/", after="s/1/", shallow=True) == ["s/2/", "s/x"]


async def test_more_entries_than_a_page_holds_all_come(store: ObjectStore) -> None:
    made = [f"s/{number:04}" for number in range(25)]
    for start in range(0, len(made), 8):
        await asyncio.gather(*(put(store, name, b"") for name in made[start : start + 8]))
    assert await names(store, "s/") == made


async def test_delete_is_done_when_it_returns_also_for_what_was_not_there(store: ObjectStore) -> None:
    await put(store, "s/a", b"1", epoch="1")
    await store.delete("s/a", deadline_s=DEADLINE_S)
    await store.delete("s/a", deadline_s=DEADLINE_S)
    assert await read_object(store, "s/a", deadline_s=DEADLINE_S) is None
    await put(store, "s/a", b"2")
    found = await store.info("s/a", deadline_s=DEADLINE_S)
    assert found is not None
    assert "epoch" not in found.metadata


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", "a/../b", ".hidden", "a/", "a\nb", "a" * 1000])
async def test_a_name_that_could_leave_its_place_is_refused(store: ObjectStore, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        await put(store, name, b"")


async def test_an_object_longer_than_the_caller_can_take_is_refused(store: ObjectStore) -> None:
    await put(store, "s/a", b"12345")
    with pytest.raises(ContentDamaged):
        await read_object(store, "s/a", limit_bytes=4, deadline_s=DEADLINE_S)


async def test_a_content_that_ends_before_its_size_is_not_stored(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"123")
    with pytest.raises(ContentDamaged):
        await store.create("s/short", FileContent(path, 10), deadline_s=DEADLINE_S)
    assert await store.info("s/short", deadline_s=DEADLINE_S) is None


async def test_the_probe_is_content_and_leaves_nothing(store: ObjectStore) -> None:
    await probe(store, "s/probe")
    assert await names(store, "") == []


class Waiting:
    """Content whose reading takes until the test says."""

    def __init__(self, over: threading.Event) -> None:
        self._over = over

    @property
    def size_bytes(self) -> None:
        return None

    def chunks(self) -> Iterator[bytes]:
        self._over.wait(30)
        yield b"x"


async def test_while_as_much_is_sent_as_may_be_configured_small_calls_are_answered(
    directory_store: DirectoryStore,
) -> None:
    """archive.parallel 12, archive.backup.parallel 8: the archiver and its backups share a store."""
    over = threading.Event()
    sending = [
        asyncio.create_task(directory_store.create(f"orders/{number}", Waiting(over), deadline_s=30))
        for number in range(20)
    ]
    try:
        await asyncio.sleep(0)
        assert await directory_store.info("orders/other", deadline_s=10) is None
    finally:
        over.set()
    await asyncio.gather(*sending)
