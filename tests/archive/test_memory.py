"""What is in memory while something is sent does not grow with its size."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from archive_harness import Desk
from archiving_server import all_archived, archiving, archiving_primary
from harness import Cluster
from wal_builders import SIZE, make_ready, segment_content

from instance_manager.archive.layout import Piece
from instance_manager.archive.stores.s3 import S3Settings, S3Store
from instance_manager.archive.stores.s3_body import parts_of

PART_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Filled at the end: the most that Python held at once, beyond what it had before."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


class Swallowing:
    """An S3 client that takes parts and keeps nothing of them."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []

    def create_multipart_upload(self, **_: Any) -> dict[str, str]:
        return {"UploadId": "1"}

    def upload_part(self, *, Body: Any, **_: Any) -> dict[str, str]:
        digest = hashlib.md5(usedforsecurity=False)
        while piece := Body.read(16 << 10):
            digest.update(piece)
        self.digests.append(digest.digest())
        return {"ETag": f'"{digest.hexdigest()}"'}

    def complete_multipart_upload(self, **_: Any) -> dict[str, str]:
        whole = hashlib.md5(b"".join(self.digests), usedforsecurity=False).hexdigest()
        return {"ETag": f'"{whole}-{len(self.digests)}"'}

    def close(self) -> None:
        return


class Large:
    """Made as it is read."""

    size_bytes = None

    def chunks(self) -> Iterator[bytes]:
        for _ in range(41):
            yield os.urandom(CHUNK_BYTES)


async def test_of_an_upload_in_parts_one_part_is_in_memory_and_once() -> None:
    store, client = S3Store(S3Settings(bucket="b", part_bytes=PART_BYTES)), Swallowing()
    store._client = client  # type: ignore[assignment]
    with peak_bytes() as peak:
        await store.create("s/large", Large(), deadline_s=60)
    assert len(client.digests) == 11
    # A chunk that is being made, what goes on the wire of it, and the interpreter's own.
    assert PART_BYTES < peak[0] < PART_BYTES + 2 * CHUNK_BYTES


def test_parts_are_what_was_given_cut_at_their_size() -> None:
    for lengths in ((), (10,), (3, 3, 4), (25,), (1, 24, 7), (10, 10), (4, 0, 30)):
        chunks = [os.urandom(length) for length in lengths]
        parts = [b"".join(part.chunks()) for part in parts_of(chunks, 10)]
        assert b"".join(parts) == b"".join(chunks)
        assert all(len(part) == 10 for part in parts[:-1])
        assert len(parts) == max(1, -(-sum(lengths) // 10))


async def test_of_a_piece_of_the_unfinished_segment_only_the_compressed_form_is_in_memory(
    local_desk: Desk,
) -> None:
    name = SIZE.next_name("000000010000000000000001")
    content = segment_content(name)
    make_ready(local_desk.wal, name, content)
    path = local_desk.wal / name
    piece = Piece(100, 32 << 20)
    with path.open("r+b") as file:
        file.truncate(piece.end)
    streamer = local_desk.archiver.streamer
    with peak_bytes() as peak:
        prepared = streamer._prepared(name, piece)
    assert prepared.sha256 == hashlib.sha256(path.read_bytes()[piece.start :]).hexdigest()
    assert prepared.file_bytes == piece.end - piece.start
    assert peak[0] < 4 << 20


def heaps_of_threads(pid: int) -> int:
    """glibc reserves 64 MiB for each, of which the part that is not used yet cannot be read."""
    found = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, access, _, _, file = line.split()[:5]
        begin, end = (int(each, 16) for each in place.split("-"))
        found += access == "---p" and file == "0" and 32 << 20 < end - begin <= 64 << 20
    return found


async def test_the_archivers_threads_have_one_heap(cluster: Cluster, directory_section: dict[str, Any]) -> None:
    """What is freed in one of their own would stay there: a backup beside archiving had 268 MiB instead of 94."""
    server = cluster.add("p")
    with archiving(server, directory_section) as made:
        await archiving_primary(cluster, made)
        await all_archived(server)
        assert made.process is not None
        assert heaps_of_threads(made.process.pid) == 0
        server.kill()
