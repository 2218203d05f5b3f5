"""S3 that fails: what each failure is called, and that none is ever taken for "absent" or for success."""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import time
from pathlib import Path

import pytest
from certificates import make_certificate
from s3_server import FaultProxy, admin, settings_for

from instance_manager.archive.content import MemoryContent, read_object
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.stores.probe import probe
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.ports import (
    ContentDamaged,
    ObjectExists,
    ObjectStoreError,
    StoreForbidden,
    StoreMissing,
    StoreNotConditional,
    StoreRefused,
    StoreUnreachable,
)

DEADLINE_S = 10.0
NAME = "s/wals/0000000100000000/000000010000000000000001.zst"
CONTENT = os.urandom(100_000)


async def put(store: S3Store, content: bytes = CONTENT, name: str = NAME, deadline_s: float = DEADLINE_S) -> None:
    await store.create(name, MemoryContent.of(content), metadata={"epoch": "1"}, deadline_s=deadline_s)


async def read(store: S3Store, name: str = NAME, deadline_s: float = DEADLINE_S) -> bytes | None:
    return await read_object(store, name, deadline_s=deadline_s)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("403 AccessDenied", StoreForbidden),
        ("403", StoreForbidden),
        ("400 ExpiredToken", StoreForbidden),
        ("404 NoSuchBucket", StoreMissing),
        ("404", StoreRefused),
        ("400 InvalidRequest", StoreRefused),
        ("429 TooManyRequests", StoreUnreachable),
        ("500 InternalError", StoreUnreachable),
        ("503 SlowDown", StoreUnreachable),
        ("503", StoreUnreachable),
        ("409 OperationAborted", StoreUnreachable),
        ("reset", StoreUnreachable),
        ("silent", StoreUnreachable),
    ],
)
async def test_no_failure_is_taken_for_absence_or_success(
    s3: S3Store, proxy: FaultProxy, kind: str, expected: type[ObjectStoreError]
) -> None:
    proxy.fail(kind)

    async def first_entry() -> object:
        return await anext(aiter(s3.entries("s/", deadline_s=3)), None)

    outcomes = await asyncio.gather(
        read(s3, deadline_s=3),
        s3.info(NAME, deadline_s=3),
        put(s3, deadline_s=3),
        first_entry(),
        s3.delete(NAME, deadline_s=3),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [expected] * 5
    proxy.heal()
    assert await read(s3) is None


async def test_a_bucket_that_is_not_there_is_no_empty_archive(proxy: FaultProxy) -> None:
    store = S3Store(settings_for(proxy.url, "no-such-bucket-anywhere"))
    with pytest.raises(StoreMissing, match="create the bucket 'no-such-bucket-anywhere'"):
        await read(store)
    with pytest.raises(StoreMissing):
        await store.info(NAME, deadline_s=DEADLINE_S)
    with pytest.raises(StoreMissing):
        await put(store)


async def test_nobody_listening_is_unreachable_at_once() -> None:
    store = S3Store(settings_for("http://127.0.0.1:9", "bucket"))
    with pytest.raises(StoreUnreachable):
        await read(store)


async def test_redirections_without_an_end_are_refused_with_what_to_mend(s3: S3Store, proxy: FaultProxy) -> None:
    proxy.fail("301 PermanentRedirect")
    with pytest.raises(StoreRefused, match=r"mend archive\.s3\.region or endpoint"):
        await read(s3, deadline_s=60)


async def test_an_error_page_of_a_proxy_in_between_is_no_absence(s3: S3Store, proxy: FaultProxy) -> None:
    await put(s3)
    proxy.fail("404", method="HEAD")
    proxy.fail("404", method="GET")
    with pytest.raises(StoreRefused):
        await s3.info(NAME, deadline_s=DEADLINE_S)


async def test_a_reset_in_the_body_is_no_short_object(s3: S3Store, proxy: FaultProxy) -> None:
    await put(s3)
    proxy.fail("reset_in_the_body", method="GET")
    with pytest.raises(StoreUnreachable):
        await read(s3)


async def test_a_store_that_sends_a_byte_a_second_meets_the_deadline_and_its_thread_ends(
    s3: S3Store, proxy: FaultProxy
) -> None:
    await put(s3)
    proxy.fail("byte_a_second", method="GET")
    started_s = time.monotonic()
    with pytest.raises(StoreUnreachable):
        await read(s3, deadline_s=1.5)
    assert time.monotonic() - started_s < 2.5
    for _ in range(400):
        if s3._threads._in_flight == 0:
            break
        await asyncio.sleep(0.01)
    assert s3._threads._in_flight == 0


async def test_hanging_calls_are_bounded_and_the_store_comes_back(s3: S3Store, proxy: FaultProxy) -> None:
    proxy.fail("silent")
    outcomes = await asyncio.gather(*(read(s3, deadline_s=0.5) for _ in range(30)), return_exceptions=True)
    assert all(isinstance(each, StoreUnreachable) for each in outcomes)
    proxy.heal()
    patience = Patience(total_s=10, attempts_max=30, first_pause_s=0.2, longest_pause_s=0.5)
    assert await patience.call(lambda left_s: read(s3, deadline_s=left_s)) is None


async def test_stored_but_no_answer_is_met_as_existing_by_the_next_try(s3: S3Store, proxy: FaultProxy) -> None:
    for kind in ("stored_but_500", "stored_but_silent"):
        name = f"s/{kind}"
        proxy.fail(kind, method="PUT", times=1)
        attempt = functools.partial(put, s3, CONTENT, name)
        with pytest.raises(ObjectExists):
            await Patience(first_pause_s=0.01).call(attempt)
        assert await read(s3, name) == CONTENT


async def test_a_slow_down_is_retried_with_a_bound(s3: S3Store, proxy: FaultProxy) -> None:
    fault = proxy.fail("503 SlowDown", method="PUT", times=3)
    await Patience(attempts_max=5, first_pause_s=0.01).call(lambda left_s: put(s3, deadline_s=left_s))
    assert fault.met == 3
    endless = proxy.fail("503 SlowDown", method="GET")
    with pytest.raises(StoreUnreachable):
        await Patience(attempts_max=4, first_pause_s=0.01).call(lambda left_s: read(s3, deadline_s=left_s))
    assert endless.met == 4


async def test_a_refusal_is_not_retried(s3: S3Store, proxy: FaultProxy) -> None:
    fault = proxy.fail("403 AccessDenied")
    with pytest.raises(StoreForbidden, match="s3:ListBucket"):
        await Patience(first_pause_s=0.01).call(lambda left_s: read(s3, deadline_s=left_s))
    assert fault.met == 1


async def test_success_with_a_wrong_checksum_is_believed_only_after_reading_back(
    s3: S3Store, proxy: FaultProxy
) -> None:
    proxy.fail("wrong_etag", method="PUT")
    await put(s3)
    assert proxy.requests == ["PUT", "GET"]
    assert await read(s3) == CONTENT


async def test_an_object_damaged_on_its_way_is_never_acknowledged_and_the_next_try_stores_it(
    s3: S3Store, proxy: FaultProxy
) -> None:
    proxy.fail("damaged_on_the_way", method="PUT", times=1)
    with pytest.raises(ContentDamaged):
        await put(s3)
    assert await read(s3) is None
    await put(s3)
    assert await read(s3) == CONTENT


async def test_a_part_damaged_on_its_way_is_never_acknowledged(proxy: FaultProxy, bucket: str) -> None:
    store = S3Store(settings_for(proxy.url, bucket, single_put_max_bytes=1000, part_bytes=5 << 20))
    proxy.fail("damaged_on_the_way", method="PUT", path="partNumber=2", times=1)
    content = os.urandom(11 << 20)
    with pytest.raises(ContentDamaged):
        await put(store, content)
    assert await read(store) is None
    await put(store, content)
    assert await read(store) == content
    with pytest.raises(ObjectExists):
        await put(store, content)


async def test_a_failed_upload_in_parts_leaves_no_parts(proxy: FaultProxy, bucket: str, s3_url: str) -> None:
    store = S3Store(settings_for(proxy.url, bucket, single_put_max_bytes=1000, part_bytes=5 << 20))
    proxy.fail("503 SlowDown", method="PUT", path="partNumber=2")
    with pytest.raises(StoreUnreachable):
        await put(store, os.urandom(11 << 20))
    assert "Uploads" not in admin(s3_url).list_multipart_uploads(Bucket=bucket)


async def test_a_store_that_ignores_the_condition_is_found_out_before_anything_is_written(
    s3: S3Store, proxy: FaultProxy
) -> None:
    proxy.fail("condition_ignored", method="PUT")
    with pytest.raises(StoreNotConditional, match=r"set archive\.s3\.conditional_writes to `emulated`"):
        await probe(s3, "s/probe")
    proxy.heal()
    proxy.fail("501 NotImplemented", method="PUT")
    with pytest.raises(StoreNotConditional):
        await probe(s3, "s/probe")


async def test_emulated_conditions_look_before_they_write(proxy: FaultProxy, bucket: str) -> None:
    store = S3Store(settings_for(proxy.url, bucket, emulate_conditional_writes=True))
    proxy.fail("condition_ignored", method="PUT")
    await probe(store, "s/probe")
    await put(store)
    with pytest.raises(ObjectExists):
        await put(store, b"other")
    assert await read(store) == CONTENT


async def test_the_store_vouches_for_what_it_holds_whole(s3: S3Store, bucket: str, s3_url: str) -> None:
    await put(s3)
    found = await s3.info(NAME, deadline_s=DEADLINE_S)
    assert found is not None
    assert found.vouched
    # Replaced behind our back, with the metadata kept: the digest no longer fits.
    kept = admin(s3_url).head_object(Bucket=bucket, Key=f"pre/fix/{NAME}")["Metadata"]
    admin(s3_url).put_object(Bucket=bucket, Key=f"pre/fix/{NAME}", Body=b"other", Metadata=kept)
    found = await s3.info(NAME, deadline_s=DEADLINE_S)
    assert found is not None
    assert not found.vouched


async def test_encryption_is_asked_of_the_store(proxy: FaultProxy, bucket: str, s3_url: str) -> None:
    for encryption, key_id in (("AES256", None), ("aws:kms", "some-key")):
        store = S3Store(settings_for(proxy.url, bucket, encryption=encryption, kms_key_id=key_id))
        name = f"s/{encryption.replace(':', '-')}"
        await put(store, name=name)
        found = admin(s3_url).head_object(Bucket=bucket, Key=f"pre/fix/{name}")
        assert found["ServerSideEncryption"] == encryption
        assert found.get("SSEKMSKeyId") == key_id


async def test_a_certificate_of_an_own_authority_is_verified(s3_url: str, bucket: str, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with FaultProxy(s3_url).running(context) as proxy:
        trusting = S3Store(settings_for(proxy.url, bucket, ca_file=certificate))
        await put(trusting)
        assert await read(trusting) == CONTENT
        with pytest.raises(StoreUnreachable, match=r"archive\.s3\.ca_file"):
            await read(S3Store(settings_for(proxy.url, bucket)))
