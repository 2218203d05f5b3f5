"""Where credentials come from: a file, renewed under our feet; the environment; a web identity. Never another's."""

from __future__ import annotations

from pathlib import Path

import pytest
from s3_server import FaultProxy, settings_for

from instance_manager.archive.content import MemoryContent, read_object
from instance_manager.archive.stores.s3 import S3Store, make_client
from instance_manager.ports import StoreForbidden

DEADLINE_S = 10.0
PLANTED = "planted0123456789abcdefghijklmnopqrstuvwxyz"


def write_credentials(path: Path, key: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret-of-{key}\n")


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    return monkeypatch


async def test_none_at_all_is_told_with_what_to_give(
    bare_environment: pytest.MonkeyPatch, proxy: FaultProxy, bucket: str
) -> None:
    with pytest.raises(StoreForbidden, match=r"archive\.s3\.credentials_file"):
        await read_object(S3Store(settings_for(proxy.url, bucket)), "s/a", deadline_s=DEADLINE_S)


async def test_a_file_is_used_and_read_again_after_a_refusal(
    bare_environment: pytest.MonkeyPatch, proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    path = tmp_path / "credentials"
    write_credentials(path, "OLD")
    store = S3Store(settings_for(proxy.url, bucket, credentials_file=path))
    await store.create("s/a", MemoryContent.of(b"1"), deadline_s=DEADLINE_S)
    write_credentials(path, "NEW")
    proxy.fail("403 InvalidAccessKeyId", times=1)
    with pytest.raises(StoreForbidden):
        await read_object(store, "s/a", deadline_s=DEADLINE_S)
    assert await read_object(store, "s/a", deadline_s=DEADLINE_S) == b"1"
    credentials = store._s3._get_credentials()  # type: ignore[attr-defined]
    assert credentials.access_key == "NEW"


async def test_the_environment_is_used(bare_environment: pytest.MonkeyPatch, proxy: FaultProxy, bucket: str) -> None:
    bare_environment.setenv("AWS_ACCESS_KEY_ID", "FROM-ENVIRONMENT")
    bare_environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = make_client(settings_for(proxy.url, bucket))
    assert client._get_credentials().access_key == "FROM-ENVIRONMENT"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"])
async def test_a_line_break_at_the_end_of_a_secret_is_told_without_the_secret(
    bare_environment: pytest.MonkeyPatch, proxy: FaultProxy, bucket: str, name: str
) -> None:
    """The HTTP client puts the whole header into its error, and that went to the log, the status and an Event."""
    for each in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        bare_environment.setenv(each, f"{PLANTED}{each}")
    bare_environment.setenv(name, f"{PLANTED}{name}\n")
    with pytest.raises(StoreForbidden, match="line break at its end") as refused:
        await read_object(S3Store(settings_for(proxy.url, bucket)), "s/a", deadline_s=DEADLINE_S)
    assert PLANTED not in str(refused.value)


async def test_a_store_that_tells_what_it_was_sent_is_quoted_without_keys_tokens_and_signatures(
    bare_environment: pytest.MonkeyPatch, proxy: FaultProxy, bucket: str
) -> None:
    for each in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        bare_environment.setenv(each, f"{PLANTED}{each}")
    proxy.fail("403 AccessDenied-Echo")
    with pytest.raises(StoreForbidden) as refused:
        await read_object(S3Store(settings_for(proxy.url, bucket)), "s/a", deadline_s=DEADLINE_S)
    assert "AccessDenied-Echo" in str(refused.value)
    assert "AWS4-HMAC" in str(refused.value), "the rest is told"
    assert PLANTED not in str(refused.value)


async def test_a_web_identity_is_exchanged_for_credentials(
    bare_environment: pytest.MonkeyPatch, proxy: FaultProxy, bucket: str, s3_url: str, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("eyJhbGciOiJub25lIn0.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6bnM6cG9kIn0.c2ln")
    bare_environment.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    bare_environment.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/archive")
    bare_environment.setenv("AWS_ENDPOINT_URL_STS", s3_url)
    bare_environment.setenv("AWS_REGION", "us-east-1")
    store = S3Store(settings_for(proxy.url, bucket))
    await store.create("s/a", MemoryContent.of(b"1"), deadline_s=DEADLINE_S)
    assert await read_object(store, "s/a", deadline_s=DEADLINE_S) == b"1"
    assert store._s3._get_credentials().token  # type: ignore[attr-defined]
