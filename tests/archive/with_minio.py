"""What a real server shows and a simulated one cannot: it checks signatures, permissions and digests, and is killed at any moment.

Not collected by itself, since MinIO has to be built: `make test-minio`, which runs the tests of every store over it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import boto3
import pytest
from archive_harness import until
from archiving_server import all_archived, archiving, insert, prepared, run
from backup_harness import LAYOUT, objects, store_of, take
from harness import Cluster, wait_until
from minio_server import KMS_KEY, Minio
from recovery_harness import Restoration
from s3_server import REGION, admin, settings_for

from instance_manager.archive.backup.catalogue import list_backups
from instance_manager.archive.backup.verify import verify_backup
from instance_manager.archive.content import MemoryContent, read_object
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.stores.probe import probe
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.ports import (
    ContentDamaged,
    ObjectExists,
    StoreForbidden,
    StoreMissing,
    StoreUnreachable,
)

pytestmark = pytest.mark.timeout(240)

DEADLINE_S = 20.0
CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DAMAGED = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
NAME = "orders/wals/0000000100000000/000000010000000000000001.zst"
PARTS = os.urandom(11 << 20)
"""Three parts."""


async def put(store: S3Store, content: bytes = CONTENT, *, name: str = NAME, sha256: str | None = None) -> None:
    await store.create(name, MemoryContent((content,), sha256), metadata={"epoch": "1"}, deadline_s=DEADLINE_S)


async def read(store: S3Store, name: str = NAME) -> bytes | None:
    return await read_object(store, name, deadline_s=DEADLINE_S)


@contextlib.asynccontextmanager
async def store_with(minio: Minio, bucket: str, **changes: object) -> AsyncIterator[S3Store]:
    made = S3Store(settings_for(minio.url, bucket, ca_file=minio.certificate, read_timeout_s=10.0, **changes))
    yield made
    await made.close()


async def each_call(store: S3Store) -> list[object]:
    """What reading, looking, creating, listing and deleting come to."""

    async def first_entry() -> object:
        return await anext(aiter(store.entries("orders/", deadline_s=DEADLINE_S)), None)

    return list(
        await asyncio.gather(
            read(store),
            store.info(NAME, deadline_s=DEADLINE_S),
            put(store),
            first_entry(),
            store.delete(NAME, deadline_s=DEADLINE_S),
            return_exceptions=True,
        )
    )


async def test_what_is_not_its_sha256_is_refused_and_the_next_try_stores_it(minio_store: S3Store) -> None:
    await probe(minio_store, "s/probe")
    assert minio_store._checks_sha256, "it refused a wrong one"
    with pytest.raises(ContentDamaged):
        await put(minio_store, DAMAGED, sha256=SHA256)
    assert await read(minio_store) is None
    await put(minio_store, sha256=SHA256)
    found = await minio_store.info(NAME, deadline_s=DEADLINE_S)
    assert found is not None
    assert (found.vouched, found.metadata["stored-sha256"]) == (True, SHA256)
    with pytest.raises(ObjectExists):
        await put(minio_store, sha256=SHA256)


class Changing:
    """Content that is another when it is sent than when its digest was computed, as if damaged on its way."""

    size_bytes = len(CONTENT)

    def __init__(self) -> None:
        self._readings = iter((CONTENT, DAMAGED))

    def chunks(self) -> Iterator[bytes]:
        return iter((next(self._readings),))


async def test_what_is_not_its_md5_is_refused(minio_store: S3Store) -> None:
    with pytest.raises(ContentDamaged, match="BadDigest"):
        await minio_store.create(NAME, Changing(), deadline_s=DEADLINE_S)
    assert await read(minio_store) is None


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
async def test_wrong_credentials_are_told_and_taken_for_nothing_else(
    minio: Minio, minio_bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "another")
    async with store_with(minio, minio_bucket) as store:
        assert [type(outcome) for outcome in await each_call(store)] == [StoreForbidden] * 5


async def test_a_bucket_that_is_not_there_is_no_empty_archive(minio: Minio) -> None:
    async with store_with(minio, "no-such-bucket-anywhere") as store:
        assert [type(outcome) for outcome in await each_call(store)] == [StoreMissing] * 5
        with pytest.raises(StoreMissing, match="create the bucket 'no-such-bucket-anywhere'"):
            await probe(store, "s/probe")


def login_limited_to(minio: Minio, monkeypatch: pytest.MonkeyPatch, bucket: str, *actions: str) -> None:
    """With a session token, as a web identity has one."""
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    policy = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": list(actions), "Resource": resources}],
    }
    sts = boto3.client("sts", endpoint_url=minio.url, region_name=REGION, verify=str(minio.certificate))
    given = sts.assume_role(
        RoleArn="arn:aws:iam::123456789012:role/archive", RoleSessionName="archive", Policy=json.dumps(policy)
    )["Credentials"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", given["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", given["SecretAccessKey"])
    monkeypatch.setenv("AWS_SESSION_TOKEN", given["SessionToken"])


OBJECT_ACTIONS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")


async def test_the_permissions_that_are_asked_for_are_enough(
    minio: Minio, minio_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    login_limited_to(minio, monkeypatch, minio_bucket, "s3:ListBucket", *OBJECT_ACTIONS)
    async with store_with(minio, minio_bucket, single_put_max_bytes=1000, part_bytes=5 << 20) as store:
        await probe(store, "s/probe")
        await put(store, PARTS)
        with pytest.raises(ObjectExists):  # which aborts the upload
            await put(store, PARTS)
        assert await read(store) == PARTS
        assert [each.name async for each in store.entries("orders/", deadline_s=DEADLINE_S)] == [NAME]
        await store.delete(NAME, deadline_s=DEADLINE_S)
        assert await read(store) is None


async def test_what_may_not_be_listed_is_forbidden_and_not_empty(
    minio: Minio, minio_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    login_limited_to(minio, monkeypatch, minio_bucket, *OBJECT_ACTIONS)
    async with store_with(minio, minio_bucket) as store:
        with pytest.raises(StoreForbidden, match="s3:ListBucket"):
            await anext(aiter(store.entries("orders/", deadline_s=DEADLINE_S)), None)


@pytest.mark.parametrize(("encryption", "key_id"), [("AES256", None), ("aws:kms", KMS_KEY)])
async def test_what_is_encrypted_by_the_server_is_confirmed_and_created_once(
    minio: Minio, minio_bucket: str, encryption: str, key_id: str | None
) -> None:
    async with store_with(
        minio, minio_bucket, encryption=encryption, kms_key_id=key_id, single_put_max_bytes=1 << 20, part_bytes=5 << 20
    ) as store:
        await probe(store, "s/probe")
        for name, content, sha256 in (("s/sha", CONTENT, SHA256), ("s/md5", CONTENT, None), ("s/parts", PARTS, None)):
            await put(store, content, name=name, sha256=sha256)
            told = admin(minio.url, minio.certificate).head_object(Bucket=minio_bucket, Key=f"pre/fix/{name}")
            assert told["ServerSideEncryption"] == encryption
            assert await read(store, name) == content
            with pytest.raises(ObjectExists):
                await put(store, b"other", name=name)
            assert await read(store, name) == content


async def test_uploads_in_parts_that_lose_leave_no_parts(minio: Minio, minio_bucket: str) -> None:
    async with store_with(minio, minio_bucket, single_put_max_bytes=1000, part_bytes=5 << 20) as store:
        contents = [bytes([number]) * (6 << 20) for number in range(3)]
        outcomes = await asyncio.gather(*(put(store, each) for each in contents), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes if outcome is not None] == [ObjectExists] * 2
        assert await read(store) == contents[outcomes.index(None)]
    left = admin(minio.url, minio.certificate).list_multipart_uploads(Bucket=minio_bucket, Prefix=f"pre/fix/{NAME}")
    assert "Uploads" not in left


async def test_a_bucket_with_versions_behaves_as_one_without(
    minio: Minio, minio_bucket: str, minio_store: S3Store
) -> None:
    keep_versions(minio, minio_bucket)
    await probe(minio_store, "s/probe")
    await put(minio_store)
    with pytest.raises(ObjectExists):
        await put(minio_store, b"other")
    assert written_more_than_once(minio, minio_bucket, "wals") == set()
    await minio_store.delete(NAME, deadline_s=DEADLINE_S)
    assert await read(minio_store) is None
    assert [each.name async for each in minio_store.entries("", deadline_s=DEADLINE_S)] == []
    await put(minio_store, b"again")
    assert await read(minio_store) == b"again"
    assert written_more_than_once(minio, minio_bucket, "wals") == {f"pre/fix/{NAME}"}


class Telling:
    """Content in chunks of a MiB that tells when so many of them have been asked for, over all its readings."""

    def __init__(self, content: bytes, told_at: int) -> None:
        self._content, self._left = content, told_at
        self.size_bytes = len(content)
        self.is_reached = threading.Event()

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.size_bytes, 1 << 20):
            self._left -= 1
            if self._left == 0:
                self.is_reached.set()
            yield self._content[start : start + (1 << 20)]


@pytest.mark.parametrize(
    ("single_put_max_bytes", "told_at"),
    [(1000, 17), (1 << 30, 40 + 17)],  # for its digest a whole content is read once before
    ids=["in parts", "whole"],
)
async def test_of_an_upload_in_which_the_server_is_killed_there_is_all_after_the_next_try(
    minio: Minio, minio_bucket: str, single_put_max_bytes: int, told_at: int
) -> None:
    content = Telling(os.urandom(40 << 20), told_at)
    patience = Patience(total_s=60, attempts_max=100, first_pause_s=0.05, longest_pause_s=0.2)
    async with store_with(minio, minio_bucket, single_put_max_bytes=single_put_max_bytes, part_bytes=5 << 20) as store:
        retries: list[None] = []
        putting = asyncio.create_task(
            patience.call(
                lambda left_s: store.create(NAME, content, deadline_s=left_s), on_retry=lambda: retries.append(None)
            )
        )
        assert await asyncio.to_thread(content.is_reached.wait, 30)
        minio.kill()
        with pytest.raises(StoreUnreachable):
            await read(store)
        minio.start()
        with contextlib.suppress(ObjectExists):  # where the answer was lost, and not the object
            await putting
        assert retries, "it was in the middle of the upload"
        assert await read(store) == content._content
        with pytest.raises(ObjectExists):
            await put(store)


# --- with Postgres ---


def keep_versions(minio: Minio, bucket: str) -> None:
    """From now on nothing is overwritten or deleted unseen."""
    client = admin(minio.url, minio.certificate)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})


def written_more_than_once(minio: Minio, bucket: str, *folders: str) -> set[str]:
    """Keys of which there are several versions, or which were deleted."""
    pages = admin(minio.url, minio.certificate).get_paginator("list_object_versions")
    seen: set[str] = set()
    more: set[str] = set()
    for folder in folders:
        for page in pages.paginate(Bucket=bucket, Prefix=f"pre/fix/orders/{folder}/"):
            for each in (*page.get("Versions", ()), *page.get("DeleteMarkers", ())):
                (more if each["Key"] in seen else seen).add(each["Key"])
    assert seen
    return more


async def verified(minio: Minio, bucket: str) -> str:
    """What `archive verify` says, which must be content."""
    place = ["--bucket", bucket, "--prefix", "pre/fix", "--endpoint", minio.url, "--region", REGION, "--path-style"]
    command = [sys.executable, "-m", "instance_manager", "archive", "verify", *place, "--server", "orders"]
    done = await run([*command, "--ca-file", str(minio.certificate)])
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


async def test_a_server_killed_again_and_again_loses_and_overwrites_nothing_and_recovery_reaches_its_target(
    cluster: Cluster, minio: Minio, minio_bucket: str, minio_section: dict[str, Any]
) -> None:
    keep_versions(minio, minio_bucket)
    chance = random.Random(7)
    server, store = cluster.add("p"), store_of(minio_section)
    with archiving(server, minio_section) as made:
        await prepared(cluster, made)
        await take(made, store)
        count = 0
        for _ in range(5):
            archived = made.status()["push"]["archived"]
            for _ in range(4):
                await insert(server, count, 3000)
                count += 3000
            # Each time somewhere else in the uploads.
            await until(lambda: made.status()["push"]["archived"] > archived + chance.randrange(3), deadline_s=60)  # noqa: B023
            minio.kill()
            await insert(server, count, 3000)
            count += 3000
            minio.start()
        await server.fetchval("SELECT pg_create_restore_point('all')")
        await insert(server, count, 1000)
        await all_archived(server, deadline_s=120)
        assert made.status()["push"]["conflicts"] == 0
        server.kill()
    assert "are there and right\n" in await verified(minio, minio_bucket)
    assert written_more_than_once(minio, minio_bucket, "wals", "base") == set()
    restoration = Restoration(cluster.add("r"), store)
    await restoration.run(name="all")
    assert await restoration.numbers() == set(range(count))


async def test_a_base_backup_outlasts_a_server_that_is_killed(
    cluster: Cluster, minio: Minio, minio_section: dict[str, Any]
) -> None:
    server, store = cluster.add("p"), store_of(minio_section)
    patience = Patience(total_s=120, attempts_max=200, first_pause_s=0.1, longest_pause_s=0.5)
    with archiving(server, minio_section) as made:
        await prepared(cluster, made)
        await insert(server, 0, 100_000)
        taking = asyncio.create_task(take(made, store, rate_limit_bytes_per_s=16 << 20, patience=patience))
        await wait_until(lambda: objects(store, "orders/instance-manager/backups/"), deadline_s=60, what="it has begun")
        minio.kill()
        minio.start()
        await taking
        await all_archived(server)
        server.kill()
    (listed,) = await list_backups(store, LAYOUT, deadline_s=DEADLINE_S)
    assert listed.state == "done"
    verdict = await verify_backup(store, LAYOUT, listed)
    assert verdict.is_good, verdict
    restoration = Restoration(cluster.add("r"), store)
    await restoration.run()
    assert await restoration.numbers() == set(range(100_000))
