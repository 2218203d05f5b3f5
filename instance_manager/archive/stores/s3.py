"""S3 as an object store: boto3, one try per call, in threads.

Every object is created with `If-None-Match: *`. What the store has is compared with what was sent: by its SHA-256 where that is known
and the store was seen to refuse a wrong one, by the ETag where that is a plain MD5, else by reading back. Only the code NoSuchKey in the body of an answer proves that an object is absent.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar, cast

from botocore.exceptions import ClientError

from instance_manager.archive.content import MemoryContent
from instance_manager.archive.stores import CALLS_IN_FLIGHT_MAX, CALLS_KEPT_MAX
from instance_manager.archive.stores.names import check_name, check_prefix
from instance_manager.archive.stores.s3_body import Body, Part, parts_of
from instance_manager.archive.stores.s3_errors import (
    ABSENT,
    TRANSPORT,
    WRONG_DIGEST,
    answer_code,
    from_answer,
    from_failure,
)
from instance_manager.ports import (
    Content,
    ContentDamaged,
    ObjectExists,
    ObjectInfo,
    ObjectStoreError,
    StoreForbidden,
    StoreRefused,
    StoreUnreachable,
)
from instance_manager.threads import Threads, TooManyCalls, monotonic_s

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, ListObjectsV2OutputTypeDef

log = logging.getLogger("instance_manager.archive.s3")
T = TypeVar("T")

Encryption = Literal["AES256", "aws:kms"]
SINGLE_PUT_MAX_BYTES = 32 << 20
PART_BYTES = 8 << 20
RENEWAL_INTERVAL_S = 10.0
_READ_BYTES = 256 << 10
_DIGEST_KEY = "stored-md5"
_SHA256_KEY = "stored-sha256"
_SHA256_CHARACTERS = 44
"""In base64. Longer ones are of something else: of parts, and not of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """Where and how. What is None is left to the environment, as every tool of AWS does."""

    bucket: str
    prefix: str = ""
    """Before every name; without `/` at its ends."""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    credentials_file: Path | None = None
    profile: str | None = None
    ca_file: Path | None = None
    encryption: Encryption | None = None
    kms_key_id: str | None = None
    emulate_conditional_writes: bool = False
    """For a store that ignores `If-None-Match`: look first. Not safe against two writers at the same time."""
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 10.0
    part_bytes: int = PART_BYTES
    single_put_max_bytes: int = SINGLE_PUT_MAX_BYTES
    connections_max: int = 16
    page_entries: int = 1000

    @property
    def uses_tls(self) -> bool:
        return self.endpoint is None or self.endpoint.startswith("https:")


