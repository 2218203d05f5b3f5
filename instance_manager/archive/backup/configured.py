"""From the section `archive.backup` of a configuration to what the modules here want."""

from __future__ import annotations

import datetime

from instance_manager.archive.backup.copying import TakeSettings
from instance_manager.archive.backup.requests import Schedule
from instance_manager.archive.backup.retention import Policy
from instance_manager.archive.backup.tender import PRIMARY_WAITS_S, TenderSettings
from instance_manager.archive.codecs import Codec
from instance_manager.config_sections import BackupScheduleSection, BackupSection

_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def policy_of(section: BackupSection) -> Policy:
    days = section.retention.window_days
    return Policy(window_s=None if days is None else days * 86400, count=section.retention.count)


def schedule_of(section: BackupScheduleSection | None) -> Schedule | None:
    """ValueError: not times of day; the configuration was checked for that."""
    if section is None:
        return None
    return Schedule(
        tuple(datetime.time.fromisoformat(text) for text in section.at),
        frozenset(_WEEKDAYS.index(day) for day in section.weekdays),
    )


def tender_settings(section: BackupSection, instance: str, *, instances: int) -> TenderSettings:
    """`instances`: of the cluster; where there is no standby a primary waits for none."""
    return TenderSettings(
        instance=instance,
        take=TakeSettings(
            codec=Codec(section.codec),
            parallel=section.parallel,
            rate_limit_bytes_per_s=section.rate_limit_bytes_per_s,
            verify_checksums=section.verify_checksums,
        ),
        schedule=schedule_of(section.schedule),
        full_every=1 if section.schedule is None else section.schedule.full_every,
        policy=policy_of(section),
        primary_waits_s=PRIMARY_WAITS_S if instances > 1 else 0.0,
    )
