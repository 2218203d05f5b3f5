"""By which digest S3 proves what it holds: SHA-256 where the store was seen to refuse a wrong one, else MD5."""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from certificates import make_certificate
from s3_server import FaultProxy, admin, settings_for

from instance_manager.archive.content import FileContent, MemoryContent, read_object
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.ports import ContentDamaged, ObjectExists

CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DEADLINE_S = 10.0


@pytest.fixture
def tls(s3_url: str, tmp_path: Path) -> Iterator[tuple[FaultProxy, Path]]:
    certificate, key = make_certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with FaultProxy(s3_url).running(context) as proxy:
        yield proxy, certificate


@pytest.fixture
def proxy(tls: tuple[FaultProxy, Path]) -> FaultProxy:
    """Before moto, which repeats the SHA-256 that it is sent and does not check it."""
    return tls[0]


@pytest.fixture
async def store(tls: tuple[FaultProxy, Path], bucket: str) -> AsyncIterator[S3Store]:
    made = S3Store(settings_for(tls[0].url, bucket, ca_file=tls[1]))
    yield made
    await made.close()


async def put(store: S3Store, name: str = "a/1", sha256: str | None = SHA256) -> None:
    await store.create(name, MemoryContent((CONTENT[:100], CONTENT[100:]), sha256), deadline_s=DEADLINE_S)


async def learned(store: S3Store, proxy: FaultProxy) -> bool:
    """And nothing is left of it."""
    await store.learn("probe", deadline_s=DEADLINE_S)
    proxy.heal()
    assert [each.name async for each in store.entries("", deadline_s=DEADLINE_S)] == []
    proxy.requests.clear()
    return store._checks_sha256


async def test_where_a_wrong_sha256_is_refused_the_right_one_is_proof_whatever_the_etag(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.fail("sha256_checked", method="PUT")
    assert await learned(store, proxy)
    proxy.fail("sha256_checked", method="PUT")
    await put(store)
    assert proxy.requests == ["PUT"]
    assert await read_object(store, "a/1", deadline_s=DEADLINE_S) == CONTENT
    with pytest.raises(ObjectExists):
        await put(store)
    await put(store, "a/2", sha256=None)
    assert proxy.requests[-2:] == ["PUT", "GET"], "without a digest that is known it is read back, as ever"


async def test_what_is_damaged_on_its_way_is_refused_by_the_store_and_the_next_try_stores_it(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.fail("sha256_checked", method="PUT")
    assert await learned(store, proxy)
    proxy.fail("damaged_before_sha256_is_checked", method="PUT", times=1)
    with pytest.raises(ContentDamaged):
        await put(store)
    assert await read_object(store, "a/1", deadline_s=DEADLINE_S) is None
    await put(store)
    assert await read_object(store, "a/1", deadline_s=DEADLINE_S) == CONTENT


async def test_a_content_that_ends_while_it_is_sent_is_damaged_and_not_stored(store: S3Store, tmp_path: Path) -> None:
    """Within TLS nothing reads it before."""
    path = tmp_path / "short"
    path.write_bytes(CONTENT)
    with pytest.raises(ContentDamaged, match="ended after 300000 of 300001 bytes"):
        await store.create("a/1", FileContent(path, len(CONTENT) + 1), deadline_s=DEADLINE_S)
    assert await read_object(store, "a/1", deadline_s=DEADLINE_S) is None


async def test_an_answer_with_another_sha256_is_believed_only_after_reading_back(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.fail("sha256_checked", method="PUT")
    assert await learned(store, proxy)
    proxy.fail("another_sha256_told", method="PUT")
    await put(store)
    assert proxy.requests == ["PUT", "GET"]


async def test_a_store_that_repeats_what_it_was_sent_proves_nothing_by_it(store: S3Store, proxy: FaultProxy) -> None:
    assert not await learned(store, proxy)
    proxy.fail("damaged_on_the_way", method="PUT", times=1)
    with pytest.raises(ContentDamaged):
        await put(store)
    await put(store)
    assert await read_object(store, "a/1", deadline_s=DEADLINE_S) == CONTENT


@pytest.mark.parametrize("kind", ["400 InvalidRequest", "501 NotImplemented", "503 SlowDown", "reset"])
async def test_a_store_that_cannot_be_asked_is_sent_md5(store: S3Store, proxy: FaultProxy, kind: str) -> None:
    proxy.fail(kind, method="PUT")
    assert not await learned(store, proxy)
    await put(store)
    assert proxy.requests == ["PUT"]


async def test_where_conditions_are_emulated_a_store_that_repeats_proves_nothing_either(
    tls: tuple[FaultProxy, Path], bucket: str
) -> None:
    """Nothing would refuse the right one behind the wrong one."""
    store = S3Store(settings_for(tls[0].url, bucket, ca_file=tls[1], emulate_conditional_writes=True))
    assert not await learned(store, tls[0])
    await store.close()


async def test_the_store_vouches_by_its_sha256(store: S3Store, proxy: FaultProxy, bucket: str, s3_url: str) -> None:
    proxy.fail("sha256_checked", method="PUT")
    assert await learned(store, proxy)
    await put(store)
    found = await store.info("a/1", deadline_s=DEADLINE_S)
    assert found is not None
    assert (found.vouched, found.metadata["stored-sha256"]) == (True, SHA256)
    # Replaced behind our back, with the metadata kept.
    other = hashlib.sha256(b"other").hexdigest()
    key = "pre/fix/a/1"
    admin(s3_url).put_object(
        Bucket=bucket, Key=key, Body=b"other", Metadata={"stored-sha256": SHA256}, ChecksumAlgorithm="SHA256"
    )
    found = await store.info("a/1", deadline_s=DEADLINE_S)
    assert found is not None
    assert not found.vouched
    admin(s3_url).put_object(
        Bucket=bucket, Key=key, Body=b"other", Metadata={"stored-sha256": other}, ChecksumAlgorithm="SHA256"
    )
    found = await store.info("a/1", deadline_s=DEADLINE_S)
    assert found is not None
    assert found.vouched, "and that is what it looks at"