class S3Store:
    """Objects of one bucket below one prefix. Credentials are looked up at the first call, and again after a refusal."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._base = f"{check_name(settings.prefix)}/" if settings.prefix else ""
        self._threads = Threads(f"S3 {settings.bucket}", in_flight_max=CALLS_IN_FLIGHT_MAX, kept_max=CALLS_KEPT_MAX)
        self._client: S3Client | None = None
        self._next_renewal_s = 0.0
        self._client_mutex = threading.Lock()
        self._checks_sha256 = False
        """The store refuses content that does not fit the SHA-256 that came with it, and tells that of what it holds."""

    async def learn(self, folder: str, *, deadline_s: float) -> None:
        end_s = monotonic_s() + deadline_s
        name = f"{check_name(folder)}/{secrets.token_hex(8)}"
        try:
            self._checks_sha256 = await self._call(lambda: self._refuses_wrong_sha256(name, end_s), name, deadline_s)
        except ObjectStoreError as error:
            log.info("whether the store checks SHA-256 is not known, so MD5 is sent: %s", error)

    async def create(
        self, name: str, content: Content, *, metadata: Mapping[str, str] | None = None, deadline_s: float
    ) -> None:
        end_s = monotonic_s() + deadline_s
        await self._call(lambda: self._create(check_name(name), content, dict(metadata or {}), end_s), name, deadline_s)

    async def receive(
        self,
        name: str,
        receiver: Callable[[ObjectInfo, Iterator[bytes]], T],
        *,
        byte_range: tuple[int, int] | None = None,
        deadline_s: float,
    ) -> T | None:
        end_s = monotonic_s() + deadline_s
        return await self._call(lambda: self._receive(check_name(name), receiver, byte_range, end_s), name, deadline_s)

    async def info(self, name: str, *, deadline_s: float) -> ObjectInfo | None:
        return await self._call(lambda: self._info(check_name(name)), name, deadline_s)

    async def entries(
        self, prefix: str, *, after: str = "", shallow: bool = False, deadline_s: float
    ) -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        token: str | None = None
        while True:
            request: dict[str, Any] = {
                "Bucket": self._settings.bucket,
                "Prefix": self._base + prefix,
                "MaxKeys": self._settings.page_entries,
            }
            if token is not None:
                request["ContinuationToken"] = token
            elif after:
                request["StartAfter"] = self._base + after
            if shallow:
                request["Delimiter"] = "/"
            page = await self._call(partial(self._list, request), prefix, deadline_s)
            found = [(each["Key"], each["Size"]) for each in page.get("Contents", ())]
            found += [(each["Prefix"], 0) for each in page.get("CommonPrefixes", ())]
            for key, size in sorted(found):
                # A store may list what "StartAfter" names as a folder once more.
                if (key_name := key.removeprefix(self._base)) > after:
                    yield ObjectInfo(key_name, size, {})
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or token is None:
                return

    async def delete(self, name: str, *, deadline_s: float) -> None:
        await self._call(lambda: self._s3.delete_object(**self._place(check_name(name))), name, deadline_s)

    async def close(self) -> None:
        with self._client_mutex:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    async def _call(self, function: Callable[[], T], what: str, deadline_s: float) -> T:
        def translated() -> T:
            try:
                return function()
            except ClientError as error:
                raise self._refreshing(from_answer(error, what, self._settings.bucket)) from error
            except TimeoutError:
                raise StoreUnreachable(f"{what}: not done in time") from None
            except RecursionError:
                # botocore follows a redirection to another region, and that one's, for ever.
                raise StoreRefused(f"{what}: redirected in a circle: mend archive.s3.region or endpoint") from None
            except TRANSPORT as error:
                raise self._refreshing(from_failure(error, what)) from error

        try:
            return await self._threads.call(translated, deadline_s=deadline_s)
        except TimeoutError:
            raise StoreUnreachable(f"{what}: no end within {deadline_s:g} s") from None
        except TooManyCalls as error:
            raise StoreUnreachable(f"{what}: {error}") from error

    def _refreshing(self, error: Exception) -> Exception:
        if isinstance(error, StoreForbidden):
            with self._client_mutex:
                if monotonic_s() >= self._next_renewal_s:
                    self._next_renewal_s = monotonic_s() + RENEWAL_INTERVAL_S
                    self._client = None  # a mounted secret may have been renewed
        return error

    @property
    def _s3(self) -> S3Client:
        with self._client_mutex:
            if self._client is None:
                self._client = make_client(self._settings)
            return self._client

    def _list(self, request: dict[str, Any]) -> ListObjectsV2OutputTypeDef:
        return self._s3.list_objects_v2(**request)

    def _place(self, name: str) -> Any:
        return {"Bucket": self._settings.bucket, "Key": self._base + name}

    def _create(self, name: str, content: Content, metadata: dict[str, str], end_s: float) -> None:
        if self._settings.emulate_conditional_writes and self._info(name) is not None:
            raise ObjectExists(name)
        try:
            size = content.size_bytes
            if size is not None and size <= self._settings.single_put_max_bytes:
                self._put(name, content, size, metadata, end_s)
            else:
                self._upload_in_parts(name, content, metadata, end_s)
        except ClientError as error:
            raise self._refreshing(from_answer(error, name, self._settings.bucket, conditional=True)) from error

    def _put(self, name: str, content: Content, size: int, metadata: dict[str, str], end_s: float) -> None:
        if self._checks_sha256 and isinstance(content, MemoryContent) and content.sha256 is not None:
            self._put_by_sha256(name, content, bytes.fromhex(content.sha256), metadata, end_s)
            return
        md5 = _md5()
        for chunk in content.chunks():
            md5.update(chunk)
        answer = self._s3.put_object(
            **self._place(name),
            **self._how(metadata | {_DIGEST_KEY: md5.hexdigest()}),
            **self._condition,
            Body=_as_file(Body(content, size, end_s)),
            ContentLength=size,
            ContentMD5=base64.b64encode(md5.digest()).decode(),
        )
        if _plain(answer.get("ETag")) != md5.hexdigest():
            self._confirm_by_reading(name, size, _md5(), md5.hexdigest(), end_s)

    def _put_by_sha256(
        self, name: str, content: MemoryContent, sha256: bytes, metadata: dict[str, str], end_s: float
    ) -> None:
        """Half the work of MD5, and none is left to do where the digest is known; also where the ETag is none, as with a key of KMS."""
        digest = base64.b64encode(sha256).decode()
        answer = self._s3.put_object(
            **self._place(name),
            **self._how(metadata | {_SHA256_KEY: sha256.hex()}),
            **self._condition,
            Body=_as_file(Body(content, content.size_bytes, end_s)),
            ContentLength=content.size_bytes,
            ChecksumAlgorithm="SHA256",
            ChecksumSHA256=digest,
        )
        if answer.get("ChecksumSHA256") != digest:
            self._confirm_by_reading(name, content.size_bytes, hashlib.sha256(), sha256.hex(), end_s)

    def _refuses_wrong_sha256(self, name: str, end_s: float) -> bool:
        """Only what refuses a wrong one proves anything by telling the right one: a store may repeat what it was sent."""
        content = MemoryContent.of(secrets.token_bytes(64))
        right = hashlib.sha256(content.pieces[0]).digest()
        try:
            self._put_by_sha256(name, content, hashlib.sha256(right).digest(), {}, end_s)
        except ClientError as error:
            is_refused = answer_code(error) in WRONG_DIGEST
        except ContentDamaged:
            is_refused = False
        else:
            is_refused = False
        try:
            if not is_refused:
                return False
            self._put_by_sha256(name, content, right, {}, end_s)
            found = self._info(name, checksum=True)
        finally:
            self._s3.delete_object(**self._place(name))
        return found is not None and found.vouched

    def _upload_in_parts(self, name: str, content: Content, metadata: dict[str, str], end_s: float) -> None:
        s3 = self._s3
        upload_id = s3.create_multipart_upload(**self._place(name), **self._how(metadata))["UploadId"]
        whole, size = _md5(), 0
        tags: list[CompletedPartTypeDef] = []
        digests = []
        try:
            for part in parts_of(content.chunks(), self._settings.part_bytes):
                part.add_to(whole)
                size += part.size_bytes
                digests.append(part.md5)
                number = len(digests)
                tags.append({"PartNumber": number, "ETag": self._upload_part(name, upload_id, number, part, end_s)})
                del part  # else it is there until the next one is complete
            answer = s3.complete_multipart_upload(
                **self._place(name), **self._condition, UploadId=upload_id, MultipartUpload={"Parts": tags}
            )
        except BaseException:
            self._abort(name, upload_id)
            raise
        md5_of_parts = hashlib.md5(b"".join(digests), usedforsecurity=False)
        if _plain(answer.get("ETag")) != f"{md5_of_parts.hexdigest()}-{len(digests)}":
            self._confirm_by_reading(name, size, _md5(), whole.hexdigest(), end_s)

    def _upload_part(self, name: str, upload_id: str, number: int, part: Part, end_s: float) -> str:
        answer = self._s3.upload_part(
            **self._place(name),
            UploadId=upload_id,
            PartNumber=number,
            Body=_as_file(Body(part, part.size_bytes, end_s)),
            ContentLength=part.size_bytes,
            ContentMD5=base64.b64encode(part.md5).decode(),
        )
        tag = _plain(answer.get("ETag"))
        if self._settings.encryption != "aws:kms" and tag != part.md5.hex():
            raise ContentDamaged(f"{name}: part {number} was stored with the digest {tag}, not {part.md5.hex()}")
        return answer["ETag"]

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            self._s3.abort_multipart_upload(**self._place(name), UploadId=upload_id)
        except (ClientError, *TRANSPORT) as error:
            # It costs space only; a lifecycle rule of the bucket removes it.
            log.warning("%s: the parts of a failed upload are left behind: %s", name, error)

    def _confirm_by_reading(self, name: str, size: int, read: hashlib._Hash, digest_hex: str, end_s: float) -> None:
        """The store's own digest proves nothing, or contradicts. What this very request created and is wrong is removed."""

        def digest(info: ObjectInfo, chunks: Iterator[bytes]) -> tuple[int, str]:
            length = 0
            for chunk in chunks:
                read.update(chunk)
                length += len(chunk)
            return length, read.hexdigest()

        found = self._receive(name, digest, None, end_s)
        if found == (size, digest_hex):
            return
        removed = ""
        if found is not None and not self._settings.emulate_conditional_writes:
            self._s3.delete_object(**self._place(name))
            removed = "; it was removed"
        raise ContentDamaged(f"{name}: the store said success, but holds something else than was sent{removed}")

    def _receive(
        self,
        name: str,
        receiver: Callable[[ObjectInfo, Iterator[bytes]], T],
        byte_range: tuple[int, int] | None,
        end_s: float,
    ) -> T | None:
        place = self._place(name)
        if byte_range is not None:
            place["Range"] = f"bytes={byte_range[0]}-{byte_range[1] - 1}"
        try:
            answer = self._s3.get_object(**place)
        except ClientError as error:
            if answer_code(error) == ABSENT:
                return None
            raise
        length = answer["ContentLength"]
        size = int(answer["ContentRange"].rpartition("/")[2]) if byte_range is not None else length
        # botocore has no public way to read what has come without waiting for more.
        raw: Any = answer["Body"]._raw_stream  # type: ignore[attr-defined]
        try:
            return receiver(_info_of(name, size, answer), _chunks(raw, name, length, end_s))
        finally:
            # Read to its end the connection has gone back already; anything else must not be used again.
            raw.close()

    def _info(self, name: str, *, checksum: bool = False) -> ObjectInfo | None:
        mode: Any = {"ChecksumMode": "ENABLED"} if checksum or self._checks_sha256 else {}
        try:
            answer = self._s3.head_object(**self._place(name), **mode)
        except ClientError:
            log.debug("%s: HEAD was refused", name)
        else:
            return _info_of(name, answer["ContentLength"], answer)
        # An answer to HEAD has no body: its 404 may mean the bucket or a proxy, its 400 the credentials. GET says which.
        return self._receive(name, lambda info, _: info, None, monotonic_s() + self._settings.read_timeout_s)

    @property
    def _condition(self) -> Any:
        return {} if self._settings.emulate_conditional_writes else {"IfNoneMatch": "*"}

    def _how(self, metadata: dict[str, str]) -> Any:
        request: dict[str, Any] = {"Metadata": metadata}
        if self._settings.encryption is not None:
            request["ServerSideEncryption"] = self._settings.encryption
        if self._settings.kms_key_id is not None:
            request["SSEKMSKeyId"] = self._settings.kms_key_id
        return request


