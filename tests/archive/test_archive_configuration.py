"""The section `archive`: what is accepted, that each mistake says what mends it, and how the process takes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from instance_manager.archive.__main__ import settings_of
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.stores.s3 import S3Store
from instance_manager.archive.where import make_store
from instance_manager.config import ConfigurationError, load_configuration

REPOSITORY = Path(__file__).parent.parent.parent


def written(directory: Path, archive: dict[str, Any] | None) -> Path:
    content: dict[str, Any] = {
        "cluster": {"name": "orders", "uid": "0123456789abcdef"},
        "instance": {"name": "orders-1", "directory": "/var/tmp/i1", "run_as": "nobody"},
        "members": [{"name": "orders-1", "host": "127.0.0.1", "postgres_port": 6001, "http_port": 7001}],
        "coordination": {"local": {"directory": "/var/tmp/store", "locks_directory": "/var/tmp/locks"}},
        "secrets": {
            key: f"/var/tmp/{key}"
            for key in ("peer_token", "replication_password", "application_password", "monitoring_password")
        },
    }
    if archive is not None:
        content["archive"] = archive
    path = directory / "orders-1.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_directory_with_the_defaults_of_the_design(tmp_path: Path) -> None:
    configuration = load_configuration(written(tmp_path, {"directory": "/srv/archive"}))
    assert configuration.archive is not None
    assert isinstance(make_store(configuration.archive), DirectoryStore)
    settings = settings_of(configuration, configuration.archive, None)
    assert (settings.server_name, settings.codec, settings.stream_interval_s) == ("orders", "zstd", 1.0)
    assert settings.wal_directory == Path("/var/tmp/i1/data/pg_wal")
    assert settings.socket == Path("/var/tmp/i1/archive.sock")


def test_s3_with_everything(tmp_path: Path) -> None:
    section = {
        "s3": {
            "bucket": "backups",
            "prefix": "team/orders",
            "endpoint": "https://minio:9000",
            "path_style": True,
            "credentials_file": "/etc/credentials",
            "ca_file": "/etc/ca.pem",
            "server_side_encryption": "aws:kms",
            "kms_key_id": "key",
            "conditional_writes": "emulated",
        },
        "server_name": "orders-2025",
        "codec": "gzip",
        "level": 6,
    }
    archive = load_configuration(written(tmp_path, section)).archive
    assert archive is not None
    store = make_store(archive)
    assert isinstance(store, S3Store)
    assert store._settings.emulate_conditional_writes
    assert store._settings.credentials_file == Path("/etc/credentials")


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({}, "either directory or s3"),
        ({"directory": "/a", "s3": {"bucket": "b"}}, "either directory or s3"),
        ({"directory": "a"}, "must be an absolute path"),
        ({"directory": "/a", "codec": "bzip2"}, r"\$\.archive\.codec"),
        ({"directory": "/a", "codec": "none", "level": 1}, "no level of none"),
        ({"directory": "/a", "level": 20}, r"no level of zstd \(1 to 19\)"),
        ({"directory": "/a", "parallel": 0}, r"\$\.archive\.parallel"),
        ({"directory": "/a", "server_name": "../x"}, r"archive\.server_name"),
        ({"directory": "/a", "bucket": "b"}, "unknown field `bucket`"),
        ({"s3": {"bucket": "b", "kms_key_id": "k"}}, "needs server_side_encryption"),
        ({"s3": {"bucket": "b", "prefix": "/a/"}}, r"archive\.s3\.prefix"),
    ],
)
def test_each_mistake_says_where_it_is_and_what_mends_it(tmp_path: Path, section: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        load_configuration(written(tmp_path, section))


@pytest.mark.parametrize(("section", "told"), [(None, "no section `archive`"), ({}, "either directory or s3")])
def test_the_process_refuses_to_start_without_an_archive(
    tmp_path: Path, section: dict[str, Any] | None, told: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "instance_manager.archive", "--config", str(written(tmp_path, section))],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert told in done.stderr
