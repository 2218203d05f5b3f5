"""What S3's answers and botocore's exceptions mean: which prove something, which are worth another try."""

from __future__ import annotations

import re

import botocore.exceptions as boto
import urllib3.exceptions

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

ABSENT = "NoSuchKey"
"""The only code that proves that an object is not there. A bare 404 may come from a proxy, or mean the bucket."""

_FORBIDDEN = frozenset(
    {
        "AccessDenied",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
WRONG_DIGEST = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"})
"""How a store refuses what does not fit the digest that came with it."""
_DAMAGED = WRONG_DIGEST | {"IncompleteBody", "XAmzContentSHA256Mismatch"}
_BUSY = frozenset(
    {"ConditionalRequestConflict", "InternalError", "NoSuchUpload", "OperationAborted", "RequestTimeout", "SlowDown"}
    | {"RequestTimeTooSkewed", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests"}
)
_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
)
TRANSPORT = (boto.BotoCoreError, urllib3.exceptions.HTTPError, OSError)
"""Everything by which a request can fail without an answer of the store."""
_LIKE_A_SECRET = re.compile(r"[A-Za-z0-9+/=_%-]{32,}")
_INVALID_HEADER = "Invalid header value"
"""What http.client says, with the header's value behind it."""


def answer_code(error: boto.ClientError) -> str:
    """The code in the answer's body, such as `NoSuchKey`; for an answer without one its HTTP status as text."""
    return str(error.response.get("Error", {}).get("Code", ""))


def answer_status(error: boto.ClientError) -> int:
    """The HTTP status; 0 if the answer had none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def redacted(text: str) -> str:
    """Without what may be a key, a token or a signature: a store may answer with what it was sent, and the text goes to logs and Events."""
    return _LIKE_A_SECRET.sub("...", text)


def from_answer(error: boto.ClientError, what: str, bucket: str, *, conditional: bool = False) -> Exception:
    """The port's exception for an answer other than success. A proven absence (`ABSENT`) is the caller's to see first."""
    code, status = answer_code(error), answer_status(error)
    text = f"{what}: {code or status} {redacted(str(error.response.get('Error', {}).get('Message', '')))}".strip()
    if conditional and (status == 412 or code == "PreconditionFailed"):
        return ObjectExists(what)
    if conditional and (status == 501 or code == "NotImplemented"):
        return StoreNotConditional(f"{text}: the store does not know If-None-Match")
    if code == "NoSuchBucket":
        return StoreMissing(f"{text}: create the bucket {bucket!r}, or mend archive.s3.bucket and endpoint")
    if code in _FORBIDDEN or (status in (401, 403) and code not in _BUSY):
        return StoreForbidden(
            f"{text}: the credentials need s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload on the bucket's "
            "objects, and s3:ListBucket on the bucket, without which S3 does not tell what is absent"
        )
    if code in _DAMAGED:
        return ContentDamaged(text)
    if code in _BUSY or status in (408, 409, 429) or status >= 500:
        return StoreUnreachable(text)
    return StoreRefused(text)


def from_failure(error: Exception, what: str) -> ObjectStoreError:
    """The port's exception for a request that got no whole answer."""
    if isinstance(error, _CREDENTIALS):
        return StoreForbidden(
            f"{what}: {error}: give archive.s3.credentials_file, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a web identity"
        )
    raised = error.kwargs.get("error") if isinstance(error, boto.HTTPClientError) else None
    if isinstance(raised, ContentDamaged):
        return raised  # by the content itself, while it was sent
    said = str(error)
    if _INVALID_HEADER in said:
        # Its text holds the session token, or the access key.
        return StoreForbidden(
            f"{what}: the access key or the session token holds a character that cannot be sent: is there a line break at its end?"
        )
    if isinstance(error, boto.SSLError):
        return StoreUnreachable(f"{what}: {error}: a certificate of an own authority needs archive.s3.ca_file")
    if isinstance(error, boto.ParamValidationError | boto.InvalidEndpointDiscoveryConfigurationError):
        return StoreRefused(f"{what}: {error}")
    return StoreUnreachable(f"{what}: {said or type(error).__name__}")