def make_client(settings: S3Settings) -> S3Client:
    """A client with one try per call. Its import takes half a second: not before it is needed."""
    import boto3
    import botocore.session
    from botocore.config import Config

    session = botocore.session.get_session()
    if settings.credentials_file is not None:
        session.set_config_variable("credentials_file", str(settings.credentials_file))
    if settings.profile is not None:
        session.set_config_variable("profile", settings.profile)
    return boto3.Session(botocore_session=session, region_name=settings.region).client(
        "s3",
        endpoint_url=settings.endpoint,
        verify=None if settings.ca_file is None else str(settings.ca_file),
        config=Config(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            retries={"total_max_attempts": 1},
            max_pool_connections=settings.connections_max,
            s3={
                "addressing_style": "path" if settings.path_style else "auto",
                # Within TLS the digest that is sent along is enough: none of the content for the signature.
                "payload_signing_enabled": not settings.uses_tls,
            },
            # Checksums in trailers are unknown to many stores: ours are Content-MD5 and the ETag.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


def _as_file(body: Body) -> IO[bytes]:
    return cast("IO[bytes]", body)


def _plain(etag: str | None) -> str:
    return (etag or "").strip('"').lower()


def _info_of(name: str, size: int, answer: Any) -> ObjectInfo:
    metadata = {key.lower(): value for key, value in answer.get("Metadata", {}).items()}
    md5, sha256 = metadata.pop(_DIGEST_KEY, None), metadata.get(_SHA256_KEY)
    told = answer.get("ChecksumSHA256")
    by_md5 = md5 is not None and md5 == _plain(answer.get("ETag"))
    by_sha256 = told is not None and len(told) == _SHA256_CHARACTERS and base64.b64decode(told).hex() == sha256
    return ObjectInfo(name, size, metadata, vouched=by_md5 or by_sha256)


def _chunks(raw: Any, name: str, length: int, end_s: float) -> Iterator[bytes]:
    # read1 gives what has come: a store that sends a byte a second meets the deadline, not only the socket's timeout.
    while length > 0:
        if monotonic_s() > end_s:
            raise TimeoutError
        chunk = raw.read1(min(_READ_BYTES, length))
        if not chunk:
            raise StoreUnreachable(f"{name}: the answer broke off, {length} bytes before its end")
        length -= len(chunk)
        yield chunk
