"""moto's S3 server over real HTTP, with our proxy before it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from fault_proxy import FaultProxy
from moto.server import ThreadedMotoServer

from instance_manager.archive.stores.s3 import S3Settings

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

REGION = "us-east-1"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Its URL."""
    os.environ.update(CREDENTIALS)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def admin(url: str, ca_file: Path | None = None) -> S3Client:
    """A client past the proxy, to prepare and to look."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        verify=None if ca_file is None else str(ca_file),
        config=Config(s3={"addressing_style": "path"}),
    )


def make_bucket(url: str, ca_file: Path | None = None) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    admin(url, ca_file).create_bucket(Bucket=name)
    return name


def settings_for(endpoint: str, bucket: str, **changes: object) -> S3Settings:
    values: dict[str, object] = {
        "bucket": bucket,
        "prefix": "pre/fix",
        "endpoint": endpoint,
        "region": REGION,
        "path_style": True,
        "connect_timeout_s": 2.0,
        "read_timeout_s": 2.0,
    }
    return S3Settings(**(values | changes))  # type: ignore[arg-type]


__all__ = ["CREDENTIALS", "FaultProxy", "admin", "make_bucket", "s3_server", "settings_for"]
