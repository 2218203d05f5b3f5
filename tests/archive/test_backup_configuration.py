"""The sections `archive.backup` and `bootstrap.recovery`: defaults, errors with their mend, and what they mean."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from instance_manager.archive.backup.configured import schedule_of, tender_settings
from instance_manager.archive.backup.retention import Policy
from instance_manager.config import ConfigurationError, load_configuration
from instance_manager.config_sections import BackupSection


def write(directory: Path, **sections: Any) -> Path:
    path = directory / "instance.yaml"
    names = ("peer_token", "replication_password", "application_password", "monitoring_password")
    content = {
        "cluster": {"name": "orders", "uid": "0123456789abcdef"},
        "instance": {"name": "orders-1", "directory": "/srv/orders"},
        "members": [{"name": "orders-1", "host": "127.0.0.1", "postgres_port": 5432, "http_port": 8008}],
        "coordination": {"local": {"directory": "/srv/store", "locks_directory": "/srv/locks"}},
        "secrets": dict.fromkeys(names, "/srv/secret"),
        **sections,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def problem(directory: Path, **sections: Any) -> str:
    with pytest.raises(ConfigurationError) as raised:
        load_configuration(write(directory, **sections))
    return str(raised.value)


def test_a_schedule_and_a_retention_mean_what_they_say() -> None:
    section = msgspec.convert(
        {
            "schedule": {"at": ["03:00", "15:30"], "weekdays": ["sun"]},
            "retention": {"window_days": 2, "count": 3},
            "codec": "gzip",
        },
        BackupSection,
    )
    settings = tender_settings(section, "orders-1", instances=3)
    assert settings.primary_waits_s > 0
    assert tender_settings(section, "orders-1", instances=1).primary_waits_s == 0
    assert settings.policy == Policy(window_s=172800, count=3)
    assert settings.take.codec.suffix == ".gz"
    schedule = schedule_of(section.schedule)
    assert schedule is not None
    monday = datetime.datetime(2025, 11, 24, 1, tzinfo=datetime.UTC)
    assert schedule.last_due(monday) == datetime.datetime(2025, 11, 23, 15, 30, tzinfo=datetime.UTC)


def test_incremental_backups_are_asked_for_by_the_schedule_or_allowed_by_hand() -> None:
    section = msgspec.convert({"schedule": {"at": ["03:00"], "full_every": 7}}, BackupSection)
    assert section.needs_summaries
    assert tender_settings(section, "orders-1", instances=3).full_every == 7
    assert msgspec.convert({"incremental": True}, BackupSection).needs_summaries
    full = msgspec.convert({"schedule": {"at": ["03:00"]}}, BackupSection)
    assert not full.needs_summaries
    assert tender_settings(full, "orders-1", instances=3).full_every == 1
    for value in (0, 101):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"schedule": {"at": ["03:00"], "full_every": value}}, BackupSection)


@pytest.mark.parametrize("at", [[], ["3:00"], ["24:00"], ["03:00:00"], ["noon"]])
def test_a_schedule_without_proper_times_is_refused(tmp_path: Path, at: list[str]) -> None:
    text = problem(tmp_path, archive={"directory": "/srv/archive", "backup": {"schedule": {"at": at}}})
    assert "archive.backup.schedule.at: times of day in UTC, like ['03:00']" in text


def test_zstd_is_no_codec_of_a_backup(tmp_path: Path) -> None:
    assert "codec" in problem(tmp_path, archive={"directory": "/srv/archive", "backup": {"codec": "zstd"}})


def test_a_recovery_names_its_source_and_never_writes_to_it(tmp_path: Path) -> None:
    source = {"directory": "/srv/archive", "server_name": "old"}
    assert "server_name: is missing" in problem(
        tmp_path, bootstrap={"recovery": {"archive": {"directory": "/srv/archive"}}}
    )
    text = problem(tmp_path, archive=source, bootstrap={"recovery": {"archive": source}})
    assert "is the source's archive, which the new cluster must not write to" in text
    target = {"time": "2025-11-28 21:05:00+00", "lsn": "0/1"}
    assert "at most one" in problem(tmp_path, bootstrap={"recovery": {"archive": source, "target": target}})
    own = {"directory": "/srv/archive", "server_name": "new"}
    loaded = load_configuration(write(tmp_path, archive=own, bootstrap={"recovery": {"archive": source}}))
    assert loaded.bootstrap.recovery is not None
    assert loaded.bootstrap.recovery.archive.server_name == "old"
